"""What a run prints: few short lines, one line of progress on a terminal, and how it ended."""
import importlib.util
import io
import re
import sys
from types import SimpleNamespace

import pytest

from conftest import run_logs, succeeded, train
from engine import common
from engine.common import CLEAR_LINE
from engine.console import Console


class Screen(io.TextIOWrapper):
    """A terminal in place of stdout and stderr."""
    def __init__(self):
        super().__init__(io.BytesIO(), encoding='utf-8', newline='')

    def isatty(self):
        return True

    def read_new(self):
        """Return what was printed since the last call."""
        self.flush()
        text = self.buffer.getvalue().decode()
        self.buffer.seek(0)
        self.buffer.truncate()
        return text


@pytest.fixture
def terminal(monkeypatch):
    """terminal(): a Screen, where the test prints from now on (not earlier, because pytest resets sys.stdout)."""
    def begin():
        screen = Screen()
        monkeypatch.setattr(sys, 'stdout', screen)
        monkeypatch.setattr(sys, 'stderr', screen)
        monkeypatch.delenv('NO_COLOR', raising=False)
        return screen
    return begin


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """For a console in this process, time stands still."""
    monkeypatch.setattr('engine.console.time', SimpleNamespace(time=lambda: 1e9))


def long_ago(console):
    """Let a console believe that it has printed nothing for a long time."""
    console.last_time = console.last_progress = 0.0
    return console


def test_the_console_escapes_control_characters(capsys):
    """A model's text, a data set's name or a setting rewrites what the terminal shows."""
    Console().say('a\x1b[2Jb\r\tc\nd')
    assert capsys.readouterr().out == 'a\\x1b[2Jb\\r\tc\nd\n'


def test_progress_is_one_line_that_the_next_line_replaces(terminal):
    """A terminal fills with progress, or a line is printed behind it."""
    screen, console = terminal(), Console()
    console.share_done, console.status = 0.25, 'iter 5/20'
    long_ago(console).progress('micro-batch 1/2')
    console.progress('too soon')
    assert screen.read_new() == CLEAR_LINE + '[=====               ]  25% micro-batch 1/2, iter 5/20'
    console.say('iter 5: loss 1.0')
    assert screen.read_new() == CLEAR_LINE + 'iter 5: loss 1.0\n'


def test_progress_is_shown_again_after_a_line(terminal):
    """With log_interval=1 every iteration prints a line, and the progress was never seen."""
    screen, console = terminal(), Console()
    console.say('iter 5: loss 1.0')
    console.progress('iter 6')
    assert screen.read_new().endswith(f'{CLEAR_LINE}[                    ]   0% iter 6')


def test_progress_fits_the_terminal(terminal, monkeypatch):
    """A line wider than the terminal cannot be erased, and an escape sequence in it would be executed."""
    monkeypatch.setenv('COLUMNS', '40')
    screen = terminal()
    long_ago(Console()).progress('\x1b[2J' + 40 * 'x')
    text = screen.read_new().removeprefix(CLEAR_LINE)
    assert len(text) == 39 and '\x1b' not in text


def test_progress_in_a_file_is_a_sign_of_life(capsys):
    """A log file fills with progress, or shows nothing during a long evaluation."""
    console = Console()
    console.progress('too soon')
    long_ago(console).progress('evaluating')
    assert capsys.readouterr().out == '  ... evaluating\n'


@pytest.mark.parametrize('text, expected', [
    ('WARNING: x', '\x1b[33mWARNING:\x1b[0m x'),
    ('NOTE: x', '\x1b[36mNOTE:\x1b[0m x'),
    ('a NOTE: x', 'a NOTE: x'),
])
def test_only_notes_warnings_and_errors_have_a_colour(terminal, monkeypatch, text, expected):
    """Colours everywhere, or where NO_COLOR forbids them."""
    screen = terminal()
    Console().say(text)
    assert screen.read_new() == f'{CLEAR_LINE}{expected}\n'
    common.print_error('x')
    assert '\x1b[31m' in screen.read_new()
    monkeypatch.setenv('NO_COLOR', '1')
    Console().say(text)
    assert screen.read_new() == f'{CLEAR_LINE}{text}\n'


DRAW_AT_ONCE = """
import engine.run_log
engine.run_log.WORTH_A_PICTURE = 0
"""


def test_a_run_is_reported_in_few_short_lines(text_set, tmp_path):
    """The start-up report fills the screen, or a run ends without saying what came of it."""
    out_dir = tmp_path / 'out'
    done = train(text_set, out_dir, '--eval_interval=5', '--log_interval=5', before=DRAW_AT_ONCE)
    succeeded(done)
    lines = done.stdout.splitlines()
    titles = [line.split()[0] for line in lines]
    assert titles[:6] == ['model', 'data', 'training', 'machine', 'cost', 'out_dir']
    assert all(len(line.replace(str(text_set), '').replace(str(out_dir), '')) <= 100 for line in lines)
    assert '\x1b' not in done.stdout and '\r' not in done.stdout
    assert [line.split()[1] for line in lines if line.startswith('iter ')] == ['0', '2', '5', '10', '15', '19']
    end = titles.index('finished')
    assert [title for title in titles[end:] if title != 'picture'] == ['finished', 'val', 'best', 'log', 'next']
    if importlib.util.find_spec('matplotlib'):
        assert (out_dir / 'loss.png').stat().st_size > 5000
    evals = [e['val'] for e in run_logs(out_dir)[0]['eval_steps']]
    assert f"{evals[0]['loss']:.4f} to {evals[-1]['loss']:.4f}" in lines[end + 1]
    assert f"{evals[-1]['bits_per_byte']:.4f} bits per byte" in lines[end + 1]
    assert str(out_dir / 'ckpt_best.pt') in lines[end + 2] and f'sample.py --out_dir={out_dir}' in lines[-1]


VERBOSE = ('TFLOP/s per device', 'GiB at its peak', 'estimated', 'resident', 'gradient norm', 'mean', 'std',
           'non-embedding', 'GFLOP to train')


def test_verbose_adds_the_details(finished, text_set, tmp_path):
    """The whole start-up report, or the figures of an iteration, cannot be seen; or they are always printed."""
    assert [word for word in VERBOSE if word not in finished[1]] == []
    quiet = train(text_set, tmp_path, '--max_iters=3', '--gradient_log_interval=1')
    assert [word for word in VERBOSE if word in quiet.stdout] == []


def test_mfu_is_printed_where_the_peak_is_known(finished, text_set, tmp_path):
    """A share of a peak that was measured beside other work is a riddle."""
    assert re.search(r'^iter .* mfu \d', finished[1], re.M)  # TINY sets --peak_tflops
    measured = train(text_set, tmp_path, '--peak_tflops=0', '--max_iters=3')
    succeeded(measured)
    assert ' mfu ' not in measured.stdout
    assert run_logs(tmp_path)[0]['training_iterations'][0]['mfu']['mfu_percent'] > 0
