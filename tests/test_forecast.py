"""Forecasts of the loss at the end of a run: python -m pytest tests/test_forecast.py"""
import json
from types import SimpleNamespace

import numpy as np
import pytest

import compare
from conftest import one_line
from engine.common import UserError
from engine.console import Console
from engine.forecast import forecast
from engine.forecast_report import check
from engine.results import result_of
from engine.run_log import RunLog

CONFIG = dict(eval_only=False, seed=1, max_iters=320, log_interval=10, n_layer=2, n_head=2, n_embd=16,
              lr_schedule='cosine', lr_decay_iters=320, decay_lr=True, learning_rate=1e-3)
STARTUP = dict(total_params=1000, flops_per_token=1.0, hardware_peak_tflops=1.0, tokens_per_iter=10, device='cpu')


def log_of(end, losses, crc=0, until=320, params=1000, **config):
    """The log of a run with these losses on its log lines; it ends at a val loss, or at iteration `until`."""
    figures = dict(memory={'cpu': 1}, mfu=dict(tokens_per_sec=1.0, achieved_tflops=1.0))
    evals = [dict(iter=i, tokens=10 * i, train_seconds=1.0, train={'loss': loss},
                  val={'loss': loss, 'window_losses': [loss]}) for i, loss in ((0, 5.5), (320, end)) if i <= until]
    lines = [dict(iter=i, loss=loss, **figures) for i, loss in zip(range(0, 321, 10), losses) if i < until]
    return dict(config=CONFIG | config, startup_info=STARTUP | dict(total_params=params), training_iterations=lines,
                eval_steps=evals, eval_windows=dict(n=1, tokens_each=8, crc=crc),
                summary=dict(outcome='finished' if until == 320 else 'SIGTERM', iterations=until, iter_num=until))


def write(folder, log):
    folder.mkdir(parents=True)
    (folder / 'run_20260101_000000.json').write_text(json.dumps(log))
    return folder


def simulate(rng, choices, seeds=(1,), slope=3.0, scatter=0.02):
    """
    Runs of choices, whose losses at the end depend on the early losses, with outliers; runs of a seed share the
    noise of batches.
    """
    t, results = np.arange(33), []
    batches = {seed: rng.normal(0, 0.1, 33) for seed in seeds}
    for i in range(choices):
        early, late = rng.normal(0, 0.05), scatter * rng.standard_t(3)
        for seed in seeds:
            end = 1.5 + slope * early + late + rng.normal(0, 0.005)
            losses = 5.5 * (1 + t) ** -0.3 + early + batches[seed] + rng.normal(0, 0.002, 33)
            log = log_of(end, losses, seed=seed, learning_rate=1e-3 * (1 + i))
            results.append(result_of(f'{i},{seed}', [log]))
    return results


def coverage(pairs):
    inside = [abs(found.loss - run.evals[-1].loss) <= found.interval for run, found in pairs]
    return np.mean(inside), np.median([found.interval for _, found in pairs])


@pytest.mark.parametrize('n, slope, scatter, widest', [
    (1, 1.0, 0.15, 1.0),
    (2, 1.0, 0.15, 0.6),
    (4, 3.0, 0.1, 0.5),
    (10, 3.0, 0.02, 0.3),
    (10, 3.0, 0.1, 0.4),
    (10, 0.0, 0.15, 0.5),  # the early losses say nothing
    (20, 3.0, 0.15, 0.55),
])
def test_the_end_is_in_the_interval_as_often_as_it_says(n, slope, scatter, widest):
    """An interval that holds for many earlier runs, but not for a few; that is useless; that outliers widen."""
    rng, pairs = np.random.default_rng(0), []
    for _ in range(300):
        run, *others = simulate(rng, n + 1, slope=slope, scatter=scatter)
        pairs.append((run, forecast(run, others, seen=20)))
    share, interval = coverage(pairs)
    assert 0.9 < share and interval < widest


def test_a_resumed_run_has_a_forecast():
    """It has a log line of its own, two iterations after its start, which the other runs lack."""
    run, *others = simulate(np.random.default_rng(0), 5)
    more = run.iterations[1] | dict(iter=17)
    resumed = run._replace(iterations=sorted([*run.iterations, more], key=lambda e: e['iter']))
    assert forecast(resumed, others, seen=20) == forecast(run, others, seen=20) is not None


def test_a_forecast_beats_the_mean_of_the_other_runs():
    """A forecast that does not look at the run, and an error that many other runs do not reduce."""
    rng, errors = np.random.default_rng(0), []
    for _ in range(50):
        run, *others = simulate(rng, 11)
        found, end = forecast(run, others, seen=20), run.evals[-1].loss
        errors.append((found.loss - end, np.mean([r.evals[-1].loss for r in others]) - end))
    ours, mean = np.median(np.abs(errors), axis=0)
    assert ours < 0.3 * mean


