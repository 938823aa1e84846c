"""
Read shards of token ids and return (B, T) batches. A batch depends only on the seed and the sample
indices.

A data set is a folder of shards, train*.bin and val*.bin, and a meta.json. A shard is raw
little-endian uint16 or uint32 ids; meta.json has dtype, vocab_size, tokenizer, and the number of
tokens and crc32 of each file. Two other formats are also read: nanoGPT's folders (uint16, with
meta.pkl or no meta at all) and llm.c's shards (a header of 256 int32 before the ids).
"""
import ast
import collections
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
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.packing import PackedShard
from engine.common import UserError, first_line, replacing
from engine.schema import check, read_json

HERE = Path(__file__).resolve().parent
DTYPES = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4'), 'int32': np.dtype('<i4')}
LLMC_MAGIC, LLMC_HEADER_BYTES = 20240520, 256 * 4
REMEDY = "run the data set's prepare.py again"


# ------------------------------------------------------------------------------------------------
# data sets and their meta.json

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


# ------------------------------------------------------------------------------------------------
# the order of samples

def mix(*words):
    """
    Return a 64-bit hash of integer arrays that broadcast together, mixed as in SplitMix64 (Steele
    et al. 2014, Fast splittable pseudorandom number generators).
    """
    h = np.zeros(1, np.uint64)
    for word in words:
        h = (h ^ np.asarray(word, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h


def permute(i, n, key):
    """
    Return the place to which a shuffle of range(n) sends i: a bijection for every key, without a
    table.

    `i` is (B,) integers in [0, n). `key`, an integer or (B,), chooses the shuffle. The result is
    (B,) int64. A Feistel network permutes an a x b grid just larger than n, and is applied again if
    the result is outside the range (Black and Rogaway 2002, https://eprint.iacr.org/2001/012).
    """
    a = np.uint64(math.isqrt(n - 1) + 1)
    b = np.uint64(-(-n // int(a)))
    i, key = np.broadcast_arrays(np.asarray(i, np.uint64), np.asarray(key, np.uint64))
    i = i.copy()
    outside = np.arange(len(i))
    while len(outside):
        left, right = np.divmod(i[outside], b)
        for r in range(0, 20, 2):  # 20 rounds; with 12, some orders of 5 windows are too frequent
            left = (left + mix(key[outside], r, right) % a) % a
            right = (right + mix(key[outside], r + 1, left) % b) % b
        i[outside] = left * b + right
        outside = outside[i[outside] >= n]
    return i.astype(np.int64)


# ------------------------------------------------------------------------------------------------
# shards

class Shard(NamedTuple):
    path: Path
    dtype: np.dtype
    header_bytes: int  # before the ids
    n_tokens: int

    def read(self, starts, length):
        """Return `length` ids from each of the token offsets, (len(starts), length)."""
        ids = np.empty((len(starts), length), np.int64)
        # plain reads: the pages of a memory map would count as memory of the process
        with open(self.path, 'rb') as f:
            for row, start in enumerate(starts):
                at = self.header_bytes + int(start) * self.dtype.itemsize
                data = os.pread(f.fileno(), length * self.dtype.itemsize, at)
                if len(data) < length * self.dtype.itemsize:
                    self.refuse_shorter(os.fstat(f.fileno()).st_size)
                ids[row] = np.frombuffer(data, self.dtype)
        return ids

    def offset(self, start, column):
        """Return the token offset of an id of a window."""
        return start + column

    def refuse_shorter(self, size):
        now = max(0, size - self.header_bytes) // self.dtype.itemsize
        raise UserError(f'{self.path} has become shorter: {self.n_tokens} tokens when it was '
                        f'opened, {now} now: {REMEDY}, then resume')


@functools.cache  # size and mtime_ns are part of the key, so a file that changed is read again
def crc32(path, size, mtime_ns):
    crc = 0
    with open(path, 'rb') as f:
        while chunk := f.read(2**18):  # stays in the CPU's cache; 4 MB at a time are half as fast
            crc = zlib.crc32(chunk, crc)
    return crc


def check_shard(path, meta, block_size, checked):
    """
    Return the Shard in a file, or raise a UserError that names the problem. `checked` lists the
    large files known to match their crc32, as {name: [bytes, mtime_ns, crc32]}, and is extended.
    """
    stat = path.stat()
    if stat.st_size == 0:
        raise UserError(f'{path} is empty: {REMEDY}')
    dtype, header_bytes = read_header(path, meta)
    n_tokens, rest = divmod(stat.st_size - header_bytes, dtype.itemsize)
    if rest:
        message = f'{stat.st_size} bytes are not a whole number of {dtype.name} ids'
        raise UserError(f'{path}: {message}: {REMEDY}')
    shard = Shard(path, dtype, header_bytes, n_tokens)
    listed = meta.get('files', {}).get(path.name, {})
    holds = f'{path} holds {n_tokens} tokens'
    if n_tokens != listed.get('tokens', n_tokens):
        raise UserError(f'{holds} of {dtype.name}, meta.json says {listed["tokens"]}: {REMEDY}')
    if n_tokens < block_size + 1 and 'chat_separator' not in meta:
        needed = f'one window needs block_size + 1 = {block_size + 1}'
        raise UserError(f'{holds}, {needed}: lower block_size or prepare more text')
    if 'crc32' in listed:
        check_crc32(path, stat, listed['crc32'], checked)
    elif n_tokens > 1024:
        check_tail(shard)
    return shard


def read_header(path, meta):
    """Return (dtype, header_bytes) of a shard."""
    with open(path, 'rb') as f:
        header = np.frombuffer(f.read(12).ljust(12, b'\0'), '<i4')
    if header[0] != LLMC_MAGIC:
        return DTYPES[meta.get('dtype', 'uint16')], 0
    _, version, n_tokens = header.tolist()
    size = path.stat().st_size
    if version != 1 or size != LLMC_HEADER_BYTES + 2 * n_tokens:
        says = f"llm.c's header says version {version} and {n_tokens} tokens"
        remedy = 'only whole files of version 1 can be read, so fetch or write it again'
        raise UserError(f'{path}: {says}, which does not fit its {size} bytes: {remedy}')
    return DTYPES['uint16'], LLMC_HEADER_BYTES


def check_crc32(path, stat, expected, checked):
    known = [stat.st_size, stat.st_mtime_ns, expected]
    if checked.get(path.name) == known:
        return
    if crc32(path, stat.st_size, stat.st_mtime_ns) != expected:
        message = 'does not match its crc32 in meta.json, so its bytes have changed'
        raise UserError(f'{path} {message}: {REMEDY}')
    if stat.st_size >= 2**26:
        checked[path.name] = known


def check_tail(shard):
    """
    Raise UserError if a shard ends in zeros: without a checksum, they are the only sign of a file
    that was allocated but not completely written.
    """
    tail = shard.read([shard.n_tokens - 1024], 1024)
    if not tail.any():
        message = 'ends in 1024 zeros, as an interrupted preparation leaves it'
        raise UserError(f'{shard.path} {message}: {REMEDY}')


def check_shards(data_dir, split, block_size):
    """
    Return the Shards of a split after checking them all. UserError names the file that is wrong.
    """
    if not data_dir.is_dir():
        raise UserError(f'{data_dir} is not a folder: name a data set, or {REMEDY}')
    meta = read_meta(data_dir)
    paths = sorted(data_dir.glob(f'{split}*.bin'))
    if not paths:
        raise UserError(f'{data_dir / (split + "*.bin")}: there is no such file: {REMEDY}')
    if meta.get('files'):
        listed = {data_dir / name for name in meta['files'] if name.startswith(split)}
        for path in sorted(listed.symmetric_difference(paths)):
            if path in listed:
                raise UserError(f'{path} is missing: bring it back, or {REMEDY}')
            raise UserError(f'{path} is not listed in meta.json: remove it, or {REMEDY}')
    # a large shard is only read whole once, or after a change: 20 GB take a minute
    memory = data_dir / '.checked.json'
    checked = {}
    with suppress(OSError, UserError):  # if it is missing or damaged, the shards are read again
        checked = read_json(memory, dict)
    before = dict(checked)
    with ThreadPoolExecutor() as pool:  # several checksums at once
        shards = list(pool.map(lambda p: check_shard(p, meta, block_size, checked), paths))
    if checked != before:
        with suppress(OSError), replacing(memory, 'w') as f:  # the folder may be read-only
            json.dump(checked, f)
    return shards


# ------------------------------------------------------------------------------------------------
# batches

def fingerprint(ids):
    """
    Return an int that identifies windows of (B, T + 1) ids. Fingerprints add up, so neither the
    order of the windows nor their division into batches matters.
    """
    return sum(zlib.crc32(window.tobytes()) for window in np.asarray(ids, '<i8'))


@functools.cache
def copy_stream(device):
    """Return the CUDA stream on which batches are copied to a device."""
    import torch
    return torch.cuda.Stream(device)


class Loader:
    """
    Batches from one split of a data set, as a pure function of (seed, sample index): there is no
    state to save.

    A window is block_size inputs and the same ids shifted by one as targets; windows of an epoch do
    not overlap. Sample indices 0, 1, 2, ... count windows over the whole run, n_windows per epoch,
    so ranks and micro-batches only need to take different indices.

    With `shuffle`, every epoch has its own order; otherwise the order is that of the files. With
    `shift`, every epoch also moves the windows of each shard by an offset below block_size, so that
    many epochs show tokens at every position; this costs at most one window per shard. An id that
    is not below vocab_size is an error.

    Raise UserError for a folder or shard that is missing, truncated, empty, too short or altered,
    before any batch is read.
    """

    def __init__(self, data_dir, split, block_size, *, seed=1337, shuffle=True, shift=True,
                 vocab_size=None, device='cpu'):
        if block_size < 1:
            raise UserError(f'block_size is {block_size} and should be at least 1')
        self.shards = check_shards(Path(data_dir), split, block_size)
        separator = read_meta(data_dir).get('chat_separator')
        self.packed = separator is not None  # with conversations, of which some ids are targets
        if self.packed:
            self.shards = [PackedShard(shard, separator, block_size) for shard in self.shards]
        n_tokens = np.array([shard.n_tokens for shard in self.shards])
        usable = n_tokens - 1  # the last token is only ever a target
        # a shard that is shifted has one window less, and the others room to move
        shift = shift and shuffle and not self.packed
        windows = np.maximum(1, usable // block_size - shift)
        self.max_offset = np.minimum(usable - windows * block_size, block_size - 1) * shift
        self.ends = np.cumsum(windows)
        self.first = self.ends - windows
        self.n_tokens, self.n_windows = int(n_tokens.sum()), int(self.ends[-1])
        self.block_size, self.seed, self.shuffle = block_size, seed % 2**64, shuffle
        # torch is imported late because data/prepare.py's many processes do not need it
        import torch
        self.vocab_size, self.device = vocab_size, torch.device(device)

    def locate(self, indices):
        """
        Return shard number and token offset, (B,) each, of the windows for sample indices (B,).
        """
        epoch, window = np.divmod(np.asarray(indices, np.int64), self.n_windows)
        if self.shuffle:
            window = permute(window, self.n_windows, mix(self.seed, epoch))
        shard = np.searchsorted(self.ends, window, side='right')
        n_offsets = (self.max_offset[shard] + 1).astype(np.uint64)
        offset = (mix(self.seed, epoch, shard) % n_offsets).astype(np.int64)
        return shard, (window - self.first[shard]) * self.block_size + offset

    def read(self, numbers, starts):
        """
        Return inputs and targets in host memory, (B, T) each, from shard numbers and token offsets.
        A target that is not to be learned is -1.
        """
        import torch
        ids = np.empty((len(starts), self.block_size + 1), np.int64)
        for number in np.unique(numbers):
            rows = numbers == number
            ids[rows] = self.shards[number].read(starts[rows], self.block_size + 1)
        targets = np.maximum(ids[:, 1:], -1)
        ids = np.maximum(ids, ~ids)  # only conversations have negative ids
        if self.vocab_size is not None and (ids >= self.vocab_size).any():
            row, column = np.argwhere(ids >= self.vocab_size)[0]
            shard = self.shards[numbers[row]]
            found = f'id {ids[row, column]} at token {shard.offset(starts[row], column)}'
            remedy = f"raise vocab_size, or {REMEDY} with the model's tokenizer"
            problem = f'{found} is not below vocab_size {self.vocab_size}'
            raise UserError(f'{shard.path}: {problem}: {remedy}')
        x, y = torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets)
        if self.device.type == 'cuda':
            x, y = x.pin_memory(), y.pin_memory()
        return x, y

    def to_device(self, x, y):
        """
        Return x and y on the device. On CUDA they are copied beside the work that is queued there,
        and work that is queued from here on waits for them.
        """
        if self.device.type != 'cuda':
            return x.to(self.device), y.to(self.device)
        import torch
        computing, copying = torch.cuda.current_stream(self.device), copy_stream(self.device)
        with torch.cuda.stream(copying):
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        computing.wait_stream(copying)
        for ids in (x, y):  # or a later copy could reuse their memory while they are still read
            ids.record_stream(computing)
        return x, y

    def batch(self, indices):
        """
        Return inputs x and targets y, int64 (B, T) each on the device, for sample indices (B,). If
        an id is too large, UserError names the file, the token offset, the id and vocab_size.
        """
        return self.to_device(*self.read(*self.locate(indices)))

    def stream(self, index_arrays, ahead=1):
        """
        Yield batch(indices) for each array of an iterable, read in a thread at least `ahead`
        batches ahead. An error in the thread is raised by the next() that reaches its group.
        """
        index_arrays = iter(index_arrays)
        with ThreadPoolExecutor(1) as pool:
            reading = None
            while group := self.next_group(index_arrays, ahead):
                next_reading = pool.submit(self.read_group, group)
                if reading:
                    yield from itertools.starmap(self.to_device, reading.result())
                reading = next_reading
            if reading:
                yield from itertools.starmap(self.to_device, reading.result())

    def next_group(self, index_arrays, ahead):
        """
        Return `ahead` batches to be read together, or up to 16 small ones, because waking a thread
        takes longer than reading one.
        """
        group = list(itertools.islice(index_arrays, 1))
        if group:
            n = min(16, 2**18 // (len(group[0]) * self.block_size))
            group += itertools.islice(index_arrays, max(n, ahead) - 1)
        return group

    def read_group(self, group):
        sizes = [len(indices) for indices in group]
        x, y = self.read(*self.locate(np.concatenate(group)))
        return zip(x.split(sizes), y.split(sizes))


class Mixture(Loader):
    """
    Several Loaders sampled in fixed shares; itself a pure function of the sample index.

    Among the first n samples, each set has its share to within a few windows, for any n: the first
    set takes the samples at which floor(i * share) grows, the second takes its part of the rest in
    the same way, and so on. Each set is read in its own order, over its own epochs. An epoch of the
    mixture (n_windows) ends before any set would begin again.
    """

    def __init__(self, loaders, shares):
        self.loaders = loaders
        self.block_size, self.vocab_size = loaders[0].block_size, loaders[0].vocab_size
        self.device, self.packed = loaders[0].device, loaders[0].packed
        self.shards = [shard for loader in loaders for shard in loader.shards]
        self.first_shard = np.cumsum([0] + [len(loader.shards) for loader in loaders])
        # integers, so that rounding loses no sample
        self.parts = [round(share * 10**6) for share in shares]
        if min(self.parts) < 1:
            message = f'a share of {min(shares):g} is too small to be drawn'
            raise UserError(f'{message}: the smallest is one millionth')
        self.n_tokens = sum(loader.n_tokens for loader in loaders)
        total = sum(self.parts)
        pairs = zip(loaders, self.parts)
        lasts = [(loader.n_windows - 1) * total // part for loader, part in pairs]
        self.n_windows = max(1, min(lasts))

    def choose(self, indices):
        """Return (number of the Loader, sample index there), (B,) each, for sample indices (B,)."""
        indices = np.array(indices, np.int64)
        chosen, within = np.empty_like(indices), np.empty_like(indices)
        waiting = np.ones(len(indices), bool)
        for number, part in enumerate(self.parts):
            rest = sum(self.parts[number:])
            divisor = math.gcd(part, rest)
            part, rest = part // divisor, rest // divisor
            before, after = indices * part // rest, (indices + 1) * part // rest
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


class MicroBatches:
    """
    An endless iterator of one rank's micro-batches (X, Y), read ahead in a thread.

    Iteration i reads the next batch_size * accumulation_steps samples. Ranks take micro-batches in
    turn. The samples of an iteration depend neither on the size of a micro-batch nor on the number
    of ranks. accumulation_steps is the total over all ranks.
    """

    def __init__(self, loader, batch_size, accumulation_steps, rank=0, world_size=1, iter_num=0):
        self.loader, self.rank, self.world_size = loader, rank, world_size
        self.batch_size, self.accumulation_steps = batch_size, accumulation_steps
        self.start(iter_num)

    def start(self, iter_num):
        self.per_rank = max(1, self.accumulation_steps // self.world_size)
        self.batches = self.loader.stream(self.indices(iter_num), self.per_rank)
        self.fetched = collections.deque()

    def indices(self, iter_num):
        for i in itertools.count(iter_num):
            for m in range(self.per_rank):
                number = i * self.accumulation_steps + m * self.world_size + self.rank
                yield np.arange(self.batch_size) + number * self.batch_size

    def __iter__(self):
        return self

    def __next__(self):
        self.fetch()
        return self.fetched.popleft()

    def fetch(self):
        """
        Read all micro-batches of the next iteration, unless that is done. Then none of them can
        fail when other ranks are already computing theirs.
        """
        if not self.fetched:
            self.fetched.extend(itertools.islice(self.batches, self.per_rank))

    def mean_targets(self, parallel):
        """Return the mean number of targets of the next iteration's micro-batches, of all ranks."""
        self.fetch()
        count = sum((Y >= 0).sum() for _, Y in self.fetched)
        return parallel.all_reduce(count).clamp(min=1) / self.accumulation_steps

    def smaller(self):
        """
        Return (batch_size, accumulation_steps) of the next smaller micro-batch, with as many
        sequences per iteration, or None if a micro-batch is a single sequence.
        """
        if self.batch_size == 1:
            return None
        parts = next(n for n in range(2, self.batch_size + 1) if self.batch_size % n == 0)
        return self.batch_size // parts, self.accumulation_steps * parts

    def shrink(self, iter_num):
        """Switch to the next smaller micro-batch and start iteration iter_num again."""
        self.close()
        self.batch_size, self.accumulation_steps = self.smaller()
        self.start(iter_num)

    def close(self):
        """End the reading thread."""
        self.batches.close()
