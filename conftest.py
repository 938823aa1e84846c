"""
Helpers and fixtures for several test files.

Tests of whole runs start the real scripts with tiny models: train() runs train.py to its end, and
`finished`, `modes` and `sharded` are runs that many tests read or copy, but never write to.
Soak tests take minutes and are left out by default: python -m pytest -m soak --trials=20
"""
import functools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.folder import read_meta, write_dataset
from data.tokenizer import get_tokenizer, train_bpe
from tests import warm
from tests.warm import HANGS

ROOT = Path(__file__).resolve().parent
BYTE = {'vocab_size': 256, 'tokenizer': {'name': 'byte'}}


def pytest_addoption(parser):
    parser.addoption('--trials', type=int, default=20, help='repetitions in each soak test')


def pytest_configure(config):
    for name in ('SIGINT', 'SIGHUP'):  # nohup and & ignore these, and the runs under test would inherit that
        if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.SIG_DFL)


# starting scripts

PYTHON = (sys.executable,)
TORCHRUN = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
LIMITED = 'ulimit -{} {}; exec "$0" "$@"'  # for a launcher: 'bash', '-c', LIMITED.format(what, limit), *PYTHON
SMALL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
"""  # as `before`: no file can grow beyond 100 kB
LIMIT_DATA = """
import resource
from engine.machine import read_sizes
limit = read_sizes('/proc/self/status')['VmData'] + {megabytes} * 10 ** 6
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
"""
READ_AT_START = 'PYTHON', 'MALLOC'  # variables that have no effect once Python runs


def limit_data(megabytes):
    """Code for `before`: the memory of a process may grow by so much beyond its imports. Only Linux has this limit."""
    return LIMIT_DATA.format(megabytes=megabytes)


def missing(module):
    """Code for `before`: importing this module fails as if it were not installed."""
    return f'import sys; sys.modules[{module!r}] = None'


def command(script, *flags, cwd=ROOT, env=None, processes=1, before='', launcher=None, text=True):
    """
    Run a script to its end, in as many processes as torchrun would start. tests/warm.py starts it
    fast; a `launcher` starts it in earnest, for tests in which the start matters. `before` is Python
    code that every process runs first, to inject a fault.
    """
    argv, added = [str(script), *map(str, flags)], env or {}
    env = os.environ | {'OMP_NUM_THREADS': '1'} | added
    if launcher is None and any(name.startswith(READ_AT_START) for name in added):
        launcher = PYTHON
    if launcher is None:
        return warm.run(argv, cwd, env, processes, before, text)
    assert processes == 1 and not before, 'only tests/warm.py knows these'
    return subprocess.run([*launcher, *argv], cwd=cwd, env=env, capture_output=True, text=text, timeout=HANGS)


TINY = """
    --n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --dropout=0.1
    --batch_size=4 --gradient_accumulation_steps=2 --max_iters=20
    --learning_rate=1e-3 --min_lr=1e-4 --lr_decay_iters=20 --warmup_iters=2
    --eval_interval=100 --eval_iters=2 --sample_interval=0
    --device=cpu --dtype=float32 --compile=False --peak_tflops=1
""".split()
MUON = '--optimizer=muon', '--arch_preset=modern', '--muon_learning_rate=0.03', '--muon_momentum=0.9'


def train(dataset, out_dir, *flags, **kwargs):
    """Run train.py with a tiny model to its end; kwargs are those of command()."""
    script = ROOT / 'train.py' if 'cwd' in kwargs else 'train.py'
    return command(script, *TINY, f'--dataset={dataset}', f'--out_dir={out_dir}', *flags, **kwargs)


def begin(dataset, out_dir, *flags, launcher=PYTHON, env=None, **kwargs):
    """Start train.py with a tiny model and return the process, whose pid and group are its own."""
    return subprocess.Popen([*launcher, 'train.py', *TINY, f'--dataset={dataset}', f'--out_dir={out_dir}', *flags],
                            cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'} | (env or {}), start_new_session=True,
                            **{'stdout': subprocess.PIPE, 'stderr': subprocess.DEVNULL, 'text': True} | kwargs)


def start(dataset, out_dir, *flags, launcher=PYTHON):
    """Start an endless run and return its process after the first iteration whose number ends in 5."""
    process = begin(dataset, out_dir, '--max_iters=1000000', *flags, launcher=launcher)
    assert any(re.match(r'iter \d*5 ', line) for line in process.stdout)
    return process


def at_start(folder, code):
    """
    Variables of the environment with which each Python runs this code first. It can let a process hang where a test
    needs it, however busy the machine is.
    """
    (folder / 'sitecustomize.py').write_text(code)
    return {'PYTHONPATH': str(folder)}


HANG_ONCE_WRITTEN = """
import os, time

