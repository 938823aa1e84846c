"""
Random command lines, and files with one field changed: python -m pytest -m soak -k fuzz --trials=300
The seed is fixed, so a failure can be repeated. Whatever is given, a script ends within its limit,
with status 0 or with status 2 and one line; it never computes with nonsense.
"""
import copy
import json
import math
import random
import re
import reprlib
import shutil
from pathlib import Path

import pytest
import torch

from configurator import read_block
from conftest import ROOT, TINY, command, succeeded, train

pytestmark = pytest.mark.soak

LIMITS = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
"""  # as `before`: a script that takes all memory or never ends fails instead

BENCH_LIMITS = LIMITS.replace('12 * 2**30', '24 * 2**30')  # two processes of torch.compile map more

NOT_A_NUMBER = ['', 'x', 'nan', 'inf', '-inf', '1e999', '-1e999', '9' * 40, '9' * 5000, '[1]', '{"a": 1}', 'None,',
                '\x1b[2J', '1 2', '--', '=', '-', "__import__('os')", 'lambda: 0']
NUMBERS = ['0', '-1', '1', '2', '3', '7', '0.5', '-0.5', '1e-30', '1e30', '1e308', '2147483647', '2147483648',
           '16777216', '18446744073709551616', 'True', 'None', '0x10', '1_000']
TEXTS = ['', ' ', 'x', '..', '/', '/dev/null', '/nonexistent/x', 'None', 'a:0.5,b', 'a:nan', '\x1b[2J', 'é' * 300,
         '%s%n', 'FILE:/dev/null', 'x.pt', 'README.md', '-', '"', "'; ls", '{}', 'pystdlib:2']
LONG = {'max_iters', 'eval_iters', 'gradient_accumulation_steps', 'num_samples', 'max_new_tokens', 'repeats', 'warmup',
        'prompt_tokens', 'new_tokens', 'accumulation', 'n_layer', 'batch_size', 'block_size', 'search', 'jobs',
        'max_seconds', 'attention_chunk_size', 'seed', 'num_beams'}  # a large legal value takes long
FREE = {'device', 'out_dir', 'init_from', 'dataset', 'start', 'serve'}  # these have tests of their own values


def is_number(setting):
    kinds = {type(choice) for choice in setting.choices()} | {setting.kind} | set(setting.choices())
    return int in kinds or float in kinds


def random_flag(rng, block):
    """Return (flag, whether a script must refuse it)."""
    name = rng.choice([name for name in block if name not in LONG or rng.random() < 0.3])
    setting = block[name]
    if str in (setting.choices() or [setting.kind]):
        return f'--{name}={rng.choice(TEXTS)}', False
    if is_number(setting) and name not in LONG and rng.random() < 0.5:
        return f'--{name}={rng.choice(NUMBERS)}', False
    value = rng.choice(NOT_A_NUMBER)
    return f'--{name}={value}', value not in map(str, setting.choices())


def complaint(done, must_fail=False):
    """Return what is wrong with the way a script ended, or ''."""
    lines = done.stderr.strip().splitlines()
    if 'Traceback' in done.stderr:
        return f'a traceback: {lines[-1]}'
    if done.returncode not in (0, 2):
        return f'status {done.returncode}: {lines[-1:]}'
    if done.returncode == 2 and not (lines and len(lines[-1]) < 1000):
        return f'no short line: {lines[-1:]}'
    if done.returncode == 0 and must_fail:
        return f'accepted: {done.stdout[-200:]!r}'
    if '\x1b' in done.stdout + done.stderr:
        return 'an escape sequence'
    if done.returncode == 0 and re.search(r'\b(nan|inf|Infinity|NaN)\b', done.stdout):
        return f'nonsense in its output: {done.stdout[-300:]!r}'
    return ''


@pytest.fixture
def report():
    """Collect failures, so that one run shows all of them."""
    failures = []
    yield failures
    assert not failures, f'{len(failures)} failures\n' + '\n'.join(failures)


def base_flags(script, text_set, finished, out_dir):
    """Return the flags of a short run of a script, before the random ones."""
    run = f'--out_dir={finished[0]}'
    return {
        'train.py': [*TINY, f'--dataset={text_set}', f'--out_dir={out_dir}', '--max_iters=1'],
        'sample.py': [run, '--num_samples=1', '--max_new_tokens=3', '--device=cpu'],
        'model.py': ['--n_layer=1', '--n_embd=32', '--n_head=2', '--block_size=16', f'--dataset={text_set}'],
        'bench.py': [*TINY, f'--dataset={text_set}', '--repeats=1', '--warmup=1', '--max_seconds=5'],
    }[script]


BLOCKS = {'train.py': ['train.py'], 'sample.py': ['sample.py'], 'model.py': ['engine/describe.py', 'train.py'],
          'bench.py': ['bench.py']}


@pytest.mark.parametrize('script', BLOCKS)
def test_fuzz_command_lines(text_set, finished, tmp_path, trials, report, script):
    """A traceback, or a run with a nonsensical value."""
    rng = random.Random(script)
    block = {name: s for file in BLOCKS[script] for name, s in read_block(str(ROOT / file)).items() if name not in FREE}
    before = {path.name: path.read_bytes() for path in finished[0].iterdir()}
    for trial in trials:
        out_dir = tmp_path / str(trial)
        asked = [random_flag(rng, block) for _ in range(rng.choice([1, 1, 2, 3]))]
        flags = base_flags(script, text_set, finished, out_dir) + [flag for flag, _ in asked]
        done = command(ROOT / script, *flags, cwd=tmp_path, before=BENCH_LIMITS if script == 'bench.py' else LIMITS)
        if problem := complaint(done, any(must_fail for _, must_fail in asked)):
            report.append(f'{script} {[flag[:80] for flag, _ in asked]}: {problem}')
        shutil.rmtree(out_dir, ignore_errors=True)
    assert before == {path.name: path.read_bytes() for path in finished[0].iterdir()}


# one changed field per file

def nest(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


NONSENSE = [None, [], {}, '', 'x', -5, 10 ** 30, math.nan, math.inf, -math.inf, 1e308, True, [1], {'a': 1}, '\x1b[2J',
            '../x', 2 ** 63, 'x' * 10_000]


def places(value, path=()):
    """Yield the paths of all fields in nested dicts and lists, at most five items of each list."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:5]) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def change_field(content, rng, depth=2000):
    """
    Replace one random field of nested dicts and lists, in place, or remove it. Every part of a file
    has the same chance, however large it is. Return a description.
    """
    top = rng.choice(list(content))
    *path, last = rng.choice([(top,), *((top, *path) for path in places(content[top]))])
    holder = content
    for key in path:
        holder = holder[key]
    where = '.'.join(map(str, [*path, last]))
    if rng.random() < 0.1:
        del holder[last]
        return f'{where} removed'
    value = copy.deepcopy(rng.choice(NONSENSE))
    if type(value) is type(holder[last]) and value == holder[last]:
        value = nest(depth)
    holder[last] = value
    return f'{where} = {reprlib.repr(value)}'  # which is short, and not as deep as the value


