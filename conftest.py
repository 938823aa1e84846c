"""Helpers and fixtures of all tests, and the long ones, which a plain run leaves out: python -m pytest -m soak --trials=20"""
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import read_meta, write_dataset
from data.tokenizer import get_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parent
BYTE = {'vocab_size': 256, 'tokenizer': {'name': 'byte'}}


def pytest_addoption(parser):
    parser.addoption('--trials', type=int, default=20, help='times that each soak test tries what it tries')


def pytest_configure(config):
    config.addinivalue_line('markers', 'soak: takes minutes and is left out, unless asked for by -m soak')
    config.option.markexpr = config.option.markexpr or 'not soak'
    for name in ('SIGINT', 'SIGHUP'):  # what nohup and a shell's & ignore, the runs that are tested would too
        if signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.SIG_DFL)


def one_line(message, *parts):
    text = str(message)
    assert '\n' not in text.strip() and all(str(part) in text for part in parts), text


# whole runs, through the command line

TINY = ('--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 --gradient_accumulation_steps=2 --dropout=0.1 --max_iters=20 '
        '--lr_decay_iters=20 --warmup_iters=2 --eval_interval=100 --eval_iters=2 --learning_rate=1e-3 --min_lr=1e-4 '
        '--sample_interval=0 --device=cpu --dtype=float32 --compile=False --peak_tflops=1').split()


@pytest.fixture(scope='session')
def text_set(tmp_path_factory):
    """A data set of bytes that a tiny model can learn something of."""
    folder = tmp_path_factory.mktemp('text')
    text = ''.join(f'line {i} says {i * i % 97}\n' for i in range(900)).encode()
    write_dataset(folder, {'train': text[:12000], 'val': text[12000:]}, BYTE)
    return folder


def command(script, *flags, cwd=ROOT, env=None, launcher=(sys.executable,), text=True):
    return subprocess.run([*launcher, script, *map(str, flags)], cwd=cwd, env=os.environ | {'OMP_NUM_THREADS': '1'} | (env or {}),
                          capture_output=True, text=text, timeout=300)


TORCHRUN = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')


def train(text_set, out_dir, *flags, **kwargs):
    return command('train.py', *TINY, f'--dataset={text_set}', f'--out_dir={out_dir}', *flags, **kwargs)


