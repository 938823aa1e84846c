"""Shards of token ids in, (B, T) batches out; what a step reads depends on nothing but the seed and the sample index.

A data set is a folder: shards train*.bin and val*.bin of raw little-endian uint16 or uint32 ids, and a meta.json with
dtype, vocab_size, tokenizer, and the number of tokens and crc32 of each file. Two relatives are read as they are:
nanoGPT's folders (uint16, with meta.pkl or no meta at all) and llm.c's shards (256 int32 of header before the ids).
"""
import ast
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

DTYPES = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}
LLMC_MAGIC, LLMC_HEADER_BYTES = 20240520, 256 * 4
REMEDY = "run the data set's prepare.py again"


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):  # every global is a way to run code, and a table of characters needs none
        raise pickle.UnpicklingError(f'it wants to import {module}.{name}')


def read_meta(data_dir):
    """The meta.json of a data set as a dict; nanoGPT's meta.pkl is turned into the same shape; {} without either.

    ValueError names a file that is malformed, has an unknown dtype, or is a pickle with more in it than plain values."""
    path, nanogpt = Path(data_dir) / 'meta.json', Path(data_dir) / 'meta.pkl'
    if path.exists():
        try:
            meta = json.loads(path.read_text(encoding='utf-8'))
        except ValueError as e:
            raise ValueError(f'{path} is not JSON ({e}): {REMEDY}') from None
    elif nanogpt.exists():
        path = nanogpt
        try:
            with open(path, 'rb') as f:
                pickled = _PlainUnpickler(f).load()
            vocab_size = pickled['vocab_size']
            chars = [pickled['itos'][i] for i in range(vocab_size)]
        except Exception as e:  # broken pickles raise nearly anything
            raise ValueError(f"{path} is not nanoGPT's table of characters ({e!r}): {REMEDY}") from None
        meta = {'dtype': 'uint16', 'vocab_size': vocab_size, 'tokenizer': {'name': 'char', 'chars': chars}}
    else:
        return {}
    files = meta.get('files', {}) if isinstance(meta, dict) else None
    if not (isinstance(files, dict) and all(isinstance(entry, dict) for entry in files.values())):
        raise ValueError(f'{path} should hold an object, and "files" in it an object a file name: {REMEDY}')
    if str(meta.get('dtype', 'uint16')) not in DTYPES:
        raise ValueError(f'{path}: unknown dtype {meta["dtype"]!r}, use one of {", ".join(DTYPES)}')
    vocab_size = meta.get('vocab_size', 1)
    if type(vocab_size) is not int or vocab_size < 1:
        raise ValueError(f'{path}: vocab_size is {vocab_size!r}, it should be a positive integer: {REMEDY}')
    return meta


def prepare_facts(script):
    """What a data set's prepare.py says of itself, read without running it: {'about': first line of its docstring,
    'download_mb': ..., 'vocab_size': ...}."""
    tree = ast.parse(Path(script).read_text(encoding='utf-8'))
    facts = {'about': (ast.get_docstring(tree) or '').split('\n')[0], 'download_mb': 0, 'vocab_size': None}
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) in facts:
            facts[node.targets[0].id] = ast.literal_eval(node.value)
    return facts


def find_datasets(dataset):
    """What --dataset names, as [(name, share, folder)]: a folder of data/ or a path of its own; a file of text, whose folder in
    data/.cache changes whenever the file does; or several, as in a:0.7,b:0.3. ValueError for shares that are none."""
    named = re.findall(r'([^,]+?):([^:,/]+)(?:,|$)', dataset)
    if os.path.exists(dataset) or ','.join(f'{name}:{share}' for name, share in named) != dataset:
        named = [(dataset, '1')]
    found = []
    for name, share in named:
        folder, path = Path(__file__).resolve().parent / name, Path(name)
        try:
            share = float(share)
        except ValueError:
            share = 0.0
        if not 0 < share < math.inf:
            raise ValueError(f"dataset '{dataset}': {name} needs a share above 0, as in a:0.7,b:0.3")
        if path.is_file():
            stat = path.stat()
            version = hashlib.sha256(f'{path.resolve()} {stat.st_size} {stat.st_mtime_ns}'.encode()).hexdigest()[:8]
            folder = Path(__file__).resolve().parent / '.cache' / f'{path.name.split(".")[0]}-{version}'
        elif not folder.is_dir() and path.is_dir():
            folder = path.resolve()
        found.append((name, share, folder))
    return [(name, share / sum(s for _, s, _ in found), folder) for name, share, folder in found]


