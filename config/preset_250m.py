# GPT of 250M: 253,920,256 parameters (nanoGPT's mix, tied)
out_dir = 'out-250m'
dataset = 'openwebtext'  # --dataset=pystdlib: for a first try, without a download

# nanoGPT's mix. --arch_preset=llama swaps the parts and unties the embeddings; with
# --weight_tying=True as well, the size stays about the same.
arch_preset = 'custom'
n_layer = 16
n_head = 16
n_embd = 1024
block_size = 1024
vocab_size = 50304  # GPT-2's 50257 rounded up to a multiple of 64; the same for any data set

# 12 sequences x 1024 tokens x 40 = 491,520 tokens per iteration
batch_size = 12
gradient_accumulation_steps = 5 * 8
max_iters = 10400  # 20 tokens per parameter, https://arxiv.org/abs/2203.15556
warmup_iters = 700
learning_rate = 4e-4  # between GPT-3's 6e-4 at 125M and 3e-4 at 350M
min_lr = 4e-5

eval_interval = 500
eval_iters = 100
log_interval = 10
