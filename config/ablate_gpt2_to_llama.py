# From GPT-2 to LLaMA one part at a time, each change on top of the one before:
# python compare.py config/ablate_gpt2_to_llama.py
out_dir = 'out-ablate-gpt2-to-llama'
_rmsnorm = dict(arch_preset='gpt2', normalization='rmsnorm')
_rope = dict(**_rmsnorm, position_encoding='rope')
cells = {
    'gpt2': dict(arch_preset='gpt2'),
    '+ rmsnorm': _rmsnorm,
    '+ rope': _rope,
    '+ swiglu': dict(**_rope, ffn_type='swiglu', d_ff=344),
    '+ no biases': dict(arch_preset='llama', d_ff=344, weight_tying=True),
    '+ untied = llama': dict(arch_preset='llama', d_ff=344),
}
seed = 1, 2, 3

# small enough for two CPU cores: 18 runs take a quarter of an hour
dataset = 'pystdlib'
n_layer = 4
n_head = 4
n_embd = 128  # the standard FFN has d_ff = 4 n_embd = 512; swiglu with 344 has as many FLOPs
block_size = 128
compile = False

# 8 sequences x 128 tokens x 1 = 1,024 tokens per iteration
batch_size = 8
gradient_accumulation_steps = 1
max_iters = 600
warmup_iters = 50
learning_rate = 2e-3
min_lr = 1e-4
beta2 = 0.99

eval_interval = 60
eval_iters = 40  # 320 windows
log_interval = 20
sample_interval = 0
