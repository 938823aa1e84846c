"""
Train a GPT: on a laptop, on one GPU, or on many.

    python train.py config/preset_quick_test.py
    python train.py config/full_llama_124m.py --dataset=pystdlib --max_iters=100
    torchrun --standalone --nproc_per_node=8 train.py config/full_gpt2_124m.py  # one node
    torchrun --standalone --nproc_per_node=8 train.py config/full_llama_1.36b.py --use_fsdp=True
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py config/full_gpt2_124m.py --gradient_accumulation_steps=48

Writes out_dir/ckpt.pt (for resuming and sample.py), ckpt_best.pt (the lowest val loss),
ckpt_prev.pt (the one before, used if ckpt.pt is damaged), ckpt_000500.pt and so on (with
--keep_interval), lock (held while it runs) and run_YYYYMMDD_HHMMSS.json (everything measured). With
--init_from=auto the same command starts or resumes a run.
"""
import functools
import math
import os
import signal
import time
from dataclasses import asdict
from typing import Literal

# OpenMP reads this when torch is imported. Its threads then sleep soon while they wait for each
# other. Otherwise they spin, and a step takes 20 times as long while other programs use the cores.
os.environ.setdefault('GOMP_SPINCOUNT', '10000')
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while torch is imported
import torch

from configurator import (
    Fraction,
    Layers,
    LogitScale,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
    Size,
    configure,
)
from data.chat import end_of_turn
from data.folder import find_datasets
from data.loader import MicroBatches
from engine import distill, lora, machine, optim, report, start
from engine.attention_kernel import choose_attention
from engine.batch_size import auto_batch_size, run_within_memory
from engine.checkpoint import is_ours
from engine.checks import check_doc_mask, check_settings
from engine.common import StopSignal
from engine.compile import compile_model
from engine.console import Console
from engine.datasets import load_split, load_tokenizer, prepare_data, read_metas
from engine.evaluate import evaluate, load_eval_splits, sample_prompt, sample_text
from engine.parallel import Parallel
from engine.run_folder import RunFolder
from engine.run_log import RunLog, numbers_in
from engine.schedule import schedule
from engine.startup_report import measure_costs, say_startup, startup_report

