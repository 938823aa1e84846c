"""Settings from a script's block, override files and flags, through the command line."""
import ast
import os
import re
import subprocess
import sys

import pytest

from configurator import configure, read_block
from conftest import ROOT, one_line
from engine.common import UserError
from tests.warm import HANGS

SCRIPT = '''"""A script with settings."""
from typing import Literal
from configurator import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, configure
count = 3  # how many
rate = 0.5  # how fast
name = 'x'  # a text
flag = False  # yes or no
width: int = None  # None: four times the count
mode: Literal['auto', True, False] = 'auto'  # one of three
decay: Literal['cosine', 'linear'] = 'cosine'  # a word
steps: PositiveInt = 10  # 1 or more
pause: NonNegativeInt = 0  # 0 or more
lr: PositiveFloat = 0.1  # above 0
clip: NonNegativeFloat = 0.0  # 0: off
beta: Fraction = 0.9  # below 1
batch: PositiveInt | Literal['auto'] = 12  # a number or a word
heads: PositiveInt = None  # None: as many as there are
_own = 1  # no setting
config, given = configure(__file__)
globals().update(config)
print((config, given))
'''
DEFAULTS = dict(
    count=3, rate=0.5, name='x', flag=False, width=None, mode='auto', decay='cosine',
    steps=10, pause=0, lr=0.1, clip=0.0, beta=0.9, batch=12, heads=None)


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """configured(*args, files={name: text}) is (config, given) of the script above, in this process."""
    (tmp_path / 'script.py').write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # configure() sets it

    def configured(*args, files=None):
        for name, text in (files or {}).items():
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return configure('script.py', argv=list(args))
    return configured


@pytest.fixture
def script(tmp_path):
    """script(*args) runs the script above in a process of its own."""
    (tmp_path / 'script.py').write_text(SCRIPT)

    def run(*args, **env):
        env = os.environ | {'PYTHONPATH': str(ROOT), 'PYTHONDONTWRITEBYTECODE': '1'} | env
        return subprocess.run([sys.executable, 'script.py', *args], cwd=tmp_path, env=env,
                              capture_output=True, text=True, timeout=HANGS)
    return run


def refusal(result, *parts):
    """Exit status 2 and exactly one line on stderr, which holds all the parts and is no traceback."""
    assert result.returncode == 2 and 'Traceback' not in result.stderr, (result.returncode, result.stderr)
    assert result.stderr.count('\n') == 1 and result.stderr.endswith('\n'), result.stderr
    assert result.stdout == '' and all(str(part) in result.stderr for part in parts), result.stderr


def refused(parts, configured, *args, files=None):
    with pytest.raises(UserError) as caught:
        configured(*args, files=files)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_defaults_are_those_in_the_script(configured):
    """A default that goes through text and back may come out as another type."""
    assert configured() == (DEFAULTS, {})


def test_a_script_runs_with_its_settings_or_ends_with_one_line(script, tmp_path):
    """A message of two lines, or a traceback in which the reason is the last of forty lines."""
    result = script('--count=7')
    assert result.returncode == 0 and result.stderr == '', result.stderr
    assert ast.literal_eval(result.stdout) == (DEFAULTS | {'count': 7}, {'count': 'on the command line'})
    refusal(script('--cuont=7'), 'script.py: unknown key', "'cuont'", "'count'")
    (tmp_path / 'file.py').write_text('raise ValueError("two\\nlines")\n')
    refusal(script('file.py'), "override file 'file.py' line 1: ValueError: two lines")


@pytest.mark.parametrize('flag, key, value', [
    ('--count=7', 'count', 7),
    ('--count=-7', 'count', -7),
    ('--count=1_000', 'count', 1000),
    ('--rate=1', 'rate', 1.0),
    ('--rate=1e-4', 'rate', 1e-4),
    ('--flag=True', 'flag', True),
    ('--name=abc', 'name', 'abc'),
    ('--name="abc"', 'name', 'abc'),
    ("--name='a b'", 'name', 'a b'),
    ('--name=a b', 'name', 'a b'),
    ('--name=123', 'name', '123'),
    ('--name=1e3', 'name', '1e3'),
    ('--name=True', 'name', 'True'),
    ('--name=', 'name', ''),
    ("--name='None'", 'name', 'None'),
    ('--name=[1, 2]', 'name', '[1, 2]'),
    ('--name={[]: 1}', 'name', '{[]: 1}'),
    ('--name=--x', 'name', '--x'),
    ('--name=a=b', 'name', 'a=b'),
    ('--name=x==1', 'name', 'x==1'),
    (r"--name='C:\data'", 'name', r'C:\data'),
    ("--name='a=b'", 'name', 'a=b'),
    ('--width=8', 'width', 8),
    ('--width=None', 'width', None),
    ('--mode=True', 'mode', True),
    ('--mode=auto', 'mode', 'auto'),
    ("--mode='auto'", 'mode', 'auto'),
    ('--decay=linear', 'decay', 'linear'),
    ('--batch=auto', 'batch', 'auto'),
    ('--batch=1', 'batch', 1),
    ('--heads=None', 'heads', None),
    ('--pause=0', 'pause', 0),
    ('--lr=1', 'lr', 1.0),
    ('--beta=0', 'beta', 0.0),
])
def test_a_flag_sets_a_value_of_its_type(configured, flag, key, value):
    """--out_dir=123 is the name 123, an int is fine for a float, and a value may hold '='."""
    config, given = configured(flag)
    assert config == DEFAULTS | {key: value} and type(config[key]) is type(value)
    assert list(given) == [key]


