"""bench.py --report: python -m pytest tests/test_report.py"""
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from bench import main as bench_main
from conftest import PYTHON, ROOT, children, command, one_line, succeeded, wait_for_end, wait_until
from engine import machine_report
from engine.common import UserError
from engine.gpu_checks import failed_checks, verdict, worst_difference
from engine.machine import pick_device
from engine.machine_commands import fitted_row, step_figures
from engine.machine_rows import Report, Row, exponent, fits, measure_rows, run
from tests.test_bench import NANOGPT_LIKE
from tests.warm import HANGS

CPU = torch.device('cpu')
SMALL = """
    --device=cpu --dtype=float32 --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --vocab_size=256
    --batch_size=2 --prompt_tokens=8 --new_tokens=4
""".split()


def new_report(folder, **kwargs):
    facts = dict(device=CPU, dtype='float32', machine={'device': 'cpu'}, peak=1e12, peak_is_measured=True,
                 seconds=1e6, sections={'things': 'Some things.'}, flags=SMALL)
    return Report(folder=str(folder), **facts | kwargs)


def written(folder):
    """Return the content of report.json, and of report.md."""
    return json.loads((folder / 'report.json').read_text()), (folder / 'report.md').read_text()


def measured(row):
    """Return a row that is measured at once."""
    return Row('things', row, f'python {row}.py', 0, lambda left: ({'speed': f'{row} m/s'}, {'speed': 1.5}))


FIRST_ROWS = """
import itertools
from engine import machine_report
measure_rows = machine_report.measure_rows
machine_report.measure_rows = lambda report, rows: measure_rows(report, itertools.islice(rows, {n}))
"""
COLUMNS = {
    'training': {'parameters', 'tokens', 'step', 'MFU', 'memory', 'estimated'},
    'parts': {'matmuls', 'attention', 'head and loss', 'optimizer', 'waiting for data', 'the rest'},
    'generation': {'share of the limit'},
    'loader': {'waiting'},
    'checkpoint': {'of a step', 'every 1000 steps'},
    'growth': {'step', 'memory'},
    'processes': {'iteration', 'memory of each'},
    'versus': {'ours', 'theirs', 'ratio'},
}


def test_one_command_measures_each_section(tmp_path):
    """There was no such command; a section that nobody has run, or flags that its script does not know."""
    (tmp_path / 'model.py').write_text(NANOGPT_LIKE)
    asked = f'--report={tmp_path}', f'--sections={",".join(COLUMNS)}', f'--versus={tmp_path}'
    succeeded(command('bench.py', *asked, *SMALL, before=FIRST_ROWS.format(n=1)), 'loader, preset_quick_test')
    facts, text = written(tmp_path)
    assert facts['ended'] == 'complete' and facts['machine']['torch'].startswith(torch.__version__)
    rows = {row['section']: row for row in facts['rows']}
    assert rows.keys() == COLUMNS.keys()
    for section, row in rows.items():
        assert COLUMNS[section] <= row['cells'].keys() and row['numbers'] and 'config/' in row['command'], section
        assert f"\n{row['command']}\n" in text and f'## {section.capitalize()}\n' in text, section
    assert sum(rows['parts']['numbers']['shares'].values()) == pytest.approx(1)
    loader = rows['loader']['numbers']
    assert 0 < loader['waiting_share'] < 1 and loader['sides'][0]['times']['reading']
    assert not {'run', 'row.json'} & set(os.listdir(tmp_path))


def test_ceilings_stop_where_a_matmul_takes_long(tmp_path):
    """float16 without units for it took minutes."""
    report = new_report(tmp_path)
    names = []
    for row in machine_report.ceilings(report):
        names.append(row.name)
        report.rows.append(dict(section='ceilings', numbers=dict(dtype=row.name.split(',')[0], seconds=1.0)))
    assert names == [*(f'{dtype}, 256 x 256' for dtype in ('float32', 'bfloat16', 'float16')), 'copy of 256 MiB']


