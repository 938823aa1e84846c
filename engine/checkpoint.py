"""
Read the checkpoints of a run, and restore a run from one. out_dir holds the newest checkpoint, the
previous one, the best one and those of keep_interval, each as one file (ckpt.pt) or, with
--sharded_checkpoint, as a folder (ckpt_sharded) with a file per process.

A checkpoint is a dict of tensors and plain values, a superset of nanoGPT's: 'model', 'optimizer',
'model_args', 'iter_num', 'best_val_loss' and 'config'. It does not depend on the parallel mode that
wrote it. It is always read with weights_only=True, so reading runs no code. A sharded folder
contains

    rank_0000.pt, ...   {'set/name': (shape, first row, rows)}: the tensors of one process
    info.pt             everything else; it is written last

engine/checkpoint_writer.py writes checkpoints, engine/checked_file.py reads and writes each file,
and engine/run_folder.py keeps the folder of a run.
"""
import glob
import math
import os
import re
from dataclasses import dataclass, field, fields

import torch

from engine.checked_file import distinct_tensors, load_zip, read_file, reading
from engine.common import UserError
from engine.optim import OPTIMIZER
from engine.schema import Between, check

PLAIN = 'ckpt.pt', 'ckpt_prev.pt', 'ckpt_best.pt'
SHARDED = 'ckpt_sharded', 'ckpt_sharded_prev', 'ckpt_sharded_best'
NUMBERED = re.compile(r'ckpt_\d{6,}\.pt|ckpt_sharded_\d{6,}')  # ckpt_000500.pt, kept for good


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
        values = dict(last_eval_iter=ckpt['iter_num'])  # nanoGPT saves right after an evaluation
        values |= {f.name: ckpt[f.name] for f in fields(cls) if f.name in ckpt}
        values |= dict(best_val_loss=float(ckpt['best_val_loss']), losses={})
        return cls(**values)


# -------------------------------------------------------------------------------------------------
# reading

# The plain values in a checkpoint, ours or nanoGPT's; see engine/schema.py
POSITIVE = range(1, 2 ** 63)
FACTS = {
    'iter_num?': int,
    'best_val_loss?': (float, math.inf),
    'stale_evals?': int,
    'last_eval_iter?': range(-1, 2 ** 63),
    'train_seconds?': Between(0, 1e10),
    'losses?': {str: {str: float}},
    'tokenizer?': ({'name': str}, None),
    'chat_template?': (str, None),
    'lora?': {'lora_rank': POSITIVE, 'lora_alpha': Between(1e-30, 1e30), 'lora_targets': str,
              'base': str, 'crc32': int},
    'config?': {str: object, 'batch_size?': POSITIVE, 'gradient_accumulation_steps?': POSITIVE,
                'optimizer?': str, 'compile?': bool},
}
WEIGHTS = {'model_args': {str: object}, 'model': {str: object}}
MOMENTS = {
    'state': {int: {str: object}},
    'param_groups': [{'params': [int]}],
}


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
    Check the plain values in a checkpoint dict and return it. nanoGPT's best_val_loss, a tensor,
    becomes a float; the tokenizer of an earlier version, a name, becomes a dict. ValueError names
    the field.
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
    # otherwise model_args could ask for a model of any size
    check(ckpt['model_args'], {'n_layer?': range(1, len(ckpt['model']) + 1)}, 'model_args')
    weights = {name: [rows for _, rows in w.parts] if isinstance(w, Pieces) else w
               for name, w in ckpt['model'].items()}
    check(weights, {str: (torch.Tensor, list)}, 'model')
    for name, weight in distinct_tensors({'model': weights}).items():
        if weight.is_complex():
            raise ValueError(f"'{name}' must have real numbers, not {weight.dtype}")
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
        except (ValueError, KeyError):
            return math.inf  # a damaged one counts as the newest, so that loading it reports this

    found = existing('ckpt.pt', 'ckpt_sharded')
    if not existing('ckpt_sharded'):  # a kill between its two renames leaves only the previous one
        found += existing('ckpt_sharded_prev')
    if not found:  # a kill during the first save may leave only its hard links, which come first
        found = existing('ckpt_best.pt', 'ckpt_sharded_best', *numbered_checkpoints(folder))
    return max(found, key=reached) if len(found) > 1 else next(iter(found), None)


def numbered_checkpoints(folder):
    """Return the names of the checkpoints that keep_interval has kept in a run's folder."""
    names = glob.glob('ckpt_*', root_dir=folder)
    return sorted(name for name in names if NUMBERED.fullmatch(name))


def checkpoints_in(folder):
    """Return the names of the checkpoints in a run's folder."""
    names = [name for name in PLAIN + SHARDED if os.path.exists(os.path.join(folder, name))]
    return names + numbered_checkpoints(folder)


def no_checkpoint(path):
    """
    Return the message for a path without a checkpoint. It lists those beside it or, if there are
    none, the run folders here.
    """
    folder = os.path.dirname(path)
    if folder and checkpoints_in(folder):
        return f"no checkpoint at '{path}'; '{folder}' has {', '.join(checkpoints_in(folder))}"
    here = os.path.dirname(os.fspath(path).rstrip('/'))
    names = sorted(os.listdir(here or '.')) if os.path.isdir(here or '.') else []
    runs = [run for run in (os.path.join(here, name) for name in names) if checkpoints_in(run)]
    if not runs:
        return f"no checkpoint at '{path}', and none in the folders here"
    return f"no checkpoint at '{path}'; the folders here that have one: {', '.join(runs)}"


