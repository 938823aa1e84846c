# Questions about signatures, after the quick start: 853,056 parameters, bytes, ChatML spelled out
# python train.py config/preset_quick_test.py
# python train.py config/chat_pystdlib.py
# python data/chat_pystdlib/score.py out-chat-pystdlib out-quick-test
out_dir = 'out-chat-pystdlib'
overwrite = True  # each run replaces the one before
init_from = 'out-quick-test'
dataset = 'chat_pystdlib'  # made from the installed Python, without a download
device = 'auto'
dtype = 'auto'
compile = False

arch_preset = 'llama'  # the shape of the quick start
qk_norm = True
zero_init_residual = True
n_layer = 3
n_head = 4
n_embd = 128
block_size = 256  # twice the quick start's: ChatML takes 61 bytes of a question and its answer

# 8 sequences x 256 tokens x 1 = 2,048 tokens per iteration
batch_size = 8
gradient_accumulation_steps = 1
optimizer = 'muon'
muon_learning_rate = 0.01
muon_momentum = 0.9
learning_rate = 0.006
beta1 = 0.8
weight_decay = 0.0
max_iters = 1200
lr_schedule = 'wsd'
warmup_iters = 0
cooldown_frac = 0.85
min_lr = 0.0

eval_interval = 300
eval_iters = 10
log_interval = 20
