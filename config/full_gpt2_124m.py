# GPT-2 124M: 124,373,760 parameters (tied, no biases)
# OpenAI's own 124,439,808 parameters: --bias=True --vocab_size=50257
out_dir = 'out-gpt2-124m'
dataset = 'openwebtext'  # --dataset=pystdlib: for a first try, without a download

arch_preset = 'gpt2'
bias = False  # as in nanoGPT: slightly better and faster
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304  # GPT-2's 50257 rounded up to a multiple of 64; the same for any data set

# 12 sequences x 1024 tokens x 40 = 491,520 tokens per iteration, for any number of processes that
# divides 40
batch_size = 12
gradient_accumulation_steps = 5 * 8
max_iters = 600000  # 295 billion tokens
warmup_iters = 2000
learning_rate = 6e-4  # GPT-3's for this size
min_lr = 6e-5
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