hung = os.path.join(os.path.dirname(__file__), 'hung')

def sync(fd, fsync=os.fsync):
    fsync(fd)
    if os.readlink(f'/proc/self/fd/{{fd}}').endswith({end!r}) and not os.path.exists(hung):
        open(hung, 'w').close()
        time.sleep(1e6)

os.fsync = sync
"""


def hang_once_written(end):
    """
    Code for at_start(folder): a process hangs when it has written a file whose name has this ending, as folder/hung
    shows. Only then is a signal sure to meet it there.
    """
    return HANG_ONCE_WRITTEN.format(end=end)


def wait_until(condition, process=None):
    """Return condition() once it is true. It has to become so before this process ends."""
    deadline = time.time() + HANGS
    while not (found := condition()):
        assert time.time() < deadline and (process is None or process.poll() is None)
        time.sleep(0.02)
    return found


def children(pid):
    """The pids of all processes under pid."""
    found = []
    for path in Path(f'/proc/{pid}/task').glob('*/children'):
        for child in map(int, path.read_text().split()):
            found += [child, *children(child)]
    return found


def works(pid):
    """Whether a process exists and is not only waiting to be collected."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


def wait_for_end(pids):
    wait_until(lambda: not any(map(works, pids)))


# parallel modes

MODES = {'one': (1, []), 'ddp': (2, []), 'zero1': (2, ['--use_zero1=True']), 'fsdp': (2, ['--use_fsdp=True'])}
HYBRID = 4, ['--use_fsdp=True', '--fsdp_shard_size=2',
             '--batch_size=1', '--gradient_accumulation_steps=8', '--eval_iters=8']  # the same windows
PARALLEL_MODES = [mode for mode in MODES if mode != 'one']


def launcher_of(mode):
    """What starts a run of this mode in earnest."""
    return PYTHON if mode == 'one' else TORCHRUN


def train_mode(mode, dataset, out_dir, *flags, **kwargs):
    """train() in a mode of MODES, without dropout, whose random numbers differ between numbers of processes."""
    processes, mode_flags = HYBRID if mode == 'hybrid' else MODES[mode]
    if kwargs.get('launcher'):
        processes = 1
    return train(dataset, out_dir, '--dropout=0.0', *mode_flags, *flags, processes=processes, **kwargs)


# what a run leaves behind

def checkpoint(out_dir, name='ckpt.pt'):
    return torch.load(Path(out_dir) / name, weights_only=True)


def run_logs(out_dir):
    """The run logs in out_dir, oldest first."""
    return [json.loads(path.read_text()) for path in sorted(Path(out_dir).glob('run_*.json'))]


def losses(out_dir):
    """{iteration: training loss}, from all run logs in out_dir."""
    return {entry['iter']: entry['loss'] for run in run_logs(out_dir) for entry in run['training_iterations']}


def losses_from(out_dir, first):
    """{iteration: training loss} of the iterations from `first` on."""
    return {it: loss for it, loss in losses(out_dir).items() if it >= first}


def contents(out_dir):
    """{name: bytes} of the checkpoint files in out_dir."""
    return {path.name: path.read_bytes() for path in Path(out_dir).glob('*.pt*')}


