# GPT-2's size with arch_preset=modern and Muon: 162,223,872 parameters (untied; GPT-2 124M's FLOPs)
# The aim is the val loss of GPT-2 124M after 10 billion tokens of FineWeb, 3.28 with llm.c
# (https://github.com/karpathy/llm.c/discussions/481), from a third of the tokens, and in a third of
# the time if a step takes no longer. It has not run on a GPU yet, only small: docs/speedruns.md
out_dir = 'out-speedrun-124m'
dataset = 'fineweb10B'  # python data/fineweb10B/prepare.py --shards=34

arch_preset = 'modern'
n_layer = 12
n_head = 6  # as in modded-nanogpt
n_embd = 768
block_size = 1024
vocab_size = 50304

# 30 sequences x 1024 tokens x 16 = 491,520 tokens per iteration (nanoGPT's), for any number of
# processes that divides 16
batch_size = 30
gradient_accumulation_steps = 16
max_iters = 6784  # 3 billion tokens (3.33, a third of 10)
optimizer = 'muon'
muon_learning_rate = 0.02
learning_rate = 4e-3  # embeddings, head, norms
weight_decay = 0.0
lr_schedule = 'wsd'
warmup_iters = 0  # not needed with qk_norm and zero_init_residual
cooldown_frac = 0.5
min_lr = 0.0

eval_interval = 250
eval_iters = 340  # 10 million tokens, as llm.c and modded-nanogpt evaluate
log_interval = 10
