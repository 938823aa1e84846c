# The worth of each part of modern, found by taking it out:
# python compare.py config/ablate_modern_parts.py --jobs=2
# On other text, add --dataset=pystdlib --out_dir=out-ablate-modern-parts-pystdlib
out_dir = 'out-ablate-modern-parts'
arch_preset = 'modern'
cells = {
    'modern': dict(),
    'layernorm': dict(normalization='layernorm'),
    'learned positions': dict(position_encoding='learned_absolute'),
    'gelu': dict(activation='gelu'),
    'swiglu': dict(ffn_type='swiglu', d_ff=344),  # as many FLOPs
    'no qk_norm': dict(qk_norm=False),
    'no zero_init_residual': dict(zero_init_residual=False),
    'no softcap': dict(logit_softcap=0.0),
    'tied': dict(weight_tying=True),
    'normuon': dict(optimizer='normuon'),
    'token_shift': dict(token_shift=True),
    'normuon and token_shift': dict(optimizer='normuon', token_shift=True),
}
seed = 1, 2, 3

# the shape, batch and rates of speedrun_shakespeare_char.py, with d_ff = 4 n_embd:
# 36 runs take four minutes on two CPU cores
dataset = 'shakespeare_char'
n_layer = 2
n_head = 4
n_embd = 128
block_size = 64
rope_theta = 300.0
compile = False

# 16 sequences x 64 tokens x 1 = 1,024 tokens per iteration
batch_size = 16
gradient_accumulation_steps = 1
optimizer = 'muon'
muon_learning_rate = 0.014
muon_momentum = 0.9
learning_rate = 8e-3
beta1 = 0.8
weight_decay = 0.0
grad_clip = 0.0
max_iters = 250
lr_schedule = 'wsd'
warmup_iters = 0
cooldown_frac = 0.85
min_lr = 4e-4

eval_interval = 125
eval_iters = 40  # 640 windows
log_interval = 50
gradient_log_interval = 0
sample_interval = 0
