# Which choices carry over to another size? Ten changes to the recipe of the quick start, to be run
# at several sizes and ranked at each of them:
# python compare.py config/ablate_choices.py --n_layer=2 --n_embd=80 --out_dir=out-choices-0.2M
# python compare.py config/ablate_choices.py --out_dir=out-choices-0.8M
# python compare.py config/ablate_choices.py --n_layer=4 --n_embd=240 --out_dir=out-choices-3M
out_dir = 'out-ablate-choices'
cells = {
    'recipe': dict(),
    # parts of the model
    'layernorm': dict(normalization='layernorm'),
    'learned positions': dict(position_encoding='learned_absolute'),
    'ungated, relu_squared': dict(ffn_type='standard', activation='relu_squared'),
    'post-norm': dict(norm_position='post'),
    'tied': dict(weight_tying=True),
    'token_shift': dict(token_shift=True),
    'no qk_norm': dict(qk_norm=False),
    # the start and the course of training
    'no zero_init_residual': dict(zero_init_residual=False),
    'adamw': dict(optimizer='adamw', learning_rate=4e-3),
    'cosine': dict(lr_schedule='cosine'),
}
seed = 1, 2, 3

# the quick start's 0.8 million parameters
dataset = 'pystdlib'
arch_preset = 'llama'
qk_norm = True
zero_init_residual = True
n_layer = 3
n_head = 4
n_embd = 128
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
max_iters = 320
lr_schedule = 'wsd'
warmup_iters = 0
cooldown_frac = 0.85
min_lr = 0.0

eval_interval = 160
eval_iters = 20  # 320 windows
log_interval = 10
gradient_log_interval = 0
sample_interval = 0
