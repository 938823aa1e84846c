"""What must stay true of comparisons: python -m pytest test_compare.py"""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import compare
from compare import (
    Range,
    estimate,
    fit_power_law,
    losses_at,
    make_cells,
    seed_variance,
    several,
)
from configurator import configure, read_block
from conftest import ROOT
from data.loader import write_dataset
from engine.cost import meta_model


@pytest.fixture(scope='module')
def text_set(tmp_path_factory):
    """A text of words in random order, of which a model learns the words within some iterations."""
    words = np.random.default_rng(0).choice(['to ', 'be ', 'or ', 'not ', 'that ', 'is ', 'the ', 'question\n'], 6000)
    text = ''.join(words).encode()
    folder = tmp_path_factory.mktemp('data') / 'text'
    write_dataset(folder, {'train': text[:20000], 'val': text[20000:]}, {'vocab_size': 256, 'tokenizer': {'name': 'byte'}})
    return folder


TINY = '''--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --gradient_accumulation_steps=1 --max_iters=12 --lr_decay_iters=12 --warmup_iters=2
          --learning_rate=1e-2 --eval_interval=3 --eval_iters=9 --device=cpu --dtype=float32 --peak_tflops=1 --sample_interval=0 --dropout=0.1'''.split()


def run(*flags, script='compare.py'):
    return subprocess.run([sys.executable, script, *map(str, flags)], cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'}, capture_output=True,
                          text=True, timeout=300)


def results(out_dir):
    return json.loads((Path(out_dir) / 'compare.json').read_text())


def one_line(message, *parts):
    assert '\n' not in message.strip() and all(str(part) in message for part in parts), message


# statistics

def correlated(rng, n, deviation, rho=0.4):
    """n values of an autoregression of that deviation: neighbouring windows of a text are alike."""
    noise, x = rng.normal(size=n) * deviation * math.sqrt(1 - rho ** 2), rng.normal(size=n) * deviation
    for i in range(1, n):
        x[i] = rho * x[i - 1] + noise[i]
    return x


def simulate(rng, effects, seeds, n=300, seed_deviation=0.006):
    """Window losses (n,) of cells whose true means differ by effects: hard and easy windows, a cell's own strengths, seeds, and noise."""
    text = correlated(rng, n, 0.3)
    return [[1.9 + effect + text + own + rng.normal() * seed_deviation + 0.05 * rng.normal(size=n) for _ in range(seeds)]
            for effect in effects for own in [correlated(rng, n, 0.03)]]


@pytest.mark.parametrize('n_cells, seeds', [(2, 2), (2, 3), (5, 3)])
def test_intervals_cover_the_truth(n_cells, seeds):
    """Pairing window by window as if they were independent, or forgetting that another seed gives another loss, makes intervals too short."""
    rng, hit, alarms, halves = np.random.default_rng(n_cells * 10 + seeds), [], [], []
    for trial in range(500):
        effects = [0.0, *rng.choice([0.0, 0.02], n_cells - 1)]
        cells = simulate(rng, effects, seeds)
        variance, df = seed_variance([[x.mean() for x in cell] for cell in cells])
        assert df == n_cells * (seeds - 1)
        for effect, cell in zip(effects[1:], cells[1:]):
            d, half, p = estimate(np.mean(cell, axis=0) - np.mean(cells[0], axis=0), variance, df, 2 / seeds)
            hit.append(abs(d - effect) <= half)
            halves.append(half)
            assert (p < 0.05) == (abs(d) > half)
            if not effect:
                alarms.append(p < 0.05)
    assert 0.93 <= np.mean(hit) <= 0.98  # 95 %, a little careful, and 500 trials or more
    assert np.mean(alarms) <= 0.07
    assert np.median(halves) < 0.025  # and not by being of no use: the losses themselves are known to 0.05


def test_without_noise_from_the_text_it_is_students_t_test():
    """Degrees of freedom or the standard error of the pooled variance taken wrongly, against scipy's two-sample test."""
    a, b = [1.90, 1.93, 1.91], [1.88, 1.86, 1.89]
    variance, df = seed_variance([a, b])
    d, half, p = estimate(np.full(100, np.mean(b) - np.mean(a)), variance, df, 2 / 3)
    reference = stats.ttest_ind(b, a)
    low, high = reference.confidence_interval(0.95)
    assert p == pytest.approx(reference.pvalue) and (d - half, d + half) == pytest.approx((low, high))


