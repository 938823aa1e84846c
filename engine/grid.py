"""
Plan the runs of a comparison for compare.py: keys with several values, the cells of a grid or of a
search, and a ladder of widths. `block` is the settings block of train.py, as read_block() returns
it.
"""
import ast
import itertools
import math
import os
import re
from typing import NamedTuple

from configurator import ON_COMMAND_LINE, coerce
from data.folder import find_datasets, prepare_facts, read_meta
from engine.common import UserError
from engine.job import Run
from engine.schedule import fit_schedule, schedule_note


class Range(NamedTuple):
    """
    Numbers from low to high for a search to draw from: evenly, or evenly by their logarithm if they
    span a factor of 10.
    """
    low: float
    high: float

    def draw(self, rng):
        if 0 < 10 * self.low <= self.high:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = rng.uniform(self.low, self.high)
        return round(value) if isinstance(self.low, int) else float(f'{value:.4g}')


def several(name, value, setting):
    """
    Convert a key's value like configurator.coerce(), but 'a,b' or (a, b) becomes a list, and
    'low..high' a Range.
    """
    def one(text):
        if setting.kind is str:
            return coerce(None if text == 'None' else text, setting)
        return coerce(literal(text), setting)
    if isinstance(value, str) and '..' in value and setting.kind is not str and name != 'seed':
        low, _, high = value.partition('..')
        found = Range(one(low), one(high))
        if isinstance(found.low, bool) or not found.low < found.high:
            raise ValueError('low..high with low below high')
        return found
    if isinstance(value, str):
        value = value.split(',')
    values = value if isinstance(value, (list, tuple)) else [value]
    values = list(dict.fromkeys(map(one, values)))
    return values[0] if len(values) == 1 else values


def literal(text):
    """Return the Python literal that a text is, or the text itself."""
    try:
        return ast.literal_eval(text.strip()) if isinstance(text, str) else text
    except (ValueError, SyntaxError):
        return text


def several_values(config):
    """Return the keys that have several values, except seed: {key: list or Range}."""
    return {k: v for k, v in config.items() if isinstance(v, (list, Range)) and k != 'seed'}


def seeds_of(config):
    return config['seed'] if isinstance(config['seed'], list) else [config['seed']]


def make_cells(config, given, block, rng=None):
    """
    Return {name of a cell: its settings}: the named cells times every combination of the keys that
    have several values; with rng, times `search` random draws of them.
    """
    axes = several_values(config)
    named = config['cells'] or {'': {}}
    check_named_cells(named, axes, given, block)
    choices = combinations(axes, config['search'], rng)
    cells = {}
    for name, own in named.items():
        for chosen in choices:
            words = [v if isinstance(v, str) else f'{k}={v}' for k, v in chosen.items()]
            label = ', '.join(filter(None, [name, *words]))
            cells[label or 'as configured'] = chosen | own
    return cells


def check_named_cells(named, axes, given, block):
    """
    Raise UserError for a key or value that a cell cannot set. Convert values to the type of their
    key.
    """
    for name, own in named.items():
        for key, value in own.items():
            if key not in block or key in ('out_dir', 'seed'):
                raise UserError(f"cell '{name}': '{key}' is not a key that a cell can set")
            if key in axes or given.get(key) == ON_COMMAND_LINE:
                raise UserError(f"cell '{name}' sets {key} itself, so --{key} has no effect there")
            try:
                own[key] = coerce(value, block[key])
            except ValueError as expected:
                message = f"cell '{name}': {key} must be {expected}, not {value!r}"
                raise UserError(message) from None


def combinations(axes, draws, rng):
    """Return a list of {key: value}: all combinations or, with rng, `draws` random ones."""
    if rng is None:
        for key, values in axes.items():
            if isinstance(values, Range):
                raise UserError(f'{key} is a range: --search=32 draws 32 cells from it; a grid '
                                f'takes values, as in --{key}=1,2')
        return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]

    def draw(values):
        return values.draw(rng) if isinstance(values, Range) else values[rng.integers(len(values))]
    return [{key: draw(values) for key, values in axes.items()} for _ in range(draws)]


def make_runs(config, given, block, cells, usual_iters=0):
    """
    Return a Run per cell and seed. Seeds are outermost, so that an interrupted study can be
    compared. A cell with fewer iterations than usual_iters has a shorter warmup, as in train.py.
    """
    axes = several_values(config)
    keys = [k for k in block
            if k in given and k not in axes and k not in ('seed', 'overwrite', 'out_dir')]
    shared = {k: config[k] for k in keys}
    runs, windows, notes = [], None, []
    for seed in seeds_of(config):
        for cell, own in cells.items():
            chosen = shared | own | {'seed': seed}
            # here, because halving starts runs with a smaller max_iters and the same schedule
            flags = given.flags() | own.keys()
            fitted = fit_schedule(config | chosen, flags, usual_iters)
            notes.append(schedule_note(config | chosen, fitted))
            chosen |= fitted
            if chosen.get('epochs'):
                raise UserError('the runs of a study end at --max_iters, not after --epochs')
            windows = match_windows(cell, chosen, config, windows)
            name = re.sub(r'[^\w.,=+-]+', '_', cell)[:150] + f',seed={seed}'
            folder = os.path.join(config['out_dir'], name)
            max_iters = chosen.get('max_iters', config['max_iters'])
            runs.append(Run(cell, seed, folder, chosen, max_iters))
    for note in filter(None, dict.fromkeys(notes)):
        print(note, flush=True)
    if len({run.folder for run in runs}) < len(runs):
        raise UserError('two cells would have the same folder: give them names that differ in '
                        'letters or digits')
    return runs


