"""
Describe a model: parameters, FLOPs, memory. Inspect, merge and export checkpoints.

    python model.py config/full_llama_1.36b.py --n_layer=24     # describe; needs no memory
    python model.py config/full_llama_1.36b.py --device=H100    # its cost on a GPU elsewhere
    python model.py --ckpt=out                                  # inspect a checkpoint
    python model.py --ckpt=out --consolidate=ckpt.pt            # a sharded checkpoint as one file
    python model.py --ckpt=out-lora --merge=ckpt.pt             # LoRA's adapters and their base
    python model.py --ckpt=out-lora --peft=peft_dir             # LoRA's adapters to PEFT's format
    python model.py --ckpt=out --export=hf_dir                  # for Hugging Face transformers
    python model.py --ckpt=out --export=model.onnx              # for ONNX
    python model.py --list=True                                 # every config with its counts
"""
import math
import os
import re
import sys

import torch

from configurator import PositiveInt, Share, configure
from data.folder import prepare_facts, read_meta
from engine.checked_file import save_checked
from engine.checkpoint import load_checkpoint
from engine.common import (
    GIB,
    ROOT,
    UserError,
    duration,
    first_line,
    printable,
    replacing,
    user_errors,
)
from engine.cost import add_process, cache_bytes, memory_estimate
from engine.export import save_onnx
from engine.huggingface import load_weights
from engine.lora import add_adapters, save_peft
from engine.machine import (
    DATASHEETS,
    FLOAT16_ONLY,
    USABLE_MEMORY,
    datasheet_peak,
    find_gpu,
    memory,
    pick_device,
)
from engine.parallel import MODES
from engine.schema import shown
from model import GPT, GPTConfig

TRAIN = os.path.join(ROOT, 'train.py')


# ------------------------------------------------------------------------------------------------
# describe

def meta_model(settings):
    """
    Build the model of a dict of settings on the meta device. If vocab_size is None it comes from
    the data set, or else is GPT-2's.
    """
    folder = os.path.join(ROOT, 'data', settings['dataset'])
    script = os.path.join(folder, 'prepare.py')
    vocab_size = read_meta(folder).get('vocab_size')
    if not vocab_size and os.path.exists(script):
        vocab_size = prepare_facts(script)['vocab_size']
    vocab_size = vocab_size or 50257
    if settings['vocab_size'] is not None:
        vocab_size = min(vocab_size, settings['vocab_size'])
    with user_errors():
        model = GPT.without_data(GPTConfig.from_settings(settings, vocab_size))
    if settings.get('lora_rank'):
        add_adapters(model, settings)
    return model


def describe(model, settings, device, dtype, gpu=''):
    """
    Return a text about a model's architecture and the cost of training it with these settings, on a
    device of this computer or on a GPU in DATASHEETS. The model may be on the meta device.
    """
    config = model.config
    lines = ['architecture']
    lines += [f'  {key:<24} {value}' for key, value in vars(config).items() if value is not None]
    lines += parameter_lines(model) + flops_lines(model)
    sizes = training_memory(model, settings, device, dtype, gpu)
    lines += size_lines(
        f"memory to train, {settings.get('optimizer', 'adamw')}, {dtype} on {gpu or device}, "
        f'batch_size {whole_batch_size(settings)}, one process, estimated', sizes)
    if gpu:
        lines += gpu_lines(model, settings, dtype, device, gpu, sizes)
    lines += sampling_memory_lines(model)
    return printable('\n'.join(lines))


# which row of params_by_part() a parameter counts in, by a word of its name; all others are norms
PARTS = dict(wte='token embeddings', shift='token embeddings', wpe='position embeddings',
             attn='attention', mlp='ffn', lm_head='head')


def params_by_part(model):
    """Return {part: number of parameters}. A tied matrix counts once, as token embeddings."""
    counts = {}
    for name, p in model.named_parameters():  # lists a shared tensor once, under wte
        part = next((PARTS[word] for word in name.split('.') if word in PARTS), 'norms')
        counts[part] = counts.get(part, 0) + p.numel()
    return counts


