"""
Train a GPT: on a laptop, on one GPU, or on many.

    python train.py config/preset_quick_test.py
    python train.py config/full_llama_124m.py --max_iters=100 --normalization=layernorm
    torchrun --standalone --nproc_per_node=8 train.py config/full_gpt2_124m.py          # one node
    torchrun --standalone --nproc_per_node=8 train.py config/full_llama_1.36b.py --use_fsdp=True
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/full_gpt2_124m.py

Writes out_dir/ckpt.pt (what resume and sample.py read), ckpt_best.pt (lowest val loss), ckpt_prev.pt (the one before, in case), lock (while it runs)
and run_YYYYMMDD_HHMMSS.json (everything measured). With --init_from=auto the same command starts a run and goes on where it stopped.
"""
import atexit
import collections
import contextlib
import ctypes
import fcntl
import glob
import html
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from configurator import configure, fail
from data.loader import Loader, Mixture, find_datasets, find_trained_on, fingerprint, prepare_facts, read_meta
from data.tokenizer import get_tokenizer
from engine.checkpoint import file_crc32, fill, load_checkpoint, model_of, newest_checkpoint, read_facts, read_metadata, read_part, save_checked
from engine.common import first_line, optional, out_of_memory
from engine.cost import memory_estimate
from engine.huggingface import load_weights
from engine.machine import keep_freed_memory, memory, peak_flops, pick_device, release_freed_memory
from engine.report import gradient_norms, gradient_statistics
from engine.statistics import mean_and_error
from model import GPT, PRESETS, GPTConfig

