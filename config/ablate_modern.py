# GPT-2's, LLaMA's and modern's parts with AdamW and with Muon, each for 90 seconds on a core: python compare.py config/ablate_modern.py --jobs=2
out_dir = 'out-ablate-modern'
_adamw = dict(optimizer='adamw', learning_rate=2e-3, min_lr=1e-4)  # best of 1e-3, 2e-3, 4e-3, 8e-3 (for modern of the last three), with seed 1337
_muon = dict(optimizer='muon', learning_rate=0.012, min_lr=6e-4, muon_learning_rate=0.01)  # best of 4e-3, 0.012 and 0.01, 0.02
cells = {  # iterations that take the same time on one core, compiled
    'gpt2, adamw': dict(arch_preset='gpt2', **_adamw, max_iters=666, lr_decay_iters=666),
    'gpt2, muon': dict(arch_preset='gpt2', **_muon, max_iters=576, lr_decay_iters=576),
    'llama, adamw': dict(arch_preset='llama', **_adamw, max_iters=762, lr_decay_iters=762),
    'llama, muon': dict(arch_preset='llama', **_muon, max_iters=630, lr_decay_iters=630),
    'modern, adamw': dict(arch_preset='modern', **_adamw, max_iters=581, lr_decay_iters=581),
    'modern, muon': dict(arch_preset='modern', **_muon, max_iters=506, lr_decay_iters=506),
}
seed = 1, 2, 3

# small enough for two CPU cores: 18 runs in 20 minutes
dataset = 'pystdlib_bpe'  # needs pip install tokenizers
n_layer = 4
n_head = 3
n_embd = 192
block_size = 128
compile = True  # or the parts of many small operations would look slower than they are

# 16 sequences x 128 tokens x 1 = 2,048 tokens an iteration
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
