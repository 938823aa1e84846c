"""
The out_dir of a run: its lock, and the newest, the previous, the best and the numbered checkpoints.
A kill at any moment leaves a complete checkpoint. engine/checkpoint_writer.py writes each of them.
"""
import atexit
import functools
import os
import shutil
import socket
import time

from engine.background import LARGE, Background, Copies
from engine.checkpoint import PLAIN, SHARDED, checkpoints_in
from engine.checkpoint_writer import OwnPieces, WholeTensors, together
from engine.common import (
    Locked,
    UserError,
    first_line,
    link_or_copy,
    print_error,
    remove,
    sync_folder,
    try_lock,
)


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
        self.copies, self.report = Copies(parallel), None

    def used(self):
        """Return the names of the checkpoints in the folder."""
        return checkpoints_in(self.path)

    def lock(self):
        """
        Lock the folder for as long as this process lives; do nothing if it does not exist yet or is
        locked already. If another run holds the lock, raise an error on all processes.
        """
        refusal = None
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise UserError(f"out_dir '{self.path}' is a file: name another folder with --out_dir")
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
            background = self.copies.worth_making(sets, LARGE if background == 'auto' else 0)
        if background:
            self.group = self.group or self.parallel.host_group()
        form = OwnPieces if self.sharded else WholeTensors
        content = form(sets, self.parallel, copy=background)
        write = functools.partial(self._replace_newest, content, param_groups, facts, also)
        if not background:
            write()
            when_saved(time.time() - started)
            return
        if self.report is None:
            # atexit calls the latest first, so this one comes before the run log's last write
            atexit.register(self._let_finish)
        self.writing = Background(write)
        self.report = functools.partial(when_saved, time.time() - started)

    def _replace_newest(self, content, param_groups, facts, also):
        temporary = self.newest + '.tmp'
        try:
            content.write(temporary, param_groups, facts, self.group)
            with together(self.parallel, self.group):
                if self.parallel.master:
                    self._rename(temporary, also)
        except OSError as e:
            with together(self.parallel, self.group):
                if self.parallel.master:
                    remove(temporary)
            self.parallel.fail(f"checkpoint '{self.newest}' could not be written; the "
                               f'existing checkpoints are untouched: {e}')
        self.newest_is_ours = True

    def _rename(self, temporary, also):
        if self.new_run and not self.newest_is_ours:
            self._remove_earlier_run()
        # `also` first: once `newest` is replaced, a resume would not write this checkpoint again
        link = link_folder if self.sharded else link_or_copy
        for path in also:
            link(temporary, path)
        if self.newest_is_ours and self.sharded:  # a folder cannot be replaced atomically
            remove(self.previous)
            os.replace(self.newest, self.previous)
        elif self.newest_is_ours:
            link_or_copy(self.newest, self.previous)
        elif self.sharded:
            remove(self.newest)
        os.replace(temporary, self.newest)
        sync_folder(self.path)

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

    def poll(self):
        """
        Report the checkpoint that is being written if it is complete. Return whether writing it
        has failed; finish() raises the error, and all processes must call that one.
        """
        if self.writing and not self.writing.is_alive() and not self.writing.error:
            self.finish()
        return self.writing is not None and self.writing.error is not None

    def finish(self):
        """
        Wait for the checkpoint that is being written, if any, and report it. If it could not be
        written, raise an error on all processes.
        """
        if self.writing:
            writing, self.writing = self.writing, None
            writing.join()
            if writing.error:
                raise writing.error
            self.report()

    def _let_finish(self):
        """Let a checkpoint be completed when the process ends because of an error."""
        if not self.writing:
            return
        # other processes may have ended already, and then it never completes
        self.writing.join(timeout=20 if self.parallel.distributed else None)
        if not self.writing.is_alive() and not self.writing.error:
            self.report()
        elif self.parallel.master:
            print_error(f"checkpoint '{self.newest}' was not completed: "
                        f'{self.writing.error or "other processes have ended"}')


def link_folder(path, other):
    """Replace the folder `other` by one with hard links to the files in `path`."""
    remove(f'{other}.tmp')
    shutil.copytree(path, f'{other}.tmp', copy_function=link_or_copy)
    remove(other)
    os.replace(f'{other}.tmp', other)
