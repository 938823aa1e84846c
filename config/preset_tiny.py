# GPT of 11M: 11,113,344 parameters (nanoGPT's mix, tied; bytes)
out_dir = 'out-tiny'
# Needs no download. Its 12 million bytes are seen about 19 times, so watch val loss or bring more
# text.
dataset = 'pystdlib'

# nanoGPT's mix. --arch_preset=llama swaps the parts and unties the embeddings; with
# --weight_tying=True as well, the size stays about the same.
arch_preset = 'custom'
n_layer = 6
n_head = 6
n_embd = 384
block_size = 1024
vocab_size = 256  # bytes

# 8 sequences x 1024 tokens x 8 = 65,536 tokens per iteration
batch_size = 8
gradient_accumulation_steps = 8
max_iters = 3400  # 20 tokens per parameter, https://arxiv.org/abs/2203.15556
warmup_iters = 100
learning_rate = 1e-3  # small networks can take more than GPT-3's 6e-4
min_lr = 1e-4

eval_interval = 250
eval_iters = 50
log_interval = 10