def parameter_lines(model):
    counts = params_by_part(model) | {
        'total': model.get_num_params(non_embedding=False),
        'trainable': sum(p.numel() for p in model.parameters() if p.requires_grad),
        'non-embedding': model.get_num_params(),
    }
    return ['parameters'] + [f'  {name:<24} {count:>16,}' for name, count in counts.items()]


def flops_lines(model):
    full, causal = model.flops_by_part(), model.flops_by_part(causal=True)
    title = f'FLOPs per token at sequence length {model.config.block_size}'
    note = 'matmuls only; causal counts half of the scores'
    rows = [(f'{part}, forward', full[part], causal[part]) for part in full]
    ratio = model.flops_per_token() / sum(full.values())  # 3, or less if some weights are frozen
    rows += [
        ('forward', sum(full.values()), sum(causal.values())),
        (f'training, {ratio:.3g} x forward',
         model.flops_per_token(), model.flops_per_token(causal=True)),
    ]
    lines = [f"{title:<42} {'full':>16} {'causal':>16}  {note}"]
    return lines + [f'  {name:<40} {a:>16,.0f} {b:>16,.0f}' for name, a, b in rows]


def training_memory(model, settings, device, dtype, gpu, mode='none', n=1):
    """Return {part: bytes} of a training step on each of n processes, as train.py estimates it."""
    accumulation = math.ceil(settings.get('gradient_accumulation_steps', 1) / n)
    present = memory(device)
    # A GPU is estimated with the kernels of a CPU. In bfloat16 some of them keep more than a GPU's.
    traced_dtype = 'float16' if gpu and dtype == 'bfloat16' else dtype
    sizes = memory_estimate(model.config, whole_batch_size(settings), traced_dtype, device,
                            accumulation, mode, n, settings.get('optimizer', 'adamw'),
                            lora=getattr(model, 'lora', None))
    if device.type == 'cpu' and not gpu:
        weights = sum(p.nbytes for p in model.parameters() if not p.is_meta)
        add_process(sizes, present.get('resident', present['peak']) - weights)
    return {part: size for part, size in sizes.items() if size and part != 'peak'}


def whole_batch_size(settings):
    batch_size = settings.get('batch_size', 1)
    return 1 if batch_size == 'auto' else batch_size


def gpu_lines(model, settings, dtype, device, gpu, on_one):
    """
    Tell whether a training step fits GPUs of a kind, `gpus` of them in settings, and how long it
    takes at the MFU in settings. `on_one` is {part: bytes} of the step on one GPU.
    """
    n, gib, peak = settings['gpus'], DATASHEETS[gpu][1], datasheet_peak(gpu, dtype)
    lines = [f'on {n} x {gpu}, by the datasheet']
    for mode, name in MODES.items():
        if (mode == 'none') != (n == 1):
            continue
        sizes = on_one
        if n > 1:
            sizes = training_memory(model, settings, device, dtype, gpu, mode, n)
        lines.append(f"  {'memory, ' + name:<24} {fit(sizes, gib, mode)}")
    if peak is None:
        return lines + [f"  {'speed':<24} not known, because the table has no peak for {dtype}"]
    mfu, max_iters = settings['mfu'], settings['max_iters']
    sequences = whole_batch_size(settings) * settings['gradient_accumulation_steps']
    tokens_per_iter = sequences * model.config.block_size
    speed = n * mfu * peak / model.flops_per_token()
    seconds = tokens_per_iter / speed
    return lines + [
        f"  {'speed':<24} {speed:,.0f} tokens/s if MFU is {100 * mfu:g} % (--mfu={mfu:g}) of "
        f'{peak / 1e12:g} TFLOP/s, dense {dtype}',
        f"  {'time':<24} {1000 * seconds:,.0f} ms per iteration of {tokens_per_iter:,} tokens; "
        f'{duration(seconds * max_iters)} for {max_iters:,} iterations, without evaluations',
    ]