def test_without_seeds_the_interval_is_the_texts_and_there_is_no_p():
    """A p-value from one seed: it would call the luck of a seed a finding."""
    values = np.random.default_rng(1).normal(size=1600)
    d, half, p = estimate(values, 0.0, 0, 2.0)
    reference = stats.t.interval(0.95, 39, values.mean(), stats.sem(values.reshape(40, 40).mean(1)))
    assert p is None and (d - half, d + half) == pytest.approx(reference)
    assert estimate(np.zeros(100), 0.0, 4, 1.0) == (0.0, 0.0, 1.0)  # a choice that changes nothing


def test_losses_at_a_budget_lie_between_evaluations():
    """A run that did more is compared at its end all the same, or its first evaluation stands for the budget."""
    evals = [dict(iter=i, flops=10.0 * i, losses=np.array([10.0 - i, 20.0 - i])) for i in (0, 5, 9, 10)]
    at = lambda budget: losses_at(dict(evals=evals), 'FLOPs', budget)
    assert at(100).tolist() == [0, 10] and at(95).tolist() == [0.5, 10.5] and at(1000).tolist() == [0, 10]
    assert at(90).tolist() == [1, 11] and at(70) is None  # 5 and 9 are more than a quarter of 7 apart


def test_the_power_law_is_found_with_its_interval():
    """A fit whose interval does not hold the truth, or that finds an irreducible loss where there is none to be seen."""
    n, rng = np.geomspace(1e5, 1e7, 7), np.random.default_rng(0)
    hits, forms = [], []
    for _ in range(200):
        fit = fit_power_law(n, 3.0 * (n / 1e6) ** -0.1 * np.exp(0.002 * rng.normal(size=7)))
        if fit['form'] == 'L = A N^-alpha':
            hits.append(abs(fit['alpha'] - 0.1) < fit['alpha_interval'])
        forms.append(fit['form'])
    assert 0.9 <= np.mean(hits) <= 0.99 and np.mean([form == 'L = A N^-alpha' for form in forms]) > 0.9
    exact = fit_power_law(n, 1.7 + 2.0 * (n / 1e6) ** -0.5)
    assert exact['form'] == 'L = E + A N^-alpha' and exact['E'] == pytest.approx(1.7, abs=1e-3) and exact['alpha'] == pytest.approx(0.5, abs=1e-3)
    assert exact['A'] == pytest.approx(2000, rel=0.01) and exact['predict'](1e8)[0] == pytest.approx(1.9, abs=1e-3)
    with pytest.raises(ValueError, match='3 sizes'):
        fit_power_law([1e5, 1e6], [3, 2])


# which cells

def test_values_of_a_key():
    """1,2 as a string, a mixture of data sets taken apart, a range that is none."""
    of = lambda name, value: several(name, value, *read_block(compare.TRAIN)[name][:2])
    assert of('seed', (1, 2, 3)) == [1, 2, 3] and of('normalization', 'layernorm,rmsnorm') == ['layernorm', 'rmsnorm']
    assert of('bias', (True, False)) == [True, False] and of('n_kv_head', (None, 2)) == [None, 2] and of('batch_size', 'auto,8') == ['auto', 8]
    assert of('dataset', 'a:0.7,b:0.3') == 'a:0.7,b:0.3' and of('learning_rate', (1e-3, 1)) == [1e-3, 1.0] and of('seed', 3) == 3
    assert of('learning_rate', '1e-4..1e-2') == Range(1e-4, 1e-2) and of('n_head', '1..4') == Range(1, 4)
    for name, value in (('seed', '1,x'), ('seed', '1..3'), ('learning_rate', '1e-2..1e-4'), ('bias', '1,2'), ('n_head', '1..x')):
        with pytest.raises(ValueError):
            of(name, value)


def test_a_range_is_drawn_from_evenly():
    """Linear draws from 1e-4..1e-2 leave 1e-4..1e-3 to one in eleven."""
    rng = np.random.default_rng(0)
    rates = np.array([Range(1e-4, 1e-2).draw(rng) for _ in range(2000)])
    assert rates.min() >= 1e-4 and rates.max() <= 1e-2 and abs(np.mean(rates < 1e-3) - 0.5) < 0.04
    drops = np.array([Range(0.0, 0.2).draw(rng) for _ in range(2000)])
    assert abs(drops.mean() - 0.1) < 0.005 and {Range(2, 4).draw(rng) for _ in range(99)} == {2, 3, 4}


