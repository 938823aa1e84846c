# GPT of 40M: 40,151,680 parameters (nanoGPT's mix, tied; bytes)
out_dir = 'out-small'
# Needs no download. Its 12 million bytes are seen about 70 times, so watch val loss or bring more
# text.
dataset = 'pystdlib'

# nanoGPT's mix. --arch_preset=llama swaps the parts and unties the embeddings; with
# --weight_tying=True as well, the size stays about the same.
arch_preset = 'custom'
n_layer = 8
n_head = 10
n_embd = 640
block_size = 1024
vocab_size = 256  # bytes

# 16 sequences x 1024 tokens x 8 = 131,072 tokens per iteration
batch_size = 16
gradient_accumulation_steps = 8
max_iters = 6200  # 20 tokens per parameter, https://arxiv.org/abs/2203.15556
warmup_iters = 200
learning_rate = 8e-4  # between preset_tiny.py and GPT-3's 6e-4 at 125M
min_lr = 8e-5

eval_interval = 250
eval_iters = 50
log_interval = 10