# ---------------------------------------------------------------------------------------------------------------------
# The defaults train a GPT-2 (124M) as nanoGPT does, on OpenWebText.
# I/O
out_dir = 'out'  # checkpoints and the run log go here
eval_interval = 2000  # iterations between evaluations
log_interval = 1  # iterations between log lines
eval_iters = 200  # batches an evaluation reads of each split, over all processes together, the same ones every time
eval_only = False  # evaluate once and leave, on all of val unless eval_iters is given with it; a run's data and batch are its checkpoint's
always_save_checkpoint = True  # save at every evaluation, not only when val loss is the lowest so far
save_interval = 0  # iterations between checkpoints besides those at evaluations; 0: none
init_from = 'scratch'  # 'scratch', 'resume', 'auto' (resume if there is a checkpoint); to fine-tune: another run's out_dir, a Hugging Face folder or id (gpt2)
overwrite = False  # a new run may replace the checkpoints of an earlier one in out_dir
sample_interval = 1  # evaluations between short text samples; 0: none
patience = 0  # stop after this many evaluations without a lower val loss; 0: never
gradient_log_interval = 10  # iterations between gradient statistics in the run log: norm a layer, mean, std; 0: only the global norm
# logging besides the console and the run log
wandb_log = False  # also log to Weights & Biases; offline, into out_dir/wandb, where its server does not answer
wandb_project = 'owt'  # its project
wandb_run_name = 'gpt2'  # its run name
wandb_artifacts = False  # with wandb_log: keep every checkpoint there too, as versions of one artifact
tensorboard_log = False  # also write TensorBoard's event files, into out_dir
# data
dataset = 'openwebtext'  # a folder in data/ ('pystdlib' needs no download), a file of text, or several with their shares: 'a:0.7,b:0.3'
doc_mask = False  # attention stays inside a document: an end-of-text token opens the next one
gradient_accumulation_steps = 5 * 8  # micro-batches an iteration, over all processes together
batch_size: int | Literal['auto'] = 12  # sequences a micro-batch; 'auto': the most that fit, with accumulation that keeps tokens an iteration
block_size = 1024  # tokens a sequence, the context length
# model: None leaves it to arch_preset
arch_preset = 'custom'  # gpt2, llama, team (llama), hybrid, modern, or custom: nanoGPT's own mix of parts
n_layer = 12  # blocks
n_head = 12  # query heads
n_embd = 768  # width
n_kv_head: int = None  # key/value heads, fewer than n_head for grouped-query attention; None: n_head
d_ff: int = None  # feed-forward width; None: 4 n_embd, gated 8/3 n_embd rounded up to a multiple of 256
vocab_size: int = None  # None: the data set's, over 1024 padded up to a multiple of 64
dropout = 0.0  # for pretraining 0 is good, for fine-tuning try 0.1
bias: bool = None  # biases in Linears and layernorm
normalization: str = None  # layernorm, layernorm_nobias, rmsnorm
activation: str = None  # gelu (exact), gelu_tanh, silu, relu, leaky_relu, relu_squared
position_encoding: str = None  # learned_absolute, rope, none
attention_backend: str = None  # sdpa (the fastest kernel torch has), manual (the definition), chunked (less memory than manual)
norm_position: str = None  # pre, post
ffn_type: str = None  # standard, swiglu (gated; the gate goes through the activation)
weight_tying: bool = None  # token embeddings and head share one matrix
qk_norm: bool = None  # normalise queries and keys a head
zero_init_residual: bool = None  # what writes to the residual stream starts at 0
rope_theta = 10000.0  # base of RoPE's wavelengths
norm_eps = 1e-5  # added to the variance in every norm
logit_softcap: float = None  # logits = cap * tanh(logits / cap); 0: off
attention_chunk_size = 256  # queries at a time with attention_backend=chunked
activation_checkpointing = False  # keep only each block's input and recompute in backward: less memory, a third more compute
# optimizer
optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: torch.optim.Muon for the matrices in the blocks, AdamW for the rest
learning_rate = 6e-4  # AdamW's, the highest
muon_learning_rate = 0.02  # Muon's, the highest; its schedule is learning_rate's times a constant, down to that multiple of min_lr
muon_momentum = 0.95  # Nesterov's
max_iters = 600000  # optimizer steps
weight_decay = 1e-1  # on matrices and embeddings, not on biases and norms; a step takes weight_decay times the optimizer's learning rate off them
beta1 = 0.9  # AdamW's decay of the first moment
beta2 = 0.95  # of the second
grad_clip = 1.0  # clip the global gradient norm to this; 0: do not clip
# learning rate schedule
decay_lr = True  # False: learning_rate throughout, without warmup
lr_schedule: Literal['cosine', 'sgdr', 'wsd', 'linear', 'constant'] = 'cosine'  # after warmup
warmup_iters = 2000  # linear warmup
lr_decay_iters = 600000  # where the decay ends, usually max_iters
min_lr = 6e-5  # where it ends, usually learning_rate / 10
restart_iters = 10000  # sgdr: iterations of the first cosine cycle
restart_mult = 2  # sgdr: each cycle is this many times as long as the one before
cooldown_frac = 0.2  # wsd: share of lr_decay_iters, at its end, that decays linearly to min_lr
# system
seed = 1337  # of initialisation, data order and dropout
backend: Literal['auto', 'nccl', 'gloo'] = 'auto'  # torch.distributed's; auto: nccl on GPUs, gloo on CPUs
use_zero1 = False  # under torchrun: AdamW's moments divided among processes (ZeRO-1), 8 + 8/N bytes a parameter instead of 16
use_fsdp = False  # under torchrun: weights, gradients and moments divided among processes (FSDP2), 16/N bytes a parameter and a gathered block
fsdp_reshard_after_forward = True  # False: keep gathered weights until backward, and gradients whole between micro-batches; faster, more memory
sharded_checkpoint = False  # under torchrun: each process writes its part, into out_dir/ckpt_sharded; model.py --consolidate makes it one file
fsdp_min_num_params = 0  # blocks with fewer parameters are gathered together with embeddings and head, for a whole step, not one by one
device = 'auto'  # cuda, mps or cpu; also 'cuda:1'
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of the matmuls (autocast); weights and moments stay float32
compile: Literal['auto', True, False] = 'auto'  # torch.compile: on GPUs, and on CPUs for runs long enough to pay for it
peak_tflops = 0.0  # the device's dense peak, for MFU; 0: known or measured
config, given = configure(__file__)
globals().update(config)
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_line_errors():
    """For what depends on a person's files, flags and memory: a ValueError, OSError or lack of memory becomes one line and exit status 2."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        if isinstance(e, (RuntimeError, MemoryError)) and not out_of_memory(e):
            raise
        message = str(e) if isinstance(e, (ValueError, OSError)) else f'out of memory; to need less: {less_memory()[0]} ({first_line(e)[:200]})'
        if rank and (dist.is_initialized() or os.environ.get('LOCAL_RANK') == '0'):  # what rank 0 has not met; before, all processes of a node meet the same
            print(f'train.py: rank {rank}: {first_line(message)}', file=sys.stderr, flush=True)
        fail(message)


def say(text):
    if master:
        try:
            print(text, flush=True)
        except OSError:  # the terminal is gone, and the run goes on without it
            sys.stdout = open(os.devnull, 'w')


def show_progress(text):
    """A sign of life, every 10 seconds, in a long stretch without log lines."""
    global last_line
    if time.time() - last_line > 10:
        say(f'  ... {text}')
        last_line = time.time()


def duration(seconds):
    s = int(max(0, seconds))
    return f'{s // 86400}d{s // 3600 % 24:02d}h' if s >= 86400 else f'{s // 3600}h{s // 60 % 60:02d}m' if s >= 3600 else f'{s // 60}m{s % 60:02d}s'


def check_ranges():
    """ValueError for a setting that has the right type and no meaning."""
    positive = ('eval_interval log_interval eval_iters gradient_accumulation_steps batch_size block_size learning_rate muon_learning_rate max_iters '
                'lr_decay_iters restart_iters restart_mult').split()
    not_negative = ('fsdp_min_num_params save_interval sample_interval patience gradient_log_interval weight_decay grad_clip warmup_iters min_lr '
                    'peak_tflops seed').split()
    for key in positive + not_negative:
        if config[key] != 'auto' and not (config[key] > 0 or config[key] == 0 and key in not_negative) or config[key] == math.inf:
            raise ValueError(f"{key} must be {'positive' if key in positive else '0 or more'}, not {config[key]}")
    for key in ('beta1', 'beta2', 'muon_momentum', 'cooldown_frac'):
        if not 0 <= config[key] < 1:
            raise ValueError(f'{key} must be at least 0 and below 1, not {config[key]}')
    for key in ('dataset', 'out_dir', 'init_from'):
        if not config[key]:
            raise ValueError(f'{key} must not be empty')
    if seed >= 2 ** 63:
        raise ValueError(f'seed must be below 2^63, not {seed}')
    if use_zero1 and use_fsdp:
        raise ValueError('use_zero1 and use_fsdp exclude each other: FSDP divides the moments too, and weights and gradients besides')
    for key in ('use_fsdp', 'use_zero1', 'sharded_checkpoint'):
        if config[key] and not distributed:
            raise ValueError(f"{key} divides a model among processes, and here is one: torchrun --standalone --nproc_per_node=N {' '.join(sys.argv)}")
    for keys, useful, where in (
            ('fsdp_reshard_after_forward fsdp_min_num_params', use_fsdp, 'without --use_fsdp=True' if distributed else 'in one process'),
            ('backend', distributed, 'in one process'), ('muon_learning_rate muon_momentum', config['optimizer'] == 'muon', 'without --optimizer=muon'),
            ('cooldown_frac', lr_schedule == 'wsd', 'without --lr_schedule=wsd'),
            ('restart_iters restart_mult', lr_schedule == 'sgdr', 'without --lr_schedule=sgdr'),
            ('overwrite', not overwrite or init_from not in ('resume', 'auto'), f'with --init_from={init_from}')):
        for key in keys.split():
            if not useful and given.get(key) == 'on the command line':
                say(f'NOTE: --{key} does nothing {where}')
    if decay_lr and lr_schedule != 'constant' and min_lr > learning_rate:
        say(f'NOTE: min_lr ({min_lr:g}) is above learning_rate ({learning_rate:g}), so the learning rate rises to it')
    if wandb_artifacts and not wandb_log:
        say('NOTE: --wandb_artifacts=True does nothing without --wandb_log=True')
    if tensorboard_log:
        optional('tensorboard', 'tensorboard_log=True')
    if arch_preset not in PRESETS:
        raise ValueError(f"unknown arch_preset '{arch_preset}'; choose from {', '.join(PRESETS)}")


def take_settings_of_run():
    """To evaluate a run is to evaluate it on its own data: what nobody set of these comes from its checkpoint."""
    path = init_from if init_from not in ('scratch', 'resume', 'auto') else out_dir
    path = path if os.path.isfile(path) or os.path.exists(os.path.join(path, '.metadata')) else newest_checkpoint(path)
    asked = {key for key in ('dataset', 'doc_mask', 'batch_size', 'gradient_accumulation_steps') if key not in given}
    try:
        saved = (read_facts(path).get('config') or {}) if path and init_from != 'scratch' and asked else {}
    except ValueError:
        previous = os.path.join(out_dir, 'ckpt_sharded_prev' if os.path.isdir(path) else 'ckpt_prev.pt')
        if init_from not in ('resume', 'auto') or not os.path.exists(previous):
            raise
        saved = read_facts(previous).get('config') or {}  # starting_point goes back to it too, and says so
    if 'dataset' in asked & saved.keys():
        try:
            find_trained_on(saved)
        except ValueError as e:
            raise ValueError(f"{e}; --dataset=... names another ('{path}')") from None
    config.update({key: saved[key] for key in asked & saved.keys()})
    globals().update(config)


def prepare_data(name, folder):
    """Run a data set's own prepare.py if it has not been run, or data/prepare.py for a file of text, on this node's first process; say what and how large."""
    script, flags = os.path.join(folder, 'prepare.py'), []
    if int(os.environ.get('LOCAL_RANK', 0)) == 0 and not glob.glob(os.path.join(glob.escape(folder), 'train*.bin')):
        if os.path.isfile(name):
            # bytes do for any text and leave a small model its parameters; a large text is worth the vocabulary
            script, tokens = os.path.join(HERE, 'data', 'prepare.py'), 'gpt2' if os.path.getsize(name) > 20e6 else 'byte'
            flags = [f'--input={name}', f'--out={folder}', f'--tokenizer={tokens}']
            say(f"preparing '{name}' once, with tokenizer {tokens}; another choice: python data/prepare.py {shlex.quote(name)} "
                '--tokenizer=... --out=NAME, then --dataset=NAME')
        elif not os.path.isdir(folder):
            have = sorted(os.path.basename(os.path.dirname(p)) for p in glob.glob(os.path.join(HERE, 'data', '*', 'prepare.py')))
            shares = ', or with shares, as in a:0.7,b:0.3,' * (',' in name)
            raise ValueError(f"no data set '{name}' in data/{shares} and no such file; there are {', '.join(have)} (--dataset=pystdlib needs no download); "
                             f"nanoGPT's or llm.c's train*.bin and val*.bin in a folder data/{name} are one, too")
        elif not os.path.exists(script):
            raise ValueError(f"'{name}' has no train*.bin; to make a data set of text in it: python data/prepare.py --input="
                             f"{shlex.quote(name if os.path.isdir(name) else folder)} --out=NAME, then --dataset=NAME")
        if os.path.exists(script):
            about, megabytes = (prepare_facts(script)[k] for k in ('about', 'download_mb'))
            command = f'python {os.path.relpath(script)}'
            if megabytes > 100:
                raise ValueError(f"data set '{name}' is not prepared and is a download of {megabytes:,.0f} MB; to fetch it: {command}")
            if not flags:
                say(f"preparing data set '{name}' by {command} ({f'a download of {megabytes} MB' if megabytes else 'no download'}): {about}")
            if subprocess.run([sys.executable, script, *flags]).returncode:
                if flags:
                    raise SystemExit(2)  # prepare.py has said what is wrong with the file
                raise ValueError(f"data set '{name}' could not be prepared, see above; to try again: {command}")
    if distributed:
        dist.barrier()


def read_metas():
    """The meta of the data sets, which must have their ids in common."""
    metas = [read_meta(folder) for _, _, folder in data_sets]
    for (name, _, _), meta in zip(data_sets, metas):
        if (meta.get('tokenizer'), meta.get('vocab_size')) != (metas[0].get('tokenizer'), metas[0].get('vocab_size')):
            raise ValueError(f"data sets '{data_sets[0][0]}' and '{name}' have different tokenizers, so an id means two things: prepare one of them again")
    return metas[0]


def load(split, **kwargs):
    """A Loader of that split, or a Mixture of several in their shares."""
    loaders = [Loader(folder, split, model_config.block_size, vocab_size=model_config.vocab_size, device=device, **kwargs) for _, _, folder in data_sets]
    return loaders[0] if len(loaders) == 1 else Mixture(loaders, [share for _, share, _ in data_sets])


def get_lr(it):
    """The learning rate of iteration it: linear warmup, then lr_schedule from learning_rate to min_lr, reached at lr_decay_iters or each restart."""
    if decay_lr and it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if not decay_lr or lr_schedule == 'constant':
        return learning_rate
    if lr_schedule == 'sgdr':  # cosine with warm restarts, https://arxiv.org/abs/1608.03983
        at, length = it - warmup_iters, restart_iters
        while at >= length:
            at, length = at - length, length * restart_mult
        ratio = at / length
    else:
        start = max(warmup_iters, (1 - cooldown_frac) * lr_decay_iters) if lr_schedule == 'wsd' else warmup_iters
        ratio = min(1.0, max(0.0, (it - start) / max(1, lr_decay_iters - start)))
    coeff = 1 - ratio if lr_schedule in ('linear', 'wsd') else 0.5 * (1 + math.cos(math.pi * ratio))
    return min_lr + coeff * (learning_rate - min_lr)


def lock_out_dir():
    """
    Hold out_dir/lock, once there is an out_dir, for as long as this process lives: the kernel gives it back, also after kill -9. Rank 0
    takes it; if another run has it, all ranks leave.
    """
    global lock
    refusal = ''
    if os.path.isdir(out_dir) and not os.access(out_dir, os.W_OK):
        raise ValueError(f"out_dir '{out_dir}' is not writable")
    if master and lock is None and os.path.isdir(out_dir):
        lock = open(os.path.join(out_dir, 'lock'), 'a+', encoding='utf-8')
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            lock.write(f'process {os.getpid()} on {socket.gethostname()}')
            lock.flush()
        except BlockingIOError:
            lock.seek(0)
            refusal = f"out_dir '{out_dir}' is in use by another run, {lock.read() or 'just starting'}; --out_dir=... gives this one another"
        except OSError as e:
            say(f"WARNING: '{lock.name}' cannot be locked here, so a second run in this out_dir would not be noticed: {first_line(e)}")
    if all_reduce(torch.tensor(bool(refusal), dtype=torch.int32, device=device), dist.ReduceOp.MAX).item():
        fail(refusal)


def starting_point():
    """(GPTConfig, None, None) for a new model; (config, model, None) for another run's weights; (config, model, checkpoint) to resume."""
    newest = newest_checkpoint(out_dir)
    used = [name for name in CHECKPOINTS if os.path.exists(os.path.join(out_dir, name))]
    resuming = init_from == 'resume' or init_from == 'auto' and bool(used)
    previous = os.path.join(out_dir, 'ckpt_sharded_prev' if os.path.isdir(newest or '') else 'ckpt_prev.pt')
    if used and not resuming and not eval_only:
        if not overwrite:
            raise ValueError(f"out_dir '{out_dir}' holds a run ({', '.join(used)}): --init_from=resume or --init_from=auto continues it, another --out_dir "
                             'keeps it, --overwrite=True replaces it')
        say(f"WARNING: overwrite=True: this run will replace the checkpoints in '{out_dir}'")
    if not resuming and init_from in ('scratch', 'auto'):
        return GPTConfig.from_settings(config, data_vocab), None, None
    try:
        ckpt = load_checkpoint(out_dir, moments=False) if resuming else load_weights(init_from, block_size if 'block_size' in given else None)
    except ValueError as e:
        if not resuming or not os.path.exists(previous):
            raise
        say(f'WARNING: {e}; going back to the one before it')
        ckpt = load_checkpoint(previous, moments=False)
    if resuming and not {'optimizer', 'iter_num', 'best_val_loss'} <= ckpt.keys():
        raise ValueError(f"checkpoint '{ckpt['path']}' has weights only and cannot be resumed; --init_from={ckpt['path']} and another --out_dir fine-tune it")
    # the architecture is the checkpoint's; a part that somebody asked for by name must agree with it
    asked = {k: v for k, v in config.items() if k in GPTConfig.__dataclass_fields__ and k in given and v is not None}
    if 'arch_preset' in given:
        asked = PRESETS[arch_preset] | asked
    free = {'dropout', 'attention_backend', 'attention_chunk_size', 'activation_checkpointing'}
    ckpt['model_args'].update({k: v for k, v in asked.items() if k in free}, dropout=dropout)  # as in nanoGPT, dropout is never the checkpoint's
    model = model_of(ckpt).float()
    stored = asdict(model.config)
    stored['n_kv_head'] = stored['n_kv_head'] or stored['n_head']
    stored['d_ff'] = stored['d_ff'] or model.transformer.h[0].mlp.c_proj.in_features
    for key, value in asked.items():
        if key not in free and value != stored[key] and not (key == 'block_size' and not resuming):
            raise ValueError(f"{key}={value} does not fit the checkpoint '{ckpt['path']}', which has {key}={stored[key]}")
    shorter = 'iter_num' not in ckpt and block_size < model.config.block_size  # a pretrained one may have a context that no step here could hold, as in nanoGPT
    if shorter or asked.get('block_size', model.config.block_size) != model.config.block_size:
        model.crop_block_size(block_size)
    if (data_vocab or 0) > model.config.vocab_size:
        raise ValueError(f"data set '{dataset}' has {data_vocab} ids, the checkpoint '{ckpt['path']}' knows {model.config.vocab_size}")
    if tokenizer and ckpt.get('tokenizer') not in (None, tokenizer.spec):
        message = (f"the checkpoint '{ckpt['path']}' was trained with tokenizer {ckpt['tokenizer']['name']}, "
                   f"not with that of data set '{dataset}', {tokenizer.name}")
        if resuming:
            raise ValueError(message)
        say(f'WARNING: {message}: its ids mean something else here')
    model.config.unpadded_vocab_size = data_vocab or model.config.unpadded_vocab_size
    return model.config, model, ckpt if resuming else None


