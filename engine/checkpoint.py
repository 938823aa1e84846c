"""
Read and write the checkpoints of a run. out_dir holds the newest checkpoint, the previous one and
the best one, each as one file (ckpt.pt) or, with --sharded_checkpoint, as a folder (ckpt_sharded)
with a file per process.

A checkpoint is a dict of tensors and plain values, a superset of nanoGPT's: 'model', 'optimizer',
'model_args', 'iter_num', 'best_val_loss' and 'config'. It does not depend on the parallel mode that
wrote it. It is always read with weights_only=True, so reading runs no code. A sharded folder
contains

    rank_0000.pt, ...   {'set/name': (shape, first row, rows)}: the tensors of one process
    info.pt             everything else; it is written last
"""
import contextlib
import math
import os
import pickle
import shutil
import socket
import zipfile
from dataclasses import dataclass, field, fields

import torch

from engine.common import (
    Locked,
    UserError,
    create,
    first_line,
    link_or_copy,
    sync_folder,
    try_lock,
)

PLAIN = 'ckpt.pt', 'ckpt_prev.pt', 'ckpt_best.pt'
SHARDED = 'ckpt_sharded', 'ckpt_sharded_prev', 'ckpt_sharded_best'


@dataclass
class State:
    """
    Counters of a run. A checkpoint stores them under these names, and a resume restores them (all
    but `losses`).
    """
    iter_num: int = 0
    best_val_loss: float = math.inf
    losses: dict = field(default_factory=dict)  # of the last evaluation, per split
    stale_evals: int = 0  # evaluations since the best one
    last_eval_iter: int = -1
    train_seconds: float = 0.0

    def add_evaluation(self, losses, count=True):
        """
        Record the losses of an evaluation, {split: {'loss', ...}}. Return whether the val loss is
        the lowest so far. With count=False nothing is counted, because the windows may not be the
        run's own.
        """
        self.losses = losses
        if not count:
            return False
        val_loss = losses['val']['loss']
        best = val_loss < self.best_val_loss
        if self.iter_num != self.last_eval_iter:  # otherwise it was counted before a resume
            self.best_val_loss = min(self.best_val_loss, val_loss)
            self.stale_evals = 0 if best else self.stale_evals + 1
            self.last_eval_iter = self.iter_num
        return best

    @classmethod
    def from_dict(cls, ckpt):
        """
        Return the State in a checkpoint. A nanoGPT checkpoint has only iter_num and best_val_loss.
        """
        known = {f.name: ckpt[f.name] for f in fields(cls) if f.name in ckpt}
        known |= dict(best_val_loss=float(ckpt['best_val_loss']), losses={})
        return cls(**{'last_eval_iter': ckpt['iter_num']} | known)


# -------------------------------------------------------------------------------------------------
# reading

def check_crcs(path):
    """Raise ValueError if a zip file written by torch.save does not match its checksums."""
    with zipfile.ZipFile(path) as z:
        damaged = z.testzip()  # torch.load does not verify the checksums
    if damaged is not None:
        raise ValueError(f"'{damaged}' inside it does not match its checksum")


def read_file(path, **kwargs):
    """Return the dict in a checkpoint file, on the CPU, after verifying its checksums."""
    check_crcs(path)
    return torch.load(path, map_location='cpu', weights_only=True, **kwargs)


def read_facts(path):
    """
    Return the plain values in a checkpoint quickly, without reading tensors or verifying checksums.
    Raise UserError if the file cannot be read.
    """
    path = os.path.join(path, 'info.pt') if os.path.isdir(path) else path
    try:
        return dict(torch.load(path, map_location='cpu', weights_only=True, mmap=True))
    except Exception as e:  # zip, pickle and torch raise different types
        raise UserError(f"checkpoint '{path}' cannot be used: {first_line(e)}") from e


def newest_checkpoint(folder):
    """Return the path of the checkpoint in a run's folder with the highest iteration, or None."""
    def existing(*names):
        paths = [os.path.join(folder, name) for name in names]
        return [path for path in paths if os.path.exists(path)]

    def reached(path):  # not file times, which a copy changes
        try:
            return read_facts(path)['iter_num']
        except (ValueError, KeyError):  # a damaged one counts as newest, so it is noticed
            return math.inf

    found = existing('ckpt.pt', 'ckpt_sharded')
    if not existing('ckpt_sharded'):  # a kill between the two renames that replace it
        found += existing('ckpt_sharded_prev')
    if not found:  # a kill during the first save, which is also the best one
        found = existing('ckpt_best.pt', 'ckpt_sharded_best')
    return max(found, key=reached) if len(found) > 1 else next(iter(found), None)


def is_sharded(path):
    """Return whether a folder is itself a sharded checkpoint, and not a run's folder."""
    return os.path.isdir(path) and os.path.exists(os.path.join(path, 'info.pt'))