def test_cells_are_the_grid_times_the_named_ones():
    """A combination left out, or named so that two are the same."""
    config = {k: v[0] for k, v in read_block(compare.TRAIN).items()}
    config.update(cells={'a': {}, 'b': dict(qk_norm=True)}, n_head=[2, 4], normalization=['rmsnorm', 'layernorm'])
    cells = make_cells(config, {})
    assert list(cells) == [f'{name}, n_head={h}, {norm}' for name in 'ab' for h in (2, 4) for norm in ('rmsnorm', 'layernorm')]
    assert sum(c.get('qk_norm', False) for c in cells.values()) == 4


ABLATIONS = sorted(p.name for p in (ROOT / 'config').glob('ablate_*.py'))


@pytest.mark.parametrize('name', ABLATIONS)
def test_ablations_in_config_build(name):
    """A study that ends at its first cell; 'at equal FLOPs' that is not."""
    config, given = configure(compare.__file__, compare.TRAIN, argv=[str(ROOT / 'config' / name)], convert=several)
    cells = make_cells(config, given)
    flops = [meta_model(config | settings).flops_per_token() for settings in cells.values()]
    assert len(cells) > 1 and isinstance(config['seed'], list) and max(flops) / min(flops) < 1.01
    assert all((config | s)['max_iters'] == (config | s)['lr_decay_iters'] for s in cells.values())
    assert config['out_dir'] == 'out-' + name[:-3].replace('_', '-')


# whole comparisons

@pytest.fixture(scope='module')
def grid(text_set, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp('grid') / 'out'
    done = run(*TINY, f'--dataset={text_set}', f'--out_dir={out_dir}', '--position_encoding=none,rope', '--n_embd=16,32', '--seed=1,2')
    assert done.returncode == 0, done.stderr + done.stdout
    return out_dir, done.stdout


def test_a_grid_is_runs_of_train_py(grid, text_set, tmp_path):
    """A cell that is not what train.py would have done with these flags."""
    out_dir, console = grid
    rows = {row['cell']: row for row in results(out_dir)['rows']}
    assert list(rows) == [f'n_embd={n}, {p}' for n in (16, 32) for p in ('none', 'rope')]
    row = rows['n_embd=32, rope']
    alone = run(*TINY, f'--dataset={text_set}', f'--out_dir={tmp_path}', '--position_encoding=rope', '--n_embd=32', '--seed=2', script='train.py')
    assert alone.returncode == 0, alone.stderr
    log = json.loads(next(tmp_path.glob('run_*.json')).read_text())
    end = log['eval_steps'][-1]
    assert row['loss_by_seed'][1] == pytest.approx(end['val']['loss'], abs=1e-5) and row['iterations'] == 12 and row['seeds'] == [1, 2]
    assert row['params'] == log['startup_info']['total_params'] and row['flops_per_token'] == log['startup_info']['flops_per_token']
    assert row['val_loss'] == pytest.approx(np.mean(row['loss_by_seed']))
    for text in (console, (out_dir / 'compare.md').read_text()):
        assert all(f'| {cell}' in text for cell in rows) and 'baseline' in text and '8 runs' in console and '36 windows of 16 tokens' in text
    assert (out_dir / 'compare.png').read_bytes()[:4] == b'\x89PNG'


def test_differences_are_paired_and_from_the_baseline(grid):
    """The sign turned round, the baseline another cell, the windows not paired."""
    rows = results(grid[0])['rows']
    logs = {(row['cell'], seed): json.loads(next(Path(folder).glob('run_*.json')).read_text())['eval_steps'][-1]['val']['window_losses']
            for row in rows for seed, folder in zip(row['seeds'], row['folders'])}
    assert 'difference at end' not in rows[0]
    variance = np.mean([np.var(row['loss_by_seed'], ddof=1) for row in rows])
    for row in rows[1:]:
        d = np.mean([logs[row['cell'], s] for s in (1, 2)], axis=0) - np.mean([logs[rows[0]['cell'], s] for s in (1, 2)], axis=0)
        found = row['difference at end']
        assert found['difference'] == pytest.approx(d.mean(), abs=1e-9) == pytest.approx(row['val_loss'] - rows[0]['val_loss'], abs=1e-9)
        blocks = d.reshape(6, 6).mean(1)
        error = math.sqrt(blocks.var(ddof=1) / 6 + variance)
        assert found['interval'] / error == pytest.approx(stats.t.ppf(0.975, error ** 4 / ((blocks.var(ddof=1) / 6) ** 2 / 5 + variance ** 2 / 4)))


def test_the_same_command_again_does_nothing_twice(grid, text_set):
    """A finished night of runs begun anew; a changed setting mixed with what is there."""
    out_dir, _ = grid
    before = {path: path.stat().st_mtime_ns for path in out_dir.glob('*/*')}
    flags = *TINY, f'--dataset={text_set}', f'--out_dir={out_dir}', '--position_encoding=none,rope', '--n_embd=16,32', '--seed=1,2'
    again = run(*flags, '--sort=params')
    assert again.returncode == 0 and '8 runs, 8 of them finished' in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in out_dir.glob('*/*')}
    params = [row['params'] for row in results(out_dir)['rows']]
    assert params == sorted(params)
    for flag, parts in (('--learning_rate=3e-3', ['learning_rate=0.01', '0.003']), ('--d_ff=8', ['d_ff=None', '8']),
                        ('--max_iters=6', ['max_iters=12', '6'])):
        changed = run(*flags, flag)
        assert changed.returncode == 2
        one_line(changed.stderr, *parts, '--out_dir')
    log = next((out_dir / 'n_embd=16,_none,seed=1').glob('run_*.json'))
    whole = log.read_text()
    log.write_text(whole.replace('"outcome":"finished"', '"outcome":"failed"'))  # what a kill after the last checkpoint leaves
    again = run(*flags, '--baseline=n_embd=32, rope')
    log.write_text(whole)
    assert again.returncode == 0 and '8 of them finished' in again.stdout and results(out_dir)['baseline'] == 'n_embd=32, rope'
    nobody = run(*flags, '--baseline=nobody')
    assert nobody.returncode == 2
    one_line(nobody.stderr, 'nobody', 'rope')