def test_matmuls_are_those_of_each_linear(tmp_path):
    """A ceiling of square matmuls, which says nothing of the shapes that a step has."""
    report = new_report(tmp_path, seconds=30)
    rows = list(machine_report.matmuls(report))
    shapes = '16 to 48', '16 to 16', '16 to 64', '64 to 16', '16 to 256'  # qkv, c_proj, c_fc, c_proj, head
    assert [row.name for row in rows] == [f'{n} tokens, {shape}' for n in (32, 64) for shape in shapes]
    measure_rows(report, rows[:1])
    (row,) = written(tmp_path)[0]['rows']
    assert row['numbers']['flops'] == 2 * 32 * 16 * 48 and 'linear_times(32, 16, 48,' in row['command']
    assert row['cells'].keys() == row['numbers']['rates'].keys() == {
        'forward', 'gradient of x', 'gradient of the weight'}


def test_rows_without_time_are_listed(tmp_path):
    """A report that takes as long as it likes, or that says nothing of what it has left out."""
    report = new_report(tmp_path, seconds=50)
    rows = [measured('first'), Row('things', 'long', 'python long.py', 90, measured('x').measure),
            measured('last'), Row('things', 'large', '', 0, unfit='needs 30 GiB')]
    measure_rows(report, rows)
    facts, text = written(tmp_path)
    assert [bool(row['cells']) for row in facts['rows']] == [True, False, True, False]
    assert '- long: left out: it takes about 90 s' in text and '- large: needs 30 GiB' in text
    assert 'python first.py\npython last.py\n' in text and 'long.py' not in text


def test_a_row_ends_at_the_deadline():
    """A command that takes longer than expected, and goes on behind the report's back."""
    before = children(os.getpid())
    with pytest.raises(UserError, match='stopped after 1 s'):
        run(['python', '-c', 'import time; print(1, flush=True); time.sleep(1000)'], 1)
    assert set(children(os.getpid())) <= set(before)


def test_a_row_that_fails_is_a_note(tmp_path):
    """One command that fails cost all the others."""
    def fail(left):
        run(['python', '-c', 'raise SystemExit("no such thing")'], left)
    report = new_report(tmp_path)
    measure_rows(report, [Row('things', 'bad', 'python bad.py', 0, fail), measured('good')])
    facts, text = written(tmp_path)
    assert facts['rows'][0]['note'] == 'failed with status 1: no such thing' and facts['rows'][1]['cells']


