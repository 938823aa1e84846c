"""
Report a comparison for compare.py: the table with its notes, the picture, and the power law of a
ladder of widths.
"""
import itertools
import math
import os

import numpy as np

from engine.common import GIB
from engine.results import AXES
from engine.run_report import markdown_table, save_picture
from engine.statistics import fit_power_law

COLUMNS = ['choice', 'seeds', 'iterations', 'parameters', 'MFLOP/token', 'tokens/s', 'MFU',
           'peak memory', 'val loss', 'difference', 'by seed', 'p', 'verdict',
           'at equal FLOPs', 'at equal time']


def table_line(row, baseline, confidence):
    """Return the texts of a row. `baseline` is the row of the baseline."""
    at = {axis: row.get(f'difference at {axis}') for axis in ('end', 'FLOPs', 'seconds')}
    differences = {}
    for axis, d in at.items():
        missing = '' if row is baseline else '-'
        differences[axis] = plus_minus(d['difference'], d['interval'], '+') if d else missing
    by_seed = ''
    if at['end']:
        by_seed = ', '.join(f'{d:+.4f}' for d in at['end']['by_seed'].values())
    p = at['end']['p'] if at['end'] else None
    p_text = '' if p is None else '<0.001' if p < 0.001 else f'{p:.3f}'
    return [
        row['cell'].replace('|', '\\|'),
        str(len(row['seeds'])),
        str(row['iterations']),
        f"{row['params']:,}",
        f"{row['flops_per_token'] / 1e6:,.4g}",
        f"{row['tokens_per_sec']:,.0f}",
        '-' if row['peak_source'].startswith('measured') else f"{row['mfu_percent']:.1f}%",
        f"{row['peak_bytes'] / GIB:.2f} GiB",
        plus_minus(row['val_loss'], row['interval']),
        differences['end'],
        by_seed,
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
        word = 'no difference'
    else:
        word = 'better' if d['difference'] < 0 else 'worse'
    ratio = row['flops_per_token'] / baseline['flops_per_token']
    return word if 0.98 < ratio < 1.02 else f'{word}, {ratio:.2f}x FLOPs'


def table(rows, facts):
    """Format the rows in Markdown, followed by notes for the reader."""
    baseline = next(row for row in rows if row['cell'] == facts['baseline'])
    lines = [table_line(row, baseline, facts['confidence']) for row in rows]
    return '\n'.join([markdown_table([COLUMNS, *lines]), '', *notes(rows, facts)]) + '\n'


def notes(rows, facts):
    windows, percent = facts['windows'], f"{100 * facts['confidence']:g} %"
    yield (f"Val loss in nats per token on {windows['n']:,} windows of {windows['tokens_each']} "
           f'tokens, the same for all; ± is a {percent} interval. Differences are from '
           f"'{facts['baseline']}', window by window.")
    if facts['seed_df']:
        yield ('They hold for other text and other seeds: seeds of one cell differ by '
               f"{spread(facts, 'seed')}.")
    if facts['residual_df']:
        yield ('Differences are estimated within each seed that both cells have: without what a '
               f"seed does to all cells, runs differ by {spread(facts, 'residual')}.")
    if not facts['seed_df']:
        yield ('Each cell has one seed, so intervals are for other text only, and there are no '
               'p-values: --seed=1,2,3 shows what another seed would give.')
    if len(rows) == 1 and len(rows[0]['seeds']) > 1:
        losses = ', '.join(f'{x:.4f}' for x in rows[0]['loss_by_seed'])
        yield f'No difference: these runs differ only in their seed. Their losses: {losses}.'
    yield ('At equal FLOPs and time, every run is compared after the cost of the cheapest run. The '
           'others are interpolated between two evaluations, when their learning rate had not yet '
           'decayed as far; - means that these are further apart than a quarter of that cost: '
           'evaluate ten times in a run, by --eval_interval. These intervals do not include the '
           'noise of clocks; neither do tokens/s of runs that shared the machine.')
    if facts['residual_df'] == 1:
        yield ('NOTE: two cells and two seeds leave one degree of freedom, with which a 95 % '
               'interval holds the truth about 92 times in 100: a third seed is worth its time.')
    unpaired = [row['cell'] for row in rows
                if 'difference at end' in row and not row['difference at end']['paired']]
    if unpaired and facts['seed_df']:
        yield ('NOTE: too few seeds in common with the baseline, so compared as independent runs: '
               f"{'; '.join(unpaired)}")
    if facts['variances_differ']:
        yield ("NOTE: seeds of some cells differ more than those of others (Bartlett's test, "
               'loss_by_seed in compare.json); for these cells, intervals are too short and '
               'p-values too low.')
    if len({row['iterations'] for row in rows}) > 1:
        yield ("NOTE: not all cells have the same number of iterations, so 'difference' is not at "
               'equal steps.')
    for name in facts['failed']:
        yield f'NOT IN THE TABLE, failed: {name}'


def spread(facts, kind):
    return (f"{facts[f'{kind}_deviation']:.4f} (standard deviation, pooled over cells, "
            f"{facts[f'{kind}_df']:.3g} degrees of freedom)")


def picture(groups, path):
    """
    Plot val loss against steps, tokens, FLOPs and seconds: a line per cell with the mean over
    seeds, and a band from the best seed to the worst.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 9), layout='constrained')
    axes = figure.subplots(2, 2, sharey=True)
    shades = colormaps['viridis'](np.linspace(0, 0.85, len(groups)))  # also distinct in grey
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
    save_picture(figure, path)


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
    from matplotlib.figure import Figure
    x = np.geomspace(min(n) / 1.5, max(n) * 10, 100)
    y, half = fit.predict(x)
    figure = Figure(figsize=(8, 6))
    ax = figure.subplots()
    ax.plot(n, losses, 'o', color='black', label='runs')
    ax.plot(x, y, '-', color='black', label=fit.form)
    ax.fill_between(x, y - half, y + half, color='grey', alpha=0.3, linewidth=0,
                    label=f"{100 * config['confidence']:g} %")
    ax.set(xscale='log', yscale='log', xlabel='parameters', ylabel='val loss, nats per token',
           title=f"{config['tokens_per_param']} tokens per parameter")
    ax.grid(alpha=0.3, which='both')
    ax.legend()
    figure.tight_layout()
    save_picture(figure, os.path.join(config['out_dir'], 'scaling.png'))