def test_finished_runs_are_compared_from_their_logs(grid, text_set, tmp_path):
    """Seeds of one config taken for two choices; runs evaluated on other windows compared all the same."""
    out_dir, _ = grid
    folders = sorted(str(p) for p in out_dir.iterdir() if p.is_dir())
    done = run(*folders, f'--out_dir={tmp_path / "all"}')
    assert done.returncode == 0, done.stderr
    ours, theirs = (sorted((row['val_loss'], row['interval'], len(row['seeds'])) for row in results(d)['rows']) for d in (out_dir, tmp_path / 'all'))
    assert ours == theirs
    same = [f for f in folders if 'rope' in f and '32' in f]
    done = run(*same, f'--out_dir={tmp_path / "same"}')
    assert done.returncode == 0 and len(results(tmp_path / 'same')['rows']) == 1 and 'better' not in done.stdout and 'worse' not in done.stdout
    assert run(*TINY, '--eval_iters=8', f'--dataset={text_set}', f'--out_dir={tmp_path / "other"}', script='train.py').returncode == 0
    other = run(folders[0], tmp_path / 'other', f'--out_dir={tmp_path / "no"}')
    assert other.returncode == 2
    one_line(other.stderr, 'same windows', folders[0], tmp_path / 'other', 'eval_iters')
    twice = run(folders[0], folders[0] + '/', folders[-1], f'--out_dir={tmp_path / "twice"}')
    assert twice.returncode == 0 and [row['seeds'] for row in results(tmp_path / 'twice')['rows']] == [[1], [2]]
    shutil.copytree(folders[0], tmp_path / 'copy')
    for args, parts in (([folders[0], tmp_path / 'copy'], ['copy', 'nothing new']), ([folders[0]], ['nothing to compare']),
                        ([*folders, '--search=4'], ['search'])):
        done = run(*args, f'--out_dir={tmp_path / "no"}')
        assert done.returncode == 2
        one_line(done.stderr, *parts)
    (tmp_path / 'empty').mkdir()
    empty = run(folders[0], tmp_path / 'empty', f'--out_dir={tmp_path / "no"}')
    assert empty.returncode == 2
    one_line(empty.stderr, 'empty', 'run_*.json')


