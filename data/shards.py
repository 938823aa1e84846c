"""
Shards, files of token ids: read and check them, or write them so that they can be cut back after a
kill. llm.c's shards, which have a header of 256 int32 before the ids, can be read, too.
"""
import functools
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.folder import DTYPES, REMEDY, read_meta
from engine.common import UserError, replacing
from engine.schema import read_json

LLMC_MAGIC, LLMC_HEADER_BYTES = 20240520, 256 * 4


# ------------------------------------------------------------------------------------------------
# read and check

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
# write

class Shards:
    """
    The shards of one split, to append to: train_00000.bin and so on if `name` is train. `record`
    describes the existing ones: a dict of documents, bytes (of text), skipped (documents left out)
    and shards, [{'tokens': ..., 'crc32': ...}].
    """

    def __init__(self, folder, name, dtype, tokens_per_shard, record):
        self.folder, self.name = folder, name
        self.width, self.tokens_per_shard = dtype.itemsize, tokens_per_shard
        self.documents, self.text_bytes = record['documents'], record['bytes']
        self.skipped = record['skipped']
        self.shards = [dict(shard) for shard in record['shards']]
        self.file = None

    def record(self):
        """Return a copy of the record; only the last shard can still change."""
        shards = self.shards[:-1] + [dict(shard) for shard in self.shards[-1:]]
        return {'documents': self.documents, 'bytes': self.text_bytes, 'skipped': self.skipped,
                'shards': shards}

    def path(self, number):
        return self.folder / f'{self.name}_{number:05d}.bin'

    def tokens(self):
        return sum(shard['tokens'] for shard in self.shards)

    def cut_back(self):
        """
        Remove what was written after the record. Raise ValueError if a file is shorter than it
        says.
        """
        for number, shard in enumerate(self.shards):
            size = shard['tokens'] * self.width
            if self.path(number).stat().st_size < size:
                raise ValueError(f'{self.path(number)} is shorter than it was')
            os.truncate(self.path(number), size)
        for path in self.folder.glob(f'{self.name}_*.bin'):
            if int(path.stem[-5:]) >= len(self.shards):
                path.unlink()

    def append(self, encoded):
        """
        Write ids at the end, over as many shards as they take. Return whether a shard is full now.
        """
        self.documents += encoded.documents
        self.text_bytes += encoded.text_bytes
        self.skipped += len(encoded.skipped)
        ids, filled = memoryview(encoded.ids), False
        while len(ids):
            if not self.shards or self.shards[-1]['tokens'] == self.tokens_per_shard:
                self.shards.append({'tokens': 0, 'crc32': 0})
            room = self.tokens_per_shard - self.shards[-1]['tokens']
            self.write(ids[:room * self.width])
            ids = ids[room * self.width:]
            if self.shards[-1]['tokens'] == self.tokens_per_shard:
                self.close()
                filled = True
        return filled

    def write(self, ids):
        """Write ids to the last shard."""
        if self.file is None:
            self.file = open(self.path(len(self.shards) - 1), 'ab')
        self.file.write(ids)
        last = self.shards[-1]
        last['tokens'] += len(ids) // self.width
        last['crc32'] = zlib.crc32(ids, last['crc32'])

    def join_short_tail(self):
        """
        Append a short last shard to the previous one, because a shard shorter than a window cannot
        be used. Its file stays, so that this can be done again after a kill.
        """
        if len(self.shards) > 1 and self.shards[-1]['tokens'] < self.tokens_per_shard // 10:
            self.close()
            tail = self.path(len(self.shards) - 1).read_bytes()
            self.shards.pop()
            self.write(tail)
        self.close()

    def sync(self):
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self):
        if self.file:
            self.sync()
            self.file.close()
            self.file = None

    def listed(self):
        """Return {file name: shard}, as in meta.json."""
        return {self.path(number).name: shard for number, shard in enumerate(self.shards)}
