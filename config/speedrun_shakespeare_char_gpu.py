# nanoGPT's baby GPT with arch_preset=modern and Muon: 10,672,512 parameters with 65 characters
# nanoGPT's best val loss on Shakespeare in 5000 iterations is 1.4697. This config has 1.4539 after
# 500, with seed 1337, in a single run, which took an hour on one CPU core. It has not run on a GPU
# yet, so its time there is not known.
out_dir = 'out-speedrun-shakespeare-char-gpu'
overwrite = True  # each run replaces the one before
dataset = 'shakespeare_char'
always_save_checkpoint = False  # it will overfit, so only the best is worth keeping
eval_interval = 100
eval_iters = 7  # all of val
log_interval = 10
compile = False  # compiling takes longer than the run

arch_preset = 'modern'
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256  # characters
dropout = 0.2

# 64 sequences x 256 tokens x 1 = 16,384 tokens per iteration
batch_size = 64
gradient_accumulation_steps = 1
optimizer = 'muon'
muon_learning_rate = 0.02
learning_rate = 4e-3  # embeddings, head, norms
beta2 = 0.99
weight_decay = 0.1
lr_schedule = 'wsd'
warmup_iters = 0
max_iters = 500
cooldown_frac = 0.7
min_lr = 0.0
