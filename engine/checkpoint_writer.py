"""
Write a checkpoint in one of two forms: whole tensors in one file, or the pieces of each process in
a folder. Their format is in engine/checkpoint.py.
"""
import contextlib
import os

from engine.checked_file import read_file, save_checked
from engine.checkpoint import optimizer_state
from engine.common import create, first_line, remove, sync_folder
from engine.parallel import copy_to_host


@contextlib.contextmanager
def together(parallel, group):
    """Run this block on every process. If it fails on one of them, raise OSError on all of them."""
    problem = None
    try:
        yield
    except (OSError, RuntimeError, ValueError) as e:
        problem = first_line(e)
    problems = [p for p in parallel.gather_objects(problem, group) if p]
    if problems:
        raise OSError(problems[0])


class WholeTensors:
    """All tensors, whole, on rank 0, which writes them to one file."""
    def __init__(self, sets, parallel, copy):
        self.parallel = parallel
        self.sets = {kind: parallel.gather(tensors, copy) for kind, tensors in sets.items()}

    def write(self, path, param_groups, facts, group):
        with together(self.parallel, group):
            if self.parallel.master:
                check_finite(self.sets['model'].values())
                optimizer = optimizer_state(self.sets['optimizer'], param_groups)
                with create(path) as f:
                    save_checked(self.sets | {'optimizer': optimizer} | facts, f)


class OwnPieces:
    """
    The tensors that this process writes into a folder: `pieces`, {'set/name': (shape, first row,
    rows)}. A tied weight is written once: `names` is {name of a weight: the name under which it is
    written}. Of FSDP's replicas only the first writes its rows.
    """
    def __init__(self, sets, parallel, copy):
        self.parallel, self.pieces = parallel, {}
        first_replica = parallel.rank < parallel.shard_size
        weights, first_names = sets['model'], {}
        self.names = {name: first_names.setdefault(id(t), name) for name, t in weights.items()}
        untied = {name: weights[name] for name in first_names.values()}
        for kind, tensors in (sets | {'model': untied}).items():
            owned = parallel.owned(tensors)
            for name, t in tensors.items():
                first, rows, is_own = 0, t.detach(), name in owned
                if hasattr(rows, 'to_local'):
                    first, _ = parallel.rows(rows.shape, t)
                    rows, is_own = rows.to_local(), first_replica
                if is_own:
                    rows = copy_to_host(rows) if copy else rows
                    self.pieces[f'{kind}/{name}'] = list(t.shape), first, rows

    def write(self, path, param_groups, facts, group):
        rank, n_files = self.parallel.rank, self.parallel.world_size
        with together(self.parallel, group):
            if self.parallel.master:
                remove(path)
                os.mkdir(path)
        with together(self.parallel, group):
            check_finite(t for key, (*_, t) in self.pieces.items() if key.startswith('model/'))
            if not os.path.isdir(path):  # rank 0 has made it, perhaps on another node
                raise OSError('out_dir must be a folder that all nodes share')
            with create(os.path.join(path, f'rank_{rank:04d}.pt')) as f:
                save_checked(self.pieces, f)
        with together(self.parallel, group):  # check a file that may come from another node
            try:
                read_file(os.path.join(path, f'rank_{(rank + 1) % n_files:04d}.pt'), mmap=True)
            except ValueError as e:
                raise OSError(f'{first_line(e)}; out_dir must be a folder that all nodes '
                              'share') from e
        with together(self.parallel, group):
            if self.parallel.master:
                info = dict(names=self.names, param_groups=param_groups, n_files=n_files)
                with create(os.path.join(path, 'info.pt')) as f:
                    save_checked(facts | info, f)
                sync_folder(path)


def check_finite(tensors):
    """Raise ValueError if a weight is not finite, so that no such checkpoint is written."""
    if not all(t.isfinite().all() for t in tensors):
        raise ValueError('a weight is not finite')