# -------------------------------------------------------------------------------------------------
# The defaults train a GPT-2 (124M) as nanoGPT does, on OpenWebText.
# I/O
out_dir = 'out'  # checkpoints and the run log go here
eval_interval: PositiveInt = 2000  # iterations between evaluations
log_interval: PositiveInt = 1  # iterations between log lines
eval_iters: PositiveInt = 200  # batches per split per evaluation, over all processes
eval_only = False  # evaluate once and exit; on all of val unless --eval_iters is a flag too
always_save_checkpoint = True  # save at every evaluation, not only at the lowest val loss so far
save_interval: NonNegativeInt = 0  # iterations between additional checkpoints; 0: none
keep_interval: NonNegativeInt = 0  # iterations between checkpoints to keep: ckpt_ITER.pt; 0: none
async_checkpoint: Literal['auto', True, False] = 'auto'  # write while training; auto: large ones
init_from = 'scratch'  # scratch, resume, auto (resume if possible), or weights: a folder, a hub id
ckpt = ''  # with init_from=resume: the checkpoint to start from; '': the newest in out_dir
overwrite = False  # let a new run replace the checkpoints of an earlier one in out_dir
sample_interval: NonNegativeInt = 1  # evaluations between short text samples; 0: none
sample_start: str = None  # the text with which these samples begin; None: a line end
patience: NonNegativeInt = 0  # stop after this many evaluations without a lower val loss; 0: never
gradient_log_interval: NonNegativeInt = 10  # iterations between gradient statistics; 0: none
verbose = False  # print the whole start-up report, and FLOP/s, memory and gradients per log line
# logging: besides the console and the run log
wandb_log = False  # also log to Weights & Biases; offline where its server does not answer
wandb_project = 'owt'  # its project
wandb_run_name = 'gpt2'  # its run name
wandb_artifacts = False  # with wandb_log: upload every checkpoint, as versions of one artifact
tensorboard_log = False  # also write TensorBoard's event files into out_dir
# data
dataset = 'openwebtext'  # a folder in data/, a text file, or several with shares: 'a:0.7,b:0.3'
doc_mask = False  # attention stays within a document; an end-of-text token starts the next one
gradient_accumulation_steps: PositiveInt = 5 * 8  # micro-batches per iteration, over all processes
batch_size: PositiveInt | Literal['auto'] = 12  # sequences per micro-batch; auto: as many as fit
block_size: Size = 1024  # tokens per sequence, the context length
# distillation: the loss is (1 - w) cross-entropy + w T^2 KL(teacher || model)
teacher = ''  # a run, a checkpoint, a Hugging Face folder or hub id, same tokenizer; '': none
distill_weight: Share = 0.5  # w
distill_temperature: PositiveFloat = 2.0  # T, which divides both models' logits for the KL
# model: keys that are None come from arch_preset
arch_preset = 'custom'  # gpt2, llama (or team), hybrid, modern, or custom: nanoGPT's mix
n_layer: Layers = 12  # blocks
n_head: Size = 12  # query heads
n_embd: Size = 768  # width
n_kv_head: Size = None  # key/value heads, fewer for grouped-query attention; None: n_head
d_ff: Size = None  # feed-forward width; None: 4 n_embd; gated: 8/3 n_embd, rounded up
vocab_size: Size = None  # None: the data set's; above 1024 padded to a multiple of 64
dropout: Fraction = 0.0  # for pretraining 0 is good, for fine-tuning try 0.1
bias: bool = None  # biases in Linears and layernorm
normalization: str = None  # layernorm, layernorm_nobias, rmsnorm
activation: str = None  # gelu (exact), gelu_tanh, silu, relu, leaky_relu, relu_squared
position_encoding: str = None  # learned_absolute, rope, none
attention_backend: str = None  # sdpa (torch's fastest kernel), manual (by definition), chunked
norm_position: str = None  # pre, post
ffn_type: str = None  # standard; gated: swiglu (its activation is silu), geglu (gelu)
weight_tying: bool = None  # token embeddings and head share one matrix
qk_norm: bool = None  # normalize q and k per head
zero_init_residual: bool = None  # projections that write to the residual stream start at 0
token_shift: bool = None  # add the previous token's embedding, times a weight per channel
rope_theta: PositiveFloat = 10000.0  # base of RoPE's wavelengths
norm_eps: OpenFraction = 1e-5  # added to the variance in every norm
logit_softcap: LogitScale = None  # logits = cap * tanh(logits / cap); 0: off
attention_chunk_size: Size = 256  # queries per chunk for attention_backend=chunked
activation_checkpointing = False  # recompute blocks in backward: less memory, a third more compute
# lora: with init_from, train small adapters beside that model's weights, which stay as they are
lora_rank: NonNegativeInt = 0  # width of the adapters; 0: none, train all weights
lora_alpha: PositiveFloat = 16.0  # their outputs are scaled by lora_alpha / lora_rank
lora_targets = 'attn,mlp'  # Linears that get one: all in attn and mlp; or names like attn.c_attn
# optimizer
optimizer = 'adamw'  # adamw; muon, normuon: these for the blocks' matrices, AdamW for the rest
learning_rate: PositiveFloat = 6e-4  # peak learning rate
muon_learning_rate: PositiveFloat = 0.02  # Muon's peak learning rate; it follows the same schedule
muon_momentum: Fraction = 0.95  # Nesterov momentum
max_iters: PositiveInt = 600000  # optimizer steps
epochs: NonNegativeFloat = 0.0  # passes over the training data instead of max_iters; 0: off
weight_decay: NonNegativeFloat = 1e-1  # of matrices and embeddings, not of biases and norms
beta1: Fraction = 0.9  # decay of the first moment
beta2: Fraction = 0.95  # decay of the second moment
grad_clip: NonNegativeFloat = 1.0  # clip the global gradient norm to this; 0: do not clip
# schedule: of the learning rate
decay_lr = True  # False: learning_rate throughout, without warmup
lr_schedule: Literal['cosine', 'sgdr', 'wsd', 'linear', 'constant'] = 'cosine'  # after warmup
warmup_iters: NonNegativeInt = 2000  # linear warmup
lr_decay_iters: PositiveInt = None  # where the decay ends; None: at max_iters
min_lr: NonNegativeFloat = 6e-5  # final learning rate, usually learning_rate / 10
restart_iters: PositiveInt = 10000  # sgdr: iterations of the first cosine cycle
restart_mult: PositiveInt = 2  # sgdr: each cycle is this many times as long as the one before
cooldown_frac: Fraction = 0.2  # wsd: last share of lr_decay_iters, with a linear decay
# system
seed: Seed = 1337  # of initialization, data order and dropout
backend: Literal['auto', 'nccl', 'gloo'] = 'auto'  # torch.distributed's; auto: nccl on GPUs
use_zero1 = False  # under torchrun: divide AdamW's moments among processes (ZeRO-1)
use_fsdp = False  # under torchrun: divide weights, gradients and moments among processes (FSDP2)
fsdp_shard_size: NonNegativeInt = 0  # processes that divide them, such as a node's; 0: all
fsdp_reshard_after_forward = True  # False: keep gathered weights until backward, faster
sharded_checkpoint = False  # under torchrun: each process writes its part, to out_dir/ckpt_sharded
fsdp_min_num_params: NonNegativeInt = 0  # smaller blocks are gathered with the embeddings
device = 'auto'  # cuda, mps or cpu; also 'cuda:1'
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of matmuls; weights are float32
compile: Literal['auto', True, False] = 'auto'  # torch.compile; auto: on GPUs, and in long runs
peak_tflops: NonNegativeFloat = 0.0  # the device's dense peak, for MFU; 0: known or measured
# Below, settings are read as plain names. `config` holds their values for checkpoints and logs, and
# `given` says where each of them was set, if it was.
config, given = configure(__file__)
globals().update(config)
# -------------------------------------------------------------------------------------------------


