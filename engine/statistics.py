"""
Compute errors of a mean loss, intervals and p-values of differences, and power-law fits. This file
does not import torch, and imports scipy only when needed.

Window losses are in text order, and neighbouring windows are correlated. A mean over them has two
errors: one from the text, estimated from contiguous blocks of windows, and one from the training
seeds. Their variances add up.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from engine.common import optional


def mean_and_error(losses, sets=None):
    """
    Return (mean, standard error, degrees of freedom) of losses (n,) in text order. `sets` (n,) says
    which data set of a mixture each loss comes from; shares are fixed, so differences between sets
    are not part of the error.

    The error is estimated from floor(sqrt(n)) block means (Flegal and Jones 2010,
    https://doi.org/10.1214/09-AOS735). With fewer than 4 losses the error is nan.
    """
    losses = np.asarray(losses, np.float64)
    mean = float(losses.mean())
    numbers = [] if sets is None else np.unique(sets)
    if len(numbers) < 2:
        return mean, *error_of_mean(losses, mean)
    variance, total_df = 0.0, 0
    for number in numbers:
        part = losses[sets == number]
        error, df = error_of_mean(part, float(part.mean()))
        variance += (len(part) / len(losses) * error) ** 2
        total_df += df
    return mean, math.sqrt(variance), total_df


def error_of_mean(losses, mean):
    """Return (standard error, degrees of freedom) of the mean of losses, from contiguous blocks."""
    blocks = math.isqrt(len(losses))
    if blocks < 2:
        return math.nan, 0
    sums = [(block - mean).sum() for block in np.array_split(losses, blocks)]
    deviations = np.array(sums) / len(losses)  # each block's contribution
    variance = blocks / (blocks - 1) * float(np.square(deviations).sum())
    return math.sqrt(variance), blocks - 1


def t_quantile(confidence, df):
    """
    Return half the width of a two-sided Student's t interval, in standard errors; nan for df 0.
    """
    special = optional('scipy.special', 'a confidence interval')  # loads faster than scipy.stats
    return float(special.stdtrit(df, (1 + confidence) / 2))


class SeedVariance(NamedTuple):
    """A variance of the loss between runs that differ in their seed."""
    variance: float
    df: float  # degrees of freedom; 0: unknown

    @property
    def deviation(self):
        """Return the standard deviation, or None if it is unknown."""
        return math.sqrt(self.variance) if self.df else None


class SeedVariances(NamedTuple):
    """What seeds do to the loss of a run, pooled over cells; see seed_variances()."""
    within: SeedVariance  # between runs of one cell
    residual: SeedVariance  # of runs, without the effect that a seed has on all cells alike
    differ: bool  # whether the runs of some cells vary more than those of others


def seed_variances(cells):
    """
    Return the SeedVariances of cells, each a dict {seed: loss}, as in an analysis of variance of a
    two-way layout: loss = cell + seed + residual. Cells may have different seeds.

    If a seed is lucky in all cells alike, the cells' variances are not independent, so the pooled
    variance within cells has fewer degrees of freedom than runs minus cells. They are
    Satterthwaite's, from its two parts: between seeds, and residual.
    """
    runs = [(i, seed, losses[seed]) for i, losses in enumerate(cells) for seed in losses]
    numbers, seeds, y = map(np.array, zip(*runs))
    cell_columns = np.equal.outer(numbers, range(len(cells))).astype(float)
    seed_columns = np.equal.outer(seeds, np.unique(seeds)).astype(float)
    from_cell, within_df = residuals(cell_columns, y)
    from_both, residual_df = residuals(np.hstack([cell_columns, seed_columns]), y)
    within, residual = np.square(from_cell).sum(), np.square(from_both).sum()
    parts = (within - residual, within_df - residual_df), (residual, residual_df)
    uncertainty = sum(squares ** 2 / df for squares, df in parts if df)
    effective_df = within ** 2 / uncertainty if uncertainty else within_df
    # with two cells of the same seeds, the residuals of one mirror those of the other
    left = from_both if residual_df and len(cells) > 2 else from_cell
    return SeedVariances(
        within=SeedVariance(within / max(1, within_df), effective_df),
        residual=SeedVariance(residual / max(1, residual_df), residual_df),
        differ=variances_differ([left[numbers == i] for i in range(len(cells))]))


def residuals(columns, y):
    """Return what a linear model, fitted by least squares, leaves of y; and degrees of freedom."""
    y = y - y.mean()  # every model here has a mean, and small numbers have smaller errors
    solution, _, rank, _ = np.linalg.lstsq(columns, y, rcond=None)
    return y - columns @ solution, len(y) - int(rank)


def variances_differ(cells):
    """Return whether Bartlett's test finds that some cells vary more than others."""
    cells = [losses for losses in cells if len(losses) > 1]
    if len(cells) < 2 or min(map(np.ptp, cells)) < 1e-9:
        return False
    return bool(optional('scipy.stats', "Bartlett's test").bartlett(*cells).pvalue < 0.01)


class Estimate(NamedTuple):
    mean: float
    interval: float  # half the width of the confidence interval
    p: float | None  # p-value of the hypothesis that the true mean is 0


def estimate(values, seeds, share, confidence=0.95):
    """
    Return the Estimate of the mean of values (n windows, in text order). A value is a mean over S
    seeds (share = 1/S) or a difference of two such means (share = 1/S_a + 1/S_b); the variance
    between seeds is multiplied by share. Degrees of freedom are Welch and Satterthwaite's. If the
    variance between seeds is unknown, the interval is for other text only and p is None.
    """
    mean, error, df = mean_and_error(values)
    from_text, from_seeds = error ** 2, share * seeds.variance
    variance = from_text + from_seeds
    if not variance > 0:  # every window has the same loss
        return Estimate(mean, 0.0, 1.0 if seeds.df else None)
    seed_term = from_seeds ** 2 / seeds.df if seeds.df else 0.0
    total_df = variance ** 2 / (from_text ** 2 / df + seed_term)
    scale = math.sqrt(variance)
    interval = t_quantile(confidence, total_df) * scale
    if not seeds.df:
        return Estimate(mean, interval, None)
    stats = optional('scipy.stats', 'a p-value')
    return Estimate(mean, interval, 2 * float(stats.t.sf(abs(mean) / scale, total_df)))


class Difference(NamedTuple):
    """The difference of two cells in their loss; the first fields are those of an Estimate."""
    mean: float
    interval: float
    p: float | None
    by_seed: dict  # {seed: difference} for the seeds of both cells
    paired: bool  # whether the estimate is their mean


def difference(a, b, seeds, confidence=0.95):
    """
    Return the Difference a - b of two cells, each a dict {seed: losses of its windows}. `seeds` are
    the SeedVariances of all cells.

    It is estimated within each seed that both cells have, with the residual variance. If they have
    none in common, or the residual variance is unknown, it is the difference of the two means over
    all seeds of a cell, as of independent samples, with the variance within cells.
    """
    within_seed = {seed: a[seed] - b[seed] for seed in a if seed in b}
    by_seed = {seed: float(values.mean()) for seed, values in within_seed.items()}
    n = len(by_seed)
    if n and seeds.residual.df:
        values = np.mean(list(within_seed.values()), axis=0)
        found = estimate(values, seeds.residual, 2 / n, confidence)
        return Difference(*found, by_seed, paired=True)
    values = np.mean(list(a.values()), axis=0) - np.mean(list(b.values()), axis=0)
    found = estimate(values, seeds.within, 1 / len(a) + 1 / len(b), confidence)
    return Difference(*found, by_seed, paired=False)


class PowerLaw(NamedTuple):
    """L(N) = E + A N^-alpha with confidence intervals (stored as half-widths)."""
    form: str
    alpha: float
    alpha_interval: float
    A: float
    df: int  # degrees of freedom of the fit
    E: float  # 0 where the form has none
    E_interval: float | None
    predict: Callable  # N -> (loss, half-width of its interval)


def power_law(x, a, alpha, e=0.0):
    return e + a * x ** -alpha


def least_squares(x, losses, start, confidence):
    """
    Fit power_law() to losses at x, from the parameters `start`. Return the parameters, the
    half-widths of their intervals, and their covariance on the scale of these intervals; or None if
    the fit does not converge.
    """
    optimize = optional('scipy.optimize', 'a power law')
    try:
        best, covariance = optimize.curve_fit(power_law, x, losses, start, maxfev=20000)
    except RuntimeError:
        return None
    t = t_quantile(confidence, len(x) - len(start))
    return best, t * np.sqrt(np.diag(covariance)), t ** 2 * covariance


def tells_floor(best, half):
    """Return whether a fit shows that E is above 0."""
    return np.isfinite(half).all() and best[1] > 0 and best[2] > half[2]


def fit_power_law(n, losses, confidence=0.95):
    """
    Fit L(N) = E + A N^-alpha (https://arxiv.org/abs/2203.15556) to losses of models of n parameters
    by least squares, or L(N) = A N^-alpha if these sizes cannot tell E from 0. Raise ValueError for
    fewer than 3 sizes, or if no power law fits.
    """
    n, losses = np.asarray(n, float), np.asarray(losses, float)
    if len(set(n)) < 3:
        raise ValueError('a power law needs at least 3 sizes')
    middle = np.exp(np.log(n).mean())  # A and alpha are almost uncorrelated at this scale
    x, mean = n / middle, losses.mean()
    fit = None
    if len(n) > 3:  # otherwise no degree of freedom is left to judge E by
        fit = least_squares(x, losses, [mean / 2, 0.2, mean / 2], confidence)
    has_floor = fit is not None and tells_floor(*fit[:2])
    if not has_floor:
        fit = least_squares(x, losses, [mean, 0.1], confidence)
    if fit is None:
        raise ValueError('no power law fits these losses')
    best, half, square = fit

    def predict(size):
        x = np.asarray(size, float) / middle
        a, alpha = best[:2]
        power = x ** -alpha
        slopes = np.stack([power, -a * power * np.log(x), np.ones_like(x)])[:len(best)]
        variance = np.einsum('i...,ij,j...->...', slopes, square, slopes)
        return power_law(x, *best), np.sqrt(variance)

    return PowerLaw(
        form='L = E + A N^-alpha' if has_floor else 'L = A N^-alpha',
        alpha=best[1],
        alpha_interval=half[1],
        A=best[0] * middle ** best[1],
        df=len(n) - len(best),
        E=best[2] if has_floor else 0.0,
        E_interval=half[2] if has_floor else None,
        predict=predict)
