"""A run on disk: write, read, check."""
import io
import math
import os
import pickle
import zipfile
import zlib
from dataclasses import fields

import torch

from engine.common import first_line
from model import GPT, GPTConfig


def check_crcs(path):
    """ValueError if what a checkpoint file (a path, or its bytes as a file) holds does not match its own CRCs, which torch.load does not check."""
    with zipfile.ZipFile(path) as z:
        damaged = z.testzip()
    if damaged is not None:
        raise ValueError(f"'{damaged}' inside it does not match its checksum")


def save_checked(obj, path):
    """torch.save to a file that, when this returns, is on the disk and has been read back."""
    with open(path, 'wb') as f:
        torch.save(obj, f)
        f.flush()
        os.fsync(f.fileno())
    check_crcs(path)


class MetadataUnpickler(pickle.Unpickler):
    """torch.distributed.checkpoint describes its files in a pickle, .metadata; this one knows the classes of tensors in there, none of which runs code."""
    KNOWN = ({('torch.distributed.checkpoint.metadata', name) for name in (
        'Metadata', 'MetadataIndex', 'StorageMeta', 'TensorStorageMetadata', 'TensorProperties', 'ChunkStorageMetadata', '_MEM_FORMAT_ENCODING')} |
        {('torch.distributed.checkpoint.filesystem', '_StorageInfo'), ('torch', 'Size'), ('torch.serialization', '_get_layout')} |
        {('torch', name) for name in ('float32', 'bfloat16', 'float16', 'float64', 'int64', 'bool')} |
        {(module, name) for module in ('pathlib', 'pathlib._local') for name in ('PosixPath', 'WindowsPath')})

    def find_class(self, module, name):
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f'{module}.{name}')
        return super().find_class(module, name)


def read_metadata(path):
    """What .metadata in the folder of a sharded checkpoint says: which part of which tensor is where."""
    with open(os.path.join(path, '.metadata'), 'rb') as f:
        return MetadataUnpickler(f).load()


def read_part(path, place):
    """A tensor in a sharded checkpoint; place: one of .metadata's. ValueError or OSError if it is not there or not whole."""
    with open(os.path.join(path, os.path.basename(place.relative_path)), 'rb') as f:
        f.seek(place.offset)
        data = io.BytesIO(f.read(place.length))
    check_crcs(data)
    data.seek(0)
    return torch.load(data, map_location='cpu', weights_only=True)


def fill(tensors, path):
    """
    Fill {name: (a tensor, or rows of one; the number of its first row)} from a sharded checkpoint. Of that every part is read and checked, one
    at a time. ValueError if numbers are missing.
    """
    missing = sum(t.numel() for t, _ in tensors.values())
    for index, place in read_metadata(path).storage_data.items():
        part, (tensor, first) = read_part(path, place), tensors.get(index.fqn, (None, 0))
        if tensor is None:
            continue
        if tensor.dim():
            at = index.offset[0] - first
            low, high = max(0, at), max(0, at, min(len(tensor), at + len(part)))
            tensor = tensor[low:high][:, *(slice(start, start + n) for start, n in zip(index.offset[1:], part.shape[1:]))]
            part = part[low - at:high - at]
        tensor.copy_(part)
        missing -= part.numel()
    if missing:
        raise ValueError(f"'{path}' lacks {missing} numbers")


def load_sharded(path, moments=True):
    """The dict that ckpt.pt would hold, from a folder that train.py wrote by torch.distributed.checkpoint, whatever the number of processes was."""
    check_crcs(os.path.join(path, 'info.pt'))
    ckpt = torch.load(os.path.join(path, 'info.pt'), map_location='cpu', weights_only=True)
    if file_crc32(os.path.join(path, '.metadata')) != ckpt.pop('metadata_crc32'):
        raise ValueError('its .metadata does not match its checksum')
    tensors = {name: torch.empty(t.size, dtype=t.properties.dtype) for name, t in read_metadata(path).state_dict_metadata.items()
               if moments or name.startswith('model/')}
    fill({name: (t, 0) for name, t in tensors.items()}, path)
    ckpt['model'] = {name: tensors[f'model/{stored}'] for name, stored in ckpt.pop('names').items()}  # tied tensors are stored once
    ckpt['optimizer'] = {'state': {} if moments else None, 'param_groups': ckpt.pop('param_groups')}
    for name in sorted((name.split('/') for name in tensors if name.startswith('optimizer/')), key=lambda name: int(name[1])):
        ckpt['optimizer']['state'].setdefault(int(name[1]), {})[name[2]] = tensors['/'.join(name)]
    return ckpt