def match_windows(cell, chosen, config, expected):
    """
    Adapt eval_iters of a cell to its batch size, so that it is evaluated on the windows of the
    first cell: (block_size, number). Return these; `expected` is None for the first cell.
    """
    keys = 'batch_size', 'block_size', 'eval_iters'
    batch_size, block_size, eval_iters = (chosen.get(k, config[k]) for k in keys)
    if batch_size == 'auto':
        return expected  # compare() checks the windows when the runs have finished
    if expected is None:
        return block_size, batch_size * eval_iters
    if batch_size * eval_iters != expected[1] and expected[1] % batch_size == 0:
        chosen['eval_iters'] = eval_iters = expected[1] // batch_size
    if (block_size, batch_size * eval_iters) != expected:
        raise UserError(
            f"cell '{cell}' would be evaluated on {batch_size * eval_iters} windows of "
            f'{block_size} tokens, the first cell on {expected[1]} of {expected[0]}: they can '
            'only be compared with the same block_size and eval_iters * batch_size')
    return expected


def ladder(config, given, block):
    """
    Return the Runs of a ladder of widths. Heads keep their size and d_ff its proportion, as in the
    config file without flags. tokens_per_param determines the number of iterations.
    """
    from engine.describe import meta_model  # imports torch, which takes seconds
    base = given.without_flags()
    for key in ('n_embd', 'n_head'):
        if not isinstance(base[key], int):
            raise UserError(f"'{config['scaling']}' must have one {key}, whose proportions the "
                            'ladder keeps; widths are a flag, as in --n_embd=64,96,128')
    head_dim = base['n_embd'] // base['n_head']
    widths = ladder_widths(config, given, base['n_head'], head_dim)
    vocab_size = known_vocab_size(config)
    batch = config['batch_size'] * config['gradient_accumulation_steps']
    tokens_per_iter = batch * config['block_size']
    cells = {}
    for width in widths:
        own = dict(n_embd=width, n_head=width // head_dim)
        if base['d_ff']:
            own['d_ff'] = round(base['d_ff'] * width / base['n_embd'])
        model = meta_model(config | own | dict(vocab_size=vocab_size))
        n = model.get_num_params(False)
        steps = math.ceil(config['tokens_per_param'] * n / tokens_per_iter)
        print(f'width {width}: {n:,} parameters, {steps:,} iterations, '
              f'{steps * tokens_per_iter:,} tokens', flush=True)
        warmup_iters = min(config['warmup_iters'], steps // 10)
        own |= dict(max_iters=steps, lr_decay_iters=steps, warmup_iters=warmup_iters)
        cells[f'width {width}'] = own
    runs = make_runs(config, given, block, cells)
    for run in runs:
        run.cost = float(run.max_iters * run.settings['n_embd'])
    return runs


def ladder_widths(config, given, n_head, head_dim):
    """Return the given widths, or half to twice the width of the config file, in whole heads."""
    widths = config['n_embd']
    wrong = [k for k in several_values(config) if k != 'n_embd']
    wrong += [k for k in ('cells', 'search') if config[k]]
    if wrong:
        raise UserError('scaling varies n_embd, and no other key but seed may have several '
                        f'values: not {wrong[0]}')
    if not isinstance(widths, list):
        if given.get('n_embd') == ON_COMMAND_LINE:
            raise UserError(f'scaling needs several widths, as in --n_embd=64,96,128, not {widths}')
        heads = {max(1, round(factor * n_head)) for factor in (0.5, 0.75, 1, 1.5, 2)}
        widths = [head_dim * n for n in sorted(heads)]
    for width in widths:
        if width % head_dim:
            raise UserError(f'n_embd={width} is not a multiple of {head_dim}, the size of a head '
                            f"in '{config['scaling']}'")
    if len(widths) < 3:
        raise UserError(f'a power law needs 3 widths or more, not {len(widths)}: '
                        '--n_embd=64,96,128')
    return widths


def known_vocab_size(config):
    """
    Return the vocabulary size of the data set, which need not be prepared if its script names it.
    """
    folder = find_datasets(config['dataset'])[0][2]
    script = folder / 'prepare.py'
    vocab_size = config['vocab_size'] or read_meta(folder).get('vocab_size')
    if not vocab_size and script.exists():
        vocab_size = prepare_facts(script)['vocab_size']
    if not vocab_size:
        raise UserError(f"the vocabulary of data set '{config['dataset']}' is not known before it "
                        'is prepared, and sizes depend on it: prepare it, or give --vocab_size')
    return vocab_size