def test_a_report_that_is_cut_short_is_a_shorter_report(tmp_path):
    """Ctrl-C lost what had been measured, or left a measurement behind."""
    folder = tmp_path / 'report'
    process = subprocess.Popen([*PYTHON, 'bench.py', f'--report={folder}', '--sections=training',
                                '--peak_tflops=1', *SMALL],
                               cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith('training, preset_quick_test')
    # the next row's bench.py, which has started its side
    left_behind = wait_until(lambda: (pids := children(process.pid)) and len(pids) > 1 and pids, process)
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait(HANGS) == 130
    facts, text = written(folder)
    assert facts['ended'] == 'cut short by Ctrl-C' and 'The report is cut short by Ctrl-C.' in text
    assert facts['rows'][0]['cells'] and len(facts['rows']) < 5
    wait_for_end(left_behind)  # a process of bench.py ends soon after its parent


def test_exponents_are_slopes_of_logarithms():
    """A fit in other units than its logarithms, or of another column."""
    rng = np.random.default_rng(0)
    x = np.array([128, 256, 512, 1024])
    y = x ** 1.7 * np.exp(0.1 * rng.standard_normal(4))
    u, v = np.log2(x), np.log2(y)
    slope = ((u - u.mean()) * (v - v.mean())).sum() / ((u - u.mean()) ** 2).sum()
    assert exponent(x, y) == pytest.approx(slope)
    points = [dict(key='n_embd', x=n, seconds=3 * n ** 1.5, flops=n ** 2, bytes=7 * n, estimate=n ** 0.5) for n in x]
    text = fits([dict(numbers=point) for point in points] + [dict(numbers=dict(x=1))])
    assert [cell.strip() for cell in text.splitlines()[-1].strip('|').split('|')] == [
        'n_embd', '4', '1.50', '2.00', '1.00', '0.50']
    assert fits([dict(numbers=points[0])]) == ''


def test_the_batch_is_halved_until_time_suffices(tmp_path):
    """A step of a large model on a CPU took the time of the whole report."""
    flags = '--n_layer=2', '--n_head=4', '--n_embd=256', '--vocab_size=256', '--block_size=128', '--batch_size=64'
    quick, slow = (new_report(tmp_path, flags=list(flags), peak=peak) for peak in (1e15, 2e10))
    rows = [fitted_row(r, 'training', 'config/preset_tiny.py', [], step_figures) for r in (quick, slow)]
    assert '--batch_size=64 --warmup' in rows[0].command
    slow.seconds = 300
    row = fitted_row(slow, 'training', 'config/preset_tiny.py', [], step_figures)
    batch = int(row.command.split('--batch_size=')[-1].split()[0])
    assert 1 <= batch < 64


def test_a_model_larger_than_memory_says_so(tmp_path):
    """The kernel killed the process."""
    flags = ['--n_layer=1000', '--n_head=8', '--n_embd=16384']
    row = fitted_row(new_report(tmp_path, flags=flags), 'training', 'config/preset_tiny.py', [], step_figures)
    assert row.unfit.startswith('needs') and 'GiB are free' in row.unfit


@pytest.mark.parametrize('flags, words', [
    (['--sections=speed'], ['speed', 'ceilings', 'growth']),
    (['--sections=versus'], ['--versus=FOLDER']),
    (['--what=forward'], ['--what=forward']),
    (['config/preset_tiny.py'], ['config/preset_tiny.py']),
    (['--minutes=0'], ['minutes']),
], ids=str)
def test_a_wrong_use_is_one_line(tmp_path, monkeypatch, flags, words):
    """A report of something else than was asked for."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', ['bench.py', f'--report={tmp_path}/report', '--device=cpu', *flags])
    with pytest.raises(UserError) as error:
        bench_main()
    one_line(error.value, *words)
    assert not (tmp_path / 'report').exists()


# correctness on a GPU, tried on a CPU

def test_a_check_compares_losses_with_its_reference(tmp_path):
    """A check that passes whatever the losses are; or a folder's name that rewrites the terminal."""
    folder = tmp_path / 'clears\x1b[2Jthe screen'
    asked = f'--report={folder}', '--sections=correctness', '--peak_tflops=1', *SMALL[:7]
    done = command('bench.py', *asked, before=FIRST_ROWS.format(n=3))
    succeeded(done, 'wrote')
    assert '\x1b' not in done.stdout + done.stderr
    rows = written(folder)[0]['rows']
    reference, same, rough = (row['numbers'] for row in rows)
    assert rows[1]['cells']['passed'] == 'yes' and same['difference'] == 0 and len(reference['losses']) == 10
    assert rough['difference'] == worst_difference(rough['losses'], reference['losses']) > 0 and rough['passed']
    rows[2]['numbers'] = verdict('with float32', rough['difference'], rough['difference'] / 2)[1]
    assert failed_checks(rows) == ['bfloat16']


def test_the_worst_difference_is_relative():
    """Steps that fp16 skips have no loss, and a failed reference has no losses at all."""
    assert worst_difference({0: 2.2, 1: None, 2: 4.0}, {0: 2.0, 1: 1.0, 2: 4.0}) == pytest.approx(0.1)
    with pytest.raises(UserError, match='the reference run failed'):
        worst_difference({0: 1.0}, {})
    left_out, broken = ({'name': n, 'numbers': {}, 'note': n} for n in ('left out: no time', 'failed with status 1'))
    assert failed_checks([left_out, broken]) == ['failed with status 1']


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_gpu_has_a_number():
    """torch.cuda.set_device(torch.device('cuda')) raises a ValueError, in bench.py on every GPU."""
    assert pick_device('cuda')[0] == pick_device('auto')[0] == torch.device('cuda', 0)