def auto_batch_size(ckpt):
    """
    (batch_size, gradient_accumulation_steps) for batch_size='auto': the checkpoint's to resume, or else the largest micro-batch that
    bench.py finds to fit, with as many sequences an iteration as the settings say without 'auto'. Rank 0 looks, all take its answer.
    """
    if ckpt is not None and 'gradient_accumulation_steps' in (ckpt.get('config') or {}):
        return ckpt['config']['batch_size'], ckpt['config']['gradient_accumulation_steps']
    without = configure(__file__, argv=[arg for arg in sys.argv[1:] if arg != '--batch_size=auto'])[0]['batch_size']
    without = configure(__file__, argv=[])[0]['batch_size'] if without == 'auto' else without  # 'auto' in a config file
    found = 0
    if master:
        say(f"batch_size='auto': looking for the largest micro-batch that fits, for the {gradient_accumulation_steps * without} sequences an iteration of "
            f'batch_size {without} x gradient_accumulation_steps {gradient_accumulation_steps} ...')
        model = {k: v for k, v in asdict(model_config).items() if k in config}
        flags = model | dict(dataset=dataset, device=device, dtype=dtype, optimizer=config['optimizer'], batch_size=without,
                             gradient_accumulation_steps=gradient_accumulation_steps // world_size)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'found.json')
            search = subprocess.Popen([sys.executable, os.path.join(HERE, 'bench.py'), '--find_batch_size=True', f'--json={path}', *(f'--{k}={v}' for k, v in flags.items())])
            while search.poll() is None and not stop_signal:
                time.sleep(0.1)
            search.terminate()
            if os.path.exists(path):
                with open(path, encoding='utf-8') as f:
                    found = json.load(f)['batch_size']
    found = all_reduce(torch.tensor(found, device=device), dist.ReduceOp.MAX).item()
    if stop_signal:
        raise SystemExit(128 + stop_signal)
    if not found:
        raise ValueError("batch_size='auto' found none, see above; give --batch_size a number")
    return found, gradient_accumulation_steps * without // found


def parallelize(raw_model):
    """
    (model, optimizer) for the mode at hand: the model as it is; inside DDP, and with ZeRO-1 an optimizer that keeps the moments of this
    rank's parameters only; or itself with every parameter divided by FSDP2, a block gathered when its turn comes.
    """
    muon = dict(lr=muon_learning_rate, momentum=muon_momentum) if config['optimizer'] == 'muon' else None
    configured = lambda: raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device.type, muon)
    if mode == 'fsdp':
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method  # a second to import
        mesh = dist.init_device_mesh(device.type, (world_size,))
        half = MixedPrecisionPolicy(param_dtype=None if dtype == 'float32' else getattr(torch, dtype), reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in raw_model.transformer.h:  # gathered in dtype; the residual stream stays float32, as autocast has it elsewhere
            if sum(p.numel() for p in block.parameters()) >= fsdp_min_num_params:
                fully_shard(block, mesh=mesh, reshard_after_forward=fsdp_reshard_after_forward, mp_policy=half)
        fully_shard(raw_model, mesh=mesh)  # the rest as one group, so that embeddings and a tied head stay one tensor
        register_fsdp_forward_method(raw_model, 'generate')
        return raw_model, configured()
    optimizer = configured()
    if mode == 'zero1':
        from torch.distributed.optim import ZeroRedundancyOptimizer
        optimizer = ZeroRedundancyOptimizer([dict(group) for group in optimizer.param_groups], type(optimizer))  # groups that have all of their settings
    return DDP(raw_model, device_ids=[device] if device.type == 'cuda' else None, gradient_as_bucket_view=True) if distributed else raw_model, optimizer


def sync_gradients(last):
    """Whether the next backward averages gradients over ranks: with the last micro-batch, but FSDP with each, or gradients would take whole weights' memory."""
    if mode == 'fsdp':
        model.set_requires_gradient_sync(last or fsdp_reshard_after_forward)
    elif distributed:
        model.require_backward_grad_sync = last


def release_gathered():
    """After a forward without backward: FSDP's root gives up the weights that it keeps gathered for backward."""
    if mode == 'fsdp':
        raw_model.reshard()


def local_optimizer():
    """(the optimizer that has this rank's moments, its parameters, their numbers in that of one process): with ZeRO-1, of some of the parameters."""
    local = getattr(optimizer, 'optim', optimizer)
    number = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group['params'])}
    params = [p for group in local.param_groups for p in group['params']]
    return local, params, [number[p] for p in params]


def load_optimizer(state, path):
    """
    Take the moments in the optimizer's state dict of a checkpoint, or what of them is this rank's. Learning rate, betas, decay and kernel stay
    those of now. Whatever the mode, parameters are numbered as one process's optimizer does it, group after group.
    """
    sizes, expected = ([len(group['params']) for group in groups] for groups in (state['param_groups'], optimizer.param_groups))
    if sizes != expected:
        theirs = 'muon' if any('momentum' in group for group in state['param_groups']) else 'adamw'
        raise ValueError(f"the checkpoint has the state of {theirs} for groups of {sizes} tensors, and optimizer='{config['optimizer']}' has {expected}: "
                         + ('resume with the same' if theirs == config['optimizer'] else f"resume with the run's config file, or --optimizer={theirs}"))
    local, params, numbers = local_optimizer()
    loaded, whole = local.state_dict(), {} if state['state'] is None else state['state']
    rows = {}  # of the moments in a sharded checkpoint, so that no process ever has all of them
    for name, t in read_metadata(path).state_dict_metadata.items() if state['state'] is None else ():
        kind, number, key = (*name.split('/', 2), '')[:3]
        if kind == 'optimizer' and int(number) in numbers:
            n, first = shard_rows(params[numbers.index(int(number))], t.size)
            rows[name] = torch.empty((n, *t.size[1:]) if t.size else (), dtype=t.properties.dtype), first
            whole.setdefault(int(number), {})[key] = rows[name][0], t.size
    if rows:
        fill(rows, path)
    for i, (p, number) in enumerate(zip(params, numbers)):
        if number in whole:
            loaded['state'][i] = {k: shard_like(p, *v) if rows else shard_like(p, v) for k, v in whole[number].items()}
    local.load_state_dict(loaded)