def test_a_failed_cell_is_reported_and_the_others_go_on(text_set, tmp_path):
    """One bad cell costs the night; or is left out of the table without a word."""
    done = run(*TINY, f'--dataset={text_set}', f'--out_dir={tmp_path}', '--n_head=3,2,4', '--seed=1')
    assert done.returncode == 1
    assert re.search(r'n_head=3, seed 1: FAILED with status 2: .*n_embd \(16\) must be a multiple of n_head \(3\)', done.stdout)
    assert [row['cell'] for row in results(tmp_path)['rows']] == ['n_head=2', 'n_head=4'] and 'failed: n_head=3, seed 1' in done.stdout
    assert 'one seed' in done.stdout and 'no p-values' in done.stdout and 'NOTE: the first cell has failed' in done.stdout


def test_batch_sizes_are_compared_on_the_same_windows(text_set, tmp_path):
    """An evaluation of eval_iters batches is of other windows with another batch size: found out after the last run."""
    done = run(*TINY, f'--dataset={text_set}', f'--out_dir={tmp_path}', '--batch_size=4,6', '--seed=1')
    assert done.returncode == 0, done.stderr
    rows = results(tmp_path)['rows']
    assert [row['cell'] for row in rows] == ['batch_size=4', 'batch_size=6'] and '36 windows' in done.stdout
    assert rows[1]['difference at end']['difference'] == pytest.approx(rows[1]['val_loss'] - rows[0]['val_loss'], abs=1e-9)


