"""
Find out which choice is better: run a grid of settings through train.py, or read finished runs, and
report them in a table with error bars and a picture.

    # a grid: every combination of these values, each with three seeds
    python compare.py config/preset_quick_test.py --normalization=layernorm,rmsnorm --seed=1,2,3

    # a study, whose file names its cells
    python compare.py config/ablate_gpt2_to_llama.py

    # finished runs
    python compare.py out-a out-b out-c

    # random search, by successive halving
    python compare.py config/preset_quick_test.py --search=32 --learning_rate=1e-4..1e-2

    # loss against size
    python compare.py --scaling=config/preset_quick_test.py --n_embd=64,96,128,192

Every cell is a run of train.py in its own folder under out_dir. After a kill, the same command
resumes the study. It writes out_dir/compare.md, compare.json and compare.png.

All runs are evaluated on the same windows of val, so two cells are compared window by window. The
difference of their losses, each a mean over seeds, has a standard error from the text (by means of
contiguous blocks of windows, since neighbouring windows are correlated) and one from the seeds (by
their variance within cells, pooled over all cells, as in an analysis of variance). The two
variances add up; interval and p-value are Student's t with Welch and Satterthwaite's degrees of
freedom. Each p-value is for a single comparison: one in twenty is below 0.05 by chance. The
variance between seeds is assumed to be the same in all cells; a NOTE appears if it is not.
"""
import ast
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
from typing import Literal, NamedTuple

import numpy as np

from configurator import (
    ON_COMMAND_LINE,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    coerce,
    configure,
    read_block,
)
from data.loader import find_datasets, prepare_facts, read_meta
from engine.common import Locked, UserError, optional, replacing, show_error, try_lock
from engine.statistics import estimate, fit_power_law, seed_variance, variances_differ
from engine.study import Launcher, Run, files_of, halving, read_run, run_all

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py')
AXES = dict(steps='iter', tokens='tokens', FLOPs='flops', seconds='train_seconds')


def settings(argv):
    """Return (config, given) as configure() does. A key of train.py may have several values."""
    out_dir = 'out-compare'  # compare.md, compare.json, compare.png and one folder per run
    cells = {}  # {name: {key: value}} in a config file: times every combination of listed values
    baseline = ''  # the cell that all others are compared with; '': the first
    sort: Literal['', 'val_loss', 'params', 'flops_per_token', 'tokens_per_sec', 'peak_bytes',
                  'seconds'] = ''  # sort rows by this figure; '': as given
    jobs: PositiveInt | Literal['auto'] = 'auto'  # runs at a time; auto: one per GPU, or 1 on a CPU
    search: NonNegativeInt = 0  # cells to draw from lists and ranges (1e-4..1e-2) and to halve
    scaling = ''  # a config file: train it in several widths (--n_embd=64,96,128), fit a power law
    tokens_per_param: PositiveFloat = 20.0  # training tokens per parameter, for scaling
    confidence: OpenFraction = 0.95  # of the intervals
    keep_checkpoints = True  # False: remove all checkpoints once every run has finished
    config, given = configure(__file__, TRAIN, argv=arguments(argv), convert=several)
    return config, given


def arguments(argv):
    """
    Return the arguments for configure(): no folders of runs, and the file of --scaling=... first.
    """
    files = [arg.removeprefix('--scaling=') for arg in argv if arg.startswith('--scaling=')]
    for arg in argv:
        is_flag = arg.startswith('-') or '=' in arg and '/' not in arg
        if not is_flag and not arg.endswith('.py') and not os.path.isdir(arg):
            raise UserError(f"'{arg}' is neither a config file nor the folder of a run")
    return files + [arg for arg in argv if not os.path.isdir(arg)]


# ------------------------------------------------------------------------------------------------
# keys with several values

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