def change_json(path, rng):
    content = json.loads(path.read_text())
    what = change_field(content, rng)
    path.write_text(json.dumps(content))
    return what


def test_fuzz_fields_of_meta_json(text_set, tmp_path, trials, report):
    """A field of a data set's meta.json became a traceback or another vocabulary."""
    rng = random.Random(1)
    for trial in trials:
        folder = tmp_path / f'set{trial}'
        shutil.copytree(text_set, folder)
        what = change_json(folder / 'meta.json', rng)
        done = train(folder, tmp_path / f'out{trial}', '--max_iters=1', before=LIMITS)
        if problem := complaint(done):
            report.append(f'{what}: {problem}')


def change_checkpoint(path, rng):
    """Replace a tensor of the model by one of another kind, or change any other field."""
    content = torch.load(path, weights_only=True)
    weights = content.pop('model')
    if rng.random() < 0.25:
        name, kind = rng.choice(list(weights)), rng.randrange(8)
        t = weights[name]
        weights[name] = [t * math.nan, t.to_sparse(), t.to('meta'), t[:1], t.double(), t.long(), t.to(torch.complex64),
                         t[None]][kind]
        content.pop('checksums')  # as somebody who changes a tensor would
        what = f'model.{name}, kind {kind}'
    else:
        what = change_field(content, rng, depth=100)  # torch.save cannot write deeper ones
    torch.save({'model': weights} | content, path)
    return what