def is_sharded(path):
    """Return whether a folder is itself a sharded checkpoint, and not a run's folder."""
    return os.path.isdir(path) and os.path.exists(os.path.join(path, 'info.pt'))


def load_checkpoint(path, moments=True, weights=True, merge=True):
    """
    Load a checkpoint as a dict on the CPU. `path` is a file, a sharded folder, or a run's folder,
    whose newest checkpoint is loaded. Checksums are verified. With moments=False the optimizer
    state of a sharded checkpoint stays on disk, as Pieces. With weights=False the weights stay
    there, too, under 'weights' for restore_weights(), and 'model' has shapes on the meta device.
    With merge=False LoRA's adapters are not merged with the weights of their base. UserError names
    the file and the problem.
    """
    if os.path.isdir(path) and not is_sharded(path):
        path = newest_checkpoint(path) or os.path.join(path, 'ckpt.pt')
    if not os.path.exists(path):
        raise UserError(no_checkpoint(path))
    with reading(path):
        if os.path.isdir(path):
            ckpt = load_sharded(path, moments, weights)
        else:
            ckpt = read_file(path, mmap=not weights)
        checked_facts(ckpt)
        check_weights(ckpt)
        check(ckpt, {'optimizer?': MOMENTS})
    if not weights:
        model = {name.removeprefix('_orig_mod.'): w for name, w in ckpt['model'].items()}
        ckpt['weights'] = model
        ckpt['model'] = {name: torch.empty(w.shape, device='meta') for name, w in model.items()}
    ckpt['path'] = path
    if merge and 'lora' in ckpt:
        from engine.lora import merged  # it imports this module
        return merged(ckpt)
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
        if not self.shape:
            return [self.parts[0][1]]
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


def load_sharded(path, moments, weights):
    """Return the dict that ckpt.pt would hold, however many processes wrote the folder."""
    ckpt = read_file(os.path.join(path, 'info.pt'))
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
    model = {name: pieces.whole() if weights else pieces
             for name, pieces in sets.pop('model').items()}
    ckpt['model'] = {name: model[stored] for name, stored in ckpt.pop('names').items()}
    for kind, tensors in sets.items():
        ckpt[kind] = {name: pieces.whole() if moments else pieces
                      for name, pieces in tensors.items()}
    ckpt['optimizer'] = optimizer_state(ckpt.get('optimizer', {}), ckpt.pop('param_groups'))
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


def optimizer_state(moments, param_groups):
    """Return an optimizer's state dict from {'number of a parameter/key': tensor}."""
    state = {}
    for name in sorted(moments, key=lambda name: int(name.partition('/')[0])):
        number, _, key = name.partition('/')
        state.setdefault(int(number), {})[key] = moments[name]
    return {'state': state, 'param_groups': param_groups}


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
    params = [(p, group.get('optimizer', name))
              for group in inner.param_groups for p in group['params']]
    keys = {}  # {optimizer: the names in its first state}
    for i, (p, kind) in enumerate(params):
        state = saved['state'].get(numbers[p])
        if state is not None:
            where = f"checkpoint '{ckpt['path']}' cannot be used: optimizer.state.{numbers[p]}"
            if state.keys() != keys.setdefault(kind, state.keys()):
                raise UserError(f"{where} has {', '.join(state)}, but another one has "
                                f"{', '.join(keys[kind])}")
            n_moments = OPTIMIZER[kind].moments
            # the number of steps is no moment, though it has the shape of a 0-dim parameter
            shapes = [getattr(t, 'shape', None) for key, t in state.items() if key != 'step']
            if shapes.count(p.shape) != n_moments:
                raise UserError(f'{where} must have {n_moments} tensors of shape {tuple(p.shape)}')
            loaded['state'][i] = {key: own_share(t, p, parallel, f'{where}.{key}')
                                  for key, t in state.items()}
    with reading(ckpt['path']):  # torch's optimizers expect names of their own
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


def restore_weights(model, ckpt, parallel):
    """
    Fill the trained weights of a resumed model if it was built without them: with FSDP, which reads
    only this process's rows, and with LoRA, where only the base is in place.
    """
    if 'weights' in ckpt:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        restore_tensors({'weights': trained}, ckpt, parallel)


def own_share(value, like, parallel, name):
    """
    Return this process's part of a whole tensor or of Pieces, divided as `like` is. UserError
    begins with `name` if it has another shape or is not finite.
    """
    if not isinstance(value, (torch.Tensor, Pieces)) or value.shape not in (like.shape, ()):
        raise UserError(f'{name} must be a tensor of shape {tuple(like.shape)}')
    first, n = parallel.rows(value.shape, like)
    if isinstance(value, Pieces):
        parts, read = value.slices(first, n), lambda: value.rows(first, n)
    elif n == (value.shape[0] if value.shape else 0):
        parts, read = [value], lambda: value
    else:
        part = value[first:first + n]
        parts, read = [part], part.clone
    # checked before they are copied, because the check takes as much memory as a copy
    if not all(part.is_floating_point() and part.isfinite().all() for part in parts):
        raise UserError(f'{name} has numbers that are not finite')
    return parallel.place(read(), value.shape, like)