def load_checkpoint(path, moments=True):
    """
    Load a checkpoint as a dict on the CPU. `path` is a file, a sharded folder, or a run's folder,
    whose newest checkpoint is loaded. Checksums are verified. With moments=False the optimizer
    state of a sharded checkpoint stays on disk, as Pieces. UserError names the file and the
    problem.
    """
    if os.path.isdir(path) and not is_sharded(path):
        path = newest_checkpoint(path) or os.path.join(path, 'ckpt.pt')
    if not os.path.exists(path):
        raise UserError(f"no checkpoint at '{path}'")
    try:
        ckpt = load_sharded(path, moments) if os.path.isdir(path) else read_file(path)
        if not isinstance(ckpt, dict) or not all(isinstance(ckpt.get(key), dict)
                                                 for key in ('model', 'model_args')):
            raise ValueError("it has no 'model' and 'model_args'")
    except pickle.UnpicklingError as e:
        raise UserError(f"checkpoint '{path}' is refused: it contains objects other than "
                        'tensors and plain values, which could run code') from e
    except Exception as e:  # zip, pickle and torch raise different types
        raise UserError(f"checkpoint '{path}' cannot be used: {first_line(e)}") from e
    ckpt['path'] = path
    return ckpt


def is_ours(ckpt):
    """Return whether a checkpoint dict is plainGPT's, and not nanoGPT's."""
    return 'tokenizer' in ckpt


class Pieces:
    """A tensor whose rows are in the files of several processes and are read on demand."""
    def __init__(self, shape):
        self.shape, self.parts = torch.Size(shape), []  # [(first row, its rows)]

    def rows(self, first, n):
        """Return rows first to first + n - 1 as one tensor, or a 0-dim tensor unchanged."""
        if not self.shape:
            return self.parts[0][1].clone()
        pieces, at = [], first
        for start, part in sorted(self.parts, key=lambda p: p[0]):
            low, high = max(at, start), min(first + n, start + len(part))
            if low == at and low < high:
                pieces.append(part[low - start:high - start])
                at = high
        if at != first + n:
            raise ValueError(f'rows {at} to {first + n - 1} of a tensor are missing')
        return torch.cat(pieces) if pieces else self.parts[0][1][:0].clone()

    def whole(self):
        return self.rows(0, self.shape[0] if self.shape else 1)


def load_sharded(path, moments):
    """Return the dict that ckpt.pt would hold, however many processes wrote the folder."""
    ckpt = read_file(os.path.join(path, 'info.pt'))
    if 'n_files' not in ckpt:
        raise ValueError('an older version wrote this folder; in a checkout of that version '
                         '(git worktree add ../plainGPT-old 3e9c4cc), convert it to one file: '
                         f'python model.py --ckpt={os.path.abspath(path)} --consolidate=ckpt.pt')
    sets = {}
    for number in range(ckpt.pop('n_files')):
        file = os.path.join(path, f'rank_{number:04d}.pt')
        for key, (shape, first, rows) in read_file(file, mmap=True).items():
            kind, _, name = key.partition('/')
            pieces = sets.setdefault(kind, {}).setdefault(name, Pieces(shape))
            pieces.parts.append((first, rows))
    state = {}
    moment_pieces = sets.pop('optimizer', {})
    for name in sorted(moment_pieces, key=number_of):
        number, _, key = name.partition('/')
        pieces = moment_pieces[name]
        state.setdefault(int(number), {})[key] = pieces.whole() if moments else pieces
    ckpt['optimizer'] = {'state': state, 'param_groups': ckpt.pop('param_groups')}
    weights = {name: pieces.whole() for name, pieces in sets.pop('model').items()}
    ckpt['model'] = {name: weights[stored] for name, stored in ckpt.pop('names').items()}
    for kind, tensors in sets.items():
        ckpt[kind] = {name: pieces.whole() if moments else pieces
                      for name, pieces in tensors.items()}
    return ckpt


def number_of(name):
    """Return the parameter's number from an optimizer tensor's name, 'number/key'."""
    return int(name.partition('/')[0])


# -------------------------------------------------------------------------------------------------
# restoring

def restore_optimizer(optimizer, name, ckpt, parallel):
    """
    Load the moments in a checkpoint into the optimizer, or this process's share of them. Learning
    rate, betas, weight decay and kernel keep their current settings. Raise UserError if the
    checkpoint is of another optimizer.
    """
    saved = ckpt['optimizer']
    theirs = (ckpt.get('config') or {}).get('optimizer', 'adamw')  # nanoGPT's does not name it
    their_sizes = [len(group['params']) for group in saved['param_groups']]
    sizes = [len(group['params']) for group in optimizer.param_groups]
    if theirs != name or their_sizes != sizes:
        remedy = 'resume with the same settings' if theirs == name else \
            f"resume with the run's config file, or --optimizer={theirs}"
        raise UserError(f'the checkpoint holds the state of {theirs} with groups of {their_sizes} '
                        f"tensors, and optimizer='{name}' has {sizes}: {remedy}")
    inner, numbers = parallel.inner_optimizer(optimizer)
    loaded = inner.state_dict()
    params = [p for group in inner.param_groups for p in group['params']]
    for i, p in enumerate(params):
        state = saved['state'].get(numbers[p])
        if state is not None:
            loaded['state'][i] = {key: own_share(t, p, parallel) for key, t in state.items()}
    inner.load_state_dict(loaded)