def copy_run(out_dir, to, name='ckpt.pt'):
    """A new out_dir with one checkpoint of another, as its ckpt.pt."""
    to.mkdir()
    (to / 'ckpt.pt').write_bytes((out_dir / name).read_bytes())
    return to


def copy_sharded(out_dir, to, name='ckpt_sharded_prev'):
    """A new out_dir with one sharded checkpoint of another, as its ckpt_sharded."""
    shutil.copytree(out_dir / name, to / 'ckpt_sharded')
    return to


def rewrite(path, change):
    """Replace a file's bytes by change(bytes)."""
    path.write_bytes(change(path.read_bytes()))


def flip_bit(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]


# assertions

def one_line(message, *parts):
    """A message is a single line that has these parts."""
    text = str(message)
    assert '\n' not in text.strip() and all(str(part) in text for part in parts), text


def succeeded(done, *words):
    """A command ended well and its output has these words."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert all(str(word) in done.stdout for word in words), done.stdout


def refused(done, *words):
    """A command ended with status 2 and one line with these words."""
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stdout + done.stderr
    one_line(done.stderr, *words)


def assert_equal_states(a, b):
    """Two checkpoints have the same iteration, weights and moments, bit for bit."""
    assert a['iter_num'] == b['iter_num'] and a['model'].keys() == b['model'].keys()
    for name, tensor in a['model'].items():
        assert torch.equal(tensor, b['model'][name]) and not b['model'][name].requires_grad, name
    assert a['optimizer']['state'].keys() == b['optimizer']['state'].keys()
    for i, state in a['optimizer']['state'].items():
        for key, value in state.items():
            assert torch.equal(value, b['optimizer']['state'][i][key]), (i, key)


def assert_finite_checkpoints(out_dir):
    """No checkpoint file in out_dir has a weight that is not finite."""
    for path in Path(out_dir).glob('*.pt'):
        weights = checkpoint(out_dir, path.name)['model']
        assert all(tensor.isfinite().all() for tensor in weights.values()), path


# runs that many tests share

@pytest.fixture(scope='session')
def text_set(tmp_path_factory):
    """A data set of bytes from which a tiny model can learn something."""
    folder = tmp_path_factory.mktemp('text')
    text = ''.join(f'line {i} says {i * i % 97}\n' for i in range(900)).encode()
    write_dataset(folder, {'train': text[:12000], 'val': text[12000:]}, BYTE)
    return folder


@pytest.fixture(scope='session')
def finished(text_set, tmp_path_factory):
    """(out_dir, console) of a run of 20 iterations, with checkpoints at 10 (ckpt_prev.pt) and 20 (ckpt.pt)."""
    out_dir = tmp_path_factory.mktemp('runs') / 'out'
    flags = '--save_interval=10', '--sample_interval=1', '--gradient_log_interval=5', '--verbose=True'
    done = train(text_set, out_dir, *flags)
    succeeded(done)
    return out_dir, done.stdout


@pytest.fixture(scope='session')
def modes(text_set, tmp_path_factory):
    """
    modes(mode): (out_dir, console) of the same 20 iterations in that mode, with checkpoints at 10
    (ckpt_prev.pt) and 20 (ckpt.pt). modes(mode, '--some=flag'): with that flag.
    """
    @functools.cache
    def run(mode, *flags):
        out_dir = tmp_path_factory.mktemp(mode) / 'out'
        done = train_mode(mode, text_set, out_dir, '--save_interval=10', '--gradient_log_interval=2', *flags)
        succeeded(done)
        return out_dir, done.stdout
    return run


@pytest.fixture(scope='session')
def sharded(modes):
    """sharded(mode): out_dir of the run of `modes` with sharded checkpoints."""
    return lambda mode: modes(mode, '--sharded_checkpoint=True')[0]


@pytest.fixture
def trials(request):
    return range(request.config.getoption('--trials'))


# files to read

class Bomb:
    """Unpickling one creates the folder Bomb.path."""
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def llmc_shard(n_tokens, version=1, says=None):
    """The bytes of a file as llm.c writes it, of ids 0, 1, 2, ...; `says`: the number of tokens in its header."""
    header = np.zeros(256, '<i4')
    header[:3] = 20240520, version, n_tokens if says is None else says
    return header.tobytes() + np.arange(n_tokens, dtype='<u2').tobytes()


def ids_of(folder, split):
    """All ids of a prepared split, shard after shard."""
    dtype = np.dtype(read_meta(folder)['dtype']).newbyteorder('<')
    return np.concatenate([np.fromfile(path, dtype) for path in sorted(Path(folder).glob(f'{split}_*.bin'))]).tolist()


def shards(folder):
    """{name: bytes} of the shards in a data set."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob('*.bin'))}


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / 'text.txt'
    path.write_bytes('Où sont les neiges d’antan?\r\n'.encode() * 40)
    return path


