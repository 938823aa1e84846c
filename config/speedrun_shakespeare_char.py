# nanoGPT's CPU recipe for a sixteenth of its FLOPs: 279,680 parameters with 65 characters
# The aim is that recipe's loss on Shakespeare, 1.886. The loss is that of all of val, in windows of
# 64 characters as in preset_shakespeare_char_cpu.py. Seeds 1 to 5 give 1.825, 1.832, 1.829, 1.820
# and 1.861 (two threads, bfloat16). Iterations and batch size were chosen with seeds 1 and 2:
# python train.py config/speedrun_shakespeare_char.py --seed=1
out_dir = 'out-speedrun-shakespeare-char'
overwrite = True  # each run replaces the one before
device = 'cpu'
dtype = 'auto'  # bfloat16 where the CPU has units for it, otherwise float32
compile = False  # compiling would take longer than the run
dataset = 'shakespeare_char'
eval_interval = 130  # before the first and after the last iteration
eval_iters = 10  # 320 windows; --init_from=resume --eval_only=True reads all of val
sample_interval = 0
log_interval = 10
gradient_log_interval = 0

arch_preset = 'modern'
normalization = 'layernorm'  # one kernel on a CPU; rmsnorm is several
logit_softcap = 0.0  # off, since it changes nothing here and takes time
n_layer = 2  # 4 layers learn less for the same FLOPs
n_head = 4
n_embd = 128
d_ff = 256
block_size = 64
rope_theta = 300.0  # wavelengths for 64 positions
token_shift = True
batch_size = 32
gradient_accumulation_steps = 1

optimizer = 'normuon'
muon_learning_rate = 0.02
muon_momentum = 0.9  # the run is too short for 0.95
learning_rate = 0.011  # embeddings, head, norms
beta1 = 0.8
beta2 = 0.95
weight_decay = 0.0
grad_clip = 0.0
max_iters = 130
lr_schedule = 'wsd'
warmup_iters = 0
cooldown_frac = 0.85
min_lr = 5.5e-4
