"""Comparisons: python -m pytest tests/test_compare.py"""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import compare
from compare import convert
from configurator import configure, read_block
from conftest import (
    ROOT,
    at_start,
    children,
    command,
    missing,
    one_line,
    refused,
    wait_for_end,
    wait_until,
)
from data.folder import write_dataset
from engine.common import UserError
from engine.compare_report import verdict
from engine.comparison import losses_at
from engine.describe import meta_model
from engine.grid import Range, make_cells
from engine.results import Evaluation, read_run
from engine.run_report import draw_loss, evaluation_table, sparkline
from tests.warm import HANGS


@pytest.fixture(scope='module')
def text_set(tmp_path_factory):
    """Words in random order; a model learns the words within some iterations."""
    words = ['to ', 'be ', 'or ', 'not ', 'that ', 'is ', 'the ', 'question\n']
    text = ''.join(np.random.default_rng(0).choice(words, 6000)).encode()
    folder = tmp_path_factory.mktemp('data') / 'text'
    meta = {'vocab_size': 256, 'tokenizer': {'name': 'byte'}}
    write_dataset(folder, {'train': text[:20000], 'val': text[20000:]}, meta)
    return folder


TINY = '''--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --gradient_accumulation_steps=1
    --max_iters=12 --lr_decay_iters=12 --warmup_iters=2 --learning_rate=1e-2 --eval_interval=3 --eval_iters=9
    --device=cpu --dtype=float32 --peak_tflops=1 --sample_interval=0 --dropout=0.1'''.split()
GRID = '--position_encoding=none,rope', '--n_embd=16,32', '--seed=1,2'


def study(text_set, out_dir, *flags, script='compare.py'):
    """Run a script on the text set to its end; returns what it printed."""
    done = command(script, *TINY, f'--dataset={text_set}', f'--out_dir={out_dir}', *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refusal(capsys, *argv):
    """The line with which compare.py, called in this process, refuses its arguments."""
    with pytest.raises((UserError, SystemExit)) as error:
        compare.main(list(map(str, argv)))
    printed = capsys.readouterr()
    assert not printed.out
    return printed.err or error.value


def results(out_dir):
    return json.loads((Path(out_dir) / 'compare.json').read_text())


def logs(folder):
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob('run_*.json'))]


# which cells

@pytest.mark.parametrize('name, value, expected', [
    ('seed', (1, 2, 3), [1, 2, 3]),
    ('seed', 3, 3),
    ('normalization', 'layernorm,rmsnorm', ['layernorm', 'rmsnorm']),
    ('bias', (True, False), [True, False]),
    ('n_kv_head', (None, 2), [None, 2]),
    ('batch_size', 'auto,8', ['auto', 8]),
    ('dataset', 'a:0.7,b:0.3', 'a:0.7,b:0.3'),
    ('learning_rate', (1e-3, 1), [1e-3, 1.0]),
    ('learning_rate', '1e-4..1e-2', Range(1e-4, 1e-2)),
    ('n_head', '1..4', Range(1, 4)),
])
def test_values_of_a_key(name, value, expected):
    """1,2 stays a string, or a mixture of data sets is taken apart."""
    assert convert(name, value, read_block(compare.TRAIN)[name]) == expected


@pytest.mark.parametrize('name, value', [
    ('seed', '1,x'),
    ('seed', '1..3'),
    ('learning_rate', '1e-2..1e-4'),
    ('bias', '1,2'),
    ('bias', 'False..True'),
    ('n_head', '1..x'),
])
def test_values_that_are_none(name, value):
    """A range of a switch, or from high to low, found out by train.py in every run."""
    with pytest.raises(ValueError):
        convert(name, value, read_block(compare.TRAIN)[name])


def test_a_range_is_drawn_from_evenly():
    """Linear draws from 1e-4..1e-2 leave one in eleven to 1e-4..1e-3."""
    rng = np.random.default_rng(0)
    rates = np.array([Range(1e-4, 1e-2).draw(rng) for _ in range(2000)])
    assert rates.min() >= 1e-4 and rates.max() <= 1e-2 and abs(np.mean(rates < 1e-3) - 0.5) < 0.04
    drops = np.array([Range(0.0, 0.2).draw(rng) for _ in range(2000)])
    assert abs(drops.mean() - 0.1) < 0.005
    assert {Range(2, 4).draw(rng) for _ in range(99)} == {2, 3, 4}


