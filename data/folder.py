"""
Data sets: where they are, their meta.json, and how a small one is written.

A data set is a folder of shards, train*.bin and val*.bin, and a meta.json. A shard is raw
little-endian uint16 or uint32 ids; meta.json has dtype, vocab_size, tokenizer, and the number of
tokens and crc32 of each file. nanoGPT's folders are also read: uint16, with meta.pkl or no meta at
all.
"""
import ast
import hashlib
import json
import math
import os
import pickle
import re
import zlib
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from engine.common import UserError, first_line, replacing
from engine.schema import check, read_json

HERE = Path(__file__).resolve().parent
DTYPES = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4'), 'int32': np.dtype('<i4')}
REMEDY = "run the data set's prepare.py again"


# what is read from a meta.json; other keys are for people
VOCAB_SIZE = range(1, 2**24 + 1)
TOKENIZER = {'name': str, 'chars?': (str, [str]), 'json?': str, 'eot?': (str, None)}
META = {
    'dtype?': tuple(DTYPES),
    'vocab_size?': VOCAB_SIZE,
    'tokenizer?': (str, dict),  # a dict has the fields of TOKENIZER
    'files?': dict,  # each has the fields of FILE
    'bytes?': dict,
    'documents?': dict,
    'chat_template?': str,
    'chat_separator?': range(2**24),
    'prepared_from?': str,
}
FILE = {'tokens?': int, 'crc32?': range(2**32)}


def read_meta(data_dir):
    """
    Return the meta.json of a data set as a dict. nanoGPT's meta.pkl is converted to the same form;
    {} if there is neither. UserError names a malformed file.
    """
    data_dir = Path(data_dir)
    if (data_dir / 'meta.json').exists():
        path = data_dir / 'meta.json'
        meta = read_json(path, dict)
    elif (data_dir / 'meta.pkl').exists():
        path = data_dir / 'meta.pkl'
        meta = read_nanogpt_meta(path)
    else:
        return {}
    check_meta(meta, path)
    return meta


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):  # any global could run code
        raise pickle.UnpicklingError(f'it wants to import {module}.{name}')


def read_nanogpt_meta(path):
    try:
        with open(path, 'rb') as f:
            table = PlainUnpickler(f).load()
        vocab_size = table['vocab_size']
        chars = [table['itos'][i] for i in range(vocab_size)]
    except Exception as e:  # a broken pickle raises nearly anything
        message = f"{path} is not nanoGPT's table of characters ({e!r}): {REMEDY}"
        raise UserError(message) from None
    tokenizer = {'name': 'char', 'chars': chars}
    return {'dtype': 'uint16', 'vocab_size': vocab_size, 'tokenizer': tokenizer}


def check_meta(meta, path):
    try:
        check(meta, META)
        if isinstance(meta.get('tokenizer'), dict):
            check(meta['tokenizer'], TOKENIZER, 'tokenizer')
        for name, entry in meta.get('files', {}).items():
            check(entry, FILE, f'files.{name}')
        if (meta.get('dtype') == 'int32') != ('chat_separator' in meta):
            raise ValueError('conversations need both, dtype int32 and chat_separator')
    except ValueError as e:
        raise UserError(f'{path} cannot be used: {e}: {REMEDY}') from None


FACTS = {'about': str, 'download_mb': float, 'vocab_size': (None, VOCAB_SIZE), 'needs_flags': str,
         'takes_tokenizer': bool}


def prepare_facts(script):
    """
    Return the facts that a data set's prepare.py states about itself, read without running it:
    'about' is the first line of its docstring, the others are its assignments to these names.
    """
    facts = {
        'about': '',
        'download_mb': 0,
        'vocab_size': None,
        'needs_flags': '',  # flags that the script requires, such as '--input=FILE'
        'takes_tokenizer': False,  # whether --tokenizer=... makes other ids than vocab_size
    }
    try:
        tree = ast.parse(Path(script).read_text(encoding='utf-8'))
        facts['about'] = (ast.get_docstring(tree) or '').split('\n')[0]
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) in facts:
                facts[node.targets[0].id] = ast.literal_eval(node.value)
        check(facts, FACTS)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as e:
        raise UserError(f'{script} cannot be read: {first_line(e)}') from None
    return facts