def several(name, value, default, kind):
    """
    Convert a key's value like configurator.coerce(), but 'a,b' or (a, b) becomes a list, and
    'low..high' a Range. Keys of this script, dataset and out_dir have one value, and may contain a
    comma.
    """
    if name in read_block(__file__) or name in ('dataset', 'out_dir'):
        return coerce(value, default, kind)

    def one(text):
        if kind is str:
            return coerce(None if text == 'None' else text, default, kind)
        return coerce(literal(text), default, kind)
    if isinstance(value, str) and '..' in value and kind is not str and name != 'seed':
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


# ------------------------------------------------------------------------------------------------
# plan

def plan(config, given):
    """Return the list of Runs that the settings ask for."""
    if config['search'] == 1:
        raise UserError('search draws 2 cells or more, not 1')
    if config['scaling']:
        return ladder(config, given)
    rng = np.random.default_rng(seeds_of(config)[0]) if config['search'] else None
    runs = make_runs(config, given, make_cells(config, given, rng))
    if len(runs) == 1:
        raise UserError('nothing to compare: give a key several values, as in '
                        '--normalization=layernorm,rmsnorm --seed=1,2,3, or finished runs, as in '
                        'out-a out-b')
    if config['search']:
        for run in runs:
            run.settings['always_save_checkpoint'] = True  # the better half resumes
    return runs


def make_cells(config, given, rng=None):
    """
    Return {name of a cell: its settings}: the named cells times every combination of the keys that
    have several values; with rng, times `search` random draws of them.
    """
    axes = several_values(config)
    named = config['cells'] or {'': {}}
    check_named_cells(named, axes, given)
    choices = combinations(axes, config['search'], rng)
    cells = {}
    for name, own in named.items():
        for chosen in choices:
            words = [v if isinstance(v, str) else f'{k}={v}' for k, v in chosen.items()]
            label = ', '.join(filter(None, [name, *words]))
            cells[label or 'as configured'] = chosen | own
    return cells


def check_named_cells(named, axes, given):
    """
    Raise UserError for a key or value that a cell cannot set. Convert values to the type of their
    key.
    """
    block = read_block(TRAIN)
    for name, own in named.items():
        for key, value in own.items():
            if key not in block or key in ('out_dir', 'seed'):
                raise UserError(f"cell '{name}': '{key}' is not a key that a cell can set")
            if key in axes or given.get(key) == ON_COMMAND_LINE:
                raise UserError(f"cell '{name}' sets {key} itself, so --{key} has no effect there")
            try:
                own[key] = coerce(value, *block[key][:2])
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


def make_runs(config, given, cells):
    """
    Return a Run per cell and seed. Seeds are outermost, so that an interrupted study can be
    compared.
    """
    axes = several_values(config)
    keys = [k for k in read_block(TRAIN)
            if k in given and k not in axes and k not in ('seed', 'overwrite', 'out_dir')]
    shared = {k: config[k] for k in keys}
    runs, windows = [], None
    for seed in seeds_of(config):
        for cell, own in cells.items():
            chosen = shared | own | {'seed': seed}
            windows = match_windows(cell, chosen, config, windows)
            name = re.sub(r'[^\w.,=+-]+', '_', cell)[:150] + f',seed={seed}'
            folder = os.path.join(config['out_dir'], name)
            max_iters = chosen.get('max_iters', config['max_iters'])
            runs.append(Run(cell, seed, folder, chosen, max_iters))
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


def ladder(config, given):
    """
    Return the Runs of a ladder of widths. Heads keep their size, d_ff stays in proportion, and
    tokens_per_param determines the number of iterations.
    """
    from engine.cost import meta_model
    base, _ = configure(__file__, TRAIN, argv=[config['scaling']], convert=several)
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
    runs = make_runs(config, given, cells)
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


# ------------------------------------------------------------------------------------------------
# finished runs

def read_finished(folders, given):
    """Return {cell: Results} of finished runs."""
    usable = 'out_dir', 'baseline', 'sort', 'confidence'
    useless = [key for key in given if key not in usable]
    if useless:
        raise UserError(f'finished runs are compared as they are: {useless[0]} has no effect here')
    folders = list({os.path.realpath(folder): folder for folder in folders}.values())
    if len(folders) < 2:
        raise UserError(f"nothing to compare '{folders[0]}' with: name the folder of another run")
    results = []
    for folder in folders:
        result = read_run(folder)
        if result is None or not result.evals or not result.iterations:
            raise UserError(f"'{folder}' holds no run log with window losses (run_*.json): it is "
                            'not the out_dir of a run, or the run ended before its first '
                            'evaluation')
        results.append(result)
    return group_by_config(results)