def shard_rows(p, size):
    """(number of rows, the first of them) that this rank has of a tensor like p, divided as FSDP divides it: like torch.chunk."""
    n = size[0] if size else 0
    if mode != 'fsdp' or size != p.shape:  # AdamW's step count
        return n, 0
    first = min(n, rank * math.ceil(n / world_size))
    return min(n - first, math.ceil(n / world_size)), first


def shard_like(p, value, size=None):
    """This rank's part of a tensor like p: of one that every rank has whole, or else, of that size, this rank's rows as shard_rows says."""
    if mode != 'fsdp' or (size or value.shape) != p.shape:  # AdamW's step count
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor
    if size is None:
        return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    return DTensor.from_local(value.to(device), p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


def whole_states():
    """(model, optimizer) state dicts as one process would have them, on rank 0, whatever the mode; called on all ranks, which send their parts."""
    gathered = {}

    def whole(t):  # one at a time, and a tied one, which is there twice, once
        if not hasattr(t, 'full_tensor'):
            return t
        if id(t) not in gathered:
            full = t.detach().full_tensor()
            gathered[id(t)] = full.cpu() if master else None
        return gathered[id(t)]
    if mode == 'zero1':
        optimizer.consolidate_state_dict()
    optim = optimizer.state_dict() if master or mode != 'zero1' else {'state': {}}
    if mode == 'zero1':
        optimizer._all_state_dicts = []  # or rank 0 keeps a copy of all moments
    if mode != 'fsdp':
        return raw_model.state_dict(), optim
    model_state = {name: whole(t) for name, t in raw_model.state_dict(keep_vars=True).items()}
    return model_state, optim | {'state': {i: {k: whole(v) for k, v in state.items()} for i, state in optim['state'].items()}}


def less_memory():
    """(flags, batch_size, gradient_accumulation_steps) of the next smaller micro-batch that keeps the tokens of an iteration, if there is one."""
    if batch_size in (1, 'auto'):
        return '--activation_checkpointing=True, a smaller --block_size or a smaller model', None, None
    parts = next(n for n in range(2, batch_size + 1) if batch_size % n == 0)
    smaller, more = batch_size // parts, gradient_accumulation_steps * parts
    return f'--batch_size={smaller} --gradient_accumulation_steps={more}, which are as many tokens an iteration', smaller, more


def fit_memory(step):
    """
    What step() returns; where one process runs out of memory, after doing it again in smaller micro-batches, and more of them, which read
    the same windows. Several processes would have to agree on that first: they end, with the flags to use.
    """
    global batch_size, gradient_accumulation_steps, accumulation, batches
    while True:
        with one_line_errors():
            try:
                return step()
            except (RuntimeError, MemoryError) as e:
                if distributed or batch_size == 1 or not out_of_memory(e):
                    raise
        # only here, where the error is gone, is the memory that its frames held free
        raw_model.zero_grad(set_to_none=True)
        batches.close()
        _, batch_size, gradient_accumulation_steps = less_memory()
        accumulation, batches = gradient_accumulation_steps, micro_batches()
        release_freed_memory(device)
        if compile:
            torch.compiler.reset()  # or it compiles for batches of any size, which is slower
        changed = dict(batch_size=batch_size, gradient_accumulation_steps=gradient_accumulation_steps)
        config.update(changed)
        run_log.setdefault('out_of_memory', []).append(dict(iter=iter_num) | changed)
        say(f'out of memory at iteration {iter_num}: once more, and from here on, with batch_size={batch_size} and gradient_accumulation_steps='
            f'{gradient_accumulation_steps}, the same {tokens_per_iter:,} tokens an iteration')


def micro_batches():
    """The micro-batches of this rank, from iteration iter_num to the end of time. Which windows an iteration reads does not depend on their size."""
    return train_loader.stream(np.arange(batch_size) + (it * gradient_accumulation_steps + m * world_size + rank) * batch_size
                               for it in itertools.count(iter_num) for m in range(accumulation))


def forward_backward():
    """The gradients of iteration iter_num, one micro-batch after another; ranks average them with the last one. Returns this rank's mean loss."""
    total = torch.zeros((), device=device)
    for m in range(accumulation):
        X, Y = next(batches)
        torch.manual_seed(((seed * 1_000_003 + iter_num) * 1_000_003 + m * world_size + rank) % 2**63)  # for dropout, so nothing needs saving
        sync_gradients(m == accumulation - 1)
        with autocast():
            loss = model(X, Y)[1] / accumulation
        scaler.scale(loss).backward()
        total += loss.detach()
        show_progress(f'iteration {iter_num}: micro-batch {m + 1}/{accumulation}')
    return total


def compile_model():
    """Compile in place and try one forward and backward; a compiler that fails here (no C++ compiler, say) costs one warning, not the run."""
    t0, compiled = time.time(), raw_model.transformer.h if mode == 'fsdp' else [raw_model]  # FSDP's gathering between blocks cannot be compiled
    X, Y = train_loader.batch(np.arange(batch_size))
    say('compiling the model (a minute or so) ...')
    for module in compiled:
        module.compile()
    try:
        with autocast():
            raw_model(X, Y)[1].backward()
    except Exception as e:  # whatever the compiler and its tools raise
        if out_of_memory(e):
            raise
        say(f"WARNING: torch.compile failed on this machine, going on without it, slower{', with a dense doc_mask' * (doc_mask and flex)}: {first_line(e)}")
        for module in compiled:
            module._compiled_call_impl = None
        if mode == 'fsdp':
            raw_model.reset_iter_state()
        return False
    finally:
        raw_model.zero_grad(set_to_none=True)
    say(f'compiled in {time.time() - t0:.0f} s')
    return True


def loss_and_error(losses, sets):
    """{loss, standard_error} of windows' losses in the order of the text, from these sets; None for an error that so few cannot tell."""
    loss, error, _ = mean_and_error(losses, sets)
    return dict(loss=loss, standard_error=error if math.isfinite(error) else None)


@torch.no_grad()
def estimate_loss():
    """
    {split: {loss, standard_error, perplexity, bits_per_byte}} over the first eval_windows[split] windows of each split, in an order
    that depends on nothing but block_size, so that two runs are compared on the same text. Ranks share the work. Loss in nats a
    token; bits a byte of UTF-8 text, which does not depend on the tokenizer, where the tokenizer can tell. val also has window_losses,
    in the order of the text, and by_position, loss and error from the first to the last position of each part of the context. Means over
    windows are taken in float64, so that neither batches nor ranks show in them. None if a signal came.
    """
    raw_model.eval()
    starts = [0] + [2 ** i for i in range(block_size.bit_length()) if 2 ** i < block_size]  # 0, 1, 2-3, 4-7, ...
    out, sizes = {}, np.diff([*starts, block_size]).tolist()
    for split, loader in eval_loaders.items():
        n = eval_windows[split]
        steps = math.ceil(n / (batch_size * world_size))
        first = [(i * world_size + rank) * batch_size for i in range(steps)]
        losses = torch.zeros(steps * world_size * batch_size, len(sizes), device=device)  # a window's, by position; each rank fills in its own rows
        n_bytes = crc = 0
        with autocast():  # outside the loop, so that weights are cast once
            for i, (X, Y) in enumerate(loader.stream((at + np.arange(batch_size)) % loader.n_windows for at in first)):
                if told_to_stop():
                    return None
                parts = raw_model(X, Y, reduction='none')[1].split(sizes, dim=1)
                losses[first[i]:first[i] + batch_size] = torch.stack([part.mean(1) for part in parts], dim=1)
                if split not in eval_facts:
                    x, y = (t[:max(0, n - first[i])].cpu() for t in (X, Y))  # the last batch may reach beyond n: it keeps its shape, for the compiler
                    n_bytes += bytes_per_id[y].sum().item() if bytes_per_id is not None else 0
                    crc += fingerprint(torch.cat((x, y[:, -1:]), dim=1))
                show_progress(f'evaluating {split}: batch {i + 1}/{steps}')
        if split not in eval_facts:  # the windows are fixed, so these are too
            n_bytes, crc = all_reduce(torch.tensor([n_bytes, crc], device=device)).tolist()
            eval_facts[split] = dict(bytes_per_token=n_bytes / (n * block_size), crc=crc % 2 ** 53)  # JSON's readers have exact integers up to there
        shard, offset = loader.locate(np.arange(n))
        in_text = np.lexsort((offset, shard))
        losses, sets = all_reduce(losses)[:n].cpu().double().numpy()[in_text], loader.choose(in_text)[0] if isinstance(loader, Mixture) else None
        window_losses = losses @ sizes / block_size
        out[split] = loss_and_error(window_losses, sets)
        loss = out[split]['loss']
        out[split]['perplexity'] = math.exp(min(loss, 700))
        if eval_facts[split]['bytes_per_token']:
            out[split]['bits_per_byte'] = loss / math.log(2) / eval_facts[split]['bytes_per_token']
        if split == 'val':
            run_log['eval_windows'] = dict(n=n, tokens_each=block_size, crc=eval_facts[split]['crc'])
            out[split]['by_position'] = [dict(first=at, last=at + size - 1) | loss_and_error(part, sets) for at, size, part in zip(starts, sizes, losses.T)]
            out[split]['window_losses'] = window_losses.round(5).tolist()
    raw_model.train()
    release_gathered()
    return out


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Over ranks, in place."""
    if distributed:
        dist.all_reduce(tensor, op)
    return tensor


def write_sample():
    """A short text from the model, for the eye, after end of text or else id 0. Draws from a generator of its own."""
    idx = torch.full((1, 1), tokenizer.eot or 0, device=device)
    with autocast():
        ids = raw_model.generate(idx, 200, temperature=0.8, top_k=200, seed=seed, stop=tokenizer.eot, slide=max(1, block_size // 2))[0, 1:].tolist()
    release_gathered()
    text = tokenizer.decode(ids[:-1] if ids and ids[-1] == tokenizer.eot else ids)
    say('--- sample ' + '-' * 60 + f'\n{text}\n' + '-' * 71)
    return text


def save_checkpoint(best):
    """
    Replace out_dir/ckpt.pt, or ckpt_sharded, so that a kill at any moment leaves a whole one. The one before stays as ckpt_prev, the best
    as ckpt_best. Called on all ranks, which send what they have to rank 0, or write it; if one cannot, all of them stop.
    """
    global ckpt_is_ours
    t0, error, path = time.time(), None, os.path.join(out_dir, 'ckpt_sharded' if sharded_checkpoint else 'ckpt.pt')
    facts = {'scaler': scaler.state_dict(), 'model_args': asdict(raw_model.config), 'config': config, 'tokenizer': tokenizer.spec if tokenizer else
             meta.get('tokenizer'), 'iter_num': iter_num, 'best_val_loss': best_val_loss, 'losses': last_losses, 'stale_evals': stale_evals,
             'last_eval_iter': last_eval_iter, 'train_seconds': train_seconds, 'torch_version': str(torch.__version__)}
    try:
        if sharded_checkpoint:
            write_sharded(path, facts, best)
        else:
            states = dict(zip(('model', 'optimizer'), whole_states()))
            if master:
                write_checkpoint(path, states | facts, best)
    except OSError as e:
        error = e
    if all_reduce(torch.tensor(int(error is not None), device=device)).item():
        raise error if master and error else SystemExit(2)  # torch.distributed.checkpoint tells every rank of any rank's failure
    ckpt_is_ours = True
    run_log['checkpoints'].append(dict(iter=iter_num, path=path, best=best, seconds=time.time() - t0))
    tell('checkpoint', path, best)
    say(f'saved {path}' + (f' and ckpt_{"sharded_best" if sharded_checkpoint else "best.pt"}' if best else ''))


def write_checkpoint(path, ckpt, best):
    """A superset of nanoGPT's, in plain tensors and values, the same from every mode: written beside the old one, flushed, read back, renamed."""
    try:
        if not all(p.isfinite().all() for p in ckpt['model'].values()):
            raise ValueError('a weight is not finite')
        save_checked(ckpt, path + '.tmp')
        write_log()  # first, so that a kill leaves no iteration that neither the log nor a resumed run has
        remove_earlier_run(path)
        if ckpt_is_ours:
            replace_with_link(path, os.path.join(out_dir, 'ckpt_prev.pt'))
        if best:  # before the iterations that found it count as done
            replace_with_link(path + '.tmp', os.path.join(out_dir, 'ckpt_best.pt'))
        os.replace(path + '.tmp', path)
        sync_folder(out_dir)
    except (OSError, RuntimeError, ValueError) as e:
        with contextlib.suppress(OSError):
            os.remove(path + '.tmp')
        raise OSError(f"checkpoint '{path}' could not be written, what was there is untouched: {first_line(e)}") from e


def write_sharded(path, facts, best):
    """
    The same by torch.distributed.checkpoint, each rank's part in files of its own, in a folder with info.pt for what is no tensor, which
    is written last. Not asynchronously: the next step changes the moments, unless all of them were copied first.
    """
    from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, save
    weights, first, temporary, unread = raw_model.state_dict(keep_vars=True), {}, path + '.tmp', None
    names = {name: first.setdefault(id(t), name) for name, t in weights.items()}  # a tied tensor goes by its first name
    tensors = {f'model/{name}': weights[name].detach() for name in first.values()}
    local, _, numbers = local_optimizer()
    tensors |= {f'optimizer/{numbers[i]}/{key}': t for i, state in local.state_dict()['state'].items() for key, t in state.items()}
    finite = all(t.to_local().isfinite().all() if mode == 'fsdp' else t.isfinite().all() for t in map(torch.Tensor.detach, weights.values()))
    if all_reduce(torch.tensor(int(not finite), device=device)).item():
        raise OSError(f"checkpoint '{path}' not written: a weight is not finite")
    try:
        if master:
            shutil.rmtree(temporary, ignore_errors=True)
        dist.barrier()
        save(tensors, storage_writer=FileSystemWriter(temporary))  # which flushes its files, and fails on all ranks alike
        try:  # read back, each rank its share of what all have written
            for place in list(read_metadata(temporary).storage_data.values())[rank::world_size]:
                read_part(temporary, place)
        except Exception as e:
            unread = first_line(e)
        reasons = [None] * world_size
        dist.all_gather_object(reasons, unread)
        if any(reasons):
            raise OSError(f"{next(filter(None, reasons))}; out_dir must be a folder that all nodes share")
        if master:
            info = dict(names=names, param_groups=torch.optim.Optimizer.state_dict(optimizer)['param_groups'], metadata_crc32=file_crc32(f'{temporary}/.metadata'))
            save_checked(facts | info, os.path.join(temporary, 'info.pt'))
            sync_folder(temporary)
            write_log()
            remove_earlier_run(path)
            if best:  # the same files once more, by links
                shutil.rmtree(path + '_best.tmp', ignore_errors=True)
                shutil.copytree(temporary, path + '_best.tmp', copy_function=replace_with_link)
                shutil.rmtree(path + '_best', ignore_errors=True)
                os.replace(path + '_best.tmp', path + '_best')
            for stale in [path + '_prev'] * ckpt_is_ours + [path] * (not ckpt_is_ours):
                shutil.rmtree(stale, ignore_errors=True)
            if ckpt_is_ours:
                os.replace(path, path + '_prev')
            os.replace(temporary, path)
            sync_folder(out_dir)
    except (OSError, RuntimeError, ValueError, CheckpointException) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        why = next(iter(e.failures.values()))[0] if isinstance(e, CheckpointException) else e
        raise OSError(f"checkpoint '{path}' could not be written, what was there is untouched: {first_line(why)}") from e


def remove_earlier_run(path):
    """Before the first checkpoint of a new run gets its name: what an earlier run left in out_dir is no fallback for this one, and not further on."""
    if not ckpt_is_ours and first_iter == 0:
        for name in CHECKPOINTS:
            stale = os.path.join(out_dir, name)
            if os.path.isdir(stale):
                shutil.rmtree(stale)
            elif os.path.exists(stale) and stale != path:  # a file is replaced at once
                os.remove(stale)


def sync_folder(path):
    """Make renames in it last through a power cut."""
    folder = os.open(path, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def replace_with_link(path, other):
    """Make `other` the same file as path, atomically; a copy where the file system has no hard links."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(other + '.tmp')
    try:
        os.link(path, other + '.tmp')
    except OSError:
        shutil.copyfile(path, other + '.tmp')
    os.replace(other + '.tmp', other)


class WandbSink:
    """Weights & Biases: numbers, a table of samples, checkpoints as versions of one artifact."""
    def __init__(self, facts):
        os.environ.setdefault('WANDB_DATA_DIR', os.path.abspath(os.path.join(out_dir, 'wandb')))  # for copies of checkpoints
        import wandb
        self.wandb, self.samples, settings = wandb, [], dict(project=wandb_project, name=wandb_run_name, config=facts, dir=out_dir)
        try:
            self.run = wandb.init(**settings, settings=wandb.Settings(init_timeout=15, login_timeout=15))
        except Exception as e:  # no network, no key, no such project
            self.run = wandb.init(**settings, mode='offline')
            say(f"WARNING: wandb's server cannot be used ({first_line(e)[:200]}), so this run is recorded offline; "
                f'to send it later: wandb sync {os.path.dirname(self.run.dir)}')

    def numbers(self, values, sample, step):
        if sample is not None:
            self.samples.append([step, sample])
            values = values | {'samples': self.wandb.Table(columns=['iter', 'text'], data=self.samples)}
        self.run.log(values, step=step)

    def checkpoint(self, path, best):
        if wandb_artifacts:
            artifact = self.wandb.Artifact(f'checkpoint-{self.run.id}', type='model', metadata=dict(iter=iter_num, losses=last_losses))
            (artifact.add_dir if os.path.isdir(path) else artifact.add_file)(path)  # copies, since the next checkpoint replaces this one
            self.run.log_artifact(artifact, aliases=['latest', f'iter-{iter_num}'] + ['best'] * best)

    def close(self):
        self.run.finish()


class TensorBoardSink:
    """TensorBoard's event files, with the names that wandb gets."""
    def __init__(self, facts):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(out_dir)
        atexit.register(self.writer.close)  # or what it has queued is lost when a run fails
        self.writer.add_text('config', f'<pre>{json.dumps(facts, indent=2)}</pre>', iter_num)

    def numbers(self, values, sample, step):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        if sample is not None:
            self.writer.add_text('samples', f'<pre>{html.escape(sample)}</pre>', step)

    def checkpoint(self, path, best):
        pass

    def close(self):
        self.writer.close()


def tell(what, *args):
    """Tell wandb and TensorBoard. A run must not depend on them, so one that fails is left out from then on."""
    for sink in list(sinks):
        try:
            getattr(sink, what)(*args)
        except Exception as e:
            sinks.remove(sink)
            say(f'WARNING: going on without {type(sink).__name__.removesuffix("Sink").lower()}: {first_line(e)}')


def numbers_in(entry, prefix=''):
    """{name: number} of an entry of the run log, with names inside names joined by a slash: val/loss, gradients/layers/wte."""
    flat = {}
    for key, value in entry.items():
        flat |= numbers_in(value, f'{prefix}{key}/') if isinstance(value, dict) else {prefix + key: value} if isinstance(value, (int, float)) else {}
    return flat


def log(kind, entry):
    """Add an entry to a list of the run log, and tell the other sinks. Writing the file takes at most 1 % of the time."""
    run_log[kind].append(entry)
    tell('numbers', numbers_in(entry), entry.get('sample'), entry['iter'])
    if time.time() - log_written > 100 * log_cost:
        write_log()


def write_log():
    """Replace out_dir/run_*.json as a whole. Also called at exit, whatever the reason, so that it is complete."""
    global log_written, log_cost
    run_log['summary'] = dict(outcome=outcome, iterations=iter_num - first_iter, iter_num=iter_num, seconds=time.time() - t_start, losses=last_losses,
                              best_val_loss=best_val_loss if math.isfinite(best_val_loss) else None, tokens=(iter_num - first_iter) * tokens_per_iter)
    if master:
        t0 = time.time()
        try:
            with open(log_path + '.tmp', 'w', encoding='utf-8') as f:
                f.write(json.dumps(run_log, separators=(',', ':')))
            os.replace(log_path + '.tmp', log_path)
        except OSError as e:  # a full disk must not cost the run before it costs a checkpoint
            say(f"WARNING: the run log '{log_path}' could not be written: {first_line(e)}")
            with contextlib.suppress(OSError):
                os.remove(log_path + '.tmp')
        log_written, log_cost = time.time(), time.time() - t0


def log_evaluation(evaluated, best):
    """The console line, the text sample and the run log's entry of the evaluation at hand."""
    val = evaluated['val']
    say(f'step {iter_num}: train loss {last_losses["train"]["loss"]:.4f}, val loss {val["loss"]:.4f}, perplexity {val["perplexity"]:.2f}' +
        (f', {val["bits_per_byte"]:.4f} bits per byte' if 'bits_per_byte' in val else '') + (' (best)' if best else ''))
    if eval_only:
        show_evaluation(val)
    entry = dict(iter=iter_num, tokens=iter_num * tokens_per_iter, train_seconds=train_seconds, lr=lr, **evaluated, seconds=eval_seconds)
    if sample_interval and len(run_log['eval_steps']) % sample_interval == 0 and tokenizer and (master or mode == 'fsdp'):  # which gathers weights from all ranks
        entry['sample'] = write_sample()
    log('eval_steps', entry)


def show_evaluation(val):
    """All that an evaluation of val found, in lines."""
    n, loader = eval_windows['val'], eval_loaders['val']
    total = sum(part.n_windows for part in getattr(loader, 'loaders', [loader]))  # a mixture reads what its shares allow before a set begins again
    line = lambda values: f"loss {values['loss']:.4f}" + ('' if values['standard_error'] is None else f", standard error {values['standard_error']:.4f}")
    say(f"val, {f'all {n:,}' if n == total else f'{n:,} of {total:,}'} windows of {block_size} tokens: {line(val)}, perplexity {val['perplexity']:.2f}" +
        (f", {val['bits_per_byte']:.4f} bits per byte" if 'bits_per_byte' in val else ''))
    for part in val['by_position']:
        at = f"{part['first']}-{part['last']}" if part['last'] > part['first'] else f"{part['first']}"
        say(f'  position {at:<11} {line(part)}')


def log_iteration(mean_loss, seconds, left):
    """The console line and the run log's entry of the iteration at hand; seconds an iteration, and seconds left."""
    global grad_stats
    speed, norm, used = tokens_per_iter / seconds, float(grad_norm), memory(device)
    achieved = flops_token * speed / world_size
    finite = math.isfinite(norm + grad_stats.get('norm', 0.0))
    if math.isfinite(mean_loss):
        recent_losses.append(mean_loss)
    log('training_iterations', dict(
        iter=iter_num, loss=mean_loss if math.isfinite(mean_loss) else None, loss_variance=float(np.var(recent_losses or [0])), lr=lr,
        time_ms=1000 * seconds,
        mfu=dict(mfu_percent=100 * achieved / peak, achieved_tflops=achieved / 1e12, hardware_peak_tflops=peak / 1e12,
                 tokens_per_sec=speed, flops_per_token=flops_token),
        memory=used, gradients=grad_stats | dict(norm=norm) if finite else dict(norm=None)))  # not finite: a step that the fp16 scaler skipped
    grad_stats = {}
    over = 'a bug, please report it' if peak_source.startswith('dense') else 'the peak was taken too low; --peak_tflops=0 measures it again'
    of = ' of measured' * peak_source.startswith('measured') + f' (over 100 %: {over})' * (achieved > peak)
    say(f'iter {iter_num} ({100 * (iter_num + 1) / max_iters:.1f}%): loss {mean_loss:.4f}, lr {lr:.2e}, {1000 * seconds:.0f} ms, '
        f'{speed:,.0f} tok/s, mfu {100 * achieved / peak:.1f}%{of}, grad norm {norm:.2f}, {max(used.values()) / 2**30:.2f} GiB, {duration(left)} left')


def on_signal(signum, frame):
    """The first signal ends the run after the step at hand, with a checkpoint; a second one, 2 s later or more, ends it at once."""
    global stop_signal, signal_time
    if stop_signal and time.time() - signal_time > 2:  # torchrun passes its own on, so a job that is signalled as a whole gets two
        os._exit(128 + signum)
    if stop_signal:
        return
    stop_signal, signal_time = signum, time.time()
    if master:
        with contextlib.suppress(OSError):  # a terminal that is gone
            os.write(1, f'{signal.Signals(signum).name}: finishing this iteration and saving; once more to leave at once\n'.encode())  # print is not reentrant


def told_to_stop():
    """The signal that any of the processes has got, on all of them alike; 0: none."""
    return all_reduce(torch.tensor(stop_signal, device=device), dist.ReduceOp.MAX).item()


def lost_process(kind, error, trace):
    """sys.excepthook of a rank: the loss of another one is a line, since what ended that one says why."""
    if not issubclass(kind, dist.DistError) and 'gloo' not in str(error):
        return sys.__excepthook__(kind, error, trace)
    print(f'train.py: rank {rank}: another process of this run has ended or does not answer ({first_line(error)[:200]})', file=sys.stderr, flush=True)


def leave(code):
    """Exit, with ranks together."""
    if distributed:
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(code)  # an orderly exit takes down Python under gloo's threads, where a few in a hundred abort
    raise SystemExit(code)


# ---------------------------------------------------------------------------------------------------------------------
# set-up: processes, device, data, model
rank, world_size, distributed = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1)), 'RANK' in os.environ
mode = 'none' if not distributed else 'fsdp' if use_fsdp else 'zero1' if use_zero1 else 'ddp'
master, last_line, stop_signal, signal_time, lock = rank == 0, time.time(), 0, 0.0, None
sys.stdout.reconfigure(errors='replace')  # a sample may hold what this terminal cannot show
HERE = os.path.dirname(os.path.abspath(__file__))
CHECKPOINTS = 'ckpt.pt', 'ckpt_prev.pt', 'ckpt_best.pt', 'ckpt_sharded', 'ckpt_sharded_prev', 'ckpt_sharded_best'
for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
    if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # nohup's wish
        signal.signal(getattr(signal, name), on_signal)
