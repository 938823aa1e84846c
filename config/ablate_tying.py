# Should token embeddings and head share one matrix? python compare.py config/ablate_tying.py
out_dir = 'out-ablate-tying'
arch_preset = 'llama'
cells = {
    'untied': dict(weight_tying=False),
    'tied': dict(weight_tying=True),
}
seed = 1, 2, 3, 4

# small enough for two CPU cores: 8 runs take six minutes
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