def training_loss(model, X, Y):
    """
    Return the loss of one micro-batch, which training minimizes: add a loss term here. Evaluations
    report the model's own loss. Where Y is -1, there is nothing to learn. model(X, Y,
    all_logits=True) also returns the logits, at the price of another matmul with the head and of
    (B, T, V) floats.
    """
    loss_of_rows = distillation.loss_of_rows(X) if distillation else None
    return model(X, Y, loss_of_rows=loss_of_rows)[1]


# set-up: processes and device
parallel = Parallel(use_zero1, use_fsdp, fsdp_shard_size)
console = Console(speaks=parallel.master)
stop = StopSignal('finishing this iteration and saving; a signal after 2 more seconds quits at once'
                  if parallel.master else '')
if eval_only:  # the data set and batch size come from the checkpoint unless given
    config.update(start.settings_of_run(__file__, config, given))
    globals().update(config)
for note in check_settings(config, given, parallel):
    console.say(note)
device, dtype = machine.pick_device(parallel.own_device(device), dtype)
machine.prepare_to_train(device)
parallel.connect(device, backend)
config.update(device=str(device), dtype=dtype)
autocast = functools.partial(machine.autocast, device, dtype)  # for forward passes

# set-up: data
data_sets = find_datasets(dataset)
prepare_data(data_sets, vocab_size, console, parallel)
run_folder = RunFolder(out_dir, sharded_checkpoint, parallel)
run_folder.lock()
meta = read_metas(data_sets)
tokenizer = load_tokenizer(meta, console, parallel)
data_vocab = meta.get('vocab_size') if meta else 50257  # no meta.json: GPT-2's ids
check_doc_mask(config, tokenizer)

# set-up: the model's config, and the model itself unless its weights are new. `checkpoint` is that
# of a run to resume. It is None if a run is new or takes only the weights of another run.
model_config, raw_model, checkpoint = start.starting_point(
    config, given, run_folder, data_vocab, tokenizer, console)
model_config.doc_mask_token = tokenizer.eot if doc_mask else None
if 'chat_separator' in meta:  # conversations are always masked
    model_config.doc_mask_token = meta['chat_separator']
state = start.starting_state(checkpoint, out_dir, parallel)
if batch_size == 'auto':
    batch_size, gradient_accumulation_steps = auto_batch_size(
        __file__, config, given, model_config, checkpoint, console, parallel)
    config.update(batch_size=batch_size, gradient_accumulation_steps=gradient_accumulation_steps)
resuming = checkpoint is not None and not eval_only
if resuming:
    start.say_changed_data(checkpoint, config, console)

# set-up: data loaders; evaluations read the same windows in every run, whatever its seed
train_loader = load_split('train', data_sets, model_config, device, seed=seed)
splits = load_eval_splits(data_sets, model_config, config, given, tokenizer, device)

# set-up: how long to train
config.update(schedule(__file__, config, given, data_sets, train_loader, console))
max_iters, lr_decay_iters = config['max_iters'], config['lr_decay_iters']
warmup_iters = config['warmup_iters']
if resuming:
    start.say_changed_schedule(checkpoint, config, console)