with one_line_errors():
    if eval_only:
        take_settings_of_run()
    check_ranges()
    if distributed and device in ('auto', 'cuda') and torch.cuda.is_available():
        device, gpus, processes = f"cuda:{os.environ['LOCAL_RANK']}", torch.cuda.device_count(), int(os.environ['LOCAL_WORLD_SIZE'])
        if processes > gpus:
            raise ValueError(f'{processes} processes on this machine, which has {gpus} GPUs; --nproc_per_node={gpus}')
    device, dtype = pick_device('cpu' if distributed and device == 'auto' and not torch.cuda.is_available() else device, dtype)  # gloo has no mps
    if gradient_accumulation_steps % world_size and not eval_only:
        raise ValueError(f'gradient_accumulation_steps={gradient_accumulation_steps} must be a multiple of the {world_size} processes that share it')
    if device.type == 'cpu':
        keep_freed_memory()
    if device.type == 'cuda':
        device = torch.device('cuda', device.index or 0)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32, as nanoGPT does
    if distributed:
        if backend == 'nccl' and device.type != 'cuda':
            raise ValueError(f'backend=nccl needs a GPU for each process, and this is {device.type}; --backend=gloo')
        dist.init_process_group(backend=backend if backend != 'auto' else 'nccl' if device.type == 'cuda' else 'gloo',
                                device_id=device if device.type == 'cuda' else None)
        sys.excepthook = lost_process
        if sys.platform == 'linux':
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: when torchrun itself is killed, save and end
    data_sets = find_datasets(dataset)
    for name, _, folder in data_sets:
        prepare_data(name, str(folder))
    lock_out_dir()
    meta = read_metas()
    try:  # a data set without meta.json is nanoGPT's, in GPT-2's tokens
        tokenizer = get_tokenizer(meta.get('tokenizer', 'gpt2')) if 'tokenizer' in meta or not meta else None
    except (ValueError, ImportError) as e:
        tokenizer = None
        if int(os.environ.get('LOCAL_RANK', 0)) == 0:  # it may be missing on this node only
            print(f'WARNING: training without its tokenizer, so without samples and bits per byte: {first_line(e)}', flush=True)
    if all_reduce(torch.tensor(int(tokenizer is None), device=device), dist.ReduceOp.MAX).item() and tokenizer:  # ranks evaluate and sample together
        say('WARNING: a process is without the tokenizer of this data set, so there are no samples and bits per byte')
        tokenizer = None
    data_vocab = meta.get('vocab_size', None if meta else 50257)
    model_config, raw_model, ckpt = starting_point()
    if doc_mask and getattr(tokenizer, 'eot', None) is None:
        raise ValueError(f"doc_mask needs an end-of-text token between documents, and the tokenizer of data set '{dataset}' has none")
    model_config.doc_mask_token = tokenizer.eot if doc_mask else None
    model_config.check_doc_mask()
    from_scratch = raw_model is None
    place = torch.tensor(-1 if ckpt is None else ckpt['iter_num'], device=device)
    if all_reduce(place.clone(), dist.ReduceOp.MIN) != all_reduce(place.clone(), dist.ReduceOp.MAX):
        raise ValueError(f"processes found different checkpoints, this one that of iteration {place.item()}: out_dir '{out_dir}' must be a folder that all nodes share")
    if batch_size == 'auto':
        batch_size, gradient_accumulation_steps = auto_batch_size(ckpt)
        if gradient_accumulation_steps % world_size:
            raise ValueError(f"batch_size='auto' takes the checkpoint's gradient_accumulation_steps={gradient_accumulation_steps}, which must be a multiple of "
                             f'the {world_size} processes that share it; give both keys for as many tokens an iteration: {batch_size * gradient_accumulation_steps} sequences')
        config.update(batch_size=batch_size, gradient_accumulation_steps=gradient_accumulation_steps)
    if ckpt is not None and 'tokenizer' in ckpt and not eval_only:  # nanoGPT's order is random anyway
        before, now = ({'dataset': c['dataset'], 'seed': c['seed'], 'sequences an iteration': c['batch_size'] * c['gradient_accumulation_steps']}
                       for c in (ckpt['config'], config))
        if changed := [f'{key} {now[key]} instead of {value}' for key, value in before.items() if now[key] != value]:
            say(f"NOTE: resumed with {', '.join(changed)}: from here on it reads other windows than it would have read, some of them perhaps again")
    train_loader = load('train', seed=seed)
    eval_loaders = {split: load(split, seed=0, shift=False) for split in ('train', 'val')}
    if ckpt is not None and ckpt['iter_num'] >= max_iters and ckpt.get('last_eval_iter', ckpt['iter_num']) == ckpt['iter_num'] and not eval_only:
        say(f"{ckpt['path']} is at iteration {ckpt['iter_num']} of max_iters={max_iters}: nothing to do")
        leave(0)
    os.makedirs(out_dir, exist_ok=True)
    lock_out_dir()