def fit(sizes, gib, mode='none'):
    """Say whether {part: bytes} fits a GPU of so many GiB and, if not, what would help."""
    needed, usable = sum(sizes.values()) / GIB, USABLE_MEMORY * gib
    numbers = f'{needed:,.2f} GiB, and of its {gib} GiB about {usable:.0f} are free for tensors'
    if needed <= usable:
        return f'fits: {numbers}'
    if needed - sizes['activations'] / GIB > usable:
        remedy = 'use more of them' if mode == 'fsdp' else 'divide the states with --use_fsdp=True'
        return f'does not fit: {numbers}; {remedy}'
    return f'does not fit: {numbers}; try a smaller --batch_size or --activation_checkpointing=True'


def sampling_memory_lines(model):
    config = model.config
    return size_lines('memory to sample, bfloat16; on a CPU the cache is float32, twice this', {
        'weights': 2 * model.get_num_params(non_embedding=False),
        f'KV cache, {config.block_size} tokens': cache_bytes(config, config.block_size, 2),
    })


def size_lines(title, sizes):
    sizes = sizes | {'total': sum(sizes.values())}
    return [title] + [f'  {part:<24} {size / GIB:>12,.2f} GiB' for part, size in sizes.items()]


# ------------------------------------------------------------------------------------------------
# python model.py

def list_configs():
    """Print a table of the files in config/ that describe one model each."""
    print(f"{'config':<30} {'preset':<7} {'layers':>6} {'width':>6} {'heads':>6} {'block':>6} "
          f"{'vocab':>6} {'parameters':>14} {'non-embedding':>14} {'GFLOP/token':>12}")
    folder = os.path.join(ROOT, 'config')
    for name in sorted(os.listdir(folder)):
        if not name.endswith('.py') or name.startswith('ablate_'):
            continue
        settings, _ = configure(__file__, TRAIN, argv=[os.path.join(folder, name)])
        model = meta_model(settings)
        c = model.config
        print(f"{name:<30} {settings['arch_preset']:<7} {c.n_layer:>6} {c.n_embd:>6} "
              f'{c.n_head:>6} {c.block_size:>6} {c.vocab_size:>6} '
              f'{model.get_num_params(False):>14,} {model.get_num_params():>14,} '
              f'{model.flops_per_token() / 1e9:>12.4g}')


def consolidate_checkpoint(source, path, merge=False):
    """Write a checkpoint, sharded or not, as one file, as train.py would if not for `merge`."""
    saved = load_checkpoint(source, merge=merge)
    if os.path.lexists(path):
        raise UserError(f"'{path}' already exists: choose another name, or remove it first")
    try:
        with replacing(path) as f:
            own = 'path', 'merged'  # notes of load_checkpoint()
            save_checked({key: value for key, value in saved.items() if key not in own}, f)
    except (OSError, RuntimeError, ValueError) as e:
        raise UserError(f"'{path}' could not be written: {first_line(e)}") from e
    print(printable(f"{saved['path']} -> {path}"))


def export_checkpoint(source, path, dtype):
    """
    Write a checkpoint as a folder for transformers, or as a file for ONNX. Raise UserError if the
    path has any other extension; '.36b' in llama-1.36b is none.
    """
    extension = os.path.splitext(path)[1]
    if re.match(r'\.[A-Za-z]', extension) and extension != '.onnx':
        raise UserError(f"--export='{path}' has the unknown extension '{extension}': use .onnx for "
                        'ONNX, or a name without one, or that ends in /, for a Hugging Face folder')
    saved = load_weights(source)
    model = model_in(saved)
    if path.endswith('.onnx'):
        save_onnx(model, path)
    else:
        model.to(getattr(torch, 'float32' if dtype == 'auto' else dtype))
        model.save_pretrained(path, saved)
        if not os.path.exists(os.path.join(path, 'tokenizer.json')):
            print('NOTE: exported without a tokenizer, because the checkpoint names none that fits',
                  file=sys.stderr)
    print(printable(f"{saved['path']} -> {path}"))


