"""
Read and write one file of a checkpoint: a dict of tensors and plain values, saved by torch.save
with 'checksums', {name: CRC-32}, of its tensors. The zip format has checksums of its own, which
torch.load does not verify, and which a flipped bit in the zip's directory escapes.

To change a tensor by hand, remove 'checksums' before saving the dict again.
"""
import contextlib
import errno
import os
import pickle
import shutil
import zipfile
import zlib

import torch

from engine.common import UserError, first_line
from engine.schema import check


@contextlib.contextmanager
def reading(path):
    """Turn whatever goes wrong in reading a checkpoint into a UserError that names its file."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError as e:
        raise UserError(f"checkpoint '{path}' is refused: it contains objects other than "
                        'tensors and plain values, which could run code') from e
    except Exception as e:  # zip, pickle and torch raise different types
        raise UserError(f"checkpoint '{path}' cannot be used: {first_line(e)}") from e


def read_file(path, **kwargs):
    """
    Return the dict in a checkpoint file, on the CPU, after verifying its checksums. UserError names
    the file and the problem.
    """
    with reading(path):
        content = load_zip(path, **kwargs)
        expected = content.pop('checksums', {})
        check(expected, {str: int}, 'checksums')
        tensors = distinct_tensors(content)
        if not tensors.keys() <= expected.keys():  # of nanoGPT or an earlier version
            check_zip(path)
        for name, crc in expected.items():
            if name in tensors and checksum(tensors[name]) != crc:
                raise ValueError(f"'{name}' does not match its checksum")
    return content


def load_zip(path, **kwargs):
    """Return the dict in a checkpoint file, with tensors that are not verified yet."""
    check_zip(path, skip_tensors=True)
    content = torch.load(path, map_location='cpu', weights_only=True, **kwargs)
    check(content, dict)
    return content


def check_zip(path, skip_tensors=False):
    """
    Raise ValueError if an entry of the zip file that torch.save writes is damaged. torch.load does
    not verify these checksums.
    """
    with zipfile.ZipFile(path) as z:
        for entry in z.infolist():
            # torch.load does not read an entry that is marked as a folder, and returns other bytes
            damaged = entry.external_attr & 0x10
            if not (skip_tensors and '/data/' in entry.filename):
                damaged = damaged or not is_whole(z, entry)
            if damaged:
                raise ValueError(f"'{entry.filename}' inside it does not match its checksum")


def is_whole(z, entry):
    """Return whether the bytes of an entry in an open zip file match their checksum."""
    try:
        with z.open(entry) as f:
            while f.read(2 ** 20):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def distinct_tensors(value):
    """
    Return {name: tensor} of the tensors in nested dicts, lists and tuples. A tied tensor has only
    its first name, such as 'model/lm_head.weight'. Raise ValueError for tensors that are not dense.
    """
    found, seen = {}, set()
    for name, t in tensors_in(value):
        if t.layout != torch.strided or t.is_meta or t.is_quantized:
            raise ValueError(f"'{name}' must be a dense tensor")
        identity = t.data_ptr(), t.dtype, t.shape, t.stride()
        if identity not in seen:
            found[name] = t
        seen.add(identity)
    return found


def tensors_in(value, name=''):
    if isinstance(value, torch.Tensor):
        yield name, value
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors_in(inner, f'{name}/{key}' if name else str(key))


def checksum(tensor):
    """Return the CRC-32 of a tensor's bytes."""
    tensor = tensor.detach().cpu().contiguous().view(-1)
    return zlib.crc32(tensor.view(torch.uint8).numpy())


NO_SPACE = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


def save_checked(content, f):
    """
    Save a dict, with the checksums of its tensors, to an open file. Flush the file to disk, and
    read it back to check it. OSError says how much space is needed if there is too little.
    """
    tensors = distinct_tensors(content)
    checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
    try:
        torch.save(content | {'checksums': checksums}, f)
        f.flush()
        os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # torch hides it behind its own
        if getattr(cause, 'errno', None) not in NO_SPACE:
            raise
        needed = sum(tensor.nbytes for tensor in tensors.values())
        free = shutil.disk_usage(os.path.dirname(f.name) or '.').free + os.path.getsize(f.name)
        raise OSError(f'{os.strerror(cause.errno)}: it needs {needed / 1e6:,.1f} MB, and '
                      f'{free / 1e6:,.1f} MB are free') from e
    read_file(f.name, mmap=True)