@pytest.mark.parametrize('flag, parts', [
    ('--cuont=7', ["'cuont'", "'count'", 'command line']),
    ('--zzz=7', ["'zzz'", '--help']),
    ('--_own=7', ["'_own'"]),
    ('--config=7', ["'config'"]),
    ('--count=True', ['count', 'int', 'True']),
    ('--count=1.0', ['count', 'int', '1.0']),
    ('--count=1e3', ['count', 'int', '1000.0']),
    ('--count=many', ['count', 'int', "'many'"]),
    ('--count=None', ['count', 'int', 'None']),
    ('--count=', ['count', 'int']),
    ('--count={[]: 1}', ['count', 'int']),
    ('--count=[1]', ['count', 'int']),
    ('--count=1+1', ['count', 'int']),
    ('--rate=True', ['rate', 'float', 'True']),
    ('--rate=fast', ['rate', 'float']),
    ('--rate=1j', ['rate', 'float']),
    ('--flag=1', ['flag', 'True or False', '1']),
    ('--flag=true', ['flag', 'True or False', "'true'"]),
    ('--flag=None', ['flag']),
    ('--name=None', ['name', 'str', 'None']),
    ('--rate=None', ['rate', 'None']),
    ('--mode=Flase', ['mode', "'auto'", 'True', 'False', "did you mean 'False'"]),
    ('--mode=1', ['mode', 'True', '1']),
    ('--mode=None', ['mode']),
    ('--decay=cosin', ['decay', "'cosine'", "'linear'", "did you mean 'cosine'"]),
    ('--cuont', ['--cuont', '--key=value', "'count'"]),
    ('--count', ['--count', '--key=value']),
    ('-count=3', ['-count=3', '--key=value']),
    ('count=3', ['count=3', '--key=value']),
    ('--=3', ['--=3']),
    ('--', ["'--'"]),
    ('-', ["'-'"]),
])
def test_a_wrong_flag_is_one_line(configured, flag, parts):
    """A typing error that trains for a day with the default."""
    refused(parts, configured, flag)


@pytest.mark.parametrize('flag, message', [
    ('--steps=0', 'steps on the command line must be positive (at most 2147483647), not 0'),
    ('--steps=-1', 'steps on the command line must be positive (at most 2147483647), not -1'),
    ('--steps=1.0', 'steps on the command line must be int, not 1.0'),
    ('--pause=-1', 'pause on the command line must be 0 or more (at most 2147483647), not -1'),
    ('--lr=0', 'lr on the command line must be positive (1e-30 to 1e30), not 0.0'),
    ('--lr=1e999', 'lr on the command line must be positive (1e-30 to 1e30), not inf'),
    ('--clip=-1e-9', 'clip on the command line must be 0 or more (at most 1e30), not -1e-09'),
    ('--clip=-1e999', 'clip on the command line must be 0 or more (at most 1e30), not -inf'),
    ('--beta=1', 'beta on the command line must be at least 0 and below 1, not 1.0'),
    ('--beta=-0.1', 'beta on the command line must be at least 0 and below 1, not -0.1'),
    ('--batch=0', 'batch on the command line must be positive (at most 2147483647), not 0'),
    ('--batch=atuo', "batch on the command line must be int | 'auto', not 'atuo'; did you mean 'auto'?"),
    ('--steps=2147483648', 'steps on the command line must be positive (at most 2147483647), not 2147483648'),
    ('--beta=' + '9' * 400, 'beta on the command line must be a smaller number, not 9999'),
    ('--beta=' + '9' * 5000, "beta on the command line must be float, not '9999"),
    ('--steps=' + '9' * 400, 'steps on the command line must be positive (at most 2147483647), not 9999'),
    ('--heads=0', 'heads on the command line must be positive (at most 2147483647), not 0'),
])
def test_a_range_stands_beside_its_setting(configured, flag, message):
    """A range in a list far below the block is forgotten for a new setting."""
    refused([message], configured, flag)