def children(pid):
    return [int(child) for path in Path(f'/proc/{pid}/task').glob('*/children') for child in path.read_text().split()]


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('sent', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_killed_anywhere_the_same_command_goes_on(text_set, tmp_path, sent):
    """A kill costs more than the cell at work, leaves its train.py running, or changes a result."""
    flags = *TINY, f'--dataset={text_set}', '--n_head=1,2', '--seed=5', '--max_iters=60', '--lr_decay_iters=60', '--save_interval=5'
    whole = run(*flags, f'--out_dir={tmp_path / "whole"}')
    assert whole.returncode == 0, whole.stderr
    out_dir = tmp_path / 'killed'
    process = subprocess.Popen([sys.executable, 'compare.py', *map(str, flags), f'--out_dir={out_dir}'], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.STDOUT, env=os.environ | {'OMP_NUM_THREADS': '1'}, start_new_session=True)
    second = out_dir / 'n_head=2,seed=5' / 'console.txt'
    while not (second.exists() and 'iter 7 ' in second.read_text()):
        time.sleep(0.02)
        assert process.poll() is None
    run_of_cell, = children(process.pid)
    process.send_signal(sent)
    process.wait()
    until = time.time() + 60
    while os.path.exists(f'/proc/{run_of_cell}') and time.time() < until:  # killed with kill -9, its child still saves
        time.sleep(0.05)
    assert not os.path.exists(f'/proc/{run_of_cell}')
    assert process.returncode == (128 + sent if sent != signal.SIGKILL else -9)
    done = run(*flags, f'--out_dir={out_dir}')
    assert done.returncode == 0 and '2 runs, 1 of them finished' in done.stdout, done.stdout
    a, b = (results(d)['rows'] for d in (tmp_path / 'whole', out_dir))
    assert [row['val_loss'] for row in a] == [row['val_loss'] for row in b] and [row['iterations'] for row in b] == [60, 60]
    assert len(list((out_dir / 'n_head=1,seed=5').glob('run_*.json'))) == 1


def test_search_gives_up_the_worse_half(text_set, tmp_path):
    """The better half stopped; the schedule cut short with the rung; other draws on the next start."""
    flags = *TINY, f'--dataset={text_set}', f'--out_dir={tmp_path}', '--search=4', '--learning_rate=1e-5..3e-2', '--seed=3', '--eval_interval=100', \
        '--keep_checkpoints=False'
    done = run(*flags)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = results(tmp_path)['rows']
    assert sorted(row['iterations'] for row in rows) == [3, 3, 6, 12] and rows[0]['iterations'] == 12
    rates = {row['cell']: float(row['cell'].split('=')[1]) for row in rows}
    assert all(1e-5 <= rate <= 3e-2 for rate in rates.values()) and len(set(rates.values())) == 4 and not list(tmp_path.glob('*/ckpt*'))
    first = {}
    for row in rows:
        logs = [json.loads(path.read_text()) for path in sorted(Path(row['folders'][0]).glob('run_*.json'))]
        first[row['cell']] = next(e['val']['loss'] for log in logs for e in log['eval_steps'] if e['iter'] == 3)
        assert all(log['config']['lr_decay_iters'] == 12 for log in logs)
    went_on = {row['cell'] for row in rows if row['iterations'] > 3}
    assert max(first[cell] for cell in went_on) <= min(first[cell] for cell in first.keys() - went_on)
    again = run(*flags)
    assert again.returncode == 0 and [row['cell'] for row in results(tmp_path)['rows']] == [row['cell'] for row in rows]
    assert 'other length' in again.stdout and 'looks better than it is' in again.stdout


def test_scaling_trains_a_ladder_at_the_same_tokens_a_parameter(text_set, tmp_path):
    """Sizes that are not those trained, tokens that are not in proportion, no fit."""
    config = tmp_path / 'base.py'
    config.write_text('n_embd, n_head = 16, 2\n')
    done = run(*[f for f in TINY if 'n_embd' not in f and 'n_head' not in f], f'--dataset={text_set}', f'--out_dir={tmp_path / "out"}', f'--scaling={config}',
               '--n_embd=8,16,24', '--tokens_per_param=0.2')
    assert done.returncode == 0, done.stderr + done.stdout
    found = results(tmp_path / 'out')
    assert [row['cell'] for row in found['rows']] == ['width 8', 'width 16', 'width 24'] and (tmp_path / 'out/scaling.png').exists()
    for row in found['rows']:
        log = json.loads(next(Path(row['folders'][0]).glob('run_*.json')).read_text())
        assert log['config']['n_embd'] // log['config']['n_head'] == 8
        assert 0.2 * row['params'] <= row['iterations'] * 64 < 0.2 * row['params'] + 64
    assert found['fit']['alpha_interval'] > 0 and 'alpha' in done.stdout


@pytest.mark.parametrize('flags, parts', [
    (['--normalization=rmsnorm'], ['nothing to compare', '--seed=1,2,3']), (['--learning_rate=1e-4..1e-2'], ['learning_rate', '--search']),
    (['--search=1', '--learning_rate=1e-4..1e-2'], ['search', '2']), (['--normalisation=a,b'], ["'normalisation'", "'normalization'"]),
    (['--seed=1,x'], ['seed', 'int', "'1,x'"]), (['--cells={"a": {"n_layers": 2}}'], ["cell 'a'", 'n_layers']),
    (['--confidence=95', '--seed=1,2'], ['confidence', '95']),
    (['--cells={"a": {"n_layer": "x"}}'], ["cell 'a'", 'n_layer', 'int']), (['--scaling=config/preset_quick_test.py', '--n_embd=64,96,100'], ['100', '32']),
    (['--scaling=config/preset_quick_test.py', '--n_embd=64,96'], ['3 widths']), (['--block_size=64,128', '--seed=1'], ['block_size', '64', '128']),
    (['--scaling=config/preset_quick_test.py', '--n_embd=64,96,128', '--learning_rate=1,2'], ['scaling', 'learning_rate']),
    (['--scaling=config/preset_quick_test.py', '--n_embd=64'], ['several widths', '64']), (['a/b=1', 'c'], ['a/b=1']),
    (['--cells={"a": {"n_head": 4}}', '--n_head=1,2'], ["cell 'a'", 'n_head']), (['config/ablate_swiglu.py', '--d_ff=8'], ['d_ff']),
    (['--seed=1,2', '--baseline=nobody'], ['nobody', 'as configured']),
    (['--batch_size=4,5', '--eval_iters=3', '--seed=1'], ['eval_iters * batch_size', '15', '12']),
    (['--jobs=0', '--seed=1,2'], ['jobs', '0'])], ids=str)
def test_what_cannot_be_compared_is_one_line(flags, parts, tmp_path):
    """A traceback, or a night of runs that says nothing."""
    done = run(*flags, f'--out_dir={tmp_path}')
    assert done.returncode == 2 and not done.stdout
    one_line(done.stderr, *parts)


def test_a_missing_library_is_named_before_the_first_run(text_set, tmp_path):
    """The picture's library found missing after the last run."""
    (tmp_path / 'matplotlib.py').write_text('raise ImportError')
    done = subprocess.run([sys.executable, 'compare.py', *TINY, f'--dataset={text_set}', '--seed=1,2', f'--out_dir={tmp_path / "out"}'], cwd=ROOT,
                          env=os.environ | {'PYTHONPATH': str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2
    one_line(done.stderr, 'pip install matplotlib')
    assert not list(tmp_path.glob('out/*/run_*.json'))
