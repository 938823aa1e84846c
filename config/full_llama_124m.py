# LLaMA 124M: 123,587,328 parameters (tied, so that the comparison with GPT-2 124M is fair)
out_dir = 'out-llama-124m'
dataset = 'openwebtext'  # --dataset=pystdlib: for a first try, without a download

arch_preset = 'llama'
# LLaMA does not tie. Untied, it has 162,220,800 parameters, and the comparison with GPT-2 would
# be one of sizes.
weight_tying = True
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304  # full_gpt2_124m.py's, not LLaMA's 32000: same data, same head

# batch and schedule as in full_gpt2_124m.py: 12 x 1024 x 40 = 491,520 tokens per iteration
batch_size = 12
gradient_accumulation_steps = 5 * 8
max_iters = 600000
warmup_iters = 2000
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
