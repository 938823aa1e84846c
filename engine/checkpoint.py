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

Every file also has 'checksums', {name: CRC-32} of its tensors. To change a tensor by hand, remove
that key before saving the dict again.
"""
import contextlib
import errno
import math
import os
import pickle
import shutil
import socket
import zipfile
import zlib
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
from engine.optim import OPTIMIZER
from engine.schema import check

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

# The plain values in a checkpoint, ours or nanoGPT's; see engine/schema.py
POSITIVE = range(1, 2 ** 63)
FACTS = {
    'iter_num?': int,
    'best_val_loss?': (float, math.inf),
    'stale_evals?': int,
    'last_eval_iter?': range(-1, 2 ** 63),
    'train_seconds?': float,
    'losses?': {str: {str: object}},
    'tokenizer?': ({'name': str}, None),
    'config?': {str: object, 'batch_size?': POSITIVE, 'gradient_accumulation_steps?': POSITIVE,
                'optimizer?': str, 'compile?': bool},
}
WEIGHTS = {'model_args': {str: object}, 'model': {str: torch.Tensor}}
MOMENTS = {
    'state': {int: {str: object}},
    'param_groups': [{'params': [int]}],
}


@contextlib.contextmanager
def reading(path):
    """Turn whatever goes wrong in reading a checkpoint into a UserError that names its file."""
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError as e:
        raise UserError(f"checkpoint '{path}' is refused: it contains objects other than "
                        'tensors and plain values, which could run code') from e
    except Exception as e:  # zip, pickle and torch raise different types
        raise UserError(f"checkpoint '{path}' cannot be used: {first_line(e)}") from e


def read_file(path, **kwargs):
    """
    Return the dict in a checkpoint file, on the CPU, after verifying its checksums. UserError names
    the file and the problem.
    """
    with reading(path):
        content = load_zip(path, **kwargs)
        expected = content.pop('checksums', {})
        check(expected, {str: int}, 'checksums')
        tensors = distinct_tensors(content)
        if not tensors.keys() <= expected.keys():  # of nanoGPT or an earlier version
            check_zip(path)
        for name, tensor in tensors.items():
            if expected.get(name) not in (None, checksum(tensor)):
                raise ValueError(f"'{name}' does not match its checksum")
    return content


def load_zip(path, **kwargs):
    """Return the dict in a checkpoint file, with tensors that are not verified yet."""
    check_zip(path, skip_tensors=True)
    content = torch.load(path, map_location='cpu', weights_only=True, **kwargs)
    check(content, dict)
    return content


def check_zip(path, skip_tensors=False):
    """
    Raise ValueError if an entry of the zip file that torch.save writes is damaged. torch.load does
    not verify these checksums.
    """
    with zipfile.ZipFile(path) as z:
        for entry in z.infolist():
            # torch.load does not read an entry that is marked as a folder, and returns other bytes
            damaged = entry.external_attr & 0x10
            if not (skip_tensors and '/data/' in entry.filename):
                damaged = damaged or not is_whole(z, entry)
            if damaged:
                raise ValueError(f"'{entry.filename}' inside it does not match its checksum")


def is_whole(z, entry):
    """Return whether the bytes of an entry in an open zip file match their checksum."""
    try:
        with z.open(entry) as f:
            while f.read(2 ** 20):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def distinct_tensors(value):
    """
    Return {name: tensor} of the tensors in nested dicts, lists and tuples. A tied tensor has only
    its first name, such as 'model/lm_head.weight'. Raise ValueError for tensors that are not dense.
    """
    found, seen = {}, set()
    for name, t in tensors_in(value):
        if t.layout != torch.strided or t.is_meta or t.is_quantized:
            raise ValueError(f"'{name}' must be a dense tensor")
        identity = t.data_ptr(), t.dtype, t.shape, t.stride()
        if identity not in seen:
            found[name] = t
        seen.add(identity)
    return found


def tensors_in(value, name=''):
    if isinstance(value, torch.Tensor):
        yield name, value
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors_in(inner, f'{name}/{key}' if name else str(key))


def checksum(tensor):
    """Return the CRC-32 of a tensor's bytes."""
    tensor = tensor.detach().cpu().reshape(-1)
    return zlib.crc32(tensor.view(torch.uint8).numpy())


