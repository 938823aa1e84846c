# The parts of GPT-2, LLaMA and modern with AdamW and with Muon, each for 90 seconds on one core:
# python compare.py config/ablate_modern.py --jobs=2
out_dir = 'out-ablate-modern'
# Learning rates are the best of a few with seed 1337: AdamW's of 1e-3 (not tried for modern), 2e-3,
# 4e-3 and 8e-3; with Muon, learning_rate of 4e-3 and 0.012, muon_learning_rate of 0.01 and 0.02.
_adamw = dict(optimizer='adamw', learning_rate=2e-3, min_lr=1e-4)
_muon = dict(optimizer='muon', learning_rate=0.012, min_lr=6e-4, muon_learning_rate=0.01)
cells = {  # as many iterations as take the same time on one core, compiled
    'gpt2, adamw': dict(arch_preset='gpt2', **_adamw, max_iters=666),
    'gpt2, muon': dict(arch_preset='gpt2', **_muon, max_iters=576),
    'llama, adamw': dict(arch_preset='llama', **_adamw, max_iters=762),
    'llama, muon': dict(arch_preset='llama', **_muon, max_iters=630),
    'modern, adamw': dict(arch_preset='modern', **_adamw, max_iters=581),
    'modern, muon': dict(arch_preset='modern', **_muon, max_iters=506),
}
seed = 1, 2, 3

# small enough for two CPU cores: 18 runs take 20 minutes
dataset = 'pystdlib_bpe'  # needs pip install tokenizers
n_layer = 4
n_head = 3
n_embd = 192
block_size = 128
compile = True  # without it, parts made of many small operations would look too slow

# 16 sequences x 128 tokens x 1 = 2,048 tokens per iteration
batch_size = 16
gradient_accumulation_steps = 1
weight_decay = 0.0
lr_schedule = 'wsd'
cooldown_frac = 0.7
warmup_iters = 20

eval_interval = 150
eval_iters = 40  # 640 windows
log_interval = 20
gradient_log_interval = 0
sample_interval = 0