def test_cells_are_the_grid_times_the_named_ones():
    """A combination left out, or two with the same name."""
    config = {key: setting[0] for key, setting in read_block(compare.TRAIN).items()}
    config |= dict(search=0, n_head=[2, 4], normalization=['rmsnorm', 'layernorm'])
    config['cells'] = {'a': {}, 'b': dict(qk_norm=True)}
    cells = make_cells(config, {}, read_block(compare.TRAIN))
    norms = 'rmsnorm', 'layernorm'
    assert list(cells) == [f'{name}, n_head={h}, {norm}' for name in 'ab' for h in (2, 4) for norm in norms]
    assert sum(own.get('qk_norm', False) for own in cells.values()) == 4


@pytest.mark.parametrize('name', sorted(path.name for path in (ROOT / 'config').glob('ablate_*.py')))
def test_ablations_in_config_build(name):
    """A study that ends at its first cell, or 'at equal FLOPs' that is not."""
    config, given = configure(compare.__file__, compare.TRAIN, argv=[str(ROOT / 'config' / name)], convert=convert)
    cells = make_cells(config, given, read_block(compare.TRAIN))
    flops = [meta_model(config | own).flops_per_token() for own in cells.values()]
    limit = 1.3 if name == 'ablate_choices.py' else 1.01  # it is run at several widths, d_ff follows them
    assert len(cells) > 1 and isinstance(config['seed'], list) and max(flops) / min(flops) < limit
    for own in cells.values():
        assert (config | own)['lr_decay_iters'] is None  # the decay ends at max_iters
    assert config['out_dir'] == 'out-' + name[:-3].replace('_', '-')


@pytest.mark.parametrize('budget, expected', [
    (1000, [0, 10]),
    (100, [0, 10]),
    (95, [0.5, 10.5]),
    (90, [1, 11]),
    (70, None),  # the evaluations at 5 and 9 are further apart than a quarter of 7
])
def test_losses_at_a_budget_lie_between_evaluations(budget, expected):
    """A run that did more compared at its end, or by its first evaluation."""
    evals = [Evaluation(i, 0, 10.0 * i, 0.0, 0.0, np.array([10.0 - i, 20.0 - i])) for i in (0, 5, 9, 10)]
    found = losses_at(evals, 'FLOPs', budget)
    assert found is None if expected is None else found.tolist() == expected


# whole comparisons

@pytest.fixture(scope='module')
def grid(text_set, tmp_path_factory):
    """(out_dir, console) of a grid of four cells with two seeds each, two runs at a time."""
    out_dir = tmp_path_factory.mktemp('grid') / 'out'
    return out_dir, study(text_set, out_dir, *GRID, '--jobs=2')


def test_a_grid_is_runs_of_train_py(grid, text_set, tmp_path):
    """A cell that differs from what train.py does with these flags."""
    out_dir, console = grid
    rows = {row['cell']: row for row in results(out_dir)['rows']}
    assert list(rows) == [f'n_embd={n}, {p}' for n in (16, 32) for p in ('none', 'rope')]
    row = rows['n_embd=32, rope']
    study(text_set, tmp_path, '--position_encoding=rope', '--n_embd=32', '--seed=2', script='train.py')
    log, = logs(tmp_path)
    assert row['loss_by_seed'][1] == pytest.approx(log['eval_steps'][-1]['val']['loss'], abs=1e-5)
    assert row['val_loss'] == pytest.approx(np.mean(row['loss_by_seed']))
    assert row['iterations'] == 12 and row['seeds'] == [1, 2]
    assert row['params'] == log['startup_info']['total_params']
    assert row['flops_per_token'] == log['startup_info']['flops_per_token']
    assert '8 runs' in console and '2 at a time' in console and '36 windows of 16 tokens' in console
    for text in (console, (out_dir / 'compare.md').read_text()):
        assert all(f'| {cell}' in text for cell in rows) and 'baseline' in text
    assert (out_dir / 'compare.png').read_bytes()[:4] == b'\x89PNG'