def read_facts(path):
    """
    Return the plain values in a checkpoint quickly, without reading tensors. UserError names the
    file and the problem.
    """
    path = os.path.join(path, 'info.pt') if os.path.isdir(path) else path
    with reading(path):
        return checked_facts(load_zip(path, mmap=True))


def checked_facts(content):
    """
    Check the plain values in a checkpoint dict and return it. Where nanoGPT has a tensor, or an
    earlier version a tokenizer's name, they become a float and a dict. ValueError names the field.
    """
    if isinstance(content.get('best_val_loss'), torch.Tensor):
        content['best_val_loss'] = float(content['best_val_loss'])
    if isinstance(content.get('tokenizer'), str):
        content['tokenizer'] = {'name': content['tokenizer']}
    check(content, FACTS)
    return content


def check_weights(ckpt):
    """Raise ValueError unless a checkpoint dict has finite weights for all of its layers."""
    check(ckpt, WEIGHTS)
    # a model of any size could be built otherwise
    check(ckpt['model_args'], {'n_layer?': range(1, len(ckpt['model']) + 1)}, 'model_args')
    for name, weight in distinct_tensors({'model': ckpt['model']}).items():
        if not weight.is_floating_point():
            raise ValueError(f"'{name}' must have floating-point numbers, not {weight.dtype}")
        if not weight.isfinite().all():
            raise ValueError(f"'{name}' has numbers that are not finite")


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
    with reading(path):
        ckpt = load_sharded(path, moments) if os.path.isdir(path) else read_file(path)
        checked_facts(ckpt)
        check_weights(ckpt)
        check(ckpt, {'optimizer?': MOMENTS})
    ckpt['path'] = path
    return ckpt


def is_ours(ckpt):
    """Return whether a checkpoint dict is plainGPT's, and not nanoGPT's."""
    return 'tokenizer' in ckpt


class Pieces:
    """A tensor whose rows are in the files of several processes and are read on demand."""
    def __init__(self, shape):
        self.shape, self.parts = torch.Size(shape), []  # [(first row, its rows)]

    def slices(self, first, n):
        """
        Return the slices of parts that hold rows first to first + n - 1, without reading them.
        Raise ValueError if some rows are missing.
        """
        slices, at = [], first
        for start, part in sorted(self.parts, key=lambda p: p[0]):
            low, high = max(at, start), min(first + n, start + len(part))
            if low == at and low < high:
                slices.append(part[low - start:high - start])
                at = high
        if at != first + n:
            raise ValueError(f'rows {at} to {first + n - 1} of a tensor are missing')
        return slices

    def rows(self, first, n):
        """Return rows first to first + n - 1 as one tensor, or a 0-dim tensor unchanged."""
        if not self.shape:
            return self.parts[0][1].clone()
        slices = self.slices(first, n)
        return torch.cat(slices) if slices else self.parts[0][1][:0].clone()

    def whole(self):
        return self.rows(0, self.shape[0] if self.shape else 1)


def load_sharded(path, moments):
    """Return the dict that ckpt.pt would hold, however many processes wrote the folder."""
    ckpt = read_file(os.path.join(path, 'info.pt'))
    if 'n_files' not in ckpt:
        raise ValueError('an older version wrote this folder; in a checkout of that version '
                         '(git worktree add ../plainGPT-old 3e9c4cc), convert it to one file: '
                         f'python model.py --ckpt={os.path.abspath(path)} --consolidate=ckpt.pt')
    check(ckpt, {'n_files': POSITIVE, 'names': {str: str}, 'param_groups': list})
    sets = {}
    for number in range(ckpt.pop('n_files')):
        part = read_part(os.path.join(path, f'rank_{number:04d}.pt'))
        for key, (shape, first, rows) in part.items():
            kind, _, name = key.partition('/')
            pieces = sets.setdefault(kind, {}).setdefault(name, Pieces(shape))
            pieces.parts.append((first, rows))
    for kind, tensors in sets.items():
        for name, pieces in tensors.items():
            if pieces.shape:
                pieces.slices(0, pieces.shape[0])  # none may be missing
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