@torch.no_grad()
def restore_tensors(sets, ckpt, parallel):
    """
    Fill {set: {name: tensor}}, tensors shaped like parameters, from a checkpoint. UserError names a
    set that the checkpoint lacks. The model and the optimizer are restored elsewhere.
    """
    for kind, tensors in sets.items():
        if kind not in ckpt:
            raise UserError(f"the checkpoint '{ckpt['path']}' has no '{kind}', because its run was "
                            'started without it: turn that setting off, or start a new run from '
                            f"it with --init_from={ckpt['path']} and another --out_dir")
        for name, tensor in tensors.items():
            tensor.copy_(own_share(ckpt[kind][name], tensor, parallel))


def own_share(value, like, parallel):
    """Return this process's part of a whole tensor or of Pieces, divided as `like` is."""
    first, n = parallel.rows(value.shape, like)
    whole = n == (value.shape[0] if value.shape else 0)
    if isinstance(value, Pieces):
        rows = value.rows(first, n)
    else:
        rows = value if whole else value[first:first + n].clone()
    return parallel.place(rows, value.shape, like)


# -------------------------------------------------------------------------------------------------
# writing

def save_checked(obj, path):
    """Save with torch.save, flush the file to disk, and read it back to check it."""
    with create(path) as f:
        torch.save(obj, f)
        f.flush()
        os.fsync(f.fileno())
    check_crcs(path)


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
        self.lock_file, self.can_lock = None, True

    def used(self):
        """Return the names of the checkpoints in the folder."""
        return [name for name in PLAIN + SHARDED if os.path.exists(os.path.join(self.path, name))]

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

    def resumes(self, path):
        """Record that the run resumes from the checkpoint at `path`."""
        self.new_run = False
        self.newest_is_ours = os.path.basename(path) == self.names[0]  # not a fallback

    def save(self, sets, param_groups, facts, best, before_rename):
        """
        Replace the newest checkpoint. A kill at any moment leaves a complete one. The previous
        checkpoint is kept, and the best one if `best`.

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
            self._on_master(lambda: self._rename(temporary, best))
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
            save_checked(whole | {'optimizer': optimizer} | facts, path)
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
            save_checked(pieces, os.path.join(path, f'rank_{self.parallel.rank:04d}.pt'))

        def check_next():  # check another process's file, which may be on another node
            number = (self.parallel.rank + 1) % self.parallel.world_size
            try:
                check_crcs(os.path.join(path, f'rank_{number:04d}.pt'))
            except (OSError, ValueError, zipfile.BadZipFile) as e:
                raise OSError(f'{first_line(e)}; out_dir must be a folder that all nodes '
                              'share') from e

        def finish():
            info = dict(names=names, param_groups=param_groups, n_files=self.parallel.world_size)
            save_checked(facts | info, os.path.join(path, 'info.pt'))
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

    def _rename(self, temporary, best):
        if self.new_run and not self.newest_is_ours:
            self._remove_earlier_run()
        if self.sharded:
            self._rename_folder(temporary, best)
        else:
            if self.newest_is_ours:
                link_or_copy(self.newest, self.previous)
            if best:  # first, because replacing `newest` marks these iterations as done
                link_or_copy(temporary, self.best)
            os.replace(temporary, self.newest)
        sync_folder(self.path)

    def _rename_folder(self, temporary, best):
        if best:  # hard links to the same files
            remove(self.best + '.tmp')
            shutil.copytree(temporary, self.best + '.tmp', copy_function=link_or_copy)
            remove(self.best)
            os.replace(self.best + '.tmp', self.best)
        if self.newest_is_ours:
            remove(self.previous)
            os.replace(self.newest, self.previous)
        else:
            remove(self.newest)
        os.replace(temporary, self.newest)

    def _remove_earlier_run(self):
        """
        Remove an earlier run's checkpoints, so that this run never falls back to one or takes it
        for newer because of its iteration number.
        """
        for name in self.used():
            if name != 'ckpt.pt' or self.sharded:  # os.replace replaces that file atomically
                remove(os.path.join(self.path, name))


def check_finite(tensors):
    """Raise ValueError if a weight is not finite, so that no such checkpoint is written."""
    if not all(t.isfinite().all() for t in tensors):
        raise ValueError('a weight is not finite')
