# nanoGPT's baby GPT on Shakespeare, for a GPU: 10,745,088 parameters with 65 characters
out_dir = 'out-shakespeare-char'
eval_interval = 250  # often, because it will overfit
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # for the same reason, only the best is worth keeping
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # characters

arch_preset = 'custom'  # nanoGPT's mix: exact GELU, no biases
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small networks can take more
max_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # closer to 1 than usual, because there are few tokens per iteration
warmup_iters = 100
