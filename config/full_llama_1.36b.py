# LLaMA 1.36B: 1,357,860,096 parameters (untied, as LLaMA is)
out_dir = 'out-llama-1.36b'
# prepared with LLaMA's tokenizer, whose ids fit 32000. Data sets with GPT-2's 50257 ids, such as
# fineweb10B, need --vocab_size=50304, which makes it 1,442,204,928 parameters.
dataset = 'slimpajama_627b'  # --dataset=pystdlib: for a first try, without a download

arch_preset = 'llama'
n_layer = 18
n_head = 18
n_embd = 2304
d_ff = 6656  # wider than 8/3 n_embd = 6144
block_size = 2048
vocab_size = 32000  # LLaMA's; the same for any data set

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
