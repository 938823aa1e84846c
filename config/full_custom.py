# All keys and choices, to copy and change: 9,541,248 parameters (LLaMA-like, tied; bytes)
# python train.py config/full_custom.py
# A key that is deleted here falls back to arch_preset (the parts) or to train.py's default.

# --- the model: sizes
n_layer = 6  # blocks; depth costs more time per parameter, width needs more data
n_head = 6  # query heads; divides n_embd, usually into heads of 64
n_kv_head = 2  # key/value heads; divides n_head. n_head or None: ordinary attention, 1: multi-query
n_embd = 384  # width; multiples of 64 are fastest
d_ff = None  # feed-forward width; None: 4 n_embd; gated: 8/3 n_embd up to a multiple of 256
block_size = 512  # context length in tokens; the cost of attention grows with its square
vocab_size = 256  # at least the data set's; None: the data set's, above 1024 a multiple of 64

# --- the model: parts; each wins over arch_preset, which fills those that are None or missing here
# gpt2 | llama | team (same as llama) | hybrid (custom with rope) | modern (for the speedruns) |
# custom (nanoGPT's)
arch_preset = 'custom'
normalization = 'rmsnorm'  # layernorm | layernorm_nobias (whatever bias says) | rmsnorm
norm_position = 'pre'  # pre (GPT-2, LLaMA) | post (GPT-1; needs a longer warmup)
position_encoding = 'rope'  # learned_absolute | rope | none
# sdpa (torch's fastest kernel) | manual (the definition) | chunked (less memory than manual)
attention_backend = 'sdpa'
ffn_type = 'swiglu'  # standard (two matrices) | swiglu | geglu (three; gated by silu or gelu)
# gelu (exact) | gelu_tanh (GPT-2's) | silu | relu | leaky_relu | relu_squared; None: the ffn_type's
# own, if it has one
activation = None
bias = False  # biases in Linears and layernorm
weight_tying = True  # token embeddings and head share one matrix
qk_norm = True  # normalise q and k per head, which steadies high learning rates
zero_init_residual = False  # output projections start at 0, so each block starts as the identity
token_shift = False  # add the previous token's embedding, times a weight per channel
dropout = 0.0  # 0 for pretraining; 0.1 or 0.2 if a small data set is seen many times

# --- the model: details
rope_theta = 10000.0  # base of RoPE's wavelengths; larger for long contexts (LLaMA 3: 500000)
norm_eps = 1e-5  # added to the variance in every norm
logit_softcap = 0.0  # e.g. 30.0 (Gemma 2): logits = cap * tanh(logits / cap); 0: off
attention_chunk_size = 256  # queries per chunk with attention_backend = 'chunked'
activation_checkpointing = False  # True: much less memory for activations, a third more compute

# --- data and batch: 8 sequences x 512 tokens x 8 = 32,768 tokens per iteration
dataset = 'pystdlib'  # a folder in data/ with prepare.py or *.bin; pystdlib needs no download
doc_mask = False  # True: attention never crosses the end of a document; slower
batch_size = 8  # sequences per micro-batch: as many as fit
gradient_accumulation_steps = 8  # micro-batches per iteration, over all processes

# --- distillation: the training loss is (1 - w) cross-entropy + w T^2 KL(teacher || model)
teacher = ''  # a run's out_dir, a checkpoint, a Hugging Face folder or id, same tokenizer; '': none
distill_weight = 0.5  # w, above 0 and at most 1
distill_temperature = 2.0  # T, which divides both models' logits for the KL

# --- optimizer
optimizer = 'adamw'  # adamw | muon | normuon (for the blocks' matrices, AdamW for the rest)
muon_learning_rate = 0.02  # Muon's peak: spectral norm of a step (x sqrt(rows / columns) if tall)
muon_momentum = 0.95
learning_rate = 1e-3  # AdamW's peak; 6e-4 at 124M, 3e-4 at 350M, 2e-4 at 1.3B
weight_decay = 1e-1  # for matrices and embeddings
beta1 = 0.9
beta2 = 0.95  # 0.99 if there are few tokens per iteration
grad_clip = 1.0  # 0: no clipping

