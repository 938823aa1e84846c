# The first minute, on a laptop's CPU: 820,352 parameters, bytes of the Python standard library
out_dir = 'out-quick-test'
overwrite = True  # a run of a minute, to be run again and again: each replaces the one before
dataset = 'pystdlib'  # read from this Python, nothing to download
device = 'auto'
dtype = 'auto'  # bfloat16 where the hardware has units for it
compile = False  # compiling would take longer than the run

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
normalization = 'rmsnorm'  # these three learn faster than GPT-2's parts
position_encoding = 'rope'
activation = 'relu_squared'

# 8 sequences x 128 tokens x 1 = 1,024 tokens an iteration
batch_size = 8
gradient_accumulation_steps = 1
max_iters = 800
lr_decay_iters = 800
warmup_iters = 50
learning_rate = 2e-3
min_lr = 1e-4
beta2 = 0.99  # few tokens an iteration

eval_interval = 200
eval_iters = 20
log_interval = 20
