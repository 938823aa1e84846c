"""Errors, intervals, p-values and fits: python -m pytest tests/test_statistics.py"""
import math
import zlib

import numpy as np
import pytest
import torch
from scipy import signal, stats

from data.loader import fingerprint
from engine.statistics import (
    SeedVariance,
    estimate,
    fit_power_law,
    mean_and_error,
    seed_variance,
    t_quantile,
)


def autoregressive(rng, rho, n, rows=1):
    """(rows, n) values of mean 0 and variance 1; neighbours in a row correlate by rho."""
    innovations = rng.standard_normal((rows, n))
    innovations[:, 1:] *= math.sqrt(1 - rho ** 2)
    return signal.lfilter([1], [1, -rho], innovations)


# the error of a mean

@pytest.mark.parametrize('rho, n, lowest', [
    (0.0, 100, 0.935),
    (0.0, 256, 0.935),
    (0.0, 1000, 0.935),
    (0.0, 1700, 0.935),
    (0.5, 100, 0.90),
    (0.5, 256, 0.92),
    (0.5, 1000, 0.92),
    (0.5, 1700, 0.92),
])
def test_an_interval_of_batch_means_covers_the_true_mean(rho, n, lowest):
    """An error as if windows were independent: for rho 0.5 it would cover the true mean, here 0, in 74 % of cases."""
    rows = autoregressive(np.random.default_rng(0), rho, n, rows=2000)
    mean, error, df = map(np.array, zip(*map(mean_and_error, rows)))
    assert set(df) == {math.isqrt(n) - 1}
    covered = (abs(mean) < t_quantile(0.95, df[0]) * error).mean()
    assert lowest < covered < 0.965
    inflation = math.sqrt((1 + rho) / (1 - rho))  # for large n
    assert np.sqrt((error ** 2).mean()) * math.sqrt(n) == pytest.approx(inflation, rel=0.1)


def test_the_standard_error_is_that_of_block_means():
    """By hand: blocks (1, 2) and (3, 8) have means 1.5 and 5.5, whose standard deviation is sqrt(8)."""
    mean, error, df = mean_and_error([1, 2, 3, 8])
    assert (mean, df) == (3.5, 1) and error == pytest.approx(math.sqrt(8) / math.sqrt(2))
    mean, error, df = mean_and_error([1, 2, 6])  # too few for two blocks
    assert (mean, df) == (3, 0) and math.isnan(error)
    assert mean_and_error(np.ones(11))[1] == 0  # blocks of 4, 4 and 3


@pytest.mark.parametrize('df, table', [(1, 12.706), (9, 2.262), (15, 2.131), (30, 2.042), (40, 2.021)])
def test_quantiles_are_those_of_the_printed_table(df, table):
    """A one-sided quantile, which makes every interval too short."""
    assert t_quantile(0.95, df) == pytest.approx(table, abs=5e-4)


def test_a_fingerprint_tells_windows_and_not_their_order():
    """Runs evaluated on different text taken for comparable, or the same text taken for different."""
    windows = np.random.default_rng(0).integers(0, 1000, (50, 9))
    whole = fingerprint(windows)
    assert whole == fingerprint(windows[::-1]) == sum(map(zlib.crc32, windows.astype('<i8')))
    assert whole == fingerprint(windows[:7]) + fingerprint(torch.from_numpy(windows[7:]))
    windows[3, 4] += 1
    assert whole != fingerprint(windows)


# differences of cells

def simulate(rng, effects, seeds, n=300):
    """
    Window losses (n,) per cell and seed. The true means of cells differ by effects; windows are hard or easy, cells
    have strengths of their own, seeds differ, and there is noise.
    """
    text = 0.3 * autoregressive(rng, 0.4, n)[0]
    cells = []
    for effect in effects:
        own = 1.9 + effect + text + 0.03 * autoregressive(rng, 0.4, n)[0]
        cells.append([own + 0.006 * rng.normal() + 0.05 * rng.normal(size=n) for _ in range(seeds)])
    return cells