@pytest.mark.parametrize('text, message', [
    ('steps = 0', "steps in 'a.py' must be positive (at most 2147483647), not 0"),
    ("lr = float('nan')", "lr in 'a.py' must be positive (1e-30 to 1e30), not nan"),
    ('beta = 10 ** 5000', "beta in 'a.py' must be a smaller number, not this int"),
    ('steps = 10 ** 5000', "steps in 'a.py' must be positive (at most 2147483647), not this int"),
    ('flag = 10 ** 5000', "flag in 'a.py' must be True or False, not this int"),
    ("beta = float('nan')", "beta in 'a.py' must be at least 0 and below 1, not nan"),
])
def test_a_range_holds_for_files_too(configured, text, message):
    """NaN passes every comparison that asks whether a value is too small."""
    refused([message], configured, 'a.py', files={'a.py': text})


@pytest.mark.parametrize('args, parts', [
    (['--mode', 'False'], ['--mode=False']),
    (['--count', '7'], ['--count=7']),
    (['--count', 'file.py'], ['--count=file.py']),
    (['--count', '--rate=1'], ["'--count'"]),
    (['--count', '=7'], ['--key=value']),
    (['--count=', '7'], ["'7'"]),
    (['--co-unt=7', 'file.py'], ['--co-unt=7']),
    (['--co-unt=7', '--rate=1'], ['--co-unt=7']),
    (['file.py', '--co-unt=7'], ['--co-unt=7']),
    (['--a.count=7', 'file.py'], ['--a.count=7']),
], ids=str)
def test_a_flag_that_is_not_written_key_value_is_never_passed_over(configured, args, parts):
    """--compile False reads as a flag and a file name; a flag nobody understood must not be dropped."""
    refused(parts, configured, *args, files={'file.py': 'rate = 0.25\n'})


@pytest.mark.parametrize('text, changes', [
    ('count = 7\nrate = 2\n', {'count': 7, 'rate': 2.0}),
    ("name = '123'\nwidth = None\nmode = False\n", {'name': '123', 'mode': False}),
    ('_half = 4\ncount = _half * 2\n', {'count': 8}),
    ('import math\nimport os.path as p\ncount = math.floor(7.5)\n', {'count': 7}),
    ('from math import floor as _floor\ncount = _floor(7.5)\n', {'count': 7}),
    ('def _f(count):\n    rate = 9\n    return count\ncount = _f(7)\n', {'count': 7}),
    ('count = count * 2\ncount += 1\n', {'count': 7}),
    ('count = 3\n', {}),
    ('', {}),
    ('# nothing\n', {}),
    (b'\xef\xbb\xbfcount = 7\r\n', {'count': 7}),
    ("name = 'd\u00e9j\u00e0'\n", {'name': 'd\u00e9j\u00e0'}),
])
def test_an_override_file_sets_what_it_assigns(configured, text, changes):
    """Helpers and imports of the file are its own and no keys; the values so far are in scope."""
    config, given = configured('file.py', files={'file.py': text})
    assert config == DEFAULTS | changes
    assert all(type(config[key]) is type(value) for key, value in changes.items())
    assert set(changes) <= set(given)


def test_what_files_say_is_known_beside_the_flags(configured):
    """The schedule and batch_size='auto' executed the files a second time to learn it."""
    config, given = configured('a.py', '--count=5', '--count=6', files={'a.py': 'count = 4\nrate = 0.5\n'})
    assert given.without_flags() == config | dict(count=4) and config['count'] == 6
    assert [value for value, where in given.history['count']] == [3, 4, 5, 6]
    assert given.flags() == {'count'} and given['rate'] == "in 'a.py'"


def test_setting_a_key_to_its_default_counts_as_set(configured):
    """A preset may fill only what nobody set."""
    given = configured('file.py', '--flag=False', files={'file.py': 'count = 3\n'})[1]
    assert given.keys() == {'count', 'flag'}


