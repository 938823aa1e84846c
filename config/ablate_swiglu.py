# Does a gated FFN pay at equal FLOPs? python compare.py config/ablate_swiglu.py
out_dir = 'out-ablate-swiglu'
arch_preset = 'llama'
cells = {  # two matrices of 128 x 512, or three of 128 x 344, which have 0.8 % more weights
    'gelu': dict(ffn_type='standard', activation='gelu'),
    'relu squared': dict(ffn_type='standard', activation='relu_squared'),
    'swiglu': dict(ffn_type='swiglu', d_ff=344),
    'geglu': dict(ffn_type='geglu', d_ff=344),
}
seed = 1, 2, 3

# small enough for two CPU cores: 12 runs take ten minutes
dataset = 'pystdlib'
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
compile = False

# 8 sequences x 128 tokens x 1 = 1,024 tokens per iteration
batch_size = 8
gradient_accumulation_steps = 1
max_iters = 600
warmup_iters = 50
learning_rate = 2e-3
min_lr = 1e-4
beta2 = 0.99

eval_interval = 60
eval_iters = 40  # 320 windows
log_interval = 20
sample_interval = 0
