# GPT of 350M: 354,599,936 parameters (nanoGPT's mix, tied)
out_dir = 'out-350m'
dataset = 'pystdlib'  # needs no download, for a first try; for a real run dataset = 'openwebtext'

arch_preset = 'custom'  # nanoGPT's mix; --arch_preset=llama swaps the parts (and unties; --weight_tying=True keeps it about this size)
n_layer = 24
n_head = 16
n_embd = 1024
block_size = 1024
vocab_size = 50304  # GPT-2's 50257 up to a multiple of 64; fixed, so that the size is the same on any data set

# 12 sequences x 1024 tokens x 40 = 491,520 tokens an iteration
batch_size = 12
gradient_accumulation_steps = 5 * 8
# activation_checkpointing = True  # if it does not fit
max_iters = 14500  # 20 tokens a parameter, https://arxiv.org/abs/2203.15556
lr_decay_iters = 14500
warmup_iters = 700
learning_rate = 3e-4  # GPT-3's for 350M
min_lr = 3e-5

eval_interval = 500
eval_iters = 100
log_interval = 10
