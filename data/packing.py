"""
Pack conversations into windows when a run begins, so that their files fit every block_size.

The files have int32 ids: an id that the model learns as itself, and one that it only reads, such as
those of a question, as ~id, which is negative.
"""
from bisect import bisect_right

import numpy as np

from engine.common import UserError


def pack(lengths, size):
    """
    Divide documents of these lengths among windows of `size` ids. Each window takes the longest
    document that fits, again and again until none does. Return a list of document numbers for each.
    """
    buckets = {}
    for number, length in enumerate(lengths):
        buckets.setdefault(length, []).append(number)
    left, windows = sorted(buckets), []  # the lengths of documents that are not in a window yet
    while left:
        window, room = [], size
        while at := bisect_right(left, room):
            length = left[at - 1]
            window.append(buckets[length].pop())
            room -= length
            if not buckets[length]:
                left.pop(at - 1)
        windows.append(window)
    return windows


class PackedShard:
    """
    A Shard of conversations, read as if it were one of windows. Window n begins at token n *
    block_size and has block_size + 1 ids: whole conversations, then separators. A conversation that
    is longer is cut at its end.
    """
    def __init__(self, shard, separator, block_size):
        self.shard, self.path, self.separator = shard, shard.path, separator
        self.block_size = block_size
        self.starts = np.flatnonzero(np.memmap(shard.path, shard.dtype, 'r') == ~separator)
        if not len(self.starts) or self.starts[0]:
            raise UserError(f'{self.path} does not begin with a conversation: prepare it again')
        lengths = np.diff(self.starts, append=shard.n_tokens)
        self.n_cut = int((lengths > block_size + 1).sum())
        self.lengths = lengths.clip(max=block_size + 1).tolist()
        self.windows = pack(self.lengths, block_size + 1)
        self.n_tokens = len(self.windows) * block_size + 1

    def read(self, starts, length):
        """Return windows by their offsets, (len(starts), length)."""
        ids = np.full((len(starts), length), ~self.separator)
        for row, start in zip(ids, starts):
            at = 0
            for number in self.windows[start // self.block_size]:
                n = self.lengths[number]
                row[at:at + n] = self.shard.read([self.starts[number]], n)[0]
                at += n
        return ids

    def offset(self, start, column):
        """Return the token offset in the file of an id of a window."""
        for number in self.windows[start // self.block_size]:
            if column < self.lengths[number]:
                return self.starts[number] + column
            column -= self.lengths[number]