def file_crc32(path):
    with open(path, 'rb') as f:
        return zlib.crc32(f.read())


def newest_checkpoint(folder):
    """Of what a run saved in its folder, ckpt.pt or ckpt_sharded, what is further on; None if it has saved nothing."""
    names = ['ckpt.pt', 'ckpt_sharded']
    if not os.path.exists(os.path.join(folder, 'ckpt_sharded')):
        names += ['ckpt_sharded_prev']  # a kill came between the two renames that replace a folder
    exist = lambda names: [path for path in (os.path.join(folder, name) for name in names) if os.path.exists(path)]
    found = exist(names) or exist(['ckpt_best.pt', 'ckpt_sharded_best'])  # a kill came in the midst of the first save, which is also the best

    def reached(path):  # not by their times, which a copy changes
        try:
            return read_facts(path)['iter_num']
        except (ValueError, KeyError):  # a damaged one comes first, so that it is noticed
            return math.inf
    return max(found, key=reached) if len(found) > 1 else next(iter(found), None)


def read_facts(path):
    """The dict in a checkpoint file, or in a sharded one's info.pt, at once: tensors are not read, CRCs not checked. ValueError names a file without one."""
    try:
        facts = torch.load(os.path.join(path, 'info.pt') if os.path.isdir(path) else path, map_location='cpu', weights_only=True, mmap=True)
        return dict(facts)
    except Exception as e:  # zip, pickle and torch each have their own
        raise ValueError(f"checkpoint '{path}' cannot be used: {first_line(e)}") from e


def load_checkpoint(path, moments=True):
    """
    The dict in a checkpoint, on the CPU: a file, a sharded one (a folder), or a run's folder, of which the newest. Only tensors and
    plain values are ever read, and the files' own CRCs are checked. ValueError names the file and what is wrong with it. Without moments, the
    optimizer's state from a sharded one is checked and left to fill(), as None.
    """
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, '.metadata')):
        path = newest_checkpoint(path) or os.path.join(path, 'ckpt.pt')
    if not os.path.exists(path):
        raise ValueError(f"no checkpoint at '{path}'")
    try:
        if os.path.isdir(path):
            ckpt = load_sharded(path, moments)
        else:
            check_crcs(path)
            ckpt = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(ckpt, dict) or not isinstance(ckpt.get('model'), dict) or not isinstance(ckpt.get('model_args'), dict):
            raise ValueError("it has no 'model' and 'model_args'")
    except pickle.UnpicklingError as e:
        raise ValueError(f"checkpoint '{path}' is refused: it holds something besides tensors and plain values, which could run code") from e
    except Exception as e:  # zip and torch each have their own; to a reader they are one thing
        raise ValueError(f"checkpoint '{path}' cannot be used: {first_line(e)}") from e
    ckpt['path'] = path
    return ckpt


def model_of(ckpt):
    """The model in a checkpoint dict, in eval mode."""
    known = {f.name for f in fields(GPTConfig)}
    try:
        unknown = [k for k in ckpt['model_args'] if k not in known]
        if unknown:
            raise ValueError(f"unknown model_args {', '.join(map(str, unknown))}")
        with torch.device('meta'):
            model = GPT(GPTConfig(**ckpt['model_args']))
        # nanoGPT's have a prefix from torch.compile, and causal masks (attn.bias) where torch was older than 2.0
        state = {k.removeprefix('_orig_mod.'): v for k, v in ckpt['model'].items() if not k.endswith('.attn.bias')}
        model.load_state_dict(state, assign=True)
    except Exception as e:
        raise ValueError(f"checkpoint '{ckpt['path']}' is not a model we can hold: {' '.join(str(e).split())[:300]}") from e
    if model.config.weight_tying:
        model.transformer.wte.weight = model.lm_head.weight
    return model.requires_grad_(True).eval()
