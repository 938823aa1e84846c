"""
LoRA (https://arxiv.org/abs/2106.09685): train small matrices beside the frozen weights of a model.
A checkpoint holds these adapters alone, and names the base that everything but a resume adds them
to. `lora` is a dict: the settings in LORA_SETTINGS, and the base with its checksum.
"""
import json
import os
import zlib

import torch
from torch import nn

from engine.checked_file import checksum, reading
from engine.checkpoint import load_checkpoint
from engine.common import UserError, printable
from engine.export import split_rows, write_folder
from engine.families import family_of, names_there
from engine.huggingface import is_pretrained, load_weights
from model import GPT, GPTConfig, Linear

LORA_SETTINGS = 'lora_rank', 'lora_alpha', 'lora_targets'


def add_adapters(model, lora):
    """Freeze a model, and add an adapter to each Linear of its blocks that lora_targets names."""
    model.lora = lora
    model.requires_grad_(False)
    blocks, targets = model.transformer.h, lora['lora_targets'].split(',')
    linears = {f'.{name}.': m for name, m in blocks.named_modules() if isinstance(m, nn.Linear)}
    for target in targets:
        if not any(f'.{target}.' in name for name in linears):
            raise UserError(f"lora_targets: no Linear of a block is called '{target}'; use attn, "
                            'mlp, attn.c_attn, attn.c_proj, mlp.c_fc or mlp.c_proj')
    for name, linear in linears.items():
        if any(f'.{target}.' in name for target in targets):
            add_adapter(linear, lora['lora_rank'], lora['lora_alpha'])


def add_adapter(linear, rank, alpha):
    """Make a Linear return W x + b + alpha / rank * B A x, with new matrices A and B."""
    options = dict(bias=False, device=linear.weight.device)
    linear.lora_A = Linear(linear.in_features, rank, **options)
    linear.lora_B = Linear(rank, linear.out_features, **options)
    nn.init.zeros_(linear.lora_B.weight)  # so the model begins as its base
    linear.register_forward_hook(
        lambda linear, args, y: y + alpha / rank * linear.lora_B(linear.lora_A(*args)))


def start_adapters(model, ckpt, config, resuming):
    """
    Add the adapters of a run to its base: those in a checkpoint to resume, whose settings replace
    those in `config`, or new ones if config['lora_rank'] is not 0.
    """
    lora = ckpt.get('lora')
    if resuming and lora:
        config.update({key: lora[key] for key in LORA_SETTINGS})
    elif config['lora_rank']:
        if ckpt.get('merged'):  # another CPU may round the sum otherwise: another checksum
            raise UserError(f"'{ckpt['path']}' holds adapters itself; make a base of it first: "
                            f"python model.py --ckpt={ckpt['path']} --merge=FILE")
        base = config['init_from'] if is_pretrained(config['init_from']) else ckpt['path']
        if os.path.realpath(os.path.dirname(base)) == os.path.realpath(config['out_dir']):
            raise UserError(f"the adapters will need '{base}' as it is: choose another --out_dir")
        lora = {key: config[key] for key in LORA_SETTINGS} | dict(base=base, crc32=crc_of(ckpt))
        torch.manual_seed(config['seed'])
    if lora:
        add_adapters(model, lora)


def own_weights(model):
    """Return (state dict, facts) to save: of a model with adapters, these alone and its `lora`."""
    state = model.state_dict(keep_vars=True)  # keep_vars keeps a tied tensor one object
    if not hasattr(model, 'lora'):
        return state, {}
    return {name: t for name, t in state.items() if t.requires_grad}, {'lora': model.lora}


def crc_of(ckpt):
    """Return one checksum of all weights in a checkpoint."""
    crcs = [checksum(tensor) for _, tensor in sorted(ckpt['model'].items())]
    return zlib.crc32(repr(crcs).encode())


def base_weights(ckpt):
    """
    Return the state dict of the model that the adapters in a checkpoint were trained beside. Raise
    UserError if it is gone, or not what it was.
    """
    path, block_size = ckpt['lora']['base'], ckpt['model_args']['block_size']
    problem = f"'{ckpt['path']}' holds adapters of '{path}'"
    beside = os.path.join(os.path.dirname(ckpt['path']), os.pardir, path)
    if not os.path.exists(path) and os.path.exists(beside):
        path = beside  # this process runs in another folder than train.py did
    try:
        base = load_weights(path, block_size)
    except UserError as e:
        raise UserError(f'{problem}, which cannot be read: {e}') from e
    if crc_of(base) != ckpt['lora']['crc32']:
        raise UserError(f'{problem}, whose weights have changed since: bring the old ones back')
    with reading(path):
        model = GPT.from_dict(base).float()
        model.crop_block_size(block_size)
    return model.state_dict()


def pairs_in(state):
    """Yield (name of the Linear, A (rank, in), B (out, rank)) of the adapters in a state dict."""
    for name in state:
        if name.endswith('.lora_A.weight'):
            linear = name.removesuffix('.lora_A.weight')
            yield linear, state[name], state[f'{linear}.lora_B.weight']


def merged(ckpt):
    """Return a checkpoint of adapters as one of ordinary weights, which cannot be resumed."""
    with reading(ckpt['path']):  # the adapters may not fit the base
        weights, lora = base_weights(ckpt), ckpt['lora']
        for linear, A, B in pairs_in(ckpt['model']):
            weights[f'{linear}.weight'] += lora['lora_alpha'] / lora['lora_rank'] * (B @ A)
    own = 'lora', 'optimizer', 'scaler'
    kept = {key: value for key, value in ckpt.items() if key not in own}
    return kept | {'model': weights, 'merged': True}


def save_peft(source, folder):
    """
    Write the adapters in a checkpoint to a folder for Hugging Face's PEFT, which loads them beside
    the base as --export writes it. Raise UserError if that has no class in transformers.
    """
    ckpt = load_checkpoint(source, merge=False)
    if 'lora' not in ckpt:
        raise UserError(f"'{ckpt['path']}' has no adapters; only a run with --lora_rank has them")
    lora, config = ckpt['lora'], GPTConfig(**ckpt['model_args'])
    family, tensors, modules = family_of(config), {}, []
    for linear, A, B in pairs_in(ckpt['model']):
        names = names_there(f'{linear}.weight', family)
        for name, rows in zip(names, split_rows(B, names, config)):
            modules.append(name.removesuffix('.weight'))
            prefix = f'base_model.model.{modules[-1]}'
            tensors[f'{prefix}.lora_A.weight'] = A.clone()  # safetensors refuses shared memory
            tensors[f'{prefix}.lora_B.weight'] = rows.clone()
    about = dict(peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=lora['base'],
                 r=lora['lora_rank'], lora_alpha=lora['lora_alpha'], target_modules=modules,
                 fan_in_fan_out=bool(family.transposed))
    write_folder(folder, tensors, 'adapter_model.safetensors',
                 {'adapter_config.json': json.dumps(about, indent=2)})
    print(printable(f"{ckpt['path']} -> {folder}"))