def find_trained_on(config):
    """find_datasets of what the config in a checkpoint names. A checkpoint's word is good for reading ids and not for running a prepare.py, so
    ValueError where they are not there."""
    dataset = (config or {}).get('dataset')
    found = find_datasets(dataset) if isinstance(dataset, str) and dataset else []
    if not found or not all(any(folder.glob(f'{split}*.bin')) for _, _, folder in found for split in ('train', 'val')):
        raise ValueError(f'the data set that the checkpoint was trained on, {dataset!r:.100}, is not here')
    return found


def write_dataset(data_dir, splits, meta):
    """Write train.bin, val.bin, ... and meta.json into data_dir, all of them or, when something fails, none.

    splits: {'train': ids, 'val': ids}, each an integer array of token ids or bytes (one id a byte). meta needs vocab_size
    and tokenizer; whatever else it has is kept, dtype and files are added. ValueError for an empty split or an id outside
    0..vocab_size-1; OSError from the file system passes through. Returns the meta written."""
    data_dir, vocab_size = Path(data_dir), meta['vocab_size']
    dtype = 'uint16' if vocab_size <= 2**16 else 'uint32'
    contents, files = {}, {}
    for split, ids in splits.items():
        path = data_dir / f'{split}.bin'
        ids = np.frombuffer(ids, np.uint8) if isinstance(ids, bytes) else np.asarray(ids)
        if len(ids) == 0:
            raise ValueError(f'{path} would be empty: the {split} split needs more text')
        if ids.min() < 0 or ids.max() >= vocab_size:
            at = int(np.argmax((ids < 0) | (ids >= vocab_size)))
            raise ValueError(f'{path}: id {ids[at]} at token {at} is outside 0..{vocab_size - 1}: raise vocab_size to fit')
        contents[path] = ids.astype(DTYPES[dtype]).data
        files[path.name] = {'tokens': len(ids), 'crc32': zlib.crc32(contents[path])}
    meta = {**meta, 'dtype': dtype, 'files': files}
    # renamed first: shards without it would pass for nanoGPT's, while it without its shards is noticed
    contents = {data_dir / 'meta.json': (json.dumps(meta, indent=1) + '\n').encode(), **contents}
    data_dir.mkdir(parents=True, exist_ok=True)
    write_files(contents)
    return meta


def write_files(contents):
    """Write {path: bytes}. No name appears before every byte is on the disk, and nothing temporary stays behind."""
    temporary = {path: path.with_name(f'{path.name}.{os.getpid()}.tmp') for path in contents}
    try:
        for path, data in contents.items():
            with open(temporary[path], 'wb') as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        for path in contents:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            with suppress(OSError):  # renamed already, or never created
                path.unlink()