def start(text_set, out_dir, *flags, launcher=(sys.executable,)):
    """A run that ends only when it is told to, at the first of its iterations that ends in 5."""
    process = subprocess.Popen([*launcher, 'train.py', *TINY, f'--dataset={text_set}', f'--out_dir={out_dir}', '--max_iters=1000000', *flags], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert any(re.match(r'iter \d*5 ', line) for line in process.stdout)
    return process


def checkpoint(out_dir, name='ckpt.pt'):
    return torch.load(Path(out_dir) / name, weights_only=True)


def run_logs(out_dir):
    return [json.loads(p.read_text()) for p in sorted(Path(out_dir).glob('run_*.json'))]


def losses(out_dir):
    return {e['iter']: e['loss'] for run in run_logs(out_dir) for e in run['training_iterations']}


def assert_equal_states(a, b):
    assert a['iter_num'] == b['iter_num'] and a['model'].keys() == b['model'].keys()
    for name, tensor in a['model'].items():
        assert torch.equal(tensor, b['model'][name]) and not b['model'][name].requires_grad, name
    for i, state in a['optimizer']['state'].items():
        for key, value in state.items():
            assert torch.equal(value, b['optimizer']['state'][i][key]), (i, key)


@pytest.fixture(scope='session')
def finished(text_set, tmp_path_factory):
    """A run of 20 iterations, with checkpoints at 10 (ckpt_prev.pt) and 20 (ckpt.pt)."""
    out_dir = tmp_path_factory.mktemp('runs') / 'out'
    done = train(text_set, out_dir, '--save_interval=10', '--sample_interval=1', '--gradient_log_interval=5')
    assert done.returncode == 0, done.stderr
    return out_dir, done.stdout


def copy_run(out_dir, to, name='ckpt.pt'):
    to.mkdir()
    (to / 'ckpt.pt').write_bytes((out_dir / name).read_bytes())
    return to


MODES = {'one': ((sys.executable,), []), 'ddp': (TORCHRUN, []), 'zero1': (TORCHRUN, ['--use_zero1=True']), 'fsdp': (TORCHRUN, ['--use_fsdp=True'])}  # launcher, flags


def train_mode(mode, text_set, out_dir, *flags, **kwargs):
    """Dropout 0, because it is drawn a rank and not a sequence."""
    launcher, more = MODES[mode]
    return train(text_set, out_dir, '--dropout=0.0', *more, *flags, launcher=launcher, **kwargs)


@pytest.fixture(scope='session')
def modes(text_set, tmp_path_factory):
    """{mode: (out_dir, console)} of the same 20 iterations by one process and by two in every mode, with checkpoints at 10 and 20."""
    out = {}
    for mode in MODES:
        folder = tmp_path_factory.mktemp(mode) / 'out'
        done = train_mode(mode, text_set, folder, '--save_interval=10', '--gradient_log_interval=2')
        assert done.returncode == 0, (mode, done.stderr[-3000:])
        out[mode] = folder, done.stdout
    return out


def copy_sharded(out_dir, to, name='ckpt_sharded_prev'):
    shutil.copytree(out_dir / name, to / 'ckpt_sharded')
    return to


@pytest.fixture(scope='session')
def sharded(text_set, tmp_path_factory):
    """{mode: out_dir} of the run of `modes` with sharded checkpoints."""
    out = {}
    for mode in ('zero1', 'fsdp'):
        out[mode] = tmp_path_factory.mktemp(mode) / 'out'
        done = train_mode(mode, text_set, out[mode], '--save_interval=10', '--sharded_checkpoint=True')
        assert done.returncode == 0 and not list(out[mode].glob('*.tmp')), done.stderr[-3000:]
    return out


def refused(done, *words):
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stdout + done.stderr
    one_line(done.stderr, *words)


def contents(out_dir):
    return {path.name: path.read_bytes() for path in Path(out_dir).glob('*.pt*')}


# the soak: python -m pytest -m soak --trials=20

@pytest.fixture
def trials(request):
    return range(request.config.getoption('--trials'))


def children(pid):
    """All processes under pid."""
    found = [int(child) for path in Path(f'/proc/{pid}/task').glob('*/children') for child in path.read_text().split()]
    return found + [grandchild for child in found for grandchild in children(child)]


def rewrite(path, change):
    path.write_bytes(change(path.read_bytes()))


def llmc_shard(n_tokens, version=1, says=None):
    header = np.zeros(256, '<i4')
    header[:3] = 20240520, version, n_tokens if says is None else says
    return header.tobytes() + np.arange(n_tokens, dtype='<u2').tobytes()


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


TEXTS = ['', 'First Citizen:\n', 'naïve café', '👩‍🚀 \U0001f9d1🏽', '\0\x01\t\r\n\x7f\u2028', 'ﷺ 漢字 ' * 3]


def llama_json(metaspace=False):
    """A tokenizer.json of LLaMA 2's kind: no byte-level, spaces as U+2581, one before the text, bytes outside the vocabulary as <0xNN>."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )
    reader = Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
    if metaspace:
        reader.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
    else:
        reader.normalizer = normalizers.Sequence([normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')])
    reader.decoder = decoders.Sequence([decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    reader.train_from_iterator(['the cat sat on the mat. In the end, all is well'.split(' ')] * 9, trainers.BpeTrainer(
        vocab_size=320, special_tokens=['<unk>', '<s>', '</s>'] + [f'<0x{b:02X}>' for b in range(256)], show_progress=False))
    config = json.loads(reader.to_str())
    config['added_tokens'] = config['added_tokens'][:3]  # in LLaMA's file the bytes are ordinary tokens
    return json.dumps(config)


def llama3_json():
    """A tokenizer.json of LLaMA 3's kind: words by a regular expression, then byte-level, whole words before merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    reader = Tokenizer(models.BPE(ignore_merges=True))
    reader.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), 'isolated'), pre_tokenizers.ByteLevel(False, use_regex=False)])
    reader.decoder = decoders.ByteLevel()
    reader.train_from_iterator([Path(__file__).read_text(encoding='utf-8')[:20000]], trainers.BpeTrainer(
        vocab_size=400, special_tokens=['<|end_of_text|>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return reader.to_str()


def tokenizer_named(name):
    if name == 'char':
        return get_tokenizer({'name': 'char', 'chars': sorted(set(''.join(TEXTS)))})
    if name == 'bpe':
        pytest.importorskip('tokenizers')
        return train_bpe([Path(__file__).read_text(encoding='utf-8')[:20000]], 400)
    if 'llama' in name:
        pytest.importorskip('tokenizers')
        if 'llama 3' in name:
            return get_tokenizer({'name': 'huggingface', 'json': llama3_json()})
        return get_tokenizer({'name': 'huggingface', 'json': llama_json('metaspace' in name)})
    try:
        return get_tokenizer(name)
    except ValueError as e:
        pytest.skip(str(e))


MUON = '--optimizer=muon', '--arch_preset=modern', '--muon_learning_rate=0.03', '--muon_momentum=0.9'


LIMITED = 'ulimit -{} {}; exec "$0" "$@"'


DOCUMENTS = [f'{text} document {n}\nwith <|endoftext|> in it' + '.' * (n % 7) + '\n' for n, text in enumerate(TEXTS * 10)]


def ids_of(folder, split):
    meta = read_meta(folder)
    return np.concatenate([np.fromfile(path, f"<u{int(meta['dtype'][4:]) // 8}") for path in sorted(Path(folder).glob(f'{split}_*.bin'))]).tolist()


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob('*.bin'))}


def logged(out_dir):
    """{iteration: {name: number}} of the run log."""
    log, steps = run_logs(out_dir)[-1], {}
    for entry in log['eval_steps'] + log['training_iterations']:
        steps.setdefault(entry['iter'], {}).update(numbers(entry))
    assert {'loss', 'lr', 'val/loss', 'train/loss', 'val/bits_per_byte', 'gradients/norm', 'gradients/layers/wte', 'mfu/mfu_percent', 'memory/peak'} <= steps[0].keys()
    return steps


def numbers(entry, prefix=''):
    for key, value in entry.items():
        yield from numbers(value, f'{prefix}{key}/') if isinstance(value, dict) else [(prefix + key, value)] * isinstance(value, (int, float))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / 'text.txt'
    path.write_bytes('Où sont les neiges d’antan?\r\n'.encode() * 40)
    return path


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