def test_fuzz_fields_of_checkpoints(text_set, finished, tmp_path, trials, report):
    """A checkpoint with a field of another type became a traceback, or a sample of nonsense."""
    rng = random.Random(2)
    readers = {
        'sample': lambda out: command('sample.py', f'--out_dir={out}', '--num_samples=1', '--max_new_tokens=8',
                                      '--device=cpu', before=LIMITS),
        'resume': lambda out: train(text_set, out, '--init_from=resume', '--max_iters=21', before=LIMITS),
        'resume, fp16': lambda out: train(text_set, out, '--init_from=resume', '--max_iters=21', '--dtype=float16',
                                          before=LIMITS),
        'fine-tune': lambda out: train(text_set, f'{out}-tuned', f'--init_from={out}', '--max_iters=1', before=LIMITS),
        'evaluate': lambda out: command('train.py', '--eval_only=True', '--init_from=resume', f'--out_dir={out}',
                                        '--device=cpu', f'--dataset={text_set}', before=LIMITS),
        'inspect': lambda out: command('model.py', f'--ckpt={out}', before=LIMITS),
    }
    for trial in trials:
        out_dir = tmp_path / str(trial)
        out_dir.mkdir()
        shutil.copy(finished[0] / 'ckpt.pt', out_dir)
        what, reader = change_checkpoint(out_dir / 'ckpt.pt', rng), rng.choice(list(readers))
        done = readers[reader](out_dir)
        # `inspect` lists the settings as they are
        listed = reader == 'inspect' and what.startswith('config.') and done.returncode == 0
        if problem := '' if listed else complaint(done):
            report.append(f'{reader}, {what}: {problem}')
        shutil.rmtree(out_dir)


def test_fuzz_fields_of_run_logs(text_set, finished, tmp_path, trials, report):
    """A field of a run log became a traceback in compare.py, or +nan in its table."""
    pytest.importorskip('scipy')
    pytest.importorskip('matplotlib')
    rng = random.Random(3)
    other = tmp_path / 'other'
    succeeded(train(text_set, other, '--normalization=rmsnorm'))
    for trial in trials:
        folder = tmp_path / f'run{trial}'
        folder.mkdir()
        for path in finished[0].glob('run_*.json'):
            shutil.copy(path, folder)
        what = change_json(next(folder.glob('run_*.json')), rng)
        done = command('compare.py', folder, other, f'--out_dir={tmp_path / f"cmp{trial}"}')
        named = what.startswith('config.') and done.returncode == 0  # a setting that differs names its row
        if problem := '' if named else complaint(done):
            report.append(f'{what}: {problem}')


def test_fuzz_fields_of_config_json(finished, tmp_path, trials, report):
    """A field of a Hugging Face folder's config.json became a traceback or another model."""
    pytest.importorskip('safetensors')
    pytest.importorskip('tokenizers')
    rng, original = random.Random(4), tmp_path / 'hf'
    succeeded(command('model.py', f'--ckpt={finished[0]}', f'--export={original}'))
    for trial in trials:
        folder = tmp_path / str(trial)
        shutil.copytree(original, folder)
        what = change_json(folder / rng.choice(['config.json', 'config.json', 'tokenizer_config.json']), rng)
        done = command('sample.py', f'--init_from={folder}', '--num_samples=1', '--max_new_tokens=4', '--device=cpu',
                       f'--out_dir={tmp_path}', before=LIMITS)
        if problem := complaint(done):
            report.append(f'{what}: {problem}')
        shutil.rmtree(folder)


LINES = ['1 +', '[]', '{}', 'print', '1/0', 'object()', '...', 'lambda: 0', "b'x'"]


def test_fuzz_override_files(text_set, tmp_path, trials, report):
    """A line of nonsense in a config file."""
    rng, block = random.Random(5), read_block(str(ROOT / 'train.py'))
    for trial in trials:
        name = rng.choice([name for name in block if name not in LONG])
        path = Path(tmp_path / f'{trial}.py')
        path.write_text(f'{name} = {rng.choice(LINES)}\n')
        done = command(ROOT / 'train.py', path, *TINY, f'--dataset={text_set}', f'--out_dir={tmp_path / "out"}',
                       '--max_iters=1', before=LIMITS)
        if problem := complaint(done, must_fail=True):
            report.append(f'{path.read_text()}: {problem}')
