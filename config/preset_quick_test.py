# The first minute, on a laptop's CPU: 853,056 parameters, bytes of the Python standard library
out_dir = 'out-quick-test'
overwrite = True  # each run replaces the one before
dataset = 'pystdlib'  # read from the installed Python, without a download
device = 'auto'
dtype = 'auto'  # bfloat16 where the hardware has units for it
compile = False  # compiling would take longer than the run

arch_preset = 'llama'
qk_norm = True  # LLaMA with qk_norm is Qwen3's architecture, which --export can write
zero_init_residual = True
n_layer = 3
n_head = 4
n_embd = 128
block_size = 128

# 16 sequences x 128 tokens x 1 = 2,048 tokens per iteration
batch_size = 16
gradient_accumulation_steps = 1
optimizer = 'muon'  # Muon, RoPE and qk_norm gained the most in docs/speedruns.md
muon_learning_rate = 0.014
muon_momentum = 0.9  # the run is too short for 0.95
learning_rate = 0.012  # embeddings, head, norms
beta1 = 0.8
weight_decay = 0.0
max_iters = 600
lr_schedule = 'wsd'
warmup_iters = 0
cooldown_frac = 0.85
min_lr = 0.0

eval_interval = 150
eval_iters = 20
log_interval = 20
