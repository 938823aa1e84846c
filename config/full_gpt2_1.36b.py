# GPT-2 1.36B: 1,357,565,184 parameters (tied, no biases; within 0.03 % of full_llama_1.36b.py)
out_dir = 'out-gpt2-1.36b'
dataset = 'openwebtext'  # --dataset=pystdlib: for a first try, without a download

arch_preset = 'gpt2'
bias = False
n_layer = 18  # depth, width and heads are those of full_llama_1.36b.py
n_head = 18
n_embd = 2304
d_ff = 10304  # not 4 n_embd = 9216: wider, for about as many parameters as the LLaMA
block_size = 2048
vocab_size = 50304  # the same for any data set

# 4 sequences x 2048 tokens x 64 = 524,288 tokens per iteration, for any number of processes that
# divides 64
batch_size = 4
gradient_accumulation_steps = 8 * 8
# If it does not fit: --activation_checkpointing=True. Weights, gradients and moments take 20 GiB.
max_iters = 600000  # 315 billion tokens
warmup_iters = 2000
learning_rate = 2e-4  # GPT-3's for this size
min_lr = 2e-5
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