if from_scratch:
    torch.manual_seed(seed)
    raw_model = GPT(model_config)
raw_model.train()
if mode != 'fsdp':  # which moves a block at a time, and keeps a share of it
    raw_model.to(device)
block_size = model_config.block_size
config.update({k: v for k, v in asdict(model_config).items() if k in config}, device=str(device), dtype=dtype)

bytes_per_id, eval_facts = None, {}
if tokenizer is not None:  # padding has no text
    bytes_per_id = torch.zeros(max(model_config.vocab_size, tokenizer.vocab_size), dtype=torch.long)
    bytes_per_id[:tokenizer.vocab_size] = torch.from_numpy(tokenizer.token_bytes())

# optimizer
autocast = lambda: torch.autocast(device.type, getattr(torch, dtype)) if dtype != 'float32' else contextlib.nullcontext()
scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')
with one_line_errors():
    model, optimizer = parallelize(raw_model)
iter_num, best_val_loss, last_losses, stale_evals, last_eval_iter, train_seconds = 0, math.inf, {}, 0, -1, 0.0
ckpt_is_ours = ckpt is not None and os.path.basename(ckpt['path']) == ('ckpt_sharded' if sharded_checkpoint else 'ckpt.pt')  # not after going back to ckpt_prev.pt
if ckpt is not None:
    if not eval_only:  # which has no use for moments
        with one_line_errors():
            load_optimizer(ckpt['optimizer'], ckpt['path'])
    if scaler.is_enabled() and ckpt.get('scaler'):
        scaler.load_state_dict(ckpt['scaler'])
    iter_num, best_val_loss = ckpt['iter_num'], float(ckpt['best_val_loss'])
    stale_evals, last_eval_iter, train_seconds = ckpt.get('stale_evals', 0), ckpt.get('last_eval_iter', iter_num), ckpt.get('train_seconds', 0.0)
    if 'compile' not in given and 'tokenizer' in ckpt:  # the same arithmetic as before
        compile = ckpt['config'].get('compile', compile)