def test_a_verdict_says_what_it_cost():
    """A gated FFN with a quarter more compute is called better, and nothing beside it says why."""
    def said(flops, p):
        row = {'iterations': 10, 'flops_per_token': flops, 'difference at end': dict(difference=-0.1, p=p)}
        return verdict(row, dict(iterations=10, flops_per_token=100), 0.95)
    assert (said(100, 0.01), said(125, 0.01)) == ('better', 'better, 1.25x FLOPs')
    assert (said(101, 0.5), said(80, 0.5)) == ('no difference', 'no difference, 0.80x FLOPs')


def test_differences_are_paired_and_from_the_baseline(grid):
    """The sign turned round, another baseline, windows that are not paired, or seeds taken for independent."""
    rows = results(grid[0])['rows']
    losses = {}
    for row in rows:
        ends = [logs(folder)[-1]['eval_steps'][-1]['val']['window_losses'] for folder in row['folders']]
        losses[row['cell']] = np.mean(ends, axis=0)
    table = np.array([row['loss_by_seed'] for row in rows])
    left = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    variance = np.square(left).sum() / 3  # four cells and two seeds
    base = rows[0]
    assert 'difference at end' not in base
    for row in rows[1:]:
        d, found = losses[row['cell']] - losses[base['cell']], row['difference at end']
        assert found['difference'] == pytest.approx(d.mean(), abs=1e-9)
        assert found['difference'] == pytest.approx(row['val_loss'] - base['val_loss'], abs=1e-9)
        from_text = d.reshape(6, 6).mean(1).var(ddof=1) / 6
        df = (from_text + variance) ** 2 / (from_text ** 2 / 5 + variance ** 2 / 3)
        assert found['interval'] == pytest.approx(stats.t.ppf(0.975, df) * math.sqrt(from_text + variance))
        by_seed = dict(zip('12', np.subtract(row['loss_by_seed'], base['loss_by_seed'])))
        assert found['by_seed'] == pytest.approx(by_seed) and found['paired']
        assert ', '.join(f'{d:+.4f}' for d in by_seed.values()) in (grid[0] / 'compare.md').read_text()


def test_the_same_command_again_does_nothing_twice(grid, text_set):
    """A finished night of runs started again."""
    out_dir, _ = grid
    before = {path: path.stat().st_mtime_ns for path in out_dir.glob('*/*')}
    assert '8 runs, 8 of them finished' in study(text_set, out_dir, *GRID, '--sort=params')
    assert before == {path: path.stat().st_mtime_ns for path in out_dir.glob('*/*')}
    params = [row['params'] for row in results(out_dir)['rows']]
    assert params == sorted(params)


def test_a_run_killed_after_its_last_checkpoint_is_finished(grid, text_set):
    """Its log says 'failed', though nothing is left to do."""
    out_dir, _ = grid
    path = next((out_dir / 'n_embd=16,_none,seed=1').glob('run_*.json'))
    whole = path.read_text()
    path.write_text(whole.replace('"outcome":"finished"', '"outcome":"failed"'))
    console = study(text_set, out_dir, *GRID, '--baseline=n_embd=32, rope')
    path.write_text(whole)
    assert '8 of them finished' in console and results(out_dir)['baseline'] == 'n_embd=32, rope'


@pytest.mark.parametrize('flag, parts', [
    ('--learning_rate=3e-3', ['learning_rate=0.01', '0.003', '--out_dir']),
    ('--d_ff=8', ['d_ff=None', '8', '--out_dir']),
    ('--max_iters=6', ['max_iters=12', '6', '--out_dir']),
    ('--baseline=nobody', ['nobody', 'rope']),
])
def test_changed_settings_are_refused(grid, text_set, flag, parts):
    """New settings mixed with the runs that are there. Seen from the command line."""
    refused(command('compare.py', *TINY, f'--dataset={text_set}', f'--out_dir={grid[0]}', *GRID, flag), *parts)


def folders_of(out_dir):
    return sorted(str(path) for path in out_dir.iterdir() if path.is_dir())


