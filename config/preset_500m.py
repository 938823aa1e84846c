# GPT of 500M: 498,295,040 parameters (nanoGPT's mix, tied)
out_dir = 'out-500m'
dataset = 'openwebtext'  # --dataset=pystdlib: for a first try, without a download

# nanoGPT's mix. --arch_preset=llama swaps the parts and unties the embeddings; with
# --weight_tying=True as well, the size stays about the same.
arch_preset = 'custom'
n_layer = 22
n_head = 20
n_embd = 1280
block_size = 1024
vocab_size = 50304  # GPT-2's 50257 rounded up to a multiple of 64; the same for any data set

# 12 sequences x 1024 tokens x 40 = 491,520 tokens per iteration
batch_size = 12
gradient_accumulation_steps = 5 * 8
# if it does not fit: --activation_checkpointing=True
max_iters = 20300  # 20 tokens per parameter, https://arxiv.org/abs/2203.15556
warmup_iters = 700
learning_rate = 2.75e-4  # between GPT-3's 3e-4 at 350M and 2.5e-4 at 760M
min_lr = 2.75e-5

eval_interval = 500
eval_iters = 100
log_interval = 10
