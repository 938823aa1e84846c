# nanoGPT's GPT-2 run on OpenWebText: 124,373,760 parameters with the data set's vocabulary padded to 50,304
# torchrun --standalone --nproc_per_node=8 train.py config/preset_gpt2_owt.py
out_dir = 'out-gpt2-owt'
wandb_log = False  # nanoGPT's file logs; here it is a choice of yours
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'
dataset = 'openwebtext'

arch_preset = 'custom'  # nanoGPT's mix: exact GELU, no biases; 12 layers, 12 heads, 768 and lr 6e-4 to 6e-5 are train.py's defaults

# 12 sequences x 1024 tokens x 40 = 491,520 tokens an iteration
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000  # 295 billion tokens
lr_decay_iters = 600000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