def _hash(*words):
    """A 64-bit hash of integer arrays that broadcast together; the mixing is SplitMix64's (Steele et al. 2014)."""
    h = np.zeros(1, np.uint64)
    for word in words:
        h = (h ^ np.asarray(word, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h


def permute(i, n, key):
    """Where a shuffle of range(n) sends i: a bijection for every key, computed without a table of n entries.

    i: (B,) integers in [0, n); key: an integer or (B,), choosing the shuffle; returns (B,) int64. A Feistel network on an
    a x b grid just above n, walked on from where it leaves the range (Black and Rogaway 2002, Ciphers with Arbitrary
    Finite Domains, https://eprint.iacr.org/2001/012)."""
    a = np.uint64(math.isqrt(n - 1) + 1)
    b = np.uint64(-(-n // int(a)))
    i, key = (v.copy() for v in np.broadcast_arrays(np.asarray(i, np.uint64), np.asarray(key, np.uint64)))
    walking = np.arange(len(i))
    while len(walking):
        left, right = np.divmod(i[walking], b)
        for r in range(0, 20, 2):  # with 12, the orders of 5 windows are not yet equally likely
            left = (left + _hash(key[walking], r, right) % a) % a
            right = (right + _hash(key[walking], r + 1, left) % b) % b
        i[walking] = left * b + right
        walking = walking[i[walking] >= n]
    return i.astype(np.int64)


@functools.lru_cache(maxsize=None)
def crc32(path, size, mtime_ns):  # the cache spares a second Loader on the same file the second reading
    crc = 0
    with open(path, 'rb') as f:
        while chunk := f.read(2**18):  # stays in the cache: 4 MB at a time take twice as long
            crc = zlib.crc32(chunk, crc)
    return crc


def check_shard(path, meta, block_size, checked):
    """Check one shard from outside to inside; returns its numpy dtype, the bytes before its ids, its number of tokens.

    checked: what is known to match its crc32, {file name: [bytes, mtime_ns, crc32]}, which this adds to where the file is large."""
    dtype, header_bytes, listed = DTYPES[meta.get('dtype', 'uint16')], 0, meta.get('files', {}).get(path.name)
    stat = path.stat()
    if stat.st_size == 0:
        raise ValueError(f'{path} is empty: {REMEDY}')
    with open(path, 'rb') as f:
        header = np.frombuffer(f.read(12).ljust(12, b'\0'), '<i4')
    if header[0] == LLMC_MAGIC:
        dtype, header_bytes = DTYPES['uint16'], LLMC_HEADER_BYTES
        if header[1] != 1 or stat.st_size != header_bytes + header[2].item() * dtype.itemsize:
            raise ValueError(f"{path}: llm.c's header says version {header[1]} and {header[2]} tokens, which {stat.st_size} "
                             'bytes are not: only whole files of version 1 are read, so fetch or write it again')
    n_tokens, rest = divmod(stat.st_size - header_bytes, dtype.itemsize)
    if rest:
        raise ValueError(f'{path}: {stat.st_size} bytes are not a whole number of {dtype.name} ids: {REMEDY}')
    if listed and n_tokens != listed.get('tokens', n_tokens):
        raise ValueError(f'{path} holds {n_tokens} tokens of {dtype.name}, meta.json says {listed["tokens"]}: {REMEDY}')
    if n_tokens < block_size + 1:
        raise ValueError(f'{path} holds {n_tokens} tokens, one window needs block_size + 1 = {block_size + 1}: '
                         'lower block_size or prepare more text')
    if listed and 'crc32' in listed:
        known = [stat.st_size, stat.st_mtime_ns, listed['crc32']]
        if checked.get(path.name) != known and crc32(path, stat.st_size, stat.st_mtime_ns) != listed['crc32']:
            raise ValueError(f'{path} does not match its crc32 in meta.json, so its bytes have changed: {REMEDY}')
        if stat.st_size >= 2**26:
            checked[path.name] = known
    elif n_tokens > 1024:  # without a checksum this is the one sign of a file that was sized first and never filled
        if not np.memmap(path, dtype, 'r', header_bytes)[-1024:].any():
            raise ValueError(f'{path} ends in 1024 zeros, as an interrupted preparation leaves it: {REMEDY}')
    return dtype, header_bytes, n_tokens


def fingerprint(ids):
    """An int that tells which windows these are, (B, T + 1) ids each: fingerprints add up, so neither order nor batches matter."""
    return sum(zlib.crc32(window.tobytes()) for window in np.asarray(ids, '<i8'))


class Loader:
    """Batches from one split of a data set, as a pure function of (seed, sample index): there is no state to save.

    A window is block_size inputs and the same shifted by one as targets; windows of an epoch do not overlap. Sample
    indices 0, 1, 2, ... count windows over the whole run, n_windows of them an epoch, so ranks and micro-batches only
    need to take different indices. With shuffle, every epoch has its own order; with shift too, every epoch moves the
    windows of a shard by its own offset below block_size, so that many epochs show tokens at every position, for at most
    one window a shard. Without shuffle the order is that of the files. vocab_size, when given, bounds the ids.

    ValueError, before any batch, for a folder or shard that is missing, cut, empty, too short, or altered."""

    def __init__(self, data_dir, split, block_size, *, seed=1337, shuffle=True, shift=True, vocab_size=None, device='cpu'):
        data_dir = Path(data_dir)
        if block_size < 1:
            raise ValueError(f'block_size is {block_size}, it should be at least 1')
        if not data_dir.is_dir():
            raise ValueError(f'{data_dir} is not a folder: name a data set, or {REMEDY}')
        meta = read_meta(data_dir)
        self.paths = sorted(data_dir.glob(f'{split}*.bin'))
        listed = {data_dir / name for name in meta.get('files', {}) if name.startswith(split)}
        if not self.paths:
            raise ValueError(f'{data_dir / (split + "*.bin")}: there is no such file: {REMEDY}')
        for path in sorted(listed.symmetric_difference(self.paths)) if meta.get('files') else []:
            problem = 'missing: bring it back' if path in listed else 'not listed in meta.json: remove it'
            raise ValueError(f'{path} is {problem}, or {REMEDY}')
        memory, checked = data_dir / '.checked.json', {}  # a large shard is read whole once, and again when it has changed: 20 GB take a minute
        with suppress(OSError, ValueError):
            checked = dict(json.loads(memory.read_text()))
        before = dict(checked)
        with ThreadPoolExecutor() as pool:  # checksums of several shards at once
            shards = list(pool.map(lambda path: check_shard(path, meta, block_size, checked), self.paths))
        if checked != before:
            with suppress(OSError):  # a folder for reading only
                write_files({memory: json.dumps(checked).encode()})
        self.dtypes, self.header_bytes, n_tokens = zip(*shards)
        usable = np.array(n_tokens) - 1  # the last token is only ever a target
        shift = shift and shuffle
        windows = np.maximum(1, usable // block_size - shift)
        self.max_offset = np.minimum(usable - windows * block_size, block_size - 1) * shift
        self.ends = np.cumsum(windows)
        self.first = self.ends - windows
        self.n_tokens, self.n_windows = sum(n_tokens), int(self.ends[-1])
        self.block_size, self.seed, self.shuffle = block_size, seed % 2**64, shuffle
        import torch  # here, because preparing a data set takes many processes and none of them needs it
        self.vocab_size, self.device = vocab_size, torch.device(device)

    def locate(self, indices):
        """Shard number and token offset, (B,) each, of the windows that sample indices (B,) stand for."""
        epoch, window = np.divmod(np.asarray(indices, np.int64), self.n_windows)
        if self.shuffle:
            window = permute(window, self.n_windows, _hash(self.seed, epoch))
        shard = np.searchsorted(self.ends, window, side='right')
        offset = _hash(self.seed, epoch, shard) % (self.max_offset[shard] + 1).astype(np.uint64)
        return shard, (window - self.first[shard]) * self.block_size + offset.astype(np.int64)

    def _read(self, shards, starts):
        ids = np.empty((len(starts), self.block_size + 1), np.int64)
        for shard in np.unique(shards):
            dtype, header_bytes = self.dtypes[shard], self.header_bytes[shard]
            with open(self.paths[shard], 'rb') as f:  # plain reads: the pages of a mapping would count as the process's memory
                for row in np.flatnonzero(shards == shard):
                    at = header_bytes + int(starts[row]) * dtype.itemsize
                    ids[row] = np.frombuffer(os.pread(f.fileno(), ids.shape[1] * dtype.itemsize, at), dtype)
        if self.vocab_size is not None and (bad := ids >= self.vocab_size).any():
            row, column = np.argwhere(bad)[0]
            raise ValueError(f'{self.paths[shards[row]]}: id {ids[row, column]} at token {starts[row] + column} is not below '
                             f"vocab_size {self.vocab_size}: raise vocab_size, or {REMEDY} with the model's tokenizer")
        import torch
        x, y = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(ids[:, 1:].copy())
        return (x.pin_memory(), y.pin_memory()) if self.device.type == 'cuda' else (x, y)

    def _to_device(self, xy):
        return tuple(t.to(self.device, non_blocking=self.device.type == 'cuda') for t in xy)

    def batch(self, indices):
        """Inputs x and targets y, int64 (B, T) each on the device, of sample indices (B,).

        ValueError names file, token offset, id and vocab_size where an id is too large."""
        return self._to_device(self._read(*self.locate(indices)))

    def stream(self, index_arrays):
        """Yield batch(indices) for each array of an iterable, read ahead in a thread.

        Small batches are read up to 16 at a time, since waking a thread takes longer than reading one. An error of the
        thread is raised at the next() that comes to its group."""
        index_arrays, reading = iter(index_arrays), None

        def read(group):
            places = self.locate(np.concatenate(group))
            return zip(*(t.split([len(indices) for indices in group]) for t in self._read(*places)))

        with ThreadPoolExecutor(1) as pool:
            for first in index_arrays:
                n_more = min(16, 2**18 // (len(first) * self.block_size)) - 1
                ahead = pool.submit(read, [first, *itertools.islice(index_arrays, max(0, n_more))])
                yield from map(self._to_device, reading.result() if reading else ())
                reading = ahead
            yield from map(self._to_device, reading.result() if reading else ())


class Mixture(Loader):
    """Several Loaders drawn from in fixed shares, itself a pure function of the sample index.

    Of any first n samples, each set has its share to within a few windows: the first set takes the samples at which floor(i * share) grows,
    the second its part of the rest in the same way, and so on. Each set is read in its own order, over its own epochs. An epoch of
    all (n_windows) ends before any set would begin again."""

    def __init__(self, loaders, shares):
        self.loaders, first = loaders, loaders[0]
        self.block_size, self.vocab_size, self.device = first.block_size, first.vocab_size, first.device
        for key in ('paths', 'dtypes', 'header_bytes'):
            setattr(self, key, [value for loader in loaders for value in getattr(loader, key)])
        self.first_shard = np.cumsum([0] + [len(loader.paths) for loader in loaders])
        self.parts = [round(share * 10**6) for share in shares]  # integers, so that no rounding can lose a sample
        if min(self.parts) < 1:
            raise ValueError(f'a share of {min(shares):g} is too small to be drawn: a millionth is the least')
        self.n_tokens = sum(loader.n_tokens for loader in loaders)
        self.n_windows = max(1, min((loader.n_windows - 1) * sum(self.parts) // part for loader, part in zip(loaders, self.parts)))

    def choose(self, indices):
        """(number of the Loader, sample index there), (B,) each, of sample indices (B,)."""
        indices = np.array(indices, np.int64)
        chosen, within, waiting = np.empty_like(indices), np.empty_like(indices), np.ones(len(indices), bool)
        for number, part in enumerate(self.parts):
            rest = sum(self.parts[number:])
            divisor = math.gcd(part, rest)
            before, after = (n * (part // divisor) // (rest // divisor) for n in (indices, indices + 1))
            taken = waiting & (after > before)
            chosen[taken], within[taken] = number, before[taken]
            waiting &= ~taken
            indices = indices - before
        return chosen, within

    def locate(self, indices):
        chosen, within = self.choose(indices)
        shard, start = np.empty_like(chosen), np.empty_like(chosen)
        for number in np.unique(chosen):
            rows = chosen == number
            shard[rows], start[rows] = self.loaders[number].locate(within[rows])
        return shard + self.first_shard[chosen], start
