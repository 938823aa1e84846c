# A run of 10 to 20 seconds on two CPU cores, to judge changes by: 853,056 parameters
# python compare.py --try="--token_shift=True" config/judge_quick.py
out_dir = 'out-judge-quick'
dataset = 'pystdlib'
compile = False

# the parts of the quick start. Half its rates, and a warmup, make runs of one seed differ less: a
# change of rounding moves the loss by 0.0007 bits per byte (standard deviation)
arch_preset = 'llama'
qk_norm = True
zero_init_residual = True
n_layer = 3
n_head = 4
n_embd = 128
block_size = 128

# 16 sequences x 128 tokens x 1 = 2,048 tokens per iteration
batch_size = 16
gradient_accumulation_steps = 1
optimizer = 'muon'
muon_learning_rate = 0.008
muon_momentum = 0.9
learning_rate = 0.006
beta1 = 0.8
weight_decay = 0.0
max_iters = 80
lr_schedule = 'wsd'
warmup_iters = 10
cooldown_frac = 0.85
min_lr = 0.0

eval_interval = 40
eval_iters = 20  # 320 windows
log_interval = 10
gradient_log_interval = 0
sample_interval = 0