was_evaluated = state.last_eval_iter == state.iter_num
if resuming and was_evaluated and state.iter_num >= max_iters:
    console.say(f"{checkpoint['path']} is at iteration {state.iter_num} of max_iters={max_iters}: "
                'nothing to do; a higher --max_iters trains on')
    parallel.leave(0)
os.makedirs(out_dir, exist_ok=True)
run_folder.lock()  # again, because the folder may have been missing at the first call

# set-up: the model. From here on, only model_config describes it: after a resume the settings above
# may differ from it, so their names are deleted, and reading one is a NameError.
has_loaded_weights = raw_model is not None
if not has_loaded_weights:
    torch.manual_seed(seed)
    raw_model = parallel.new_model(model_config)
raw_model.train()
config.update({key: value for key, value in asdict(model_config).items() if key in config})
for key in asdict(model_config):
    globals().pop(key, None)
model = parallel.wrap(raw_model, dtype, fsdp_reshard_after_forward, fsdp_min_num_params)
if not has_loaded_weights:
    parallel.new_weights(raw_model)

# set-up: optimizer
opt = parallel.shard_optimizer(optim.build(optimizer, raw_model, config, device.type))
scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')
# More tensors to save and restore, {set: {name: tensor like a parameter}}: an EMA, for example
state_tensors = {}
if checkpoint is not None:
    start.restore(checkpoint, raw_model, state_tensors, opt, scaler, config, parallel)
    if 'compile' not in given and is_ours(checkpoint):  # the same kernels give the same numbers
        config['compile'] = checkpoint['config'].get('compile', compile)
del checkpoint  # free its memory
distillation = None
if teacher and not eval_only:
    distillation = distill.Distillation(config, model_config, tokenizer, device)

# set-up: batches, and the prompt of the samples
batches = MicroBatches(train_loader, batch_size, gradient_accumulation_steps, parallel.rank,
                       parallel.world_size, state.iter_num)
if sample_interval and tokenizer:
    prompt = sample_prompt(sample_start, tokenizer, splits['val'], model_config.vocab_size)
    end = end_of_turn(meta['chat_template']) if 'chat_template' in meta else None

# set-up: what it will cost
costs = measure_costs(config, given, raw_model, training_loss, distillation, opt,
                      state_tensors, batches, splits, state.iter_num, parallel, console)
config['compile'] = costs.compiled
attention_note = choose_attention(model_config, batches.batch_size, dtype, parallel)
summary, details = startup_report(config, costs, attention_note, raw_model, opt, batches, splits,
                                  data_sets, tokenizer, state.iter_num, parallel)
say_startup(summary, details, costs, out_dir, verbose, console)

# set-up: logs
run_log = RunLog(out_dir, config, summary | details | costs.as_numbers(raw_model), state,
                 costs.tokens_per_iter, console)
run_log.open_sinks(config)
iteration_report = report.IterationReport(run_log, costs, max_iters, eval_interval, parallel,
                                          verbose)
# calls a function; if memory runs out, splits the micro-batches and calls it again
within_memory = functools.partial(run_within_memory, raw_model, batches, config, run_log, parallel)


def get_lr(it):
    """
    Return the learning rate of iteration `it`: linear warmup, then lr_schedule from learning_rate
    to min_lr, reached at lr_decay_iters or, for sgdr, at the end of each cycle.
    """
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if lr_schedule == 'constant':
        return learning_rate
    if lr_schedule == 'sgdr':  # cosine with warm restarts, https://arxiv.org/abs/1608.03983
        at, length = it - warmup_iters, restart_iters
        while at >= length:
            at, length = at - length, length * restart_mult
        ratio = at / length
    else:
        decay_start = warmup_iters
        if lr_schedule == 'wsd':
            decay_start = max(warmup_iters, (1 - cooldown_frac) * lr_decay_iters)
        ratio = (it - decay_start) / max(1, lr_decay_iters - decay_start)
        ratio = min(1.0, max(0.0, ratio))
    if lr_schedule in ('linear', 'wsd'):
        coeff = 1 - ratio
    else:
        coeff = 0.5 * (1 + math.cos(math.pi * ratio))
    return min_lr + coeff * (learning_rate - min_lr)


def is_due(interval):
    """Return whether the current iteration is a multiple of `interval`; 0: never."""
    return interval > 0 and state.iter_num % interval == 0


