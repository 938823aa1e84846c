"""
Read shards of token ids and return (B, T) batches. A batch depends only on the seed and the sample
indices.
"""
import collections
import functools
import itertools
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.folder import REMEDY, read_meta
from data.packing import PackedShard
from data.shards import check_shards
from engine.common import UserError

# Torch is imported in functions, because data/prepare.py's many processes do not need it.

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
        ids = np.maximum(ids, ~ids)  # in conversations, ~id stands for an id that is no target
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
