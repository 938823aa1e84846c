# To the loss of nanoGPT's CPU recipe, 1.886 on Shakespeare's characters, for a seventeenth of its FLOPs: 279,552 parameters with the data set's 65 characters
# The loss is that of all of val, in windows of 64 characters as preset_shakespeare_char_cpu.py has it. Tuned with seed 1337, which comes to 1.863; with seeds
# 1 to 5 it is 1.827, 1.852, 1.854, 1.837, 1.873 (two threads, bfloat16): python train.py config/speedrun_shakespeare_char.py --seed=1
out_dir = 'out-speedrun-shakespeare-char'
overwrite = True  # to be run again and again: each replaces the one before
device = 'cpu'
dtype = 'auto'  # bfloat16 where the CPU has units for it, else float32
compile = False  # compiling would take longer than the run
dataset = 'shakespeare_char'
eval_interval = 250  # before and after
eval_iters = 109  # all of val
sample_interval = 0
log_interval = 10
gradient_log_interval = 0

arch_preset = 'modern'
normalization = 'layernorm'  # one kernel on a CPU, where rmsnorm is several
logit_softcap = 0.0  # changes nothing here, and takes time
n_layer = 2  # 4 get less far for the same FLOPs
n_head = 4
n_embd = 128
d_ff = 256
block_size = 64
rope_theta = 300.0  # wavelengths for 64 positions
batch_size = 16  # larger ones need more tokens
gradient_accumulation_steps = 1

optimizer = 'muon'
muon_learning_rate = 0.014
muon_momentum = 0.9  # a run is too short for 0.95
learning_rate = 8e-3  # embeddings, head, norms
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
grad_clip = 0.0
max_iters = 250
lr_schedule = 'wsd'
warmup_iters = 0
lr_decay_iters = 250
cooldown_frac = 0.85
min_lr = 4e-4
