"""
The out_dir of a run: its lock, and the newest, the previous, the best and the numbered checkpoints.
A kill at any moment leaves a complete checkpoint. Their format is in engine/checkpoint.py.
"""
import contextlib
import os
import shutil
import socket

from engine.checked_file import read_file, save_checked
from engine.checkpoint import PLAIN, SHARDED, checkpoints_in, number_of
from engine.common import (
    Locked,
    UserError,
    create,
    first_line,
    link_or_copy,
    sync_folder,
    try_lock,
)


def remove(path):
    """Remove a file or a folder if it exists."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


class RunFolder:
    """
    The out_dir of a run, with its lock and its checkpoints. All processes must call lock() and
    save(), which use collectives.
    """
    def __init__(self, path, sharded, parallel):
        self.path, self.sharded, self.parallel = path, sharded, parallel
        self.names = SHARDED if sharded else PLAIN  # newest, previous, best
        self.newest, self.previous, self.best = (os.path.join(path, name) for name in self.names)
        self.new_run = True
        self.newest_is_ours = False  # True once this run has saved it or resumed from it
        self.origin = None  # the checkpoint that a new run starts from, if any
        self.lock_file, self.can_lock = None, True

    def used(self):
        """Return the names of the checkpoints in the folder."""
        return checkpoints_in(self.path)

    def lock(self):
        """
        Lock the folder for as long as this process lives; do nothing if it does not exist yet or is
        locked already. If another run holds the lock, raise an error on all processes.
        """
        refusal = None
        if os.path.isdir(self.path) and not os.access(self.path, os.W_OK):
            raise UserError(f"out_dir '{self.path}' is not writable")
        missing = self.lock_file is None and self.can_lock and self.parallel.master
        if missing and os.path.isdir(self.path):
            path = os.path.join(self.path, 'lock')
            try:
                holder = f'process {os.getpid()} on {socket.gethostname()}'
                self.lock_file = try_lock(path, holder)
            except Locked as e:
                refusal = (f"out_dir '{self.path}' is in use by another run, {e.holder}; "
                           'choose another with --out_dir=...')
            except UserError as e:
                refusal = str(e)
            except OSError as e:
                self.can_lock = False
                print(f"WARNING: '{path}' cannot be locked here, so a second run in this out_dir "
                      f'would not be noticed: {first_line(e)}', flush=True)
        if self.parallel.all_max(int(refusal is not None)):
            self.parallel.fail(refusal)

    def numbered(self, iter_num):
        """Return the path of the checkpoint that keep_interval keeps at an iteration."""
        name = f'ckpt_sharded_{iter_num:06d}' if self.sharded else f'ckpt_{iter_num:06d}.pt'
        return os.path.join(self.path, name)

    def starts_from(self, path):
        """Record that this is a new run, which starts from another's checkpoint at `path`."""
        self.origin = os.path.realpath(path)

    def resumes(self, path):
        """Record that the run continues from its own checkpoint at `path`."""
        self.new_run = False
        self.newest_is_ours = os.path.basename(path) == self.names[0]  # not a fallback

    def save(self, sets, param_groups, facts, also, before_rename):
        """
        Replace the newest checkpoint. A kill at any moment leaves a complete one. The one before it
        stays as the previous checkpoint. `also` are further paths that get the new one, as hard
        links: self.best if it is the best, self.numbered(...) if it is to be kept.

        `sets` is {'model': state dict, 'optimizer': Parallel.moments(), and any other set of
        tensors shaped like parameters}. `facts` are plain values. `before_rename` is called on rank
        0 once every tensor is on disk. If any process cannot write, all raise an error and the
        existing checkpoints stay as they are.
        """
        temporary = self.newest + '.tmp'
        write = self._write_folder if self.sharded else self._write_file
        try:
            write(temporary, sets, param_groups, facts)
            self._on_master(before_rename)
            self._on_master(lambda: self._rename(temporary, also))
        except OSError as e:
            self._on_master(lambda: remove(temporary))
            self.parallel.fail(f"checkpoint '{self.newest}' could not be written; the existing "
                               f'checkpoints are untouched: {e}')
        self.newest_is_ours = True

    def _together(self, step):
        """
        Call step() on every process. If it fails on one of them, raise OSError on all of them.
        """
        problem = None
        try:
            step()
        except (OSError, RuntimeError, ValueError) as e:
            problem = first_line(e)
        problems = [p for p in self.parallel.gather_objects(problem) if p]
        if problems:
            raise OSError(problems[0])

    def _on_master(self, step):
        self._together(step if self.parallel.master else lambda: None)

    def _write_file(self, path, sets, param_groups, facts):
        whole = {kind: self.parallel.gather(tensors) for kind, tensors in sets.items()}

        def write():
            check_finite(whole['model'].values())
            state = {}
            for name in sorted(whole['optimizer'], key=number_of):
                number, _, key = name.partition('/')
                state.setdefault(int(number), {})[key] = whole['optimizer'][name]
            optimizer = {'state': state, 'param_groups': param_groups}
            with create(path) as f:
                save_checked(whole | {'optimizer': optimizer} | facts, f)
        self._on_master(write)

    def _write_folder(self, path, sets, param_groups, facts):
        first_names = {}  # a tied tensor is written once, under its first name
        names = {name: first_names.setdefault(id(t), name) for name, t in sets['model'].items()}
        untied = {name: sets['model'][name] for name in first_names.values()}
        pieces = self._pieces(sets | {'model': untied})

        def write():
            check_finite(t for key, (_, _, t) in pieces.items() if key.startswith('model/'))
            if not os.path.isdir(path):  # rank 0 has made it, perhaps on another node
                raise OSError('out_dir must be a folder that all nodes share')
            with create(os.path.join(path, f'rank_{self.parallel.rank:04d}.pt')) as f:
                save_checked(pieces, f)

        def check_next():  # check another process's file, which may be on another node
            number = (self.parallel.rank + 1) % self.parallel.world_size
            try:
                read_file(os.path.join(path, f'rank_{number:04d}.pt'), mmap=True)
            except ValueError as e:
                raise OSError(f'{first_line(e)}; out_dir must be a folder that all nodes '
                              'share') from e

        def finish():
            info = dict(names=names, param_groups=param_groups, n_files=self.parallel.world_size)
            with create(os.path.join(path, 'info.pt')) as f:
                save_checked(facts | info, f)
            sync_folder(path)

        def start():
            remove(path)
            os.mkdir(path)

        self._on_master(start)
        self._together(write)
        self._together(check_next)
        self._on_master(finish)

    def _pieces(self, sets):
        """Return {'set/name': (shape, first row, rows)} for what this process writes."""
        pieces = {}
        for kind, tensors in sets.items():
            own = self.parallel.owned(tensors)
            for name, t in tensors.items():
                shape, t = list(t.shape), t.detach()
                if hasattr(t, 'to_local'):
                    first, _ = self.parallel.rows(shape, t)
                    pieces[f'{kind}/{name}'] = shape, first, t.to_local()
                elif name in own:
                    pieces[f'{kind}/{name}'] = shape, 0, t
        return pieces

    def _rename(self, temporary, also):
        if self.new_run and not self.newest_is_ours:
            self._remove_earlier_run()
        # `also` first, because replacing `newest` marks these iterations as done
        if self.sharded:
            for path in also:
                link_folder(temporary, path)
            self._rename_folder(temporary)
        else:
            if self.newest_is_ours:
                link_or_copy(self.newest, self.previous)
            for path in also:
                link_or_copy(temporary, path)
            os.replace(temporary, self.newest)
        sync_folder(self.path)

    def _rename_folder(self, temporary):
        if self.newest_is_ours:
            remove(self.previous)
            os.replace(self.newest, self.previous)
        else:
            remove(self.newest)
        os.replace(temporary, self.newest)

    def _remove_earlier_run(self):
        """
        Remove an earlier run's checkpoints, so that this run never falls back to one or takes it
        for newer because of its iteration number. Only the one that this run started from stays.
        """
        for name in self.used():
            path = os.path.join(self.path, name)
            replaced = name == 'ckpt.pt' and not self.sharded  # by os.replace, atomically
            if not replaced and os.path.realpath(path) != self.origin:
                remove(path)


def link_folder(path, other):
    """Replace the folder `other` by one with hard links to the files in `path`."""
    remove(f'{other}.tmp')
    shutil.copytree(path, f'{other}.tmp', copy_function=link_or_copy)
    remove(other)
    os.replace(f'{other}.tmp', other)


def check_finite(tensors):
    """Raise ValueError if a weight is not finite, so that no such checkpoint is written."""
    if not all(t.isfinite().all() for t in tensors):
        raise ValueError('a weight is not finite')