TEXTS = ['', 'First Citizen:\n', 'naïve café', '👩‍🚀 \U0001f9d1🏽', '\0\x01\t\r\n\x7f\u2028', 'ﷺ 漢字 ' * 3]
DOCUMENTS = [f'{text} document {n}\nwith <|endoftext|> in it{"." * (n % 7)}\n' for n, text in enumerate(TEXTS * 10)]


# tokenizers

def tokenizer_named(name):
    if name == 'char':
        return get_tokenizer({'name': 'char', 'chars': sorted(set(''.join(TEXTS)))})
    if name == 'bpe':
        pytest.importorskip('tokenizers')
        return train_bpe([some_text()], 400)
    if 'llama' in name:
        pytest.importorskip('tokenizers')
        model = llama3_json() if 'llama 3' in name else llama_json('metaspace' in name)
        return get_tokenizer({'name': 'huggingface', 'json': model})
    try:
        return get_tokenizer(name)
    except ValueError as e:
        pytest.skip(str(e))


def some_text():
    """English of a kind, for a tokenizer to learn from."""
    return Path(__file__).read_text(encoding='utf-8')[:20000]


def llama_json(metaspace=False):
    """
    A tokenizer.json as LLaMA 2 has it: not byte-level, spaces as U+2581 and one before the text,
    bytes outside the vocabulary as <0xNN>.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    reader = Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
    if metaspace:
        reader.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
    else:
        marked_spaces = [normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')]
        reader.normalizer = normalizers.Sequence(marked_spaces)
    reader.decoder = decoders.Sequence([
        decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    special = ['<unk>', '<s>', '</s>'] + [f'<0x{byte:02X}>' for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    reader.train_from_iterator(['the cat sat on the mat. In the end, all is well'.split(' ')] * 9, trainer)
    config = json.loads(reader.to_str())
    config['added_tokens'] = config['added_tokens'][:3]  # in LLaMA's file the bytes are ordinary tokens
    return json.dumps(config)


def llama3_json():
    """A tokenizer.json as LLaMA 3 has it: split by a regular expression, then byte-level, whole words before merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    words = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    reader = Tokenizer(models.BPE(ignore_merges=True))
    reader.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, 'isolated'), pre_tokenizers.ByteLevel(False, use_regex=False)])
    reader.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=['<|end_of_text|>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    reader.train_from_iterator([some_text()], trainer)
    return reader.to_str()

# data

@pytest.fixture
def prepare(monkeypatch, capsys):
    """prepare(script, *flags): run a prepare.py in this process; returns what subprocess.run() would."""
    def run(script, *flags):
        monkeypatch.setattr(sys, 'argv', [str(ROOT / script), *map(str, flags)])
        monkeypatch.setattr(sys, 'excepthook', sys.__excepthook__)
        capsys.readouterr()
        status = 0
        try:
            try:
                runpy.run_path(sys.argv[0], run_name='__main__')
            except Exception as e:
                status = 1
                sys.excepthook(type(e), e, e.__traceback__)  # as the interpreter does at the end of a script
        except SystemExit as e:
            status = e.code or 0
        return subprocess.CompletedProcess(sys.argv, status, *capsys.readouterr())
    return run