# --- learning rate schedule
max_iters = 2000
epochs = 0.0  # e.g. 3.0: passes over the training data instead of max_iters; 0: off
decay_lr = True  # False: learning_rate throughout
# cosine | linear | wsd (constant, then linear at the end) | sgdr (cosine with restarts) | constant
lr_schedule = 'cosine'
warmup_iters = 100
lr_decay_iters = None  # where the decay ends; None: at max_iters
min_lr = 1e-4  # usually learning_rate / 10
restart_iters = 500  # sgdr: iterations of the first cycle
restart_mult = 2  # sgdr: each cycle is this many times as long as the one before
cooldown_frac = 0.2  # wsd: share of lr_decay_iters that decays

# --- evaluation, logging, checkpoints
out_dir = 'out-custom'
eval_interval = 250  # iterations between evaluations
eval_iters = 50  # batches per split per evaluation
eval_only = False  # True: evaluate once and exit; on all of val, unless eval_iters is given too
log_interval = 10  # iterations between log lines
gradient_log_interval = 10  # iterations between gradient statistics in the log; 0: only the norm
sample_interval = 1  # evaluations between short text samples; 0: none
sample_start = None  # the text that these begin with; None: a line end
verbose = False  # True: the whole start-up report; FLOP/s, memory and gradients per log line
always_save_checkpoint = True  # False: save only when val loss is the lowest so far
save_interval = 0  # iterations between additional checkpoints; 0: none
keep_interval = 0  # iterations between those that stay, as ckpt_000500.pt and so on; 0: none
async_checkpoint = 'auto'  # write a checkpoint while training goes on; auto: large ones
patience = 0  # stop after this many evaluations without a lower val loss; 0: never
# scratch | resume | auto (resume if there is a checkpoint); to fine-tune: another run's out_dir,
# or a Hugging Face folder or id
init_from = 'scratch'
lora_rank = 0  # 8: fine-tune adapters of this width alone, beside frozen weights; 0: all weights
lora_alpha = 16.0  # the adapters' outputs are scaled by lora_alpha / lora_rank
lora_targets = 'attn,mlp'  # Linears that get one; or attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj
ckpt = ''  # with init_from = 'resume': the checkpoint to start from; '': the newest in out_dir
overwrite = False  # True: a new run may replace the checkpoints of an earlier one in out_dir
wandb_log = False
wandb_project = 'plaingpt'
wandb_run_name = 'custom'
wandb_artifacts = False  # True, with wandb_log: also keep checkpoints, as versions of one artifact
tensorboard_log = False  # True: also write TensorBoard's event files to out_dir

# --- system
seed = 1337  # of initialisation, data order and dropout
device = 'auto'  # auto | cuda | cuda:1 | mps | cpu
dtype = 'auto'  # auto | bfloat16 | float16 | float32: of the matmuls; weights stay float32
compile = 'auto'  # 'auto' | True | False
backend = 'auto'  # auto | nccl | gloo: of torch.distributed
# the rest needs torchrun, apart from peak_tflops
use_zero1 = False  # True: divide the moments among the processes (ZeRO-1)
use_fsdp = False  # True: divide weights, gradients and moments among the processes (FSDP)
fsdp_shard_size = 0  # 8: divide them among every 8 processes, such as a node's; 0: among all
fsdp_reshard_after_forward = True  # False: faster, more memory
sharded_checkpoint = False  # True: each process writes its part, to out_dir/ckpt_sharded
fsdp_min_num_params = 0  # smaller blocks are gathered together with embeddings and head
peak_tflops = 0.0  # the device's dense peak, for MFU; 0: known or measured