NOT_A_CHOICE = set('''seed out_dir init_from overwrite wandb_log wandb_project wandb_run_name
    wandb_artifacts tensorboard_log sample_interval log_interval eval_interval save_interval
    always_save_checkpoint gradient_log_interval device peak_tflops'''.split())


def group_by_config(results):
    """
    Return {cell: Results}. Runs that differ only in their seed are one cell. Its name consists of
    the keys in which cells differ.
    """
    keys = dict.fromkeys(key for result in results for key in result.config)
    shown = []
    for key in keys:
        values = {str(result.config.get(key)) for result in results}
        if key not in NOT_A_CHOICE and len(values) > 1:
            shown.append(key)
    groups = {}
    for result in results:
        cell = ', '.join(f'{key}={result.config.get(key)}' for key in shown) or 'as configured'
        group = groups.setdefault(cell, [])
        if result.config['seed'] in [other.config['seed'] for other in group]:
            raise UserError(f"'{result.folder}' repeats the config and seed of another of these "
                            'runs: leave it out')
        group.append(result)
    return groups


# ------------------------------------------------------------------------------------------------
# run

def run_study(config, runs):
    """Run what has not finished. Return {cell: Results} and the list of runs that failed."""
    defaults = {key: setting[0] for key, setting in read_block(TRAIN).items()}
    launcher = Launcher(TRAIN, defaults, *devices_to_use(config))
    failed = (halving if config['search'] else run_all)(runs, launcher)
    groups = {run.cell: [] for run in runs}
    for run in runs:
        if run not in failed:
            groups[run.cell].append(read_run(run.folder))
    finished = {cell: group for cell, group in groups.items() if group}
    if not finished:
        raise UserError('no run has finished, see above')
    if config['search']:
        finished = dict(sorted(finished.items(), key=longest_and_best))
    elif not groups[runs[0].cell] and not config['baseline']:
        print('NOTE: the first cell has failed, so another one is the baseline')
    return finished, failed


def longest_and_best(item):
    """Return the sort key of a cell of a search: by iterations, then by loss."""
    _, group = item
    return -group[0].iter_num, np.mean([result.evals[-1].loss for result in group])


def devices_to_use(config):
    """Return (runs at a time, the GPUs that they share in turn)."""
    gpus = []
    if config['device'] in ('auto', 'cuda'):
        import torch
        count = torch.cuda.device_count()
        visible = os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(map(str, range(count))))
        gpus = visible.split(',')[:count]
    jobs = max(1, len(gpus)) if config['jobs'] == 'auto' else config['jobs']
    if jobs > max(1, len(gpus)):
        print('NOTE: runs that share a device slow each other down, so speeds and equal time are '
              'less meaningful')
    return jobs, gpus


# ------------------------------------------------------------------------------------------------
# compare

def compare(groups, baseline, confidence=0.95):
    """
    Return (rows, facts). rows has a dict per cell of {cell: Results} with its costs, its loss, and
    its difference from the baseline at the end and at equal FLOPs and seconds; facts holds for all
    of them.
    """
    results = [result for group in groups.values() for result in group]
    check_same_windows(results)
    losses = losses_to_compare(groups, results)
    seeds = {}
    for axis, cells in losses.items():
        known = [group for group in cells.values() if group]
        seeds[axis] = seed_variance([[x.mean() for x in group] for group in known])
    peak = max(result.startup_info['hardware_peak_tflops'] for result in results)
    rows = []
    for cell, group in groups.items():
        row = costs_of(cell, group, peak) | loss_of(losses['end'][cell], seeds['end'], confidence)
        for axis, cells in losses.items():
            a, b = cells[cell], cells[baseline]
            if cell != baseline and a and b:
                values = np.mean(a, axis=0) - np.mean(b, axis=0)
                found = estimate(values, seeds[axis], 1 / len(a) + 1 / len(b), confidence)
                row[f'difference at {axis}'] = dict(
                    difference=found.mean, interval=found.interval, p=found.p)
        rows.append(row)
    variance, df = seeds['end']
    return rows, dict(seed_deviation=math.sqrt(variance) if df else None, seed_df=df,
                      windows=results[0].windows, baseline=baseline, confidence=confidence)


