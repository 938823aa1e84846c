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
    difference,
    estimate,
    fit_power_law,
    mean_and_error,
    seed_variances,
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

def simulate(rng, effects, seeds, luck, n=300):
    """
    {seed: window losses (n,)} per cell. The true means of cells differ by effects; windows are hard or easy, cells
    have strengths of their own, a seed has the same luck in all cells and some of its own in each, and there is noise.
    """
    text = 0.3 * autoregressive(rng, 0.4, n)[0]
    shared = luck * rng.normal(size=seeds)
    cells = []
    for effect in effects:
        own = 1.9 + effect + text + 0.03 * autoregressive(rng, 0.4, n)[0]
        cells.append({seed: own + shared[seed] + 0.006 * rng.normal() + 0.05 * rng.normal(size=n)
                      for seed in range(seeds)})
    return cells


def variances_of(cells):
    return seed_variances([{seed: x.mean() for seed, x in cell.items()} for cell in cells])


@pytest.mark.parametrize('luck', [0.0, 0.1])
@pytest.mark.parametrize('n_cells, seeds, lowest', [
    (2, 2, 0.90),  # one degree of freedom, for which Satterthwaite's approximation is a little short
    (2, 3, 0.93),
    (5, 3, 0.93),
])
def test_intervals_cover_the_truth(n_cells, seeds, lowest, luck):
    """
    Windows paired as if they were independent, or the variance between seeds forgotten: intervals too short. Seeds
    taken for independent although they have the same luck in all cells: intervals of 0.1 and more.
    """
    rng, hit, alarms, halves = np.random.default_rng(n_cells * 10 + seeds), [], [], []
    for _ in range(500):
        effects = [0.0, *rng.choice([0.0, 0.02], n_cells - 1)]
        cells = simulate(rng, effects, seeds, luck)
        known = variances_of(cells)
        assert known.residual.df == (n_cells - 1) * (seeds - 1)
        for effect, cell in zip(effects[1:], cells[1:]):
            found = difference(cell, cells[0], known)
            assert found.paired and (found.p < 0.05) == (abs(found.mean) > found.interval)
            hit.append(abs(found.mean - effect) <= found.interval)
            halves.append(found.interval)
            if not effect:
                alarms.append(found.p < 0.05)
    assert lowest <= np.mean(hit) <= 0.98  # 95 %, slightly careful, in 500 trials or more
    assert np.mean(alarms) <= 1.02 - lowest
    assert np.median(halves) < 0.025  # still useful: the losses themselves are known to 0.05


@pytest.mark.parametrize('luck', [0.0, 0.05])
def test_the_interval_of_a_cells_own_loss_covers_it(luck):
    """Five cells with the same three lucky seeds counted as ten degrees of freedom, where there are two."""
    rng, hit = np.random.default_rng(3), []
    for _ in range(400):
        cells = simulate(rng, [0.0] * 5, 3, luck)
        found = estimate(np.mean(list(cells[0].values()), axis=0), variances_of(cells).within, 1 / 3)
        hit.append(abs(found.mean - 1.9) <= found.interval)
    assert 0.91 <= np.mean(hit) <= 0.98


def test_two_cells_with_the_same_seeds_are_a_paired_t_test():
    """Two cells and two seeds gave +- 0.285 although both differences within a seed were about -0.003."""
    a, b = {1: 1.9048, 2: 1.8613}, {1: 1.9, 2: 1.86}
    windows = [{seed: np.full(100, loss) for seed, loss in cell.items()} for cell in (a, b)]
    found = difference(windows[1], windows[0], seed_variances([a, b]))
    reference = stats.ttest_rel(list(b.values()), list(a.values()))
    assert found.by_seed == pytest.approx({1: -0.0048, 2: -0.0013})
    assert found.p == pytest.approx(reference.pvalue)
    assert found.interval == pytest.approx(stats.t.ppf(0.975, 1) * 0.00175) and found.interval < 0.03


def test_residuals_are_those_of_the_two_way_layout():
    """By hand, for a balanced table: what cell and seed leave, over (cells - 1) (seeds - 1)."""
    table = np.random.default_rng(0).normal(size=(4, 3)) + [[0.0, 5.0, -7.0]]
    found = seed_variances([dict(enumerate(row)) for row in table])
    left = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    assert found.residual == (pytest.approx(np.square(left).sum() / 6), 6)
    assert found.within.variance == pytest.approx(table.var(1, ddof=1).mean())
    assert 2 <= found.within.df < 2.1  # the seeds' luck is nearly all of it, and they are three


@pytest.mark.parametrize('seeds_a, seeds_b, df, paired', [
    ((1, 2, 3), (1, 2, 3), 2, True),
    ((1, 2, 3), (2, 3), 1, True),
    ((1, 2, 3), (3, 4, 5), 0, False),  # one seed in common tells nothing about the residual
    ((1, 2, 3), (4, 5, 6), 0, False),
    ((1,), (1,), 0, False),
])
def test_cells_with_other_seeds(seeds_a, seeds_b, df, paired):
    """A run that failed, or seeds added to one cell, compared with seeds that the other cell does not have."""
    rng = np.random.default_rng(1)
    a, b = ({seed: rng.normal(size=100) for seed in seeds} for seeds in (seeds_a, seeds_b))
    known = variances_of([a, b])
    found, both = difference(a, b, known), set(seeds_a) & set(seeds_b)
    assert (known.residual.df, found.paired, set(found.by_seed)) == (df, paired, both)
    mean = np.mean([np.mean([x[s].mean() for s in (both if paired else x)]) * sign for x, sign in ((a, 2), (b, -2))])
    assert found.mean == pytest.approx(mean)


def test_without_noise_from_the_text_independent_runs_are_students_t_test():
    """Wrong degrees of freedom or a wrong error of the pooled variance, against scipy's two-sample test."""
    a, b = {1: 1.90, 2: 1.93, 3: 1.91}, {4: 1.88, 5: 1.86, 6: 1.89}
    windows = [{seed: np.full(100, loss) for seed, loss in cell.items()} for cell in (a, b)]
    found = difference(windows[1], windows[0], seed_variances([a, b]))
    reference = stats.ttest_ind(list(b.values()), list(a.values()))
    assert found.p == pytest.approx(reference.pvalue)
    interval = found.mean - found.interval, found.mean + found.interval
    assert interval == pytest.approx(tuple(reference.confidence_interval(0.95)))


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