def test_finished_runs_are_compared_from_their_logs(grid, tmp_path, capsys):
    """Other figures than those of the study, or a run that is named twice counted twice."""
    def figures(folder):
        return sorted((row['val_loss'], row['interval'], len(row['seeds'])) for row in results(folder)['rows'])
    folders = folders_of(grid[0])
    assert compare.main([*folders, f'--out_dir={tmp_path / "all"}']) == 0
    assert figures(tmp_path / 'all') == figures(grid[0])
    assert compare.main([folders[0], folders[0] + '/', folders[-1], f'--out_dir={tmp_path / "twice"}']) == 0
    assert [row['seeds'] for row in results(tmp_path / 'twice')['rows']] == [[1], [2]]


def test_runs_that_differ_in_their_seed_are_one_cell(grid, tmp_path, capsys):
    """Seeds of one config taken for two choices."""
    same = [folder for folder in folders_of(grid[0]) if 'n_embd=32,_rope' in folder]
    assert compare.main([*same, f'--out_dir={tmp_path}']) == 0
    console = capsys.readouterr().out
    assert len(results(tmp_path)['rows']) == 1 and 'better' not in console and 'worse' not in console


def test_runs_before_and_after_an_edit_of_the_code_are_cells(grid, tmp_path, capsys):
    """The README's recipe for an edited model.py failed; then other runs lost their mean over seeds unsaid."""
    before, after = folders_of(grid[0])[0], str(tmp_path / 'after')
    shutil.copytree(before, after)
    assert compare.main([before, after, f'--out_dir={tmp_path / "both"}']) == 0
    assert [(row['cell'], row['seeds']) for row in results(tmp_path / 'both')['rows']] == [(before, [1]), (after, [1])]
    note = f"NOTE: '{before}' and '{after}' have the same settings and seed, so every folder is a cell"
    assert capsys.readouterr().out.count(note) == 1


def test_finished_runs_that_cannot_be_compared(grid, text_set, tmp_path, capsys):
    """Runs that were evaluated on other windows, or folders without a log, compared all the same."""
    folders, out = folders_of(grid[0]), f'--out_dir={tmp_path / "no"}'
    study(text_set, tmp_path / 'other', '--eval_iters=8', '--max_iters=2', script='train.py')
    (tmp_path / 'empty').mkdir()
    for args, parts in (
        ([folders[0], tmp_path / 'other'], ['same windows', folders[0], tmp_path / 'other', 'eval_iters']),
        ([folders[0], tmp_path / 'empty'], ['empty', 'run_*.json']),
        ([folders[0]], ['own folder', 'out_dir']),
        ([*folders, '--search=4'], ['search']),
    ):
        one_line(refusal(capsys, *args, out), *parts)


# a single run

@pytest.fixture(scope='module')
def resumed(text_set, tmp_path_factory):
    """The out_dir of a run that was stopped at iteration 6 and resumed: two logs."""
    out_dir = tmp_path_factory.mktemp('single') / 'out'
    study(text_set, out_dir, '--max_iters=6', '--sample_interval=1', script='train.py')
    study(text_set, out_dir, '--init_from=resume', '--sample_interval=1', script='train.py')
    return out_dir


def test_a_single_run_is_reported_in_its_own_folder(resumed, tmp_path, capsys):
    """compare.py refused a single run: nothing to compare it with."""
    folder = shutil.copytree(resumed, tmp_path / 'run', ignore=shutil.ignore_patterns('loss.png'))
    assert len(logs(folder)) == 2 and compare.main([str(folder)]) == 0
    console, report = capsys.readouterr().out, (folder / 'report.md').read_text()
    evals = {e['iter']: e for log in logs(folder) for e in log['eval_steps']}
    table = re.findall(r'^\| (\d+) +\| (\S+) +\| (\S+) +\| (\S+) [ *]+\| (\S+) ', console, re.M)
    assert [int(row[0]) for row in table] == [0, 3, 6, 9, 12]
    for row, (it, e) in zip(table, evals.items()):
        figures = e['train']['loss'], e['val']['loss'], e['val']['bits_per_byte']
        assert row[1:] == (f'{it * 64:,}', *(f'{x:.4f}' for x in figures))
    assert '| parameters ' in console and 'at iteration 12 of 12 (finished)' in console
    assert console.count('Sample at iteration') == 2 and 'Sample at iteration 12' in console
    assert report.startswith('![Loss](loss.png)\n') and report.split('\n\n', 1)[1] in console
    picture = (folder / 'loss.png').read_bytes()
    assert picture[:4] == b'\x89PNG' and len(picture) < 40_000
    new = {path.name for path in folder.iterdir()} - {path.name for path in resumed.iterdir()}
    assert new <= {'report.md', 'loss.png'}