@pytest.mark.parametrize('n_cells, seeds', [(2, 2), (2, 3), (5, 3)])
def test_intervals_cover_the_truth(n_cells, seeds):
    """Windows paired as if they were independent, or the variance between seeds forgotten: intervals too short."""
    rng, hit, alarms, halves = np.random.default_rng(n_cells * 10 + seeds), [], [], []
    for _ in range(500):
        effects = [0.0, *rng.choice([0.0, 0.02], n_cells - 1)]
        cells = simulate(rng, effects, seeds)
        known = seed_variance([[x.mean() for x in cell] for cell in cells])
        assert known.df == n_cells * (seeds - 1)
        for effect, cell in zip(effects[1:], cells[1:]):
            difference = np.mean(cell, axis=0) - np.mean(cells[0], axis=0)
            mean, half, p = estimate(difference, known, 2 / seeds)
            assert (p < 0.05) == (abs(mean) > half)
            hit.append(abs(mean - effect) <= half)
            halves.append(half)
            if not effect:
                alarms.append(p < 0.05)
    assert 0.93 <= np.mean(hit) <= 0.98  # 95 %, slightly careful, in 500 trials or more
    assert np.mean(alarms) <= 0.07
    assert np.median(halves) < 0.025  # still useful: the losses themselves are known to 0.05


def test_without_noise_from_the_text_it_is_students_t_test():
    """Wrong degrees of freedom or a wrong error of the pooled variance, against scipy's two-sample test."""
    a, b = [1.90, 1.93, 1.91], [1.88, 1.86, 1.89]
    mean, half, p = estimate(np.full(100, np.mean(b) - np.mean(a)), seed_variance([a, b]), 2 / 3)
    reference = stats.ttest_ind(b, a)
    assert p == pytest.approx(reference.pvalue)
    assert (mean - half, mean + half) == pytest.approx(tuple(reference.confidence_interval(0.95)))


def test_without_seeds_the_interval_is_the_texts_and_there_is_no_p():
    """A p-value from one seed would call the luck of a seed a finding."""
    values = np.random.default_rng(1).normal(size=1600)
    mean, half, p = estimate(values, SeedVariance(0.0, 0), 2.0)
    reference = stats.t.interval(0.95, 39, values.mean(), stats.sem(values.reshape(40, 40).mean(1)))
    assert p is None and (mean - half, mean + half) == pytest.approx(reference)
    assert estimate(np.zeros(100), SeedVariance(0.0, 4), 1.0) == (0.0, 0.0, 1.0)  # a choice that changes nothing


# power laws

def test_the_power_law_is_found_with_its_interval():
    """An interval that does not hold the truth, or an irreducible loss where there is none to be seen."""
    n, rng = np.geomspace(1e5, 1e7, 7), np.random.default_rng(0)
    fits = [fit_power_law(n, 3.0 * (n / 1e6) ** -0.1 * np.exp(0.002 * rng.normal(size=7))) for _ in range(200)]
    plain = [fit for fit in fits if fit.form == 'L = A N^-alpha']
    assert len(plain) > 0.9 * len(fits)
    assert 0.9 <= np.mean([abs(fit.alpha - 0.1) < fit.alpha_interval for fit in plain]) <= 0.99


def test_an_irreducible_loss_is_found():
    """E left out where the sizes show it, or A in the units of the fit."""
    n = np.geomspace(1e5, 1e7, 7)
    exact = fit_power_law(n, 1.7 + 2.0 * (n / 1e6) ** -0.5)
    assert exact.form == 'L = E + A N^-alpha' and exact.A == pytest.approx(2000, rel=0.01)
    assert exact.E == pytest.approx(1.7, abs=1e-3) and exact.alpha == pytest.approx(0.5, abs=1e-3)
    assert exact.predict(1e8)[0] == pytest.approx(1.9, abs=1e-3)


def test_a_prediction_has_the_interval_of_its_slopes():
    """A slope with a wrong sign: the band would be too narrow beyond the sizes."""
    n, rng = np.geomspace(1e5, 1e7, 9), np.random.default_rng(0)
    hits = []
    for _ in range(200):
        loss, half = fit_power_law(n, 3.0 * (n / 1e6) ** -0.1 + 0.002 * rng.normal(size=9)).predict([1e5, 1e6])
        hits.append(abs(loss - [3.0 * 0.1 ** -0.1, 3.0]) < half)
    assert (np.mean(hits, axis=0) > 0.88).all() and (np.mean(hits, axis=0) < 0.99).all()


def test_two_sizes_are_no_power_law():
    """A line through two points would be exact and say nothing."""
    with pytest.raises(ValueError, match='3 sizes'):
        fit_power_law([1e5, 1e6], [3, 2])
