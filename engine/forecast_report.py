"""Report forecasts for compare.py, and check them on runs that have finished."""
import glob
import math
import os

import numpy as np

from engine.common import UserError, optional
from engine.forecast import (
    FIRST,
    differing,
    forecast,
    from_first_part,
    from_smaller,
    is_finished,
)
from engine.results import read_runs, runs_beside
from engine.run_report import markdown_table

NO_FORECAST = '''it needs a sixteenth of its iterations, and a finished run with the same data, \
size, schedule and log_interval; or finished runs of three smaller sizes, all else equal'''
HEADING = ['from', 'runs', 'inside', 'expect', 'interval', 'mean of others', 'rms error']
EXPLANATION = '''\
Check: each finished run is forecast from the others, without those that differ from it only in the
seed. Inside: runs whose val loss at the end was in the {:g} % interval of the forecast; expect: the
95 % interval of this share. Interval: half of it, the median over the runs; beside it that of the
mean and spread of the other runs, without a look at the run.'''


def forecast_report(folder, more, confidence):
    """
    Return a text: the forecast of a run, or of each unfinished run in a folder of runs, and a check
    of forecasts. `more` are folders of other runs; without them, these are beside the run.
    """
    own = read_runs(folder)
    others = runs_beside(folder) if own and not more else runs_in([folder, *more])
    if own:
        others = [run for run in others if not os.path.samefile(run.folder, folder)]
    runs = own + others
    if not runs:
        raise UserError(f"'{folder}' holds no run log (run_*.json): it is neither the out_dir of a "
                        'run nor a folder of them')
    targets = own[-1:] or [run for run in runs if not is_finished(run)]
    lines = [forecast_line(run, runs, confidence) for run in targets]
    rows = list(check([run for run in runs if is_finished(run)], confidence))
    if rows:
        lines += ['', markdown_table([HEADING, *rows]), '', EXPLANATION.format(100 * confidence)]
    return '\n'.join(lines or [f"NOTE: no run in '{folder}' can be forecast: {NO_FORECAST}"])


def runs_in(folders):
    """Return the Results of all runs in these folders and one level below."""
    paths = {}
    for folder in folders:
        inside = sorted(glob.glob(os.path.join(glob.escape(folder), '*', '')))
        paths |= {os.path.realpath(path): os.path.normpath(path) for path in (folder, *inside)}
    return [run for path in paths.values() for run in read_runs(path)]


def forecast_line(run, runs, confidence):
    """Return the forecast of a run, or why there is none; of a finished run, at its sixteenth."""
    total, finished = run.config['max_iters'], is_finished(run)
    seen = math.ceil(total / FIRST) if finished else run.iter_num
    where = f'{run.folder} at iteration {seen} of {total}'
    found = forecast(run, [r for r in runs if r is not run], confidence, seen)
    if not found:
        return f'NOTE: no forecast for {where}: {NO_FORECAST}'
    end = f'; it was {run.evals[-1].loss:.4f}' if finished else ''
    return (f'{where}: val loss {found.loss:.4f} ± {found.interval:.4f} at the end '
            f'({found.basis}){end}')


def check(finished, confidence):
    """Yield a row for each kind of forecast that can be made for some of these runs."""
    kinds = {f'1/{n} of a run': lambda run, others, n=n: from_first_part(
        run, others, confidence, run.config['max_iters'] / n) for n in (16, 8, 4, 2)}
    kinds['smaller runs'] = lambda run, others: from_smaller(run, others, confidence)
    for name, kind in kinds.items():
        pairs = [(run.evals[-1].loss, kind(run, [r for r in finished if differing(r, run)]))
                 for run in finished]
        pairs = [(end, found) for end, found in pairs if found]
        if pairs:
            yield [name, *figures(*zip(*pairs))]


def figures(ends, found):
    """Return the texts of a row from the losses at the end and their Forecasts."""
    stats = optional('scipy.stats', 'a binomial interval')
    errors = np.array([f.loss for f in found]) - ends
    inside, n = int(sum(abs(errors) <= [f.interval for f in found])), len(ends)
    spread = np.median([f.spread for f in found])
    low, high = stats.binomtest(inside, n).proportion_ci()
    return [str(n), f'{inside}, {100 * inside / n:.0f} %', f'{100 * low:.0f} to {100 * high:.0f} %',
            f'± {np.median([f.interval for f in found]):.4f}',
            f'± {spread:.4f}' if math.isfinite(spread) else '-',
            f'{np.sqrt(np.mean(errors ** 2)):.4f}']
