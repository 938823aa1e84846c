# Team 124M: 123,587,328 parameters (the 'team' preset, which is LLaMA's parts; tied as full_llama_124m.py)
out_dir = 'out-team-124m'
dataset = 'pystdlib'  # needs no download, for a first try; for a real run dataset = 'openwebtext'

arch_preset = 'team'  # change it in PRESETS in model.py, and this file follows
weight_tying = True  # LLaMA does not tie; untied it is 162,220,800, and the extra matrix would win the comparison by itself
n_layer = 12
n_head = 12
n_embd = 768
d_ff = 2048  # 8/3 n_embd: three matrices of this width cost what GPT-2's two of 4 n_embd do
block_size = 1024
vocab_size = 50304  # as full_gpt2_124m.py, not LLaMA's 32000: same data, same head; fixed, so that the size is the same on any data set

# batch and schedule as in full_gpt2_124m.py: 12 x 1024 x 40 = 491,520 tokens an iteration
batch_size = 12
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
warmup_iters = 2000
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
