"""What is read from files: its structure, control characters in it, links in place of files."""
import json
import math
import os

import pytest

from engine.common import UserError, create, printable, replacing, try_lock
from engine.schema import check, read_json

SCHEMA = {'name': str, 'n': int, 'x': float, 'losses?': [float], 'inner?': {'best': (float, None)}}
GOOD = dict(name='a', n=3, x=1, losses=[1.0, 2], inner={'best': None}, other=[])


@pytest.mark.parametrize('field, value, message', [
    ('n', 10 ** 30, "n must be an integer of 0 or more, not 1000000000000000000000000000000"),
    ('n', -1, 'n must be'),
    ('n', True, 'n must be'),
    ('n', '3', "n must be an integer of 0 or more, not '3'"),
    ('x', math.nan, 'x must be a finite number, not nan'),
    ('x', 10 ** 30, 'x must be a finite number'),
    ('x', 10 ** 400, 'x must be a finite number'),
    ('x', None, 'x must be'),
    ('name', ['a'], 'name must be a text'),
    ('losses', {}, 'losses must be a list'),
    ('losses', [1.0, math.inf], r'losses\[1\] must be a finite number, not inf'),
    ('inner', 7, 'inner must be a dict'),
    ('inner', {}, "inner has no 'best'"),
    ('inner', {'best': 'low'}, 'inner.best must be a finite number or None'),
])
def test_a_wrong_field_is_named(field, value, message):
    """Nonsense from a file that became a figure or a traceback."""
    check(GOOD, SCHEMA)
    with pytest.raises(ValueError, match=message):
        check(GOOD | {field: value}, SCHEMA)


@pytest.mark.parametrize('text', ['', '[]', 'null', '{"name": ', '[' * 100_000, '{"n": 1' + '0' * 5000 + '}'])
def test_a_damaged_json_file_is_one_line(tmp_path, text):
    path = tmp_path / 'meta.json'
    path.write_text(text)
    with pytest.raises(UserError, match='meta.json'):
        read_json(path, SCHEMA)
    path.write_text(json.dumps(GOOD))
    assert read_json(path, SCHEMA) == GOOD


def test_control_characters_are_escaped():
    """A sample with ESC in it that cleared the screen."""
    assert printable('a\tb\nc é 中 👩‍🔬') == 'a\tb\nc é 中 👩‍🔬'
    assert printable('\x1b[2J\r\x9b\x7f\0\u202e') == r'\x1b[2J\r\x9b\x7f\x00\u202e'


def test_nothing_is_written_through_a_link(tmp_path):
    """A link planted under a temporary name, or as the lock, through which another file was overwritten."""
    target = tmp_path / 'precious'
    for name in ('new', 'file.tmp', 'lock'):
        target.write_text('keep')
        os.symlink(target, tmp_path / name)
    with create(tmp_path / 'new', 'w') as f:
        f.write('text')
    with replacing(tmp_path / 'file', 'w') as f:
        f.write('text')
    with pytest.raises(UserError, match='plain file'):
        try_lock(tmp_path / 'lock', 'me')
    assert target.read_text() == 'keep' and (tmp_path / 'file').read_text() == 'text'


def test_a_lock_that_is_a_pipe_is_refused(tmp_path):
    """Opening it waited for a reader for ever."""
    os.mkfifo(tmp_path / 'lock')
    with pytest.raises(UserError, match='plain file'):
        try_lock(tmp_path / 'lock', 'me')