@pytest.mark.parametrize('text, parts', [
    ('cuont = 7\n', ["'cuont'", "'count'", 'file.py']),
    ('helper = 7\n', ["'helper'", 'file.py']),
    ('def helper(): pass\n', ["'helper'"]),
    ('from math import floor\n', ["'floor'"]),
    ('for i in range(3): pass\n', ["'i'"]),
    ('count = True\n', ['count', 'int', 'True', 'file.py']),
    ('count = 1.0\n', ['count', 'int']),
    ("count = '7'\n", ['count', 'int']),
    ('rate = False\n', ['rate', 'float']),
    ('name = 123\n', ['name', 'str', '123']),
    ('name = None\n', ['name', 'None']),
    ('count = None\n', ['count', 'None']),
    ('flag = 0\n', ['flag', 'True or False']),
    ("decay = 'cosin'\n", ['decay', 'cosine']),
    ('mode = 1\n', ['mode']),
    ('# one\ncount = (\n', ['line 2', 'SyntaxError', 'file.py']),
    ('if True:\ncount = 1\n', ['line 2', 'IndentationError']),
    ('count = 1\nreturn 2\n', ['line 2', 'SyntaxError']),
    ('count = 1\n\ncount = 1 / 0\n', ['line 3', 'ZeroDivisionError', 'file.py']),
    ('def _f():\n    raise KeyError("deep")\n_f()\n', ['line 2', 'KeyError', 'deep']),
    ('import json\ncount = json.loads("[1,")\n', ['line 2', 'JSONDecodeError']),
    ('count = 1\nimport nonesuch\n', ['line 2', 'ModuleNotFoundError', 'nonesuch']),
    ('raise ValueError("two\\nlines")\n', ['line 1', 'ValueError', 'two', 'lines']),
    ('class _Matrix:\n    def __repr__(self): return "1\\n2"\ncount = _Matrix()\n', ['count', 'int']),
    (b'# one\n# two\n# three\nname = "\xff"\n', ['line 4', 'SyntaxError']),
])
def test_a_wrong_override_file_is_one_line_that_says_where(configured, text, parts):
    """nanoGPT executes whatever a file says and keeps misspelt names, which then do nothing."""
    refused(parts, configured, 'file.py', files={'file.py': text})


@pytest.mark.parametrize('path, parts', [
    ('fiel.py', ["'fiel.py'", "did you mean 'file.py'"]),
    ('elsewhere/file.py', ["'elsewhere/file.py'"]),
    ('.', ["'.'"]),
    ('', ["''"]),
])
def test_a_missing_override_file_names_the_nearest(configured, path, parts):
    """config/train_gtp2.py is not there, and which one is?"""
    refused(parts, configured, path, files={'file.py': ''})


@pytest.mark.parametrize('theirs, ours', [
    ('train_shakespeare_char.py', 'preset_shakespeare_char.py'), ('train_gpt2.py', 'preset_gpt2_owt.py'),
])
def test_a_config_file_of_nanogpt_is_answered_with_ours(configured, theirs, ours):
    """A similar name was suggested, of a config with other settings."""
    refused([theirs, f"config/{ours}'?"], configured, f'config/{theirs}')


@pytest.mark.parametrize('path', [
    'preset_quick_test', 'preset_quick_tset', 'preset_quick_tset.py', 'config/preset_quick_tset',
    'config/preset_quick_tset.py', 'conifg/preset_quick_test.py'])
