"""
Forecast the val loss at the end of a run, from its first part and finished runs like it, or from
smaller runs of three sizes. `python compare.py --forecast=out` and the evaluation lines of a run
print it. This file does not import torch.

Runs with the same seed read the same batches, so that their training losses at the same iterations
differ only by what differs between the runs. Over the finished runs, the loss at the end is
regressed on the training loss early on. A few runs do not determine a line and its error, so a
prior is part of the fit, like that of Bayesian linear regression. Some choices are outliers, so
errors have a t distribution (Lange, Little and Taylor 1989, https://doi.org/10.2307/2290063).
"""
import math
from typing import NamedTuple

import numpy as np

from engine.statistics import fit_power_law, t_quantile

FIRST = 16  # a forecast needs the first sixteenth of a run
# a finished run that is like another has the same of these; a smaller run may differ in SIZE only
ALIKE = {'n_layer', 'n_head', 'n_embd', 'max_iters', 'lr_decay_iters', 'lr_schedule', 'decay_lr',
         'log_interval', 'lora_rank'}
SIZE = {'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'd_ff', 'max_iters', 'lr_decay_iters',
        'warmup_iters'}
NO_CHOICE = {'seed', 'out_dir', 'init_from', 'overwrite', 'device'}

# The prior, which counts as PRIOR_DF runs: the slope of the line, and the standard deviations, in
# nats, of the slope and of a run from the line. At 1/16 of a run both are 16 times as high.
SLOPE, SLOPE_DEVIATION, DEVIATION, PRIOR_DF = 1.0, 0.1, 0.008, 2
LAW_DEVIATION = 0.03  # of a run from a power law, in nats
T_DF = 3  # degrees of freedom of the distances from the line: one in 17 is over 3 scales off


class Forecast(NamedTuple):
    loss: float
    interval: float  # half its width
    spread: float  # what it would be by the mean and spread of the other runs
    basis: str  # the other runs, in words


def forecast(result, others, confidence=0.95, seen=None):
    """
    Return the Forecast of a run from other Results, at iteration `seen` (None: as far as it is), or
    None if these do not suffice.
    """
    seen = result.iter_num if seen is None else seen
    return (from_first_part(result, others, confidence, seen)
            or from_smaller(result, others, confidence))


def comparable(result, others):
    """Return the other runs that have finished, with losses on the same windows."""
    return [r for r in others if is_finished(r) and r.windows == result.windows]


def is_finished(result):
    return result.outcome == 'finished' and bool(result.evals)


def differing(a, b):
    """Return the keys of the settings in which two runs differ."""
    return {key for key in {*a.config, *b.config} - NO_CHOICE
            if a.config.get(key) != b.config.get(key)}


def new_run_interval(y, confidence):
    """Return half the interval of another run, from the losses y of runs."""
    if len(y) < 2:
        return math.inf
    return t_quantile(confidence, len(y) - 1) * y.std(ddof=1) * math.sqrt(1 + 1 / len(y))


# -------------------------------------------------------------------------------------------------
# from the first part

def from_first_part(result, others, confidence, seen):
    """Return the Forecast from the training losses in the second half of what has been seen."""
    total = result.config['max_iters']
    # multiples of log_interval, because a run that was resumed has other log lines, too
    iters = [e['iter'] for e in result.iterations if seen / 2 < e['iter'] <= seen
             and e['iter'] % result.config['log_interval'] == 0]
    early = early_loss(result, iters)
    alike = [r for r in comparable(result, others)
             if not differing(r, result) & ALIKE and early_loss(r, iters)]
    if FIRST * seen < total or not early or not alike:
        return None
    alike = [r for r in alike if r.config['seed'] == result.config['seed']] or alike
    x = np.array([early_loss(r, iters) for r in alike])
    y = np.array([r.evals[-1].loss for r in alike])
    return Forecast(*regression(x, y, early, seen / total, confidence),
                    new_run_interval(y, confidence), f'finished runs like it: {len(y)}')


def early_loss(result, iters):
    """Return the mean training loss of these log lines, or None if the run lacks one."""
    losses = {e['iter']: e['loss'] for e in result.iterations}
    found = [losses.get(i) for i in iters]
    return None if None in found or not found else float(np.mean(found))


def regression(x, y, x0, part, confidence):
    """
    Return (y0, half its interval) of a new point at x0, from the points x, y and the prior. Points
    far from the line get a lower weight, as the t distribution asks for.
    """
    deviation, prior = DEVIATION / part, (DEVIATION / SLOPE_DEVIATION) ** 2
    df, weights = len(y) - 1 + PRIOR_DF, np.ones(len(y))
    for _ in range(30):
        total = weights.sum()
        x_mean, y_mean = weights @ x / total, weights @ y / total
        squares = weights @ (x - x_mean) ** 2 + prior
        slope = (weights @ ((x - x_mean) * (y - y_mean)) + prior * SLOPE) / squares
        left = y - y_mean - slope * (x - x_mean)
        variance = (weights @ left ** 2 + prior * (slope - SLOPE) ** 2
                    + PRIOR_DF * deviation ** 2) / df
        weights = (T_DF + 1) / (T_DF + left ** 2 / variance)
    error = math.sqrt(variance * (1 + 1 / total + (x0 - x_mean) ** 2 / squares))
    return float(y_mean + slope * (x0 - x_mean)), t_quantile(confidence, min(df, T_DF)) * error


# -------------------------------------------------------------------------------------------------
# from smaller runs

def from_smaller(result, others, confidence):
    """
    Return the Forecast by a power law in the parameters. Its interval has three parts: the error of
    the law, that of a run, and all that the law gains beyond the largest of the other runs, because
    a few sizes do not tell where it ends.
    """
    smaller = [r for r in comparable(result, others)
               if differing(r, result) <= SIZE and size(r) < size(result)]
    if len(set(map(size, smaller))) < 3 or not same_length([*smaller, result]):
        return None
    n, y = np.array([(size(r), r.evals[-1].loss) for r in smaller]).T
    try:
        fit = fit_power_law(n, y, confidence)
    except ValueError:  # no power law fits
        return None
    loss, law_error = fit.predict(size(result))
    left, gain = y - fit.predict(n)[0], fit.predict(n.max())[0] - loss
    error = math.sqrt(left @ left / fit.df) * t_quantile(confidence, fit.df)
    if not error or not math.isfinite(law_error):
        return None
    df = fit.df + PRIOR_DF
    variance = (left @ left + PRIOR_DF * LAW_DEVIATION ** 2) / df
    with_prior = math.sqrt(variance) * t_quantile(confidence, df)
    interval = math.hypot(with_prior * math.hypot(law_error / error, 1), gain)
    return Forecast(float(loss), interval, new_run_interval(y, confidence),
                    f'smaller runs: {len(y)}, {fit.form}')


def size(result):
    return result.startup_info['total_params']


def same_length(results):
    """Return whether runs read about as many tokens, or as many per parameter."""
    tokens = [r.config['max_iters'] * r.startup_info['tokens_per_iter'] for r in results]
    per_param = [n / size(r) for n, r in zip(tokens, results)]
    return any(max(values) < 1.05 * min(values) for values in (tokens, per_param))
