"""Write checkpoints while training goes on: the thread, and whether memory allows a copy."""
import threading

import torch

from engine.common import GIB
from engine.machine import free_memory

LARGE = 10 ** 8  # bytes; a smaller checkpoint is on disk within a second


class Background(threading.Thread):
    """Call work() in a thread. If it raises an error, the attribute `error` holds it."""
    def __init__(self, work):
        super().__init__(daemon=True)
        self.work, self.error = work, None
        self.start()

    def run(self):
        try:
            self.work()
        except BaseException as e:  # SystemExit on ranks other than 0
            self.error = e


class Copies:
    """Decides for each checkpoint of a run whether its tensors are copied, to be written later."""
    def __init__(self, parallel):
        self.parallel = parallel
        self.copied = 0  # bytes of the previous copy
        self.said_scarce = False

    def worth_making(self, sets, least=LARGE):
        """
        Return whether to copy these sets and write them while training goes on. They must have more
        than `least` bytes, and the copy may take half of the free memory; if that is too little,
        say so once.
        """
        sizes = {kind: size_of(tensors) for kind, tensors in sets.items()}
        if self.parallel.mode == 'zero1':  # each process has its own share of the moments
            sizes['optimizer'] = sum(self.parallel.gather_objects(sizes['optimizer']))
        size = sum(sizes.values())
        # the allocator may keep the memory of the previous copy, which then does not count as free
        free = free_memory(torch.device('cpu')) + self.copied
        scarce = self.parallel.all_max(int(size > least and free < 2 * size))
        if scarce and not self.said_scarce and self.parallel.master:
            print('NOTE: training waits while checkpoints are written, because a copy of '
                  f'{size / GIB:.1f} GiB would take more than half of the free memory', flush=True)
        self.said_scarce = self.said_scarce or scarce
        self.copied = size if size > least and not scarce else 0
        return self.copied > 0


def size_of(tensors):
    """Return the bytes of a dict of tensors. A tied one counts once."""
    distinct = {id(t): t for t in tensors.values()}.values()
    return sum(t.numel() * t.element_size() for t in distinct)