def test_another_seed_counts_only_without_the_same_one():
    """Batches of other seeds hide the difference between two runs."""
    runs = simulate(np.random.default_rng(0), 4, seeds=(1, 2))
    found = forecast(runs[0], runs[2:], seen=20)
    assert found == forecast(runs[0], [r for r in runs[2:] if r.config['seed'] == 1], seen=20)
    assert found.basis.endswith(': 3') and forecast(runs[0], runs[3::2], seen=20).basis.endswith(': 3')


def test_a_check_leaves_out_the_other_seeds_of_a_run():
    """A run forecast from its own cell: the check would flatter the forecasts of new choices."""
    runs = simulate(np.random.default_rng(0), 1, seeds=(1, 2, 3))
    assert not list(check(runs, 0.95)) and forecast(runs[0], runs[1:], seen=20)
    rows = list(check(simulate(np.random.default_rng(0), 6, seeds=(1, 2)), 0.95))
    assert [row[:2] for row in rows] == [[f'1/{n} of a run', '12'] for n in (16, 8, 4, 2)]


@pytest.mark.parametrize('sizes, seeds', [((1, 2, 4), 1), ((1, 2, 4), 3), ((1, 1.5, 2, 3, 4), 2)])
def test_a_larger_run_is_forecast_from_smaller_ones(sizes, seeds):
    """The power law of a few sizes has no floor, so beyond them it is too low."""
    rng, pairs = np.random.default_rng(0), []
    for _ in range(200):
        runs = []
        for n in [*sizes, 8]:
            end = 1.2 + 0.8 * n ** -0.4 + rng.normal(0, 0.01, seeds)
            runs += [result_of(f'{n}', [log_of(loss, [], params=int(1000 * n), n_embd=int(16 * n), seed=s)])
                     for s, loss in enumerate(end)]
        pairs.append((runs[-1], forecast(runs[-1], runs[:-seeds], seen=0)))
    share, interval = coverage(pairs)
    assert 0.94 < share and interval < 0.25


LOSSES = list(np.linspace(5, 2, 33))


@pytest.mark.parametrize('run, words', [
    (dict(until=19), 'a sixteenth'),
    (dict(until=40, crc=1), 'the same data'),
    (dict(until=40, max_iters=640), 'schedule'),
    (dict(until=40, lr_schedule='wsd'), 'schedule'),
    (dict(until=40, n_embd=32), 'size'),
    (dict(until=40, log_interval=5), 'log_interval'),
])
def test_a_run_that_cannot_be_forecast(tmp_path, capsys, run, words):
    """A forecast from runs that say nothing about this one."""
    write(tmp_path / 'before', log_of(1.5, LOSSES))
    folder = write(tmp_path / 'run', log_of(1.5, LOSSES, **run))
    assert compare.main([f'--forecast={folder}']) == 0
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f'NOTE: no forecast for {folder} at iteration {run["until"]} of ') and words in line


def test_what_is_no_run_is_refused(tmp_path, capsys):
    """A traceback for an empty folder or for NaN in a log, or a key that is ignored."""
    bad = write(tmp_path / 'bad', log_of(float('nan'), LOSSES))
    for flags, *words in [([f'--forecast={bad}'], 'run_20260101_000000.json', 'nan'),
                          ([f'--forecast={tmp_path / "missing"}'], 'no run log'),
                          ([f'--forecast={bad}', '--max_iters=5'], 'max_iters has no effect')]:
        with pytest.raises(UserError) as error:
            compare.main(flags)
        one_line(str(error.value), *words)
    assert not capsys.readouterr().out


def test_a_run_forecasts_its_end_while_it_trains(tmp_path):
    """The evaluation line says nothing of the end, or a damaged log beside the run ends it."""
    write(tmp_path / 'before', log_of(1.5, LOSSES))
    log = log_of(1.5, LOSSES, until=41)
    state = SimpleNamespace(iter_num=10, losses={}, best_val_loss=1.5)
    run_log = RunLog(str(tmp_path / 'run'), log['config'], log['startup_info'], state, 10, Console())
    (tmp_path / 'run').mkdir()
    run_log.data |= log
    assert run_log.forecast() == ''
    state.iter_num = 40
    assert run_log.forecast().startswith(', about 1.5000 ± 0.')
    (write(tmp_path / 'damaged', {}) / 'run_20260101_000000.json').write_text('{')
    run_log.others = None
    assert run_log.forecast().startswith(', about 1.5000 ± 0.')
    state.iter_num = 320
    assert run_log.forecast() == ''


def test_a_run_that_has_just_been_resumed_forecasts_nothing_yet(tmp_path, capsys):
    """Its log has no summary before the first write: every such resume printed a WARNING about 'outcome'."""
    write(tmp_path / 'before', log_of(1.5, LOSSES))
    log = log_of(1.5, LOSSES, until=41)
    state = SimpleNamespace(iter_num=40, losses={}, best_val_loss=1.5)
    run_log = RunLog(str(tmp_path / 'run'), log['config'], log['startup_info'], state, 10, Console())
    (tmp_path / 'run').mkdir()
    assert run_log.forecast() == '' and run_log.others is None
    assert capsys.readouterr().out == ''