def inspect_checkpoint(source):
    """Print the model in a checkpoint, its training progress, and its settings."""
    saved = load_weights(source)
    config = saved.get('config') or {}
    print(describe(model_in(saved), config, *pick_device()))
    lines = [f"checkpoint {saved['path']}"]
    lines += [f"  {'iterations':<24} {saved.get('iter_num')}"]
    best = saved.get('best_val_loss')
    lines += [f"  {'best val loss':<24} {'no evaluation yet' if best == math.inf else best}"]
    for split, values in (saved.get('losses') or {}).items():
        numbers = ', '.join(f'{key} {v:.4f}' for key, v in values.items())
        lines.append(f'  {split:<24} {numbers}')
    for key in ('tokenizer', 'torch_version'):
        lines.append(f'  {key:<24} {saved.get(key)!s:.120}')
    lines.append('config')
    lines += [f'  {key:<24} {shown(value, 200)}' for key, value in config.items()]
    print(printable('\n'.join(lines)))


def model_in(saved):
    """Return the model in a checkpoint dict. Raise UserError if it does not fit."""
    with user_errors():
        return GPT.from_dict(saved)


def main():
    ckpt = ''  # inspect this checkpoint: a file, or a run's out_dir
    consolidate = ''  # write the checkpoint, sharded or not, to this one file, as train.py would
    export = ''  # write the checkpoint to a folder for transformers, or to a .onnx file
    merge = ''  # write the checkpoint to this one file, LoRA's adapters merged with their base
    peft = ''  # write LoRA's adapters to a folder for Hugging Face's PEFT
    list = False  # print a table of every file in config/ with its counts
    device = 'auto'  # cuda, mps or cpu; or a GPU that is elsewhere: --device=H100 tells its costs
    gpus: PositiveInt = 1  # with --device=H100: how many of them
    mfu: Share = 0.4  # with --device=H100: the share of its peak that training reaches, a guess
    config, given = configure(__file__, TRAIN)
    for key in ('consolidate', 'export', 'merge', 'peft'):
        if config[key] and not config['ckpt']:
            raise UserError(f'--{key} needs --ckpt=FOLDER, the checkpoint to read')
    if config['list']:
        list_configs()
    elif config['consolidate']:
        consolidate_checkpoint(config['ckpt'], config['consolidate'])
    elif config['merge']:
        consolidate_checkpoint(config['ckpt'], config['merge'], merge=True)
    elif config['peft']:
        save_peft(config['ckpt'], config['peft'])
    elif config['export']:
        export_checkpoint(config['ckpt'], config['export'], config['dtype'])
    elif config['ckpt']:
        inspect_checkpoint(config['ckpt'])
    else:
        gpu, dtype = find_gpu(config['device']), config['dtype']
        if not gpu and config['gpus'] > 1:
            raise UserError(f"--gpus={config['gpus']} needs a GPU's name: --device=H100")
        if config['gradient_accumulation_steps'] % config['gpus']:
            raise UserError(f"--gpus={config['gpus']} cannot share gradient_accumulation_steps="
                            f"{config['gradient_accumulation_steps']}: give a multiple of it")
        if gpu and config['batch_size'] == 'auto':
            raise UserError(f"batch_size='auto' can only be found on a {gpu} itself; give a number")
        if gpu and dtype == 'auto':
            dtype = 'float16' if gpu in FLOAT16_ONLY else 'bfloat16'
        device, dtype = pick_device('cpu' if gpu else config['device'], dtype)
        print(describe(meta_model(config), config, device, dtype, gpu))