def test_a_single_run_is_reported_without_matplotlib(resumed, tmp_path, capsys, monkeypatch):
    """No report, or a link to a picture that is not there."""
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    folder = shutil.copytree(resumed, tmp_path / 'run', ignore=shutil.ignore_patterns('loss.png'))
    assert compare.main([str(folder)]) == 0
    assert 'pip install matplotlib' in capsys.readouterr().out
    assert 'loss.png' not in (folder / 'report.md').read_text() and not (folder / 'loss.png').exists()


@pytest.mark.parametrize('change', [
    dict(iter_num=10 ** 6, outcome='failed'),  # killed long after its last log line
    dict(iterations=[]),
    dict(evals=[Evaluation(0, 0, 0.0, 0.0, 1.0, np.ones(1), 1.0)]),
    dict(evals=[Evaluation(i, 64 * i, 0.0, 0.0, 1.0, np.ones(1), 1.0) for i in range(5000)]),
], ids=['killed', 'no lines', 'one evaluation', 'many evaluations'])
def test_the_loss_of_any_run_is_drawn(resumed, tmp_path, change):
    """A run with little in its log ended in a traceback; one with much in its log filled the terminal."""
    result = read_run(resumed)._replace(folder=tmp_path, **change)
    assert draw_loss(result) == str(tmp_path / 'loss.png')
    assert len((tmp_path / 'loss.png').read_bytes()) < 40_000 and len(evaluation_table(result).splitlines()) <= 24


@pytest.mark.parametrize('values, text', [
    ([], ''),
    ([math.nan, None], ''),
    ([2.0, 2.0], '▁▁'),
    ([8, 7, 6, 5, 4, 3, 2, 1], '█▇▆▅▄▃▂▁'),
    ([3.0, None, math.inf, 1.0], '█▁'),
    ([1] * 40 + [2] * 40, '▁' * 20 + '█' * 20),
])
def test_a_sparkline_has_the_heights_of_its_values(values, text):
    assert sparkline(values) == text


# what a log may hold

def put(log, path, value):
    """Set a nested field of a log, or remove it if value is MISSING."""
    *parents, last = path
    for key in parents:
        log = log[key]
    if value == MISSING:
        del log[last]
    else:
        log[last] = value


MISSING = '(missing)'
EVAL = 'eval_steps', 1


@pytest.mark.parametrize('path, value, parts', [
    ((*EVAL, 'val', 'window_losses', 3), math.nan, ['window_losses[3]', 'nan']),
    ((*EVAL, 'val', 'window_losses', 3), 1e308, ['window_losses[3]', '1e+308']),
    ((*EVAL, 'val', 'window_losses', 3), 1e300, ['window_losses', '1e+300']),
    ((*EVAL, 'val', 'window_losses', 3), 99.0, ['window_losses', 'val.loss']),
    ((*EVAL, 'val', 'window_losses'), [1.0], ['window_losses', '36']),
    ((*EVAL, 'val', 'loss'), 'low', ['val.loss', "'low'"]),
    ((*EVAL, 'iter'), 10 ** 30, ['eval_steps[1].iter']),
    ((*EVAL, 'iter'), 10 ** 9, ['eval_steps', 'order']),
    ((*EVAL, 'train_seconds'), MISSING, ["no 'train_seconds'"]),
    (('eval_steps',), {}, ['eval_steps', 'list']),
    (('eval_windows',), MISSING, ['eval_windows']),
    (('config',), [], ['config', 'dict']),
    (('config', 'seed'), '1', ['config.seed', "'1'"]),
    (('config', 'seed'), MISSING, ["no 'seed'"]),
    (('startup_info', 'total_params'), MISSING, ["no 'total_params'"]),
    (('startup_info', 'hardware_peak_tflops'), 0, ['hardware_peak_tflops', 'positive']),
    (('startup_info', 'tokens_per_iter'), 0, ['tokens_per_iter', 'positive']),
    (('startup_info', 'device'), 3, ['device', 'text']),
    (('startup_info', 'peak_source'), 3, ['peak_source', 'text']),
    (('training_iterations', 0, 'loss'), 1e300, ['loss', '1e+300']),
    ((*EVAL, 'train'), MISSING, ["no 'train'"]),
    ((*EVAL, 'sample'), 3, ['sample', 'text']),
    (('training_iterations', 0, 'memory'), {}, ['no memory']),
    (('training_iterations', 0, 'memory'), {'peak': 'much'}, ["'much'"]),
    (('training_iterations', 0, 'mfu'), None, ['mfu', 'dict']),
    (('summary', 'iterations'), 99, ['summary.iterations']),
    (('summary',), None, ['summary']),
], ids=str)
def test_a_log_that_train_py_did_not_write_is_one_line(grid, tmp_path, capsys, path, value, parts):
    """NaN in a log gave a difference of +nan with exit status 0, a huge iteration was the last one; tracebacks."""
    folders = folders_of(grid[0])
    shutil.copytree(folders[0], tmp_path / 'copy')
    file, = (tmp_path / 'copy').glob('run_*.json')
    log = json.loads(file.read_text())
    put(log, path, value)
    file.write_text(json.dumps(log))
    one_line(refusal(capsys, folders[-1], tmp_path / 'copy', f'--out_dir={tmp_path / "out"}'), file.name, *parts)


