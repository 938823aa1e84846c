# nanoGPT's GPT-2 run on OpenWebText: 124,373,760 parameters (vocabulary padded to 50,304)
# torchrun --standalone --nproc_per_node=8 train.py config/preset_gpt2_owt.py
out_dir = 'out-gpt2-owt'
wandb_log = False  # True in nanoGPT's file
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'
dataset = 'openwebtext'

# nanoGPT's mix: exact GELU, no biases. Sizes and learning rates are train.py's defaults: 12 layers,
# 12 heads, width 768, learning rate from 6e-4 to 6e-5.
arch_preset = 'custom'

# 12 sequences x 1024 tokens x 40 = 491,520 tokens per iteration
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000  # 295 billion tokens
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
