# Sixteen changes to one recipe, on Shakespeare; docs/compare.md checks forecasts with them:
# python compare.py config/ablate_shakespeare.py
out_dir = 'out-ablate-shakespeare'
cells = {
    'base': dict(),
    # parts of the model
    'rmsnorm': dict(normalization='rmsnorm'),
    'rope': dict(position_encoding='rope'),
    'no positions': dict(position_encoding='none'),
    'swiglu': dict(ffn_type='swiglu', activation='silu', d_ff=171),
    'relu_squared': dict(activation='relu_squared'),
    'post-norm': dict(norm_position='post'),
    'qk_norm': dict(qk_norm=True),
    'bias': dict(bias=True),
    'untied': dict(weight_tying=False),
    'zero init': dict(zero_init_residual=True),
    'token shift': dict(token_shift=True),
    # training
    'dropout': dict(dropout=0.1),
    'learning rate / 2': dict(learning_rate=1.5e-3),
    'learning rate x 2': dict(learning_rate=6e-3),
    'beta2 0.95': dict(beta2=0.95),
    'muon': dict(optimizer='muon'),
}
seed = 1, 2, 3

# small enough for one CPU core: 51 runs take a quarter of an hour
dataset = 'shakespeare_char'
n_layer = 3
n_head = 4
n_embd = 64
block_size = 64
compile = False

# 12 sequences x 64 tokens x 1 = 768 tokens per iteration
batch_size = 12
gradient_accumulation_steps = 1
learning_rate = 3e-3
min_lr = 3e-4
beta2 = 0.99
warmup_iters = 40
max_iters = 400

eval_interval = 200
eval_iters = 60  # 720 windows
log_interval = 5
gradient_log_interval = 0
sample_interval = 0
