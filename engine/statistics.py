"""
How sure a number is: errors of a mean loss, intervals and p-values of differences, and a
power-law fit. No torch; scipy is imported when it is needed.

Losses of the windows of a text stand in the order of the text, where neighbouring windows are
correlated. A mean over them has an error from the text, for which contiguous blocks of windows
serve as independent samples, and one from the seeds of training. The two variances add up.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from engine.common import optional


def mean_and_error(losses, sets=None):
    """
    (mean, standard error of the mean, its degrees of freedom) of losses (n,) in the order of the
    text. sets (n,) says which data set of a mixture each loss comes from: the shares of the sets
    are fixed, so differences between sets are not part of the error.

    The error is that of floor(sqrt(n)) block means (Flegal and Jones 2010,
    https://doi.org/10.1214/09-AOS735). With fewer than 4 losses it is nan.
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
    """(standard error, degrees of freedom) of the mean of losses, by contiguous blocks."""
    blocks = math.isqrt(len(losses))
    if blocks < 2:
        return math.nan, 0
    sums = [(block - mean).sum() for block in np.array_split(losses, blocks)]
    deviations = np.array(sums) / len(losses)  # what each block adds to the error of the mean
    variance = blocks / (blocks - 1) * float(np.square(deviations).sum())
    return math.sqrt(variance), blocks - 1


def t_quantile(confidence, df):
    """Half the width of a two-sided interval in standard errors, by Student's t; nan for df 0."""
    stats = optional('scipy.stats', 'a confidence interval')
    return float(stats.t.ppf((1 + confidence) / 2, df))


class SeedVariance(NamedTuple):
    """The variance of the loss between runs that differ only in their seed."""
    variance: float
    df: int  # degrees of freedom; 0 if no cell has two seeds, so that nothing is known


def seed_variance(cells):
    """The SeedVariance of cells, each a list of losses, pooled as in an analysis of variance."""
    df = sum(len(losses) - 1 for losses in cells)
    if df == 0:
        return SeedVariance(0.0, 0)
    squares = sum(np.var(losses) * len(losses) for losses in cells)
    return SeedVariance(squares / df, df)


class Estimate(NamedTuple):
    mean: float
    interval: float  # half the width of the confidence interval
    p: float | None  # of a true mean of 0


def estimate(values, seeds, share, confidence=0.95):
    """
    The Estimate of the mean of values (n windows in text order). Each value is a mean over S
    seeds, whose variance enters with share = 1/S, or a difference of two such means, with
    share = 1/S_a + 1/S_b.

    The degrees of freedom are Welch and Satterthwaite's. If the variance between seeds is not
    known, the interval is for other text only and p is None: nobody knows what another seed
    would give.
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


def variances_differ(cells):
    """Whether Bartlett's test finds that some cells' losses vary more over seeds than others'."""
    cells = [losses for losses in cells if len(losses) > 1]
    if len(cells) < 2 or not all(np.ptp(losses) for losses in cells):
        return False
    return optional('scipy.stats', "Bartlett's test").bartlett(*cells).pvalue < 0.01


class PowerLaw(NamedTuple):
    """L(N) = E + A N^-alpha with confidence intervals (half their widths)."""
    form: str
    alpha: float
    alpha_interval: float
    A: float
    df: int  # degrees of freedom of the fit
    E: float  # 0 where the form has none
    E_interval: float | None
    predict: Callable  # N -> (loss, half of its interval)


def power_law(x, a, alpha, e=0.0):
    return e + a * x ** -alpha


def least_squares(x, losses, start, confidence):
    """
    Fit power_law() to losses at x, from the parameters `start`. Returns the parameters, half
    their intervals, and their covariance on the scale of these intervals; or None if the fit
    does not converge.
    """
    optimize = optional('scipy.optimize', 'a power law')
    try:
        best, covariance = optimize.curve_fit(power_law, x, losses, start, maxfev=20000)
    except RuntimeError:
        return None
    t = t_quantile(confidence, len(x) - len(start))
    return best, t * np.sqrt(np.diag(covariance)), t ** 2 * covariance


def tells_floor(best, half, square):
    """Whether a fit shows that E is above 0."""
    return np.isfinite(half).all() and best[1] > 0 and best[2] > half[2]


def fit_power_law(n, losses, confidence=0.95):
    """
    Fit L(N) = E + A N^-alpha (https://arxiv.org/abs/2203.15556) to losses of models of n
    parameters by least squares, or L(N) = A N^-alpha if these sizes cannot tell E from 0.
    ValueError for fewer than 3 sizes, or where no power law fits.
    """
    n, losses = np.asarray(n, float), np.asarray(losses, float)
    if len(set(n)) < 3:
        raise ValueError('a power law needs at least 3 sizes')
    middle = np.exp(np.log(n).mean())  # A and alpha are almost uncorrelated at this scale
    x, mean = n / middle, losses.mean()
    fit = None
    if len(n) > 3:  # or there is no degree of freedom left to judge E by
        fit = least_squares(x, losses, [mean / 2, 0.2, mean / 2], confidence)
    has_floor = fit is not None and tells_floor(*fit)
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