def forward_backward():
    """
    Compute the gradients of this iteration, averaged over processes, into p.grad. Return this
    process's mean loss as a tensor on the device.
    """
    total = torch.zeros((), device=device)
    mean_targets = batches.mean_targets(parallel) if train_loader.packed else None
    for m in range(batches.per_rank):
        X, Y = next(batches)
        # a seed per iteration and global micro-batch, so a checkpoint stores no state of the RNG
        number = m * parallel.world_size + parallel.rank
        torch.manual_seed(((seed * 1_000_003 + state.iter_num) * 1_000_003 + number) % 2 ** 63)
        parallel.sync_gradients(model, last=m == batches.per_rank - 1)
        with autocast():
            loss = training_loss(model, X, Y) / batches.per_rank
            if train_loader.packed:  # each target of an iteration has the same weight
                loss = loss * ((Y >= 0).sum() / mean_targets)
        scaler.scale(loss).backward()
        total += loss.detach()
        if batches.per_rank > 1:
            console.progress(f'micro-batch {m + 1}/{batches.per_rank}')
    return total


def evaluate_splits():
    """Return evaluate()'s result, or None if a signal came or the data cannot be read."""
    started = time.time()
    evaluated = evaluate(raw_model, splits, batches.batch_size, parallel, autocast, stop,
                         progress=console.progress)
    iteration_report.eval_seconds = time.time() - started
    return evaluated


# the first iteration with a gradient that is not finite; max_iters: none so far
first_bad = torch.tensor(max_iters, device=device)


def all_finite():
    """
    Return whether all gradients so far were finite. If not, record where the run ends; the caller
    then leaves the loop without saving. This waits for the device, so the loop calls it only before
    log lines, evaluations and checkpoints.
    """
    bad = first_bad.item()
    # fp16's loss scale starts at 2^16, and each skipped step halves it: 17 in a row are too many
    diverged = scaler.is_enabled() and scaler.get_scale() < 1
    if bad < max_iters or diverged:
        state.iter_num = min(state.iter_num, bad)
        run_log.not_finite('loss or gradient')
        return False
    return True


def report_evaluation(evaluated, best, lr):
    """Print and log an evaluation, with a text sample if one is due."""
    console.say(report.evaluation_line(state.iter_num, evaluated, best) + run_log.forecast())
    if eval_only:
        console.say(report.evaluation_lines(evaluated['val'], splits['val']))
    takes_part = parallel.master or parallel.mode == 'fsdp'  # FSDP gathers weights on all ranks
    due = sample_interval and run_log.n_evaluations % sample_interval == 0
    is_trained = state.iter_num > 0 or has_loaded_weights  # otherwise the text is noise
    sample = None
    if due and is_trained and tokenizer and takes_part:
        sample_seed = (seed * 1_000_003 + state.iter_num) % 2 ** 63
        sample = sample_text(raw_model, tokenizer, prompt, 200, sample_seed, parallel, autocast,
                             end)
        shown = sample.strip('\n')
        console.say(f"--- sample {'-' * 60}\n{shown}\n{'-' * 71}")
    run_log.add_evaluation(evaluated, splits['val'], lr, iteration_report.eval_seconds, sample)


def save_checkpoint(best, wait):
    """
    Write everything that a resume needs, from all processes. With wait=False a large checkpoint is
    copied now, and written while training goes on.
    """
    weights, about_adapters = lora.own_weights(raw_model)
    facts = asdict(state) | about_adapters | dict(
        scaler=scaler.state_dict(), model_args=asdict(raw_model.config), config=dict(config),
        tokenizer=tokenizer.spec if tokenizer else meta.get('tokenizer'),
        chat_template=meta.get('chat_template', getattr(raw_model, 'chat_template', None)),
        torch_version=str(torch.__version__))
    moments, param_groups = parallel.moments(opt)
    sets = {'model': weights, 'optimizer': moments} | state_tensors
    also = [run_folder.best] if best else []  # files with a copy of this checkpoint
    if is_due(keep_interval):
        also.append(run_folder.numbered(state.iter_num))
    run_log.write()  # before the checkpoint, so that the log never lags behind it
    when_saved = run_log.checkpoint_entry([run_folder.newest, *also], best)
    run_folder.save(sets, param_groups, facts, also, when_saved, not wait and async_checkpoint)


if config['compile']:
    config['compile'] = within_memory(lambda: compile_model(
        raw_model, training_loss, batches, costs.flex, autocast, parallel, console))
