# Every choice there is, to copy and change: 9,541,248 parameters as it stands (a small LLaMA-like mix, tied; bytes)
# python train.py config/full_custom.py; what is deleted here falls back to arch_preset (the parts) or to train.py's default.

# --- the model: sizes
n_layer = 6  # blocks; deeper is slower a parameter, wider is hungrier for data
n_head = 6  # query heads; must divide n_embd. 64 a head is usual
n_kv_head = 2  # key/value heads; must divide n_head. n_head or None: ordinary attention, 1: multi-query, between: grouped
n_embd = 384  # width; a multiple of 64 runs fastest
d_ff = 1024  # feed-forward width; None: 4 n_embd, or for swiglu 8/3 n_embd rounded up to a multiple of 256
block_size = 512  # context length in tokens; attention's cost grows with its square
vocab_size = 256  # at least the data set's ids; None: the data set's, over 1024 padded up to a multiple of 64

# --- the model: parts. Each wins over arch_preset, which fills those that are None or not here.
arch_preset = 'custom'  # gpt2 | llama | team (llama) | hybrid (gpt2's parts with rope) | modern (the speedruns') | custom (nanoGPT's mix)
normalization = 'rmsnorm'  # layernorm | layernorm_nobias (whatever bias says) | rmsnorm
norm_position = 'pre'  # pre (GPT-2, LLaMA) | post (GPT-1; needs a longer warmup)
position_encoding = 'rope'  # learned_absolute | rope | none
attention_backend = 'sdpa'  # sdpa (the fastest kernel torch has) | manual (the definition) | chunked (less memory than manual)
ffn_type = 'swiglu'  # standard (two matrices) | swiglu (three; the gate goes through activation)
activation = 'silu'  # gelu (exact) | gelu_tanh (GPT-2's) | silu | relu | leaky_relu | relu_squared
bias = False  # True | False: biases in Linears and layernorm
weight_tying = True  # True | False: token embeddings and head share one matrix
qk_norm = True  # True | False: normalise queries and keys a head, which steadies high learning rates
zero_init_residual = False  # True | False: what writes to the residual stream starts at 0, so a block starts as the identity
dropout = 0.0  # 0 to pretrain; 0.1 or 0.2 where data is little and seen many times

# --- the model: details
rope_theta = 10000.0  # base of RoPE's wavelengths; larger for long contexts (LLaMA 3: 500000)
norm_eps = 1e-5  # added to the variance in every norm
logit_softcap = 0.0  # e.g. 30.0 (Gemma 2): logits = cap * tanh(logits / cap); 0: off
attention_chunk_size = 256  # queries at a time, with attention_backend = 'chunked'
activation_checkpointing = False  # True: much less memory for activations, a third more compute

# --- data and batch: 8 sequences x 512 tokens x 8 = 32,768 tokens an iteration
dataset = 'pystdlib'  # a folder in data/ that has a prepare.py or train.bin and val.bin; pystdlib needs no download
doc_mask = False  # True: attention stays inside a document; for short documents, at some speed
batch_size = 8  # sequences a micro-batch: as many as fit
gradient_accumulation_steps = 8  # micro-batches an iteration over all processes together: a multiple of their number

# --- optimizer
optimizer = 'adamw'  # adamw | muon (for the matrices in the blocks; AdamW for embeddings, head, norms, biases)
muon_learning_rate = 0.02  # Muon's highest: the spectral norm of a step, times sqrt(rows / columns) where there are more rows
muon_momentum = 0.95
learning_rate = 1e-3  # AdamW's highest; 6e-4 at 124M, 3e-4 at 350M, 2e-4 at 1.3B
weight_decay = 1e-1  # on matrices and embeddings
beta1 = 0.9
beta2 = 0.95  # 0.99 where an iteration has few tokens
grad_clip = 1.0  # 0: do not clip

# --- learning rate schedule
max_iters = 2000
decay_lr = True  # False: learning_rate throughout
lr_schedule = 'cosine'  # cosine | linear | wsd (constant, then linear at the end) | sgdr (cosine with restarts) | constant
warmup_iters = 100
lr_decay_iters = 2000  # usually max_iters
min_lr = 1e-4  # usually learning_rate / 10
restart_iters = 500  # sgdr: iterations of the first cycle
restart_mult = 2  # sgdr: each cycle is this many times as long as the one before
cooldown_frac = 0.2  # wsd: share of lr_decay_iters that decays

# --- evaluation, logging, checkpoints
out_dir = 'out-custom'
eval_interval = 250  # iterations
eval_iters = 50  # batches of each split
eval_only = False  # True: evaluate once and leave; on all of val, unless eval_iters is given with it
log_interval = 10  # iterations
gradient_log_interval = 10  # iterations between gradient statistics in the run log: norm a layer, mean, std; 0: only the global norm
sample_interval = 1  # evaluations between short text samples; 0: none
always_save_checkpoint = True  # False: only when val loss is the lowest so far
save_interval = 0  # iterations between checkpoints besides; 0: none
patience = 0  # stop after this many evaluations without a lower val loss; 0: never
init_from = 'scratch'  # scratch | resume | auto (resume if there is something to resume) | to fine-tune: another run's out_dir, a Hugging Face folder or id
overwrite = False  # True: a new run may replace the checkpoints of an earlier one in out_dir
wandb_log = False  # True | False
wandb_project = 'plaingpt'
wandb_run_name = 'custom'
wandb_artifacts = False  # True, with wandb_log: checkpoints too, as versions of one artifact
tensorboard_log = False  # True: TensorBoard's event files in out_dir as well

# --- system
seed = 1337  # of initialisation, data order and dropout
device = 'auto'  # auto | cuda | cuda:1 | mps | cpu
dtype = 'auto'  # auto | bfloat16 | float16 | float32: of the matmuls; weights stay float32
compile = 'auto'  # 'auto' | True | False
backend = 'auto'  # auto | nccl | gloo: of torch.distributed
use_zero1 = False  # True, under torchrun: moments divided among processes (ZeRO-1)
use_fsdp = False  # True, under torchrun: weights, gradients and moments divided among processes (FSDP)
fsdp_reshard_after_forward = True  # False: faster, more memory
sharded_checkpoint = False  # True, under torchrun: a folder ckpt_sharded, to which each process writes its part, instead of ckpt.pt
fsdp_min_num_params = 0  # smaller blocks are gathered together with embeddings and head
peak_tflops = 0.0  # the device's dense peak, for MFU; 0: known or measured