def check_same_windows(results):
    first = results[0]
    for other in results:
        if other.windows != first.windows:
            raise UserError(
                f"'{first.folder}' and '{other.folder}' were not evaluated on the same windows, "
                f'{first.windows} and {other.windows}: they need the same dataset, block_size and '
                'eval_iters * batch_size')
    if first.windows['n'] < 4:
        raise UserError(f"{first.windows['n']} windows of val are too few for a comparison: "
                        'choose a higher --eval_iters')


def losses_to_compare(groups, results):
    """
    Return {'end' or axis: {cell: [window losses of each run]}}: at the end, and at the FLOPs and
    seconds of the cheapest run. The list is None for a cell without evaluations near enough.
    """
    at_end = {cell: [result.evals[-1].losses for result in group] for cell, group in groups.items()}
    losses = {'end': at_end}
    for axis in ('FLOPs', 'seconds'):
        budget = min(getattr(result.evals[-1], AXES[axis]) for result in results)
        losses[axis] = {}
        for cell, group in groups.items():
            found = [losses_at(result.evals, axis, budget) for result in group]
            losses[axis][cell] = None if any(x is None for x in found) else found
    return losses


def losses_at(evals, axis, budget):
    """
    Return the window losses of a run when it had spent its budget on an axis, interpolated between
    two evaluations. Return None if these are further apart than a quarter of the budget.
    """
    x = [getattr(e, AXES[axis]) for e in evals]
    i = int(np.searchsorted(x, budget))
    if budget >= x[-1]:
        return evals[-1].losses
    if i == 0:
        return None
    part = (budget - x[i - 1]) / (x[i] - x[i - 1])
    if part > 0.999:
        return evals[i].losses
    if x[i] - x[i - 1] > budget / 4:
        return None
    return (1 - part) * evals[i - 1].losses + part * evals[i].losses


def costs_of(cell, group, peak):
    """
    Return the settings and costs of a cell. `peak` is in TFLOP/s, one figure for all runs of a
    comparison.
    """
    first = group[0].startup_info
    steps = []
    for result in group:
        steps += result.iterations[2:] or result.iterations  # the first iterations are slow
    return dict(
        cell=cell,
        seeds=[result.config['seed'] for result in group],
        folders=[result.folder for result in group],
        iterations=max(result.iter_num for result in group),
        params=first['total_params'],
        flops_per_token=first['flops_per_token'],
        tokens_per_sec=float(np.median([e['mfu']['tokens_per_sec'] for e in steps])),
        mfu_percent=float(np.median([e['mfu']['achieved_tflops'] / peak * 100 for e in steps])),
        peak_bytes=max(max(e['memory'].values()) for e in steps),
        seconds=float(np.mean([result.evals[-1].train_seconds for result in group])))


def loss_of(losses, seeds, confidence):
    """
    Return the val loss of a cell. `losses` holds an array of window losses for each of its runs.
    """
    found = estimate(np.mean(losses, axis=0), seeds, 1 / len(losses), confidence)
    by_seed = [float(x.mean()) for x in losses]
    deviation = float(np.std(by_seed, ddof=1)) if len(losses) > 1 else None
    return dict(val_loss=found.mean, interval=found.interval, loss_by_seed=by_seed,
                seed_deviation=deviation)


# ------------------------------------------------------------------------------------------------
# report

COLUMNS = ['choice', 'seeds', 'iterations', 'parameters', 'MFLOP/token', 'tokens/s', 'MFU',
           'peak memory', 'val loss', 'difference', 'p', 'verdict', 'at equal FLOPs',
           'at equal time']