def find_datasets(dataset):
    """
    Return the data sets that --dataset names, as [(name, share, folder)]; shares add up to 1. A
    name is a folder of data/, any other folder, or a text file; a:0.7,b:0.3 names several.
    """
    named = re.findall(r'([^,]+?):([^:,/]+)(?:,|$)', dataset)
    rejoined = ','.join(f'{name}:{share}' for name, share in named)
    if os.path.exists(dataset) or rejoined != dataset:
        named = [(dataset, '1')]
    named = [(name, parse_share(dataset, name, share)) for name, share in named]
    total = sum(share for _, share in named)
    return [(name, share / total, dataset_folder(name)) for name, share in named]


def parse_share(dataset, name, text):
    with suppress(ValueError):
        share = float(text)
        if 0 < share < math.inf:
            return share
    raise UserError(f"dataset '{dataset}': {name} needs a share above 0, as in a:0.7,b:0.3")


def dataset_folder(name):
    path = Path(name)
    if path.is_file():  # prepared in a cache folder, a new one if the file changes
        stat = path.stat()
        identity = f'{path.resolve()} {stat.st_size} {stat.st_mtime_ns}'
        version = hashlib.sha256(identity.encode()).hexdigest()[:8]
        return HERE / '.cache' / f'{path.name.split(".")[0]}-{version}'
    if path.is_dir() and not (HERE / name).is_dir():
        return path.resolve()
    return HERE / name


def find_trained_on(config):
    """
    Call find_datasets() for the config in a checkpoint. Someone else's checkpoint may name data to
    read but no prepare.py to run, so data that is not prepared yet raises UserError.
    """
    dataset = (config or {}).get('dataset')
    found = find_datasets(dataset) if isinstance(dataset, str) and dataset else []
    prepared = [is_prepared(folder) for _, _, folder in found]
    if not found or not all(prepared):
        message = f'the data set that the checkpoint was trained on, {dataset!r:.100}, is not here'
        raise UserError(message)
    return found


def is_prepared(folder):
    return any(folder.glob('train*.bin')) and any(folder.glob('val*.bin'))


def dtype_for(vocab_size, chat=None):
    if chat:
        return 'int32'  # negative ids are only read; see data/packing.py
    return 'uint16' if vocab_size <= 2**16 else 'uint32'


def write_dataset(data_dir, splits, meta):
    """
    Write train.bin, val.bin, ... and meta.json into data_dir: all of them or, on an error, none.

    `splits` is {'train': ids, 'val': ids}; ids are an integer array, or bytes for one id per byte.
    `meta` needs vocab_size and tokenizer; dtype and files are added. Return the meta written. Raise
    UserError for an empty split or an id outside 0..vocab_size-1.
    """
    data_dir = Path(data_dir)
    vocab_size = meta['vocab_size']
    dtype = dtype_for(vocab_size, 'chat_separator' in meta)
    contents, files = {}, {}
    for split, ids in splits.items():
        path = data_dir / f'{split}.bin'
        ids = np.frombuffer(ids, np.uint8) if isinstance(ids, bytes) else np.asarray(ids)
        check_ids(np.maximum(ids, ~ids) if dtype == 'int32' else ids, vocab_size, path)
        contents[path] = ids.astype(DTYPES[dtype]).data
        files[path.name] = {'tokens': len(ids), 'crc32': zlib.crc32(contents[path])}
    meta = {**meta, 'dtype': dtype, 'files': files}
    # ExitStack renames the last file first. Shards without meta.json would pass for nanoGPT's;
    # meta.json without its shards is noticed.
    contents[data_dir / 'meta.json'] = meta_json(meta)
    data_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for path, content in contents.items():
            f = stack.enter_context(replacing(path))
            f.write(content)
            f.flush()
            os.fsync(f.fileno())  # so that a full disk is noticed before the first rename
    return meta


def check_ids(ids, vocab_size, path):
    if len(ids) == 0:
        raise UserError(f'{path} would be empty: the {path.stem} split needs more text')
    if ids.min() < 0 or ids.max() >= vocab_size:
        at = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        message = f'id {ids[at]} at token {at} is outside 0..{vocab_size - 1}'
        raise UserError(f'{path}: {message}: raise vocab_size to fit')


def meta_json(meta):
    return (json.dumps(meta, indent=1) + '\n').encode()