def test_a_config_file_is_found_without_its_folder_or_extension(monkeypatch, path):
    """Only names that ended in .py had a suggestion, and only from the folder that they named."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="did you mean 'config/preset_quick_test.py'"):
        configure('train.py', argv=[path])


@pytest.mark.parametrize('args', [
    ['--count=9', 'a.py', 'b.py'],
    ['a.py', '--count=9', 'b.py'],
    ['a.py', 'b.py', '--count=9'],
], ids=str)
def test_flags_win_over_files_whatever_the_order(configured, args):
    """A flag before a file, which is how people write it half of the time, must not be undone by the file."""
    files = {'a.py': 'count = 5\nrate = 1.5\nname = "a"\n', 'b.py': 'rate = rate * 2\nname = "b"\n'}
    config, given = configured(*args, files=files)
    # the later file sees and overrides the earlier
    assert config == DEFAULTS | {'count': 9, 'rate': 3.0, 'name': 'b'}
    assert given['count'] == 'on the command line' and 'b.py' in given['rate']


@pytest.mark.parametrize('flag', [
    '--d_model=64',
    '--d-model=64',
    '--d_model',
    '-d_model',
])
def test_the_name_of_another_trainer_is_answered_with_ours(configured, flag):
    """The hint at --d_model was the list of all keys, and that at --gradient_checkpointing another key."""
    script = SCRIPT.replace('width: int', 'n_embd: int')
    refused(['use n_embd'], configured, flag, files={'script.py': script})
    refused(["'d_model'", "in 'a.py'", 'use n_embd'], configured, 'a.py',
            files={'script.py': script, 'a.py': 'd_model = 64'})


@pytest.mark.parametrize('args, hint', [
    (['--flag'], "'--flag': flags are written --key=value, as in --flag=True"),
    (['--mode'], 'as in --mode=True'),
    (['--flag', 'file.py'], 'as in --flag=True'),
    (['--flag', 'False'], "'--flag=False', not '--flag False'"),
    (['--count'], "malformed flag '--count': flags are written --key=value"),
])
def test_a_flag_without_a_value_is_answered_with_the_flag_to_write(configured, args, hint):
    """`--flag file.py` was answered with --flag=file.py, and a bare --flag without an example."""
    refused([hint], configured, *args, files={'file.py': ''})


def test_help_lists_every_key_with_default_and_comment(script):
    """Help text that is written twice is wrong once. Defaults without quotes: --name= and --name=None are unclear."""
    for args in (['--help'], ['-h'], ['--cuont=3', '--help'], ['--help=all']):
        result = script(*args)
        assert result.returncode == 0 and result.stderr == ''
        words = ' '.join(result.stdout.split())
        for line in SCRIPT.splitlines():
            if match := re.match(r"(\w+)(?:: .+?)? = (.+?)  # (.+)", line):
                key, default, comment = match.groups()
                assert (f'--{key}={default} {comment}' in words) == (not key.startswith('_')), key
        assert 'A script with settings.' in words and 'Positive' not in words
        assert "a number or a word (int | 'auto')" in words


GROUPED = '''"""
A script with groups.

    python script.py --out_dir=out

More about it.
"""
alone = 1  # belongs to no group
# A comment of many words.
# I/O
out_dir = 'out'  # a word and a word and a word and a word and a word and a word and a word and a word
log_to = ''  # seldom needed
# model: its sizes
n_layer = 2  # blocks
# a comment inside a group
eps = 1e-5  # seldom needed
config, given = configure(__file__)
'''


@pytest.mark.parametrize('flag, shown', [
    ('--help', 'alone out_dir n_layer'),
    ('--help=', 'alone out_dir n_layer'),
    ('--help=all', 'alone out_dir log_to n_layer eps'),
    ('--help=I/O', 'out_dir log_to'),
    ('--help=model', 'n_layer eps'),
])
def test_help_shows_common_settings_or_a_group_or_all(configured, capsys, monkeypatch, flag, shown):
    """--help was 73 lines of up to 120 columns."""
    monkeypatch.setenv('COLUMNS', '70')
    with pytest.raises(SystemExit) as ended:
        configured(flag, files={'script.py': GROUPED})
    text = capsys.readouterr().out
    assert not ended.value.code and max(map(len, text.splitlines())) <= 70
    assert re.findall(r'^  --(\w+)=', text, flags=re.M) == shown.split()
    assert ('\nmodel: its sizes\n  --n_layer=2 ' in f'\n{text}') == ('n_layer' in shown)
    assert ('    python script.py --out_dir=out\n\n' in text) == ('alone' in shown)
    assert ('More about it.' in text) == (flag == '--help=all')
    assert ('those of a group: I/O, model' in ' '.join(text.split())) == (flag != '--help=all')


def test_an_unknown_group_is_one_line_that_names_the_groups(configured):
    with pytest.raises(UserError) as caught:
        configured('--help=modle', files={'script.py': GROUPED})
    one_line(caught.value, '--help=modle', 'all, I/O, model')


@pytest.mark.parametrize('script', ['train.py', 'data/prepare.py'])
def test_help_ends_well_if_nobody_reads_it(script):
    """`--help | head -3` may print 'Exception ignored ... BrokenPipeError' and end with status 120."""
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([sys.executable, script, '--help'], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE,
                            timeout=HANGS)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b'')


def test_only_rank_0_speaks_and_all_leave(script):
    """Eight ranks that each print the same line, or seven that go on alone."""
    refusal(script('--cuont=7', RANK='0'), 'cuont')
    result = script('--cuont=7', RANK='3')
    assert (result.returncode, result.stdout, result.stderr) == (2, '', '')


def test_a_script_that_is_no_python_is_one_line(tmp_path):
    """compare.py printed a traceback for a slip in train.py, and a judgement ended with the wrong status."""
    (tmp_path / 'train.py').write_text('a = 1\nb = = 2\n')
    with pytest.raises(UserError, match="train.py', line 2: invalid syntax"):
        read_block(tmp_path / 'train.py')