def table_line(row, baseline, confidence):
    """Return the texts of a row. `baseline` is the row of the baseline."""
    at = {axis: row.get(f'difference at {axis}') for axis in ('end', 'FLOPs', 'seconds')}
    differences = {}
    for axis, d in at.items():
        missing = '' if row is baseline else '-'
        differences[axis] = plus_minus(d['difference'], d['interval'], '+') if d else missing
    p = at['end']['p'] if at['end'] else None
    p_text = '' if p is None else '<0.001' if p < 0.001 else f'{p:.3f}'
    return [
        row['cell'].replace('|', '\\|'),
        str(len(row['seeds'])),
        str(row['iterations']),
        f"{row['params']:,}",
        f"{row['flops_per_token'] / 1e6:,.4g}",
        f"{row['tokens_per_sec']:,.0f}",
        f"{row['mfu_percent']:.1f}%",
        f"{row['peak_bytes'] / 2**30:.2f} GiB",
        plus_minus(row['val_loss'], row['interval']),
        differences['end'],
        p_text,
        verdict(row, baseline, confidence),
        differences['FLOPs'],
        differences['seconds'],
    ]


def plus_minus(value, half, sign=''):
    text = f'{value:{sign}.4f}'
    return f'{text} ± {half:.4f}' if math.isfinite(half) else text


def verdict(row, baseline, confidence):
    d = row.get('difference at end')
    if d is None:
        return 'baseline'
    if row['iterations'] != baseline['iterations']:
        return 'other length'
    if d['p'] is None:
        return 'one seed'
    if d['p'] >= 1 - confidence:
        return 'no difference'
    return 'better' if d['difference'] < 0 else 'worse'


def table(rows, facts):
    """Format the rows in Markdown, followed by notes for the reader."""
    baseline = next(row for row in rows if row['cell'] == facts['baseline'])
    lines = [table_line(row, baseline, facts['confidence']) for row in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *lines)]
    text = []
    for line in [COLUMNS, ['-' * width for width in widths], *lines]:
        text.append('| ' + ' | '.join(map(str.ljust, line, widths)) + ' |')
    return '\n'.join([*text, '', *notes(rows, facts)]) + '\n'


def notes(rows, facts):
    windows, percent = facts['windows'], f"{100 * facts['confidence']:g} %"
    yield (f"Val loss in nats per token on {windows['n']:,} windows of {windows['tokens_each']} "
           f'tokens, the same for all; ± is a {percent} interval. Differences are from '
           f"'{facts['baseline']}', window by window.")
    if facts['seed_df']:
        yield ('They hold for other text and other seeds: seeds of one cell differ by '
               f"{facts['seed_deviation']:.4f} (standard deviation, pooled, {facts['seed_df']} "
               'degrees of freedom).')
    else:
        yield ('Each cell has one seed, so intervals are for other text only, and there are no '
               'p-values: --seed=1,2,3 shows what another seed would give.')
    if len(rows) == 1 and len(rows[0]['seeds']) > 1:
        losses = ', '.join(f'{x:.4f}' for x in rows[0]['loss_by_seed'])
        yield f'No difference: these runs differ only in their seed. Their losses: {losses}.'
    yield ('At equal FLOPs and time, every run is compared after the cost of the cheapest run. The '
           'others are interpolated between two evaluations, when their learning rate had not yet '
           'decayed as far; - means that these are further apart than a quarter of that cost '
           '(--eval_interval). These intervals do not include the noise of clocks.')
    if variances_differ([row['loss_by_seed'] for row in rows]):
        yield ("NOTE: seeds of some cells differ more than those of others (Bartlett's test, "
               'seed_deviation in compare.json); for these cells, intervals are too short and '
               'p-values too low.')
    if len({row['iterations'] for row in rows}) > 1:
        yield ("NOTE: not all cells have the same number of iterations, so 'difference' is not at "
               'equal steps.')
    for name in facts['failed']:
        yield f'NOT IN THE TABLE, failed: {name}'


