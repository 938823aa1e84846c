"""
The out_dir of a run: its lock, and the newest, the previous, the best and the numbered checkpoints.
A kill at any moment leaves a complete checkpoint. Their format is in engine/checkpoint.py.
"""
import atexit
import contextlib
import os
import shutil
import socket
import threading
import time

import torch

from engine.checked_file import read_file, save_checked
from engine.checkpoint import PLAIN, SHARDED, checkpoints_in, number_of
from engine.common import (
    GIB,
    Locked,
    UserError,
    create,
    first_line,
    link_or_copy,
    print_error,
    sync_folder,
    try_lock,
)
from engine.machine import free_memory
from engine.parallel import copy_to_host

LARGE = 10 ** 8  # bytes; a smaller checkpoint is on disk within a second


def remove(path):
    """Remove a file or a folder if it exists."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


class Background(threading.Thread):
    """Call work() in a thread. An error is kept in `error`, and raised by result()."""
    def __init__(self, work):
        super().__init__(daemon=True)
        self.work, self.error = work, None
        self.start()

    def run(self):
        try:
            self.work()
        except BaseException as e:  # SystemExit on ranks other than 0
            self.error = e

    def done(self):
        return not self.is_alive()

    def result(self):
        self.join()
        if self.error:
            raise self.error


class RunFolder:
    """
    The out_dir of a run, with its lock and its checkpoints. All processes must call lock(), save()
    and finish(), which use collectives.
    """
    def __init__(self, path, sharded, parallel):
        self.path, self.sharded, self.parallel = path, sharded, parallel
        self.names = SHARDED if sharded else PLAIN  # newest, previous, best
        self.newest, self.previous, self.best = (os.path.join(path, name) for name in self.names)
        self.new_run = True
        self.newest_is_ours = False  # True once this run has saved it or resumed from it
        self.origin = None  # the checkpoint that a new run starts from, if any
        self.lock_file, self.can_lock = None, True
        self.writing, self.group = None, None  # a Background save, and its process group
        self.report, self.said_scarce, self.copied = None, False, 0

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

    def worth_copying(self, sets, least=LARGE):
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

    def save(self, sets, param_groups, facts, also, when_saved, background=False):
        """
        Replace the newest checkpoint, and call when_saved(seconds that training waited for it). A
        kill at any moment leaves a complete checkpoint. The one before it stays as the previous
        one. `also` are further paths that get the new one, as hard links: self.best if it is the
        best, self.numbered(...) if it is to be kept.

        `sets` is {'model': state dict, 'optimizer': Parallel.moments(), and any other set of
        tensors shaped like parameters}. `facts` are plain values. If any process cannot write, all
        raise an error and the existing checkpoints stay as they are.

        With background=True, return once the tensors have been copied to host memory, and write
        them in a thread; with 'auto' do so if they are large. If memory is too scarce for a copy,
        write them at once. The loop must call poll() or finish() to learn what came of it.
        """
        started = time.time()
        self.finish()
        if background:
            background = self.worth_copying(sets, LARGE if background == 'auto' else 0)
        if background:
            self.group = self.group or self.parallel.host_group()
        collect, write = self._whole_tensors, self._write_file
        if self.sharded:
            collect, write = self._own_pieces, self._write_folder
        content = collect(sets, copy=background)
        temporary = self.newest + '.tmp'

        def replace_newest():
            try:
                write(temporary, content, param_groups, facts)
                self._on_master(lambda: self._rename(temporary, also))
            except OSError as e:
                self._on_master(lambda: remove(temporary))
                self.parallel.fail(f"checkpoint '{self.newest}' could not be written; the "
                                   f'existing checkpoints are untouched: {e}')
            self.newest_is_ours = True

        if not background:
            replace_newest()
            when_saved(time.time() - started)
            return
        if self.report is None:
            # atexit calls the latest first, so this one comes before the run log's last write
            atexit.register(self._let_finish)
        self.writing = Background(replace_newest)
        seconds = time.time() - started
        self.report = lambda: when_saved(seconds)

    def poll(self):
        """
        Report the checkpoint that is being written if it is complete. Return whether writing it
        has failed; finish() raises the error, and all processes must call that one.
        """
        if self.writing and self.writing.done() and not self.writing.error:
            self.finish()
        return self.writing is not None and self.writing.error is not None

    def finish(self):
        """
        Wait for the checkpoint that is being written, if any, and report it. If it could not be
        written, raise an error on all processes.
        """
        if self.writing:
            writing, self.writing = self.writing, None
            writing.result()
            self.report()

    def _let_finish(self):
        """Let a checkpoint be completed when the process ends because of an error."""
        if not self.writing:
            return
        # other processes may have ended already, and then it never completes
        self.writing.join(timeout=20 if self.parallel.distributed else None)
        if self.writing.done() and not self.writing.error:
            self.report()
        elif self.parallel.master:
            print_error(f"checkpoint '{self.newest}' was not completed: "
                        f'{self.writing.error or "other processes have ended"}')

    def _together(self, step):
        """
        Call step() on every process. If it fails on one of them, raise OSError on all of them.
        """
        problem = None
        try:
            step()
        except (OSError, RuntimeError, ValueError) as e:
            problem = first_line(e)
        problems = [p for p in self.parallel.gather_objects(problem, self.group) if p]
        if problems:
            raise OSError(problems[0])

    def _on_master(self, step):
        self._together(step if self.parallel.master else lambda: None)

    def _whole_tensors(self, sets, copy):
        return {kind: self.parallel.gather(tensors, copy) for kind, tensors in sets.items()}

    def _write_file(self, path, whole, param_groups, facts):
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

    def _own_pieces(self, sets, copy):
        """
        Return ({'set/name': (shape, first row, rows)} for what this process writes, {name of a
        weight: the name under which it is written}). A tied weight is written once. Of FSDP's
        replicas only the first writes its rows.
        """
        first_replica = self.parallel.rank < self.parallel.shard_size
        first_names = {}
        names = {name: first_names.setdefault(id(t), name) for name, t in sets['model'].items()}
        untied = {name: sets['model'][name] for name in first_names.values()}
        pieces = {}
        for kind, tensors in (sets | {'model': untied}).items():
            own = self.parallel.owned(tensors)
            for name, t in tensors.items():
                shape, t = list(t.shape), t.detach()
                if hasattr(t, 'to_local'):
                    if first_replica:
                        first, _ = self.parallel.rows(shape, t)
                        pieces[f'{kind}/{name}'] = shape, first, t.to_local()
                elif name in own:
                    pieces[f'{kind}/{name}'] = shape, 0, t
        if copy:
            pieces = {key: (shape, first, copy_to_host(rows))
                      for key, (shape, first, rows) in pieces.items()}
        return pieces, names

    def _write_folder(self, path, content, param_groups, facts):
        pieces, names = content

        def start():
            remove(path)
            os.mkdir(path)

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

        def write_info():
            info = dict(names=names, param_groups=param_groups, n_files=self.parallel.world_size)
            with create(os.path.join(path, 'info.pt')) as f:
                save_checked(facts | info, f)
            sync_folder(path)

        self._on_master(start)
        self._together(write)
        self._together(check_next)
        self._on_master(write_info)

    def _rename(self, temporary, also):
        if self.new_run and not self.newest_is_ours:
            self._remove_earlier_run()
        # `also` first: once `newest` is replaced, a resume would not write this checkpoint again
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


def size_of(tensors):
    """Return the bytes of a dict of tensors. A tied one counts once."""
    distinct = {id(t): t for t in tensors.values()}.values()
    return sum(t.numel() * t.element_size() for t in distinct)


def check_finite(tensors):
    """Raise ValueError if a weight is not finite, so that no such checkpoint is written."""
    if not all(t.isfinite().all() for t in tensors):
        raise ValueError('a weight is not finite')