def read_part(path):
    """Return {'set/name': (shape, first row, rows)} from the file of one process."""
    part = read_file(path, mmap=True)
    with reading(path):
        check(part, {str: tuple})
        for name, (shape, first, rows) in part.items():
            check(dict(shape=shape, first=first, rows=rows),
                  {'shape': [int], 'first': int, 'rows': torch.Tensor}, name)
            if list(rows.shape[1:]) != shape[1:]:
                raise ValueError(f"'{name}' has rows of another shape than {shape}")
    return part


def number_of(name):
    """Return the parameter's number from an optimizer tensor's name, 'number/key'."""
    return int(name.partition('/')[0])


# -------------------------------------------------------------------------------------------------
# restoring

def restore_optimizer(optimizer, name, ckpt, parallel):
    """
    Load the moments in a checkpoint into the optimizer, or this process's share of them. Learning
    rate, betas, weight decay and kernel keep their current settings. Raise UserError if the
    checkpoint is of another optimizer, or if its moments do not fit the parameters.
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
    params = [(p, group) for group in inner.param_groups for p in group['params']]
    for i, (p, group) in enumerate(params):
        state = saved['state'].get(numbers[p])
        if state is not None:
            where = f"checkpoint '{ckpt['path']}' cannot be used: optimizer.state.{numbers[p]}"
            n_moments = OPTIMIZER[group.get('optimizer', name)].moments
            if [getattr(t, 'shape', None) for t in state.values()].count(p.shape) != n_moments:
                raise UserError(f'{where} must have {n_moments} tensors of shape {tuple(p.shape)}')
            loaded['state'][i] = {key: own_share(t, p, parallel, f'{where}.{key}')
                                  for key, t in state.items()}
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
        with reading(ckpt['path']):
            check(ckpt, {kind: dict.fromkeys(tensors, object)})
        for name, tensor in tensors.items():
            where = f"checkpoint '{ckpt['path']}' cannot be used: {kind}.{name}"
            tensor.copy_(own_share(ckpt[kind][name], tensor, parallel, where))


def own_share(value, like, parallel, name):
    """
    Return this process's part of a whole tensor or of Pieces, divided as `like` is. UserError
    begins with `name` if it has another shape or is not finite.
    """
    if not isinstance(value, (torch.Tensor, Pieces)) or value.shape not in (like.shape, ()):
        raise UserError(f'{name} must be a tensor of shape {tuple(like.shape)}')
    first, n = parallel.rows(value.shape, like)
    whole = n == (value.shape[0] if value.shape else 0)
    if isinstance(value, Pieces):
        rows = value.rows(first, n)
    else:
        rows = value if whole else value[first:first + n].clone()
    if not rows.is_floating_point() or not rows.isfinite().all():
        raise UserError(f'{name} has numbers that are not finite')
    return parallel.place(rows, value.shape, like)


# -------------------------------------------------------------------------------------------------
# writing

NO_SPACE = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


def save_checked(content, f):
    """
    Save a dict, with the checksums of its tensors, to an open file. Flush the file to disk, and
    read it back to check it. OSError says how much space is needed if there is too little.
    """
    tensors = distinct_tensors(content)
    checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
    try:
        torch.save(content | {'checksums': checksums}, f)
        f.flush()
        os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # torch hides it behind its own
        if getattr(cause, 'errno', None) not in NO_SPACE:
            raise
        needed = sum(tensor.nbytes for tensor in tensors.values())
        free = shutil.disk_usage(os.path.dirname(f.name) or '.').free + os.path.getsize(f.name)
        raise OSError(f'{os.strerror(cause.errno)}: it needs {needed / 1e6:,.1f} MB, and '
                      f'{free / 1e6:,.1f} MB are free') from e
    read_file(f.name, mmap=True)


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