def test_control_characters_of_a_log_are_escaped(grid, tmp_path, capsys):
    """A config value with ESC in it reached the terminal and compare.md, and one with a newline broke the table."""
    folders = folders_of(grid[0])
    shutil.copytree(folders[0], tmp_path / 'copy')
    file, = (tmp_path / 'copy').glob('run_*.json')
    log = json.loads(file.read_text())
    log['config']['activation'] = 'ge\x1b[2Jlu\nsecond line'
    file.write_text(json.dumps(log))
    assert compare.main([folders[0], str(tmp_path / 'copy'), f'--out_dir={tmp_path / "out"}']) == 0
    for text in (capsys.readouterr().out, (tmp_path / 'out/compare.md').read_text()):
        assert '\x1b' not in text and r'ge\x1b[2Jlu second line |' in text.replace('  ', '')


def test_settings_json_that_is_damaged_is_one_line(grid, text_set):
    """A study that was cut off by a full disk ended in a traceback."""
    path = grid[0] / 'n_embd=16,_none,seed=1/settings.json'
    whole = path.read_text()
    path.write_text(whole[:-9])
    done = command('compare.py', *TINY, f'--dataset={text_set}', f'--out_dir={grid[0]}', *GRID)
    path.write_text(whole)
    refused(done, 'settings.json')


def test_a_failed_cell_is_reported_and_the_others_go_on(text_set, tmp_path):
    """One bad cell costs the night, or is left out of the table without a word."""
    done = command('compare.py', *TINY, f'--dataset={text_set}', f'--out_dir={tmp_path}', '--n_head=3,2,4', '--seed=1',
                   '--jobs=2', '--max_iters=2')
    assert done.returncode == 1, done.stdout + done.stderr
    reason = r'n_embd \(16\) must be a multiple of n_head \(3\)'
    assert re.search(f'n_head=3, seed 1: FAILED with status 2: .*{reason}', done.stdout)
    assert [row['cell'] for row in results(tmp_path)['rows']] == ['n_head=2', 'n_head=4']
    one_seed = 'one seed', 'no p-values'
    for words in ('failed: n_head=3, seed 1', *one_seed, 'NOTE: the first cell has failed'):
        assert words in done.stdout


def test_batch_sizes_are_compared_on_the_same_windows(text_set, tmp_path):
    """eval_iters batches are other windows with another batch size, which would show after the last run."""
    console = study(text_set, tmp_path, '--batch_size=4,6', '--seed=1', '--jobs=2')
    a, b = results(tmp_path)['rows']
    assert [a['cell'], b['cell']] == ['batch_size=4', 'batch_size=6'] and '36 windows' in console
    assert b['difference at end']['difference'] == pytest.approx(b['val_loss'] - a['val_loss'], abs=1e-9)


