"""
Report on one run from its logs: a sparkline, the picture loss.png, what `compare.py out` prints.
Every function that takes a `result` takes a results.Result.
"""
import io
import os

import numpy as np

from engine.common import GIB, duration, printable, replacing

BLOCKS = '▁▂▃▄▅▆▇█'


def sparkline(values, width=40):
    """Return a text of at most `width` blocks whose heights are the values, for a terminal."""
    values = np.array(values, dtype=float)
    values = values[np.isfinite(values)]
    if not len(values):
        return ''
    means = thinned(values, width)
    span = means.max() - means.min() or 1.0
    heights = (means - means.min()) / span * (len(BLOCKS) - 1)
    return ''.join(BLOCKS[round(height)] for height in heights)


def thinned(values, n):
    """Return the means of at most n contiguous groups of values."""
    return np.array([group.mean() for group in np.array_split(values, min(n, len(values)))])


def draw_loss(result):
    """
    Draw the losses of a run into loss.png in its folder, and return the path. Return None if
    matplotlib is not installed, or if the run has no evaluation to draw.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        return None
    if result is None or not result.evals:
        return None
    figure = Figure(figsize=(7.5, 4.5), layout='constrained')
    ax = figure.subplots()
    draw_curves(ax, result)
    low, high = loss_limits(result)
    ax.set(xlabel='iteration', ylabel='loss, nats per token', ylim=(low, high), title=title(result))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    n = result.startup_info['tokens_per_iter']
    tokens = ax.secondary_xaxis('top', functions=(lambda x: x * n, lambda x: x / n))
    tokens.set_xlabel('tokens')
    tokens.xaxis.set_major_formatter(EngFormatter(sep=''))  # 200k
    path = os.path.join(result.folder, 'loss.png')
    save_picture(figure, path)
    return path


def save_picture(figure, path):
    """Write a figure of matplotlib as a PNG file with a palette, a third as large as without."""
    from PIL import Image  # matplotlib needs it, too
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=100, format='png')
    with replacing(path) as f:
        Image.open(pixels).convert('RGB').quantize(128).save(f, format='png', optimize=True)


def draw_curves(ax, result):
    """Plot the loss of the log lines, and both losses of the evaluations with the best marked."""
    logged = np.array(logged_losses(result))
    if len(logged):
        x, losses = (thinned(column, 200) for column in logged.T)
        ax.plot(x, losses, color='0.7', linewidth=1, label='train, as logged')
    x = [e.iter for e in result.evals]
    ax.plot(x, [e.train_loss for e in result.evals], 'o-', color='tab:blue', markersize=4,
            label='train, evaluated')
    ax.plot(x, [e.loss for e in result.evals], 's-', color='tab:orange', markersize=4, label='val')
    best = best_of(result)
    ax.plot(best.iter, best.loss, '*', color='black', markersize=11, zorder=3,
            label=f'best val loss {best.loss:.4f}')


def loss_limits(result):
    """Return limits of the loss axis. Losses of the first twentieth of a run may exceed them."""
    points = logged_losses(result)
    for e in result.evals:
        points += [(e.iter, e.loss), (e.iter, e.train_loss)]
    last = max(it for it, _ in points)
    low = min(loss for _, loss in points)
    high = max(loss for it, loss in points if it >= last / 20)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def logged_losses(result):
    """Return the (iteration, loss) of the log lines. A step that fp16 skipped has no loss."""
    return [(e['iter'], e['loss']) for e in result.iterations if e['loss'] is not None]


def title(result):
    first, last = result.evals[0], result.evals[-1]
    return (f"{result.startup_info['total_params']:,} parameters: val loss from {first.loss:.4f} "
            f'to {last.loss:.4f}')


def best_of(result):
    """Return the Evaluation with the lowest val loss."""
    return min(result.evals, key=lambda e: e.loss)


# -------------------------------------------------------------------------------------------------
# what `compare.py out` prints

def markdown_table(lines):
    """Format lists of texts, the first of which is the heading, as a table in Markdown."""
    heading, *rows = lines
    widths = [max(map(len, column)) for column in zip(*lines)]
    rules = ['-' * width for width in widths]
    return '\n'.join('| ' + ' | '.join(map(str.ljust, line, widths)) + ' |'
                     for line in [heading, rules, *rows])


def run_report(result, costs):
    """Return the report on a run in Markdown. `costs` are those of comparison.costs_of()."""
    outcome = result.outcome
    if outcome == 'failed':  # the log says so until the run has ended
        outcome = 'failed, killed or still running'
    losses = [loss for _, loss in logged_losses(result)]
    parts = [
        f"{title(result)} at iteration {result.iter_num} of {result.config['max_iters']} "
        f'({outcome})',
        f'train loss {sparkline(losses)}',
        evaluation_table(result),
        'Losses are in nats per token; * is the lowest val loss. Seconds are those of training.',
        cost_table(result, costs),
        *samples(result)]
    return '\n\n'.join(parts) + '\n'


def evaluation_table(result, most=20):
    """Return a table of the evaluations: all, or about as many as `most` and the best one."""
    evals, best = result.evals, best_of(result)
    chosen = {round(i) for i in np.linspace(0, len(evals) - 1, most)}
    lines = [['iteration', 'tokens', 'train loss', 'val loss', 'bits per byte', 'seconds']]
    for i, e in enumerate(evals):
        if i in chosen or e is best:
            mark = ' *' if e is best else ''
            bits = '-' if e.bits_per_byte is None else f'{e.bits_per_byte:.4f}'
            lines.append([str(e.iter), f'{e.tokens:,}', f'{e.train_loss:.4f}',
                          f'{e.loss:.4f}{mark}', bits, f'{e.train_seconds:,.1f}'])
    return markdown_table(lines)


def cost_table(result, costs):
    last, million = result.evals[-1], costs['flops_per_token'] / 1e6
    return markdown_table([
        ['cost', 'until the last evaluation'],
        ['parameters', f"{costs['params']:,}"],
        ['tokens', f'{last.tokens:,}'],
        ['FLOPs', f'{million:,.4g} million per token, {last.flops:.3g} in all'],
        ['speed', f"{costs['tokens_per_sec']:,.0f} tokens/s"],
        ['peak memory', f"{costs['peak_bytes'] / GIB:.2f} GiB"],
        ['time', f"{duration(costs['seconds'])}, without evaluations"],
        ['device', result.startup_info['device'].replace('|', '\\|')]])


def samples(result, most=2):
    """Yield the last samples. Indented, a text is shown as it is, whatever Markdown it contains."""
    for e in [e for e in result.evals if e.sample][-most:]:
        yield f'Sample at iteration {e.iter}:'
        lines = printable(e.sample).strip('\n').split('\n')
        yield '\n'.join(f'    {line}' for line in lines)