ckpt = None  # free the memory

# what it will cost
accumulation = max(1, gradient_accumulation_steps // world_size)  # at least 1 also where it only evaluates
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size
flops_token, parts = raw_model.flops_per_token(), raw_model.flops_by_part()
peak, peak_source = (peak_tflops * 1e12, 'as given') if peak_tflops else peak_flops(device, dtype)
if distributed:  # ranks must come to the same conclusions
    peak = all_reduce(torch.tensor(peak, dtype=torch.float64, device=device)).item() / world_size
tokens_at_half_peak = 0.5 * peak * world_size / flops_token
eval_windows = {split: min(eval_iters * batch_size, loader.n_windows) for split, loader in eval_loaders.items()}  # also if micro-batches have to shrink
if eval_only and given.get('eval_iters') not in ('on the command line', given.get('eval_only')):  # a config file's is for training, unless it is for evaluation
    eval_windows['val'] = eval_loaders['val'].n_windows
eval_tokens, iters_left = sum(eval_windows.values()) * block_size, 0 if eval_only else max_iters - iter_num
evals = iters_left // eval_interval + 1
expected = (iters_left * tokens_per_iter + evals * eval_tokens / 3) / tokens_at_half_peak  # seconds; an evaluation is forward only
why = 'as asked' if 'compile' in given else 'as before' if compile != 'auto' else 'default on a GPU' if device.type == 'cuda' else \
    'not tried on mps' if device.type == 'mps' else 'a long run' if expected > 600 else 'the run is too short to pay for it'
if compile == 'auto':
    compile = device.type == 'cuda' or device.type == 'cpu' and expected > 600 and not eval_only
config['compile'] = compile
n_params, n_trainable = raw_model.get_num_params(False), sum(p.numel() for p in raw_model.parameters() if p.requires_grad)
device_name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{torch.get_num_threads()} threads' if device.type == 'cpu' else 'mps'
device_memory = torch.cuda.get_device_properties(device).total_memory if device.type == 'cuda' else os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
present = memory(device)
try:
    estimate = memory_estimate(model_config, batch_size, dtype, device, accumulation, mode, world_size, config['optimizer'])
except Exception as e:  # of a part that tensors without data do not go through, say: no reason not to train
    say(f'NOTE: no estimate of the memory that a step takes: {first_line(e)}')
    estimate = dict(weights=0, moments=0, peak=0)
if device.type == 'cpu':  # where memory() is all of the process: Python, torch and what else there is by now, besides the states already here
    estimate['holes'] = round(0.2 * estimate['peak'])  # that malloc leaves between tensors: see PARAMETER_FORMULAS.md
    estimate['process'] = present.get('resident', present['peak']) - estimate['weights'] - bool(optimizer.state) * estimate['moments']
    estimate['peak'] += estimate['holes'] + estimate['process']
flex = compile and mode != 'fsdp' and raw_model.takes_flex(device.type)  # FSDP compiles block by block, and the mask is made outside them
startup_info = {
    'start': f'iteration {iter_num} of {max_iters} ({init_from})',
    'data': f"{dataset}: {train_loader.n_tokens:,} train tokens, {eval_loaders['val'].n_tokens:,} val tokens, "
            f"tokenizer {tokenizer.name if tokenizer else 'unknown'}" +
            ''.join(f'; {share:.3g} from {name}, {max_iters * tokens_per_iter * share / loader.n_tokens:.2f} epochs of its {loader.n_tokens:,} tokens'
                    for (name, share, _), loader in zip(data_sets, getattr(train_loader, 'loaders', []))),
    'architecture': ', '.join(str(getattr(model_config, kind)) for kind in PRESETS['custom'] if kind not in ('bias', 'weight_tying')) +
                    f", {'biases' if model_config.bias else 'no biases'}, {'tied' if model_config.weight_tying else 'untied'}" +
                    ', qk_norm' * model_config.qk_norm + ', zero_init_residual' * model_config.zero_init_residual +
                    f', logit_softcap {model_config.logit_softcap:g}' * bool(model_config.logit_softcap) +
                    f", doc_mask by {'flex attention' if flex else 'a dense mask'}" * doc_mask,
    'parameters': f'{n_params:,} total, {n_trainable:,} trainable, {raw_model.get_num_params():,} non-embedding',
    'shape': f'{model_config.n_layer} layers, width {model_config.n_embd}, {model_config.n_head} heads, '
             f'{model_config.n_kv_head or model_config.n_head} kv heads, sequence {block_size}, vocabulary {model_config.vocab_size}',
    'batch': f'{batch_size} sequences x {accumulation} accumulation x {world_size} processes = {tokens_per_iter // block_size} sequences, '
             f'{tokens_per_iter:,} tokens an iteration, {max_iters * tokens_per_iter / train_loader.n_tokens:.2f} epochs in all',
    'optimizer': ''.join(f"muon at {muon_learning_rate:g} for {len(group['params'])} matrices, " for group in optimizer.param_groups if 'momentum' in group) +
                 f"adamw at {learning_rate:g}, {lr_schedule if decay_lr else 'constant'}, weight decay {weight_decay:g}",
    'device': f'{device} ({device_name}) x {world_size}, {device_memory / 2**30:.0f} GiB, {dtype}, '
              f'{dict(none="one process", ddp="DDP", zero1="ZeRO-1", fsdp="FSDP")[mode]}, compile {compile} ({why})',
    'peak': f'{peak / 1e12:.2f} TFLOP/s a device ({peak_source})',
    'FLOPs a token': f'{flops_token / 1e9:.4g} GFLOP to train, attention in full (' + ', '.join(f'{part} {3 * n / 1e9:.4g}' for part, n in parts.items()) +
                     f'); {raw_model.flops_per_token(causal=True) / 1e9:.4g} causal (half of the scores); '
                     f'attention/FFN ratio {(parts["attention projections"] + parts["attention scores"]) / parts["ffn"]:.2f}',
    'memory': f"about {estimate['peak'] / 2**30:.2f} GiB a device estimated: " +
              ', '.join(f'{k} {v / 2**30:.2f}' for k, v in estimate.items() if v and k != 'peak') +
              (' (the step without torch.compile)' if compile else ''),
    'expected': f'{tokens_at_half_peak:,.0f} tokens/s at 50 % of peak: {duration(expected)} for the run with its evaluations',
}
for key, text in startup_info.items():
    say(f'{key + ":":<15} {text}')
STEADIER = 'try a lower --learning_rate, a longer --warmup_iters or --grad_clip=1.0'
QUICK_LOOK = ('for a quick look: --max_iters=20 --eval_iters=2 --batch_size=2 --gradient_accumulation_steps=1 --block_size=128, '
              'or config/preset_quick_test.py')
if estimate['peak'] * (world_size if device.type == 'cpu' else 1) > device_memory:
    say('NOTE: this is likely to run out of memory; a smaller --batch_size' +
        ('' if model_config.activation_checkpointing else ' or --activation_checkpointing=True') + ' needs less')
if expected > 3600:
    say(f'NOTE: on this device the run will take {duration(expected)} or more; {QUICK_LOOK}')

# the run log
start_time = time.strftime('%Y%m%d_%H%M%S')
log_path, log_written, log_cost = os.path.join(out_dir, f'run_{start_time}.json'), 0.0, 0.0
run_log = dict(run_name=f'run_{start_time}', start_time=start_time, config=config,
               startup_info=startup_info | dict(
                   total_params=n_params, trainable_params=n_trainable, non_embedding_params=raw_model.get_num_params(), tokens_per_iter=tokens_per_iter,
                   flops_per_token=flops_token, hardware_peak_tflops=peak / 1e12, peak_source=peak_source, memory_estimate=estimate,
                   torch_version=str(torch.__version__)),
               training_iterations=[], eval_steps=[], checkpoints=[], summary={})
first_iter, outcome, t_start = iter_num, 'failed', time.time()  # until it ends in another way
atexit.register(write_log)
sinks = []
for sink in (WandbSink,) * (wandb_log and master) + (TensorBoardSink,) * (tensorboard_log and master):
    try:
        sinks.append(sink(config | dict(total_params=n_params, tokens_per_iter=tokens_per_iter, flops_per_token=flops_token)))
    except Exception as e:
        name = sink.__name__.removesuffix('Sink').lower()
        say(f'WARNING: going on without {name}: {first_line(e)}' + (f' (pip install {name})' if isinstance(e, ImportError) else ''))

batches = micro_batches()
if compile:
    compile = config['compile'] = fit_memory(compile_model)
    run_log['startup_info']['compiled'] = compile
if device.type == 'cuda':
    torch.cuda.reset_peak_memory_stats()  # of the loop, not of measuring and compiling

# ---------------------------------------------------------------------------------------------------------------------
# the loop
loss_sum, iters_since_log, logged_seconds, mean_seconds, eval_seconds = torch.zeros((), device=device), 0, train_seconds, None, 0.0
stopping, grad_stats, recent_losses, sum_shards = 0, {}, collections.deque(maxlen=100), all_reduce if mode == 'fsdp' else None
while True:
    lr = get_lr(iter_num)
    for group in optimizer.param_groups:
        group['lr'] = lr * (muon_learning_rate / learning_rate if 'momentum' in group else 1)

    # evaluate, on all ranks alike
    stopping = stopping if distributed else stop_signal
    finished = iter_num >= max_iters or eval_only
    best, save = False, stopping or save_interval and iter_num % save_interval == 0
    if (iter_num % eval_interval == 0 or finished) and not stopping:
        t0 = time.time()
        evaluated = fit_memory(estimate_loss)
        if evaluated is None:
            stopping = save = told_to_stop()
        elif not math.isfinite(evaluated['val']['loss']):
            say(f'val loss is not finite at iteration {iter_num}: nothing saved; {STEADIER}')
            outcome, last_losses = 'not finite', {}
            break
        else:
            last_losses, val_loss = {split: numbers_in(values) for split, values in evaluated.items()}, evaluated['val']['loss']
            best = val_loss < best_val_loss and not eval_only  # which may be of other windows
            if iter_num != last_eval_iter and not eval_only:  # counted already, if this is where a run was resumed
                best_val_loss, stale_evals, last_eval_iter = min(best_val_loss, val_loss), 0 if best else stale_evals + 1, iter_num
            save = save or best or always_save_checkpoint
            eval_seconds = time.time() - t0
            log_evaluation(evaluated, best)
            if patience and stale_evals >= patience and not eval_only:
                say(f'stopping early: val loss has not fallen for {stale_evals} evaluations, best {best_val_loss:.4f}')
                finished = True

    # save, and leave when there is nothing more to do
    if save and (iter_num > first_iter or (best or finished) and not from_scratch) and not eval_only:
        with one_line_errors():
            save_checkpoint(best)
    if finished or stopping:
        outcome = signal.Signals(stopping).name if stopping else 'finished' if iter_num >= max_iters or eval_only else 'stopped early'
        break

    # forward and backward, in micro-batches
    t0 = time.time()
    loss_sum += fit_memory(forward_backward)

    # step, unless something is not finite: averaged gradients are the same on every rank, so all ranks stop together
    scaler.unscale_(optimizer)
    if gradient_log_interval and iter_num % gradient_log_interval == 0:
        grad_stats = gradient_statistics(raw_model, sum_shards)
        grad_stats |= dict(iter=iter_num, norm_at_iter=grad_stats['norm'])  # logged with the next log line, whose own norm may be a later one
        grad_norm = torch.tensor(grad_stats['norm'], device=device)
    else:
        grad_norm = torch.linalg.vector_norm(gradient_norms([p.grad for p in raw_model.parameters() if p.grad is not None], sum_shards))
    if grad_clip:
        torch.nn.utils.clip_grads_with_norm_(raw_model.parameters(), grad_clip, grad_norm)
    if distributed:  # a signal that reached one rank stops them all
        stopping = told_to_stop()
    finite = scaler.is_enabled() or math.isfinite(grad_norm.item())
    if finite:
        with one_line_errors():
            scaler.step(optimizer)  # with fp16 it skips a step whose gradients are not finite, and lowers its scale
        scaler.update()
    if not finite or scaler.is_enabled() and scaler.get_scale() < 1:  # 17 skips in a row, from 2^16
        say(f'loss or gradient is not finite at iteration {iter_num}: nothing saved; {STEADIER}')
        outcome = 'not finite'
        break
    optimizer.zero_grad(set_to_none=True)

    # log; reading the loss waits for the device, so times are whole
    iters_since_log += 1
    due = iter_num % log_interval == 0 or iter_num + 1 == max_iters or iter_num == first_iter + 2
    mean_loss = all_reduce(loss_sum).item() / (iters_since_log * world_size) if due else None
    train_seconds += time.time() - t0
    if due:
        seconds = (train_seconds - logged_seconds) / iters_since_log
        weight = 1.0 if iter_num < first_iter + 10 else min(1.0, iters_since_log / 10)  # the first iterations are slower than the rest
        mean_seconds = weight * seconds + (1 - weight) * (mean_seconds or 0.0)
        left = mean_seconds * (max_iters - iter_num - 1) + eval_seconds * ((max_iters - iter_num - 2) // eval_interval + 1)
        log_iteration(mean_loss, seconds, left)
        if iter_num == first_iter + 2:  # by now the moments exist
            measured = memory(device)
            say(f"memory: {measured.get('peak', max(measured.values())) / 2**30:.2f} GiB at its peak, {estimate['peak'] / 2**30:.2f} estimated")
            run_log['startup_info']['memory_measured'] = measured
        if iter_num == first_iter + 2 and left > 3600:
            say(f'NOTE: at this speed the run needs another {duration(left)}; {QUICK_LOOK}')
        iters_since_log, logged_seconds, last_line = 0, train_seconds, time.time()
        loss_sum.zero_()
    iter_num += 1

batches.close()
say(f'{outcome} after {iter_num - first_iter} iterations in {duration(time.time() - t_start)}; log: {log_path}' +
    (f'; its text: python sample.py --out_dir={out_dir}' if run_log['checkpoints'] else ''))
tell('close')
write_log()
leave(128 + stopping if stopping else 1 if outcome == 'not finite' else 0)
