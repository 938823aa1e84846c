# Does a small model learn more from a larger one? Its teacher is the run of the quick start:
# python train.py config/preset_quick_test.py
# python compare.py config/ablate_distill.py
out_dir = 'out-ablate-distill'
_distilled = dict(teacher='out-quick-test', distill_weight=0.5)
cells = {
    'alone': dict(),
    'distilled': _distilled,
    'distilled, same time': dict(**_distilled, max_iters=272),  # a step takes 2.2 times as long
}
seed = 1, 2, 3

# the parts and rates of the quick start, with a tenth of its parameters
dataset = 'pystdlib'
arch_preset = 'llama'
qk_norm = True
zero_init_residual = True
n_layer = 2
n_head = 2
n_embd = 48
d_ff = 128
block_size = 128
compile = False

# 16 sequences x 128 tokens x 1 = 2,048 tokens per iteration
batch_size = 16
gradient_accumulation_steps = 1
optimizer = 'muon'
muon_learning_rate = 0.014
muon_momentum = 0.9
learning_rate = 0.012
beta1 = 0.8
weight_decay = 0.0
max_iters = 600
lr_schedule = 'wsd'
warmup_iters = 0
cooldown_frac = 0.85
min_lr = 0.0

eval_interval = 100
eval_iters = 40  # 640 windows
log_interval = 20
gradient_log_interval = 0
sample_interval = 0