def picture(groups, path):
    """
    Plot val loss against steps, tokens, FLOPs and seconds: a line per cell with the mean over
    seeds, and a band from the best seed to the worst.
    """
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), sharey=True, layout='constrained')
    shades = plt.get_cmap('viridis')(np.linspace(0, 0.85, len(groups)))  # also distinct in grey
    dashes, markers = itertools.cycle(('-', '--', ':')), itertools.cycle('os^Dvx*P')
    styles = list(zip(shades, dashes, markers))
    low, high = loss_limits(groups)
    margin = 0.05 * (high - low)
    for ax, (label, key) in zip(axes.flat, AXES.items()):
        for (cell, group), style in zip(groups.items(), styles):
            draw_cell(ax, cell, group, key, *style)
        ax.set(xlabel=label, ylabel='val loss, nats per token', ylim=(low - margin, high + margin))
        ax.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if len(groups) <= 16:
        columns = max(1, min(6, 120 // max(map(len, labels))))
        figure.legend(handles, labels, loc='outside lower center', ncols=columns)
    windows = next(iter(groups.values()))[0].windows['n']
    figure.suptitle(f'{windows:,} windows of val; a band goes from the best seed to the worst')
    figure.savefig(path, dpi=100)


def draw_cell(ax, cell, group, key, shade, dash, marker):
    """Draw the curve of a cell against the field `key` of its evaluations."""
    common = set.intersection(*({e.iter for e in result.evals} for result in group))
    evals = [[e for e in result.evals if e.iter in common] for result in group]
    x = np.mean([[getattr(e, key) for e in row] for row in evals], axis=0)
    losses = np.array([[e.loss for e in row] for row in evals])
    ax.plot(x, losses.mean(0), linestyle=dash, marker=marker, markersize=4, color=shade, label=cell)
    ax.fill_between(x, losses.min(0), losses.max(0), color=shade, alpha=0.2, linewidth=0)


def loss_limits(groups):
    """
    Return limits that show most curves after a fifth of their run. A run that diverged may exceed
    them.
    """
    low, high = [], []
    for result in itertools.chain(*groups.values()):
        late = [e.loss for e in result.evals if e.iter >= result.iter_num / 5]
        low.append(min(late))
        high.append(max(late))
    return min(low), np.median(high)


def pyplot():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    return plt


def scaling_report(groups, config):
    """Return (text, facts) of a power law through the losses of all runs, and draw scaling.png."""
    results = [result for group in groups.values() for result in group]
    n = [result.startup_info['total_params'] for result in results]
    losses = [result.evals[-1].loss for result in results]
    try:
        fit = fit_power_law(n, losses, config['confidence'])
    except ValueError as e:
        return f'NOTE: no fit: {e}\n', {}
    scaling_picture(n, losses, fit, config)
    loss, half = fit.predict(10 * max(n))
    floor = f', E {fit.E:.4f} ± {fit.E_interval:.4f}' if fit.E else ''
    text = (f'{fit.form}: alpha {fit.alpha:.4f} ± {fit.alpha_interval:.4f}, A {fit.A:.4g}{floor} '
            f"({fit.df} degrees of freedom; N: all parameters, {config['tokens_per_param']:g} "
            f'tokens each); {10 * max(n):,} of them would reach {loss:.4f} ± {half:.4f}\n')
    if not fit.E:
        text += ('These sizes cannot distinguish E, the loss that no size removes, from 0, so the '
                 'line is too low beyond them.\n')
    facts = fit._asdict()
    del facts['predict']
    for key, value in facts.items():
        if isinstance(value, float) and not math.isfinite(value):
            facts[key] = None  # JSON has no nan
    return text, {'fit': facts}


def scaling_picture(n, losses, fit, config):
    x = np.geomspace(min(n) / 1.5, max(n) * 10, 100)
    y, half = fit.predict(x)
    figure, ax = pyplot().subplots(figsize=(8, 6))
    ax.plot(n, losses, 'o', color='black', label='runs')
    ax.plot(x, y, '-', color='black', label=fit.form)
    ax.fill_between(x, y - half, y + half, color='grey', alpha=0.3, linewidth=0,
                    label=f"{100 * config['confidence']:g} %")
    ax.set(xscale='log', yscale='log', xlabel='parameters', ylabel='val loss, nats per token',
           title=f"{config['tokens_per_param']} tokens per parameter")
    ax.grid(alpha=0.3, which='both')
    ax.legend()
    figure.tight_layout()
    figure.savefig(os.path.join(config['out_dir'], 'scaling.png'), dpi=100)


def report(groups, failed, config):
    """Print the table, and write it with its figures and pictures into out_dir."""
    out_dir, sort = config['out_dir'], config['sort']
    baseline = config['baseline'] or next(iter(groups))
    rows, facts = compare(groups, baseline, config['confidence'])
    if sort:
        rows.sort(key=lambda row: row[sort] or 0, reverse=sort == 'tokens_per_sec')
    facts |= dict(command=sys.argv, failed=[f'{run.cell}, seed {run.seed}' for run in failed])
    text = table(rows, facts)
    if config['search']:
        text += ('NOTE: the best cell of a search was selected by these figures, so it looks '
                 'better than it is: run the first few again with other seeds.\n')
    results = itertools.chain(*groups.values())
    devices = {result.startup_info['device'].split(',')[0] for result in results}
    if len(devices) > 1:
        text += ('NOTE: these runs used different devices, so speed and equal time mean little: '
                 f"{'; '.join(sorted(devices))}\n")
    if config['scaling']:
        more, fit = scaling_report(groups, config)
        text += '\n' + more
        facts |= fit
    print('\n' + text)
    contents = {'compare.md': text, 'compare.json': json.dumps(facts | dict(rows=rows), indent=1)}
    for name, content in contents.items():
        with replacing(os.path.join(out_dir, name), 'w', encoding='utf-8') as f:
            f.write(content)
    path = os.path.join(out_dir, 'compare.png')
    picture(groups, path)
    also = ' and scaling.png' if config['scaling'] else ''
    print(f'{path}, compare.md and compare.json{also}')


# ------------------------------------------------------------------------------------------------
# the whole

def main(argv):
    sys.excepthook = show_error  # before configure(), which gets the arguments from arguments()
    config, given = settings(argv)
    for library in ('scipy', 'matplotlib'):  # before hours of runs, not after them
        optional(library, 'a comparison')
    if not 0 < config['confidence'] < 1:
        raise UserError(f"confidence must be between 0 and 1, not {config['confidence']}")
    folders = [arg for arg in argv if os.path.isdir(arg)]
    runs, failed = [], []
    if folders:
        groups = read_finished(folders, given)
    else:
        runs = plan(config, given)
        check_baseline(config, dict.fromkeys(run.cell for run in runs))
    lock = lock_out_dir(config['out_dir'])
    if runs:
        for number in SIGNALS:
            signal.signal(number, stop)
        groups, failed = run_study(config, runs)
    check_baseline(config, groups)
    report(groups, failed, config)
    if not config['keep_checkpoints'] and not failed:
        remove_checkpoints(runs)
    lock.close()
    return 1 if failed else 0


def check_baseline(config, cells):
    if config['baseline'] and config['baseline'] not in cells:
        raise UserError(f"baseline '{config['baseline']}' is not one of the cells: "
                        f"{'; '.join(cells)}")


def lock_out_dir(out_dir):
    os.makedirs(out_dir, exist_ok=True)
    try:
        return try_lock(os.path.join(out_dir, 'lock'), f'compare.py, process {os.getpid()}')
    except Locked as e:
        raise UserError(f"out_dir '{out_dir}' is in use by {e.holder}; --out_dir=... gives this "
                        'run another') from None


def stop(number, frame):
    """Let the active runs save after a signal; see run_all. Further signals change nothing."""
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    print('\nthe active runs save and end; the same command resumes them', flush=True)
    raise SystemExit(128 + number)


def remove_checkpoints(runs):
    for run in runs:
        for path in files_of(run.folder, 'ckpt*'):
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


if __name__ == '__main__':
    raise SystemExit(main(sys.argv[1:]))