if device.type == 'cuda':
    torch.cuda.reset_peak_memory_stats()  # measure the loop only, not the set-up

# -------------------------------------------------------------------------------------------------
# the loop. It waits for a GPU only at log lines, evaluations and checkpoints. With float16 and Muon
# or ZeRO-1, the scaler also waits at every step.
first_iter = state.iter_num
loss_sum = torch.zeros((), device=device)
while True:
    lr = get_lr(state.iter_num)
    for group in opt.param_groups:
        group['lr'] = lr * group['lr_scale']
    stop_status = parallel.all_max(stop.status)  # if one process has to stop, all do
    finished = state.iter_num >= max_iters or eval_only
    log_due = iteration_report.due(state.iter_num, log_interval)
    save = bool(stop_status) or is_due(save_interval) or is_due(keep_interval)
    best = False

    evaluation_due = (is_due(eval_interval) or finished) and not stop_status
    if (evaluation_due or save) and state.iter_num > first_iter:
        t0 = time.time()
        finite = all_finite()
        state.train_seconds += time.time() - t0  # it waited for steps that were still running
        if not finite:
            break

    # evaluate; all processes take this branch together
    if evaluation_due:
        evaluated = within_memory(evaluate_splits)
        if evaluated is None:  # a process was told to stop: the next pass saves and ends the loop
            continue
        if not all(math.isfinite(values['loss']) for values in evaluated.values()):
            run_log.not_finite('train or val loss')
            break
        # without val's lists, by_position and window_losses
        losses = {split: numbers_in(values) for split, values in evaluated.items()}
        best = state.add_evaluation(losses, count=not eval_only)
        report_evaluation(evaluated, best, lr)
        save = save or best or always_save_checkpoint
        if patience and state.stale_evals >= patience and not eval_only:
            console.say(f'stopping early: val loss has not fallen for {state.stale_evals} '
                        f'evaluations, best {state.best_val_loss:.4f}')
            finished = True

    # save, and stop if there is nothing more to do
    if run_folder.poll():  # a thread could not write its checkpoint
        stop.status = stop.status or 2  # the next pass stops all processes, and raises the error
    # before the first step there is nothing new, except loaded weights that are best or final
    anything_new = state.iter_num > first_iter or (has_loaded_weights and (best or finished))
    if save and anything_new and not eval_only:
        save_checkpoint(best, wait=finished or bool(stop_status))
    if finished or stop_status:
        break

    # forward and backward, in micro-batches
    t0 = time.time()
    loss_sum += within_memory(forward_backward)
    iteration_report.n_since_log += 1

    # clip and step; gradients are averages over all processes, so all do the same
    scaler.unscale_(opt)
    if is_due(gradient_log_interval):
        # on the device until the next log line reads them
        iteration_report.gradients = report.GradientStatistics(raw_model, state.iter_num, parallel)
    grad_norm = parallel.global_norm([p.grad for p in raw_model.parameters() if p.grad is not None])
    if grad_clip:
        torch.nn.utils.clip_grads_with_norm_(raw_model.parameters(), grad_clip, grad_norm)
    if not scaler.is_enabled():  # fp16's scaler skips such steps, which are normal there
        first_bad = first_bad.where(grad_norm.isfinite(), first_bad.clamp(max=state.iter_num))
    if log_due:  # read before the update, which is not made if the gradients are not finite
        if not all_finite():
            break
        n_losses = iteration_report.n_since_log * parallel.world_size
        mean_loss = parallel.all_reduce(loss_sum).item() / n_losses
        loss_sum.zero_()
    scaler.step(opt)
    scaler.update()
    opt.zero_grad(set_to_none=True)
    if state.iter_num + 1 < max_iters:
        stop.try_reading(batches.fetch)  # if this fails, all processes stop and save

    # log
    state.train_seconds += time.time() - t0  # a GPU may still be computing this update
    if log_due:
        more = {}  # {name: number}: also logged and printed; compute it on all processes
        iteration_report.add(mean_loss, lr, float(grad_norm), more)
    iteration_report.show_progress()
    state.iter_num += 1
    if state.iter_num == first_iter + 1:
        stop.listen()  # before the first step there was nothing to save

run_folder.finish()
batches.close()
complete = state.iter_num >= max_iters or eval_only
run_log.close(stop_status, complete, run_folder.best, chat='chat_template' in meta)
parallel.leave(stop_status or int(run_log.outcome == 'not finite'))