# kills

TWO_RUNS = '--n_head=1,2', '--seed=5'
HANG = '''
import builtins, sys, time

def print_and_hang(*texts, print=print, **kwargs):
    print(*texts, **kwargs)
    while str(texts[0]).startswith('iter 7 ') and not sys.modules['__main__'].stop.status:
        time.sleep(0.01)  # until a signal comes

builtins.print = print_and_hang
'''


@pytest.fixture(scope='module')
def uninterrupted(text_set, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp('whole') / 'out'
    study(text_set, out_dir, *TWO_RUNS, '--jobs=2')
    return out_dir


def start_and_kill(text_set, out_dir, sent):
    """Send a signal during the second run; returns the exit status once the child has ended, too."""
    env = os.environ | {'OMP_NUM_THREADS': '1'} | at_start(out_dir.parent, HANG)
    flags = *TINY, f'--dataset={text_set}', f'--out_dir={out_dir}', *TWO_RUNS
    process = subprocess.Popen([sys.executable, 'compare.py', *flags], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.STDOUT, env=env, start_new_session=True)
    second = out_dir / 'n_head=2,seed=5' / 'console.txt'
    wait_until(lambda: second.exists() and 'iter 7 ' in second.read_text(), process)
    running = children(process.pid)
    process.send_signal(sent)
    process.wait(HANGS)
    wait_for_end(running)  # after kill -9 the child still saves
    return process.returncode


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('sent, status', [
    (signal.SIGKILL, -signal.SIGKILL),
    pytest.param(signal.SIGTERM, 128 + signal.SIGTERM, marks=pytest.mark.soak),
    pytest.param(signal.SIGINT, 128 + signal.SIGINT, marks=pytest.mark.soak),
])
def test_killed_anywhere_the_same_command_resumes(text_set, tmp_path, uninterrupted, sent, status):
    """A kill costs more than the active run, leaves its train.py running, or changes a result."""
    out_dir = tmp_path / 'out'
    shutil.copytree(uninterrupted / 'n_head=1,seed=5', out_dir / 'n_head=1,seed=5')
    assert start_and_kill(text_set, out_dir, sent) == status
    console = study(text_set, out_dir, *TWO_RUNS)
    assert '2 runs, 1 of them finished' in console
    rows = results(out_dir)['rows']
    assert [row['val_loss'] for row in rows] == [row['val_loss'] for row in results(uninterrupted)['rows']]
    assert [row['iterations'] for row in rows] == [12, 12]
    assert len(logs(out_dir / 'n_head=1,seed=5')) == 1


# search and scaling

def test_search_gives_up_the_worse_half(text_set, tmp_path):
    """The better half stopped, the schedule cut short with a round, or other draws on the next start."""
    flags = '--search=4', '--learning_rate=1e-5..3e-2', '--seed=3', '--eval_interval=100', '--keep_checkpoints=False'
    study(text_set, tmp_path, *flags, '--jobs=2')
    rows = results(tmp_path)['rows']
    assert [row['iterations'] for row in rows] == [12, 6, 3, 3]
    rates = {float(row['cell'].split('=')[1]) for row in rows}
    assert len(rates) == 4 and all(1e-5 <= rate <= 3e-2 for rate in rates) and not list(tmp_path.glob('*/ckpt*'))
    first = []  # the loss at iteration 3, of the last cell to stop first
    for row in rows:
        runs = logs(row['folders'][0])
        first.append(next(e['val']['loss'] for log in runs for e in log['eval_steps'] if e['iter'] == 3))
        assert all(log['config']['lr_decay_iters'] == 12 for log in runs)
    assert max(first[:2]) <= min(first[2:])
    again = study(text_set, tmp_path, *flags)
    assert [row['cell'] for row in results(tmp_path)['rows']] == [row['cell'] for row in rows]
    assert 'other length' in again and 'looks better than it is' in again


def test_scaling_trains_a_ladder_at_the_same_tokens_per_parameter(text_set, tmp_path):
    """Sizes other than those trained, tokens out of proportion, or no fit."""
    config = tmp_path / 'base.py'
    config.write_text('n_embd, n_head = 16, 2\n')
    flags = [flag for flag in TINY if 'n_embd' not in flag and 'n_head' not in flag]
    done = command('compare.py', *flags, f'--dataset={text_set}', f'--out_dir={tmp_path / "out"}', '--jobs=2',
                   f'--scaling={config}', '--n_embd=8,16,24', '--tokens_per_param=0.2')
    assert done.returncode == 0, done.stderr + done.stdout
    found = results(tmp_path / 'out')
    assert [row['cell'] for row in found['rows']] == ['width 8', 'width 16', 'width 24']
    for row in found['rows']:
        log, = logs(row['folders'][0])
        assert log['config']['n_embd'] // log['config']['n_head'] == 8
        assert 0.2 * row['params'] <= row['iterations'] * 64 < 0.2 * row['params'] + 64
    assert found['fit']['alpha_interval'] > 0 and 'alpha' in done.stdout
    assert (tmp_path / 'out/scaling.png').exists()


def test_a_ladder_takes_its_proportions_from_one_model(tmp_path):
    """A traceback, because the size of a head was computed from several widths."""
    (tmp_path / 'base.py').write_text('n_embd, n_head = [64, 96, 128], 2\n')
    with pytest.raises(UserError, match="base.py' must have one n_embd"):
        compare.plan(*compare.settings([f'--scaling={tmp_path}/base.py']))


# refusals

SCALING = '--scaling=config/preset_quick_test.py'


@pytest.mark.parametrize('flags, parts', [
    (['--normalization=rmsnorm'], ['nothing to compare', '--seed=1,2,3']),
    (['--learning_rate=1e-4..1e-2'], ['learning_rate', '--search']),
    (['--search=1', '--learning_rate=1e-4..1e-2'], ['search', '2']),
    (['--normalisation=a,b'], ["'normalisation'", "'normalization'"]),
    (['--seed=1,x'], ['seed', 'int', "'1,x'"]),
    (['--confidence=95', '--seed=1,2'], ['confidence', '95']),
    (['--jobs=0', '--seed=1,2'], ['jobs', '0']),
    (['--seed=1,2', '--baseline=nobody'], ['nobody', 'as configured']),
    (['a/b=1', 'c'], ['a/b=1']),
    (['--cells={"a": {"n_layers": 2}}'], ["cell 'a'", 'n_layers']),
    (['--cells={"a": {"n_layer": "x"}}'], ["cell 'a'", 'n_layer', 'int']),
    (['--cells={"a": {"n_head": 4}}', '--n_head=1,2'], ["cell 'a'", 'n_head']),
    (['config/ablate_swiglu.py', '--d_ff=8'], ['d_ff']),
    (['--block_size=64,128', '--seed=1'], ['block_size', '64', '128']),
    (['--batch_size=4,5', '--eval_iters=3', '--seed=1'], ['eval_iters * batch_size', '15', '12']),
    ([SCALING, '--n_embd=64,96,100'], ['100', '32']),
    ([SCALING, '--n_embd=64,96'], ['3 widths']),
    ([SCALING, '--n_embd=64'], ['several widths', '64']),
    ([SCALING, '--n_embd=64,96,128', '--learning_rate=1,2'], ['scaling', 'learning_rate']),
], ids=str)
def test_what_cannot_be_compared_is_one_line(flags, parts, tmp_path, capsys, monkeypatch):
    """A night of runs that says nothing."""
    monkeypatch.chdir(ROOT)
    one_line(refusal(capsys, *flags, f'--out_dir={tmp_path}'), *parts)


def test_a_missing_library_is_named_before_the_first_run(text_set, tmp_path):
    """The library for the picture found missing after the last run."""
    flags = f'--dataset={text_set}', '--seed=1,2', f'--out_dir={tmp_path}'
    refused(command('compare.py', *TINY, *flags, before=missing('matplotlib')), 'pip install matplotlib')
    assert not list(tmp_path.glob('*/run_*.json'))


def test_one_out_dir_is_for_one_comparison(grid, capsys):
    """Two studies that start the same runs."""
    lock = compare.lock_out_dir(grid[0])
    message = refusal(capsys, *folders_of(grid[0]), f'--out_dir={grid[0]}')
    lock.close()
    one_line(message, grid[0], f'process {os.getpid()}', '--out_dir=')
