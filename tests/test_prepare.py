"""data/prepare.py and the small data sets: python -m pytest tests/test_prepare.py"""
import functools
import gzip
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

import numpy as np
import pytest

from conftest import (
    DOCUMENTS,
    LIMITED,
    PYTHON,
    ROOT,
    at_start,
    children,
    command,
    flip_bit,
    hang_once_written,
    ids_of,
    llama_json,
    one_line,
    refused,
    shards,
    tokenizer_named,
    wait_for_end,
    wait_until,
)
from data.documents import KINDS, Item, Kind, find_sources
from data.folder import read_meta
from data.loader import Loader
from data.parts import Join, Part
from data.prepare import Preparation
from data.tokenizer import get_tokenizer
from engine.common import try_lock
from tests.warm import HANGS

T = 8  # block_size of the loader tests
BYTE = '--tokenizer=byte'


# the small data sets

def prepare_set(prepare, name, out, *flags):
    done = prepare(f'data/{name}/prepare.py', f'--out_dir={out}', *flags)
    assert done.returncode == 0, done.stderr
    return read_meta(out)


def test_shakespeare_char_gives_nanogpts_ids(prepare, tmp_path, text_file):
    """Split by characters and sorted vocabulary are nanoGPT's, so its checkpoints keep their meaning."""
    meta = prepare_set(prepare, 'shakespeare_char', tmp_path, f'--input={text_file}')
    text = text_file.read_text(encoding='utf-8')
    chars, cut = sorted(set(text)), int(len(text) * 0.9)
    for name, part in [('train.bin', text[:cut]), ('val.bin', text[cut:])]:
        assert np.fromfile(tmp_path / name, '<u2').tolist() == [chars.index(c) for c in part]
    assert meta['tokenizer'] == {'name': 'char', 'chars': ''.join(chars)}
    assert Loader(tmp_path, 'val', T).n_windows > 0


def test_shakespeare_gives_nanogpts_ids(prepare, tmp_path, text_file):
    """nanoGPT encodes the literal <|endoftext|> of a corpus as ordinary text."""
    tokenizer_named('gpt2')
    text = 'To be<|endoftext|>\n' * 40
    text_file.write_text(text, encoding='utf-8')
    prepare_set(prepare, 'shakespeare', tmp_path, f'--input={text_file}')
    ids = get_tokenizer('gpt2').encoding.encode_ordinary(text[:int(len(text) * 0.9)])
    assert np.fromfile(tmp_path / 'train.bin', '<u2').tolist() == ids and 50256 not in ids


def test_pystdlib_is_deterministic_and_leaves_tests_out(prepare, tmp_path):
    """Directory order differs between file systems; tests are half of the library."""
    meta = prepare_set(prepare, 'pystdlib', tmp_path / 'a')
    prepare_set(prepare, 'pystdlib', tmp_path / 'b')
    for name in ('train.bin', 'val.bin', 'meta.json'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    module = runpy.run_path(str(ROOT / 'data/pystdlib/prepare.py'))
    found, _ = module['sources'](Path(sysconfig.get_path('stdlib')))
    paths = [path for path, _ in found]
    assert paths == sorted(paths) and 'argparse.py' in paths and 'json/decoder.py' in paths
    left_out = {'test', 'tests', 'site-packages', '_bundled'}
    assert not [path for path in paths if left_out & set(path.split('/'))]
    val = np.fromfile(tmp_path / 'a' / 'val.bin', '<u2').astype(np.uint8).tobytes()
    assert val == b''.join(source + b'\0' for path, source in found if zlib.crc32(path.encode()) % 20 == 0)
    assert meta['tokenizer'] == {'name': 'byte'} and meta['vocab_size'] == 256
    assert sum(meta['n_files'].values()) == len(found)
    for split in ('train', 'val'):
        tokens = meta['files'][f'{split}.bin']['tokens']
        assert meta['bytes'][split] + meta['n_files'][split] == tokens


def test_pystdlib_bpe_is_the_text_of_pystdlib(prepare, tmp_path, monkeypatch):
    """Bits per byte of the two compare only if val is the same files and none was seen in training."""
    pytest.importorskip('tokenizers')
    for package in ('asyncio', 'email', 'json'):  # a small library
        shutil.copytree(Path(sysconfig.get_path('stdlib')) / package, tmp_path / 'lib' / package)
    monkeypatch.setattr(sysconfig, 'get_path', lambda name: tmp_path / 'lib')
    meta = prepare_set(prepare, 'pystdlib_bpe', tmp_path)
    module = runpy.run_path(str(ROOT / 'data/pystdlib/prepare.py'))
    found, _ = module['sources'](tmp_path / 'lib')
    tokenizer = get_tokenizer(meta['tokenizer'])
    for split, files in module['divide'](found).items():
        ids = np.fromfile(tmp_path / f'{split}.bin', '<u2')
        assert tokenizer.decode_bytes(ids) == b''.join(text + b'<|endoftext|>' for text in files)
        assert (ids == tokenizer.eot).sum() == len(files)
        assert meta['bytes'][split] == sum(map(len, files))
    assert meta['vocab_size'] == 4096
    assert 3 < meta['bytes']['val'] / meta['files']['val.bin']['tokens'] < 5


def test_pystdlib_without_sources_is_one_line(tmp_path):
    """Stripped installations have only compiled modules."""
    (tmp_path / 'test').mkdir()
    (tmp_path / 'test' / 'a.py').write_text('pass')
    sources = runpy.run_path(str(ROOT / 'data/pystdlib/prepare.py'))['sources']
    with pytest.raises(ValueError) as e:
        sources(tmp_path)
    one_line(e.value, tmp_path)
    (tmp_path / 'b.py').write_bytes(b'\xff')
    (tmp_path / 'c.py').write_bytes(b'pass')
    assert sources(tmp_path) == ([('c.py', b'pass')], 1)


@pytest.mark.parametrize('name', ['shakespeare_char', 'shakespeare'])
def test_prepare_errors_are_one_line(prepare, tmp_path, name, monkeypatch):
    """A traceback hides the flag or the file that is wrong."""
    (tmp_path / 'empty').touch()
    (tmp_path / 'latin').write_bytes(b'caf\xe9')
    out = tmp_path / 'out'
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')  # nobody listens there: the download fails at once
    for flags, says in [
        (['--input=nowhere.txt'], 'nowhere.txt'),
        ([f'--input={tmp_path}'], tmp_path),
        ([f'--input={tmp_path}/empty'], 'is empty'),
        ([f'--input={tmp_path}/latin'], 'UTF-8'),
        (['--inptu=x'], '--inptu'),
        (['x'], 'x'),
        ([], '--input=FILE'),
    ]:
        refused(prepare(f'data/{name}/prepare.py', f'--out_dir={out}', *flags), says, 'prepare.py: ')
        assert not out.exists()


@pytest.mark.parametrize('name', ['shakespeare_char', 'shakespeare', 'pystdlib', 'pystdlib_bpe'])
def test_prepare_help_says_what_and_how_large(prepare, name):
    """Somebody about to download wants to know how much."""
    done = prepare(f'data/{name}/prepare.py', '--help')
    assert done.returncode == 0 and 'MB' in done.stdout and '--out_dir' in done.stdout


KILLED_AT_FSYNC = '''
import os, runpy, sys
os.fsync = lambda fd: os.kill(os.getpid(), 9)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


@pytest.mark.parametrize('stop', ['full disk', 'kill'])
def test_a_stopped_preparation_leaves_no_file_under_its_final_name(prepare, tmp_path, text_file, stop):
    """A cut train.bin looks like a whole one."""
    script, out = 'data/shakespeare_char/prepare.py', tmp_path / 'out'
    flags = f'--input={text_file}', f'--out_dir={out}'
    if stop == 'kill':
        done = command('-c', KILLED_AT_FSYNC, ROOT / script, *flags)
        assert done.returncode == -signal.SIGKILL
    else:
        limited = 'bash', '-c', LIMITED.format('f', 1), sys.executable
        refused(command(script, *flags, launcher=limited), 'File too large')
        assert list(out.iterdir()) == []
    assert not [path for path in out.iterdir() if path.suffix != '.tmp']
    other = tmp_path / 'other'
    assert prepare(script, *flags).returncode == 0
    assert prepare(script, flags[0], f'--out_dir={other}').returncode == 0
    assert read_meta(out) == read_meta(other)
    assert (out / 'train.bin').read_bytes() == (other / 'train.bin').read_bytes()


# any text, by data/prepare.py

def write_input(folder, form):
    """DOCUMENTS in one of the forms that prepare.py reads; returns the path of them."""
    folder.mkdir()
    if form == 'folder':
        for n, text in enumerate(DOCUMENTS):
            sub = folder / f'{n // 10:03}'
            sub.mkdir(exist_ok=True)
            (sub / f'{n:03}.txt').write_bytes(text.encode())
        (folder / '.hidden').write_bytes(b'\xff')
        return folder
    path = folder / f'a.{form}'
    rows = [json.dumps({'id': n, 'text': t}, ensure_ascii=n % 2 == 0) for n, t in enumerate(DOCUMENTS)]
    lines = '\n'.join(rows).encode()
    if form == 'parquet':
        pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
        table = pyarrow.table({'id': range(len(DOCUMENTS)), 'text': DOCUMENTS})
        parquet.write_table(table, path, row_group_size=7)
    elif form == 'jsonl.zst':
        zstandard, half = pytest.importorskip('zstandard'), len(lines) // 2
        parts = lines[:half], lines[half:]
        path.write_bytes(b''.join(zstandard.ZstdCompressor().compress(part) for part in parts))
    else:
        path.write_bytes(gzip.compress(lines) if form.endswith('gz') else lines)
    return path


@pytest.fixture
def prepare_text(prepare):
    return lambda out, *flags: prepare('data/prepare.py', f'--out={out}', *flags)


@pytest.mark.parametrize('form', ['folder', 'jsonl', 'jsonl.gz', 'jsonl.zst', 'parquet'])
def test_every_form_of_the_same_documents_gives_their_ids(prepare_text, tmp_path, form):
    """Against tiktoken: each document whole, in train or in val, in order, an end of text behind it."""
    encode = tokenizer_named('gpt2').encoding.encode_ordinary
    out = tmp_path / 'out'
    done = prepare_text(out, f'--input={write_input(tmp_path / "in", form)}', '--tokens_per_shard=400')
    assert done.returncode == 0, done.stderr
    meta, found = read_meta(out), {split: ids_of(out, split) for split in ('train', 'val')}
    rest, held_out = {split: list(ids) for split, ids in found.items()}, []
    for number, text in enumerate(DOCUMENTS):
        ids = encode(text) + [50256]
        split = 'val' if rest['val'][:len(ids)] == ids else 'train'
        assert rest[split][:len(ids)] == ids
        rest[split] = rest[split][len(ids):]
        held_out += [number] * (split == 'val')
    assert rest == {'train': [], 'val': []}
    assert [number // 10 for number in held_out] == list(range(6))  # one in every ten
    assert meta['documents'] == {'train': 54, 'val': 6}
    assert sum(meta['bytes'].values()) == sum(len(text.encode()) for text in DOCUMENTS)
    assert meta['tokenizer'] == {'name': 'gpt2'} and meta['vocab_size'] == 50257
    assert meta['dtype'] == 'uint16' and not (out / 'unfinished').exists()
    sizes = [len(data) // 2 for name, data in shards(out).items() if name.startswith('train')]
    assert set(sizes[:-1]) == {400}
    for name, data in shards(out).items():
        assert meta['files'][name] == {'tokens': len(data) // 2, 'crc32': zlib.crc32(data)}
    assert Loader(out, 'train', T).n_tokens == len(found['train'])


def test_another_kind_of_file_is_one_function(tmp_path, monkeypatch):
    """A column of CSV took 104 lines in four files."""
    def read_csv(path, field, limit):
        for number, row in enumerate(path.read_text().split('\n'), 1):
            yield Item(row.split(',')[int(field)], number, number)
    monkeypatch.setitem(KINDS, 'csv', Kind(read_csv))
    (tmp_path / 'a.csv').write_text('\n'.join(f'{n},row {n}' for n in range(20)))
    sources = find_sources([tmp_path / 'a.csv'], None)
    Preparation(sources, tmp_path / 'out', get_tokenizer('byte'), field='1', val_fraction=0.1).run()
    rows = {split: bytes(ids_of(tmp_path / 'out', split)).split(b'\0')[:-1] for split in ('train', 'val')}
    assert len(rows['val']) == 2
    assert sorted(rows['train'] + rows['val']) == sorted(f'row {n}'.encode() for n in range(20))


@pytest.mark.parametrize('flags', ['byte', 'char', 'gpt2', 'bpe --vocab_size=300', 'LLAMA'])
def test_a_single_text_comes_back_whole_from_any_tokenizer(prepare_text, tmp_path, flags):
    """Its end is val; between the two parts nothing is lost, and meta.json says how to read both."""
    book, out = tmp_path / 'book.txt', tmp_path / 'out'
    text = ''.join(DOCUMENTS).replace('<|endoftext|>', 'end')
    book.write_bytes(text.encode())
    if flags == 'LLAMA':
        pytest.importorskip('tokenizers')
        flags = str(tmp_path / 'tokenizer.json')
        Path(flags).write_text(llama_json())
    elif flags == 'gpt2':
        tokenizer_named('gpt2')
    flags = f'--tokenizer={flags}'.split()
    done = prepare_text(out, book, *flags)
    assert done.returncode == 0, done.stderr
    meta = read_meta(out)
    tokenizer = get_tokenizer(meta['tokenizer'])
    assert meta['vocab_size'] == tokenizer.vocab_size
    assert tokenizer.vocab_size == 300 or '--tokenizer=bpe' not in flags
    parts = [ids_of(out, split) for split in ('train', 'val')]
    if tokenizer.eot is not None:
        assert [part.pop() for part in parts] == [tokenizer.eot] * 2
    assert tokenizer.decode(parts[0] + parts[1]) == text
    assert 0.05 < len(tokenizer.decode_bytes(parts[1])) / len(text.encode()) < 0.15
    again = prepare_text(out, book, *flags)
    assert again.returncode == 0 and 'nothing to do' in again.stdout
    refused(prepare_text(out, book, '--tokenizer=byte', '--val_fraction=0.2'), out, '--overwrite')


def test_more_than_65536_ids_are_uint32(prepare_text, tmp_path):
    """A 16-bit shard of LLaMA 3's ids would wrap silently."""
    tokenizers = pytest.importorskip('tokenizers')
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    alphabet = sorted(byte_level.alphabet())
    vocab = {f'x{i}': i for i in range(70000)} | {c: 70000 + i for i, c in enumerate(alphabet)}
    reader = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    reader.pre_tokenizer, reader.decoder = byte_level(False), tokenizers.decoders.ByteLevel()
    reader.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'a.txt').write_text('hello\n' * 50)
    out = tmp_path / 'out'
    assert prepare_text(out, tmp_path / 'a.txt', f'--tokenizer={tmp_path}').returncode == 0
    assert read_meta(out)['dtype'] == 'uint32'
    assert ids_of(out, 'train')[0] == 70000 + alphabet.index('h')
    assert Loader(out, 'train', T).batch([0])[0].min() >= 70000


def test_processes_do_not_change_the_result(tmp_path):
    """Batches come back in any order."""
    for n in range(3):
        (tmp_path / f'{n}.txt').write_text(''.join(f'{n} line {i} of a text\n' * 3 for i in range(40000)))
    flags = [f'--input={tmp_path / f"{n}.txt"}' for n in range(3)]
    flags += ['--tokenizer=byte', '--tokens_per_shard=3000000']
    for n in (1, 3):
        out = f'--out={tmp_path / f"out{n}"}'
        assert command('data/prepare.py', out, *flags, f'--processes={n}', launcher=PYTHON).returncode == 0
    assert shards(tmp_path / 'out1') == shards(tmp_path / 'out3')
    assert read_meta(tmp_path / 'out1') == read_meta(tmp_path / 'out3')
    assert len(shards(tmp_path / 'out1')) == 4


def test_text_for_val_can_be_given_apart(prepare_text, tmp_path):
    """A benchmark's own split should stay what it is."""
    a, b, out = tmp_path / 'a.txt', tmp_path / 'b.txt', tmp_path / 'out'
    a.write_text('train text')
    b.write_text('val text')
    assert prepare_text(out, a, f'--val_input={b}', '--tokenizer=byte').returncode == 0
    assert bytes(ids_of(out, 'train')) == b'train text\0'
    assert bytes(ids_of(out, 'val')) == b'val text\0'


def test_what_is_written_inside_the_input_is_not_read(prepare_text, tmp_path, text_file):
    """Shards taken for text would make another data set of the second try."""
    out, flags = tmp_path / 'out', (f'--input={tmp_path}', '--tokenizer=byte')
    for said in ('train:', 'nothing to do'):
        assert said in prepare_text(out, *flags).stdout
    assert sum(read_meta(out)['bytes'].values()) == text_file.stat().st_size
    refused(prepare_text(tmp_path, *flags), 'no file', 'outside')


def test_what_another_command_left_unfinished_is_not_lost_to_a_mistyped_flag(prepare_text, tmp_path, text_file):
    """Nor does it open a finished data set beside it to being replaced."""
    out, left = tmp_path / 'out', tmp_path / 'out' / 'unfinished'
    left.mkdir(parents=True)
    (left / 'state.json').write_text('{"identity": "another"}')
    refused(prepare_text(out, text_file, '--tokenizer=byte'), left, '--overwrite')
    assert [path.name for path in left.iterdir() if path.name != 'lock'] == ['state.json']
    done = prepare_text(out, text_file, '--tokenizer=byte', '--overwrite')
    assert done.returncode == 0 and not left.exists()
    whole = shards(out)
    left.mkdir()
    (left / 'state.json').write_text('{"identity": "another", "meta": {}}')
    assert prepare_text(out, text_file, '--tokenizer=byte').returncode == 0 and left.exists()
    refused(prepare_text(out, text_file, '--tokenizer=char'), 'another data set', '--overwrite')
    assert shards(out) == whole and left.exists()


def test_two_commands_do_not_write_one_folder(prepare_text, tmp_path, text_file):
    """Their shards would be mixed; a lock left by kill -9 does not block."""
    left = tmp_path / 'out' / 'unfinished'
    left.mkdir(parents=True)
    with try_lock(left / 'lock', 'process 7'):
        refused(prepare_text(tmp_path / 'out', text_file, '--tokenizer=byte'), left, 'process 7')
    assert (left / 'lock').read_text() == 'process 7'
    assert prepare_text(tmp_path / 'out', text_file, '--tokenizer=byte').returncode == 0


# killed

def killed_at(n, make):
    """Whether make(), in a forked process, was killed at its n-th call that changes the file system."""
    def child():
        left = [n]

        def killing(function):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call
        for name in ('fsync', 'replace', 'truncate', 'unlink', 'remove', 'rmdir'):
            setattr(os, name, killing(getattr(os, name)))
        make()
    process = multiprocessing.get_context('fork').Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_killed_anywhere_the_same_command_finishes_with_the_same_bytes(tmp_path, monkeypatch):
    """Before and after each call that the file system remembers: shards, state, names, the last clearing up."""
    monkeypatch.setattr(os, 'fsync', lambda fd: None)  # a kill does not lose what the kernel has
    sources = find_sources([write_input(tmp_path / 'in', 'folder')], None)
    make = lambda out: Preparation(sources, out, 'char', tokens_per_shard=150).run()
    make(tmp_path / 'whole')
    whole, meta = shards(tmp_path / 'whole'), read_meta(tmp_path / 'whole')
    assert len(whole) > 10
    n, out = 1, tmp_path / 'out'
    while killed_at(n, lambda: make(out)):
        assert (out / 'meta.json').exists() or not shards(out)
        make(out)
        assert shards(out) == whole and read_meta(out) == meta, n
        assert {path.name for path in out.iterdir()} == {'meta.json', *whole}, n
        shutil.rmtree(out)
        n += 1
    assert n > 20


def prepare_bytes(sources, out, tokens_per_shard, **kwargs):
    Preparation(sources, out, get_tokenizer('byte'), tokens_per_shard=tokens_per_shard).run(**kwargs)


def test_killed_while_it_replaces_a_data_set_nothing_of_the_old_one_stays(tmp_path, text_file, monkeypatch):
    """Killed among the renames, the old shards passed for the new ones, and these were removed."""
    monkeypatch.setattr(os, 'fsync', lambda fd: None)
    (tmp_path / 'old.txt').write_text('old text\n' * 99)
    n = 1
    while True:
        out = tmp_path / str(n)
        sources = find_sources([text_file], None)
        prepare_bytes(find_sources([tmp_path / 'old.txt'], None), out, 80)
        if not killed_at(n, functools.partial(prepare_bytes, sources, out, 300, overwrite=True)):
            break
        prepare_bytes(sources, out, 300, overwrite=True)
        assert {path.name for path in out.iterdir()} == {'meta.json', *read_meta(out)['files']}
        for split in ('train', 'val'):
            Loader(out, split, T)
        n += 1
    assert n > 15


@pytest.fixture(scope='module')
def big(tmp_path_factory):
    """Flags for a text that takes a while, and the folder that they make of it."""
    folder = tmp_path_factory.mktemp('big')
    with open(folder / 'big.txt', 'w') as f:
        f.writelines(f'line {i} of a text that takes a while, {i * i}\n' for i in range(150000))
    tokenizer_named('gpt2')
    flags = f'--input={folder / "big.txt"}', '--tokenizer=gpt2', '--tokens_per_shard=250000', '--processes=2'
    assert command('data/prepare.py', f'--out={folder / "whole"}', *flags, launcher=PYTHON).returncode == 0
    return flags, folder / 'whole'


@pytest.mark.parametrize('signum, code', [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_killed_in_the_middle_of_many_processes_it_resumes_and_leaves_none(big, tmp_path, signum, code):
    """Workers of a killed pool wait for work for ever; what is encoded already should not be encoded again."""
    flags, whole = big
    out = tmp_path / 'out'
    process = subprocess.Popen([sys.executable, 'data/prepare.py', f'--out={out}', *flags], cwd=ROOT,
                               env=os.environ | at_start(tmp_path, hang_once_written('train_00002.bin')),
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_until((tmp_path / 'hung').exists, process)
    workers = children(process.pid)
    process.send_signal(signum)
    said = process.communicate(timeout=HANGS)[1]
    assert process.returncode == code and not shards(out) and len(workers) >= 2
    if signum == signal.SIGINT:
        one_line(said, 'the same command', 'resume')
    done = command('data/prepare.py', f'--out={out}', *flags)
    share = re.search(r'resuming at (\d+)% of the input', done.stdout)
    assert done.returncode == 0 and 10 < int(share[1]) < 90, done.stdout
    assert shards(out) == shards(whole) and read_meta(out) == read_meta(whole)
    wait_for_end(workers)


# parts, on several machines

def write_long_and_empty(folder):
    """Seven files of JSON lines, some of them empty, blank or too long, and one file without any."""
    folder.mkdir()
    rows = [['', 'long' * 300, f'{text} {n}'][0 if n % 17 == 0 else 1 if n % 31 == 0 else 2]
            for n, text in enumerate(DOCUMENTS * 3)]
    for n in range(6):
        lines = [json.dumps({'text': text}) for text in rows[n * n * 5:(n + 1) ** 2 * 5]]
        (folder / f'{n}.jsonl').write_text('\n\n'.join(lines))
    (folder / '7.jsonl').write_text('\n')
    return folder


INPUTS = {
    'text files, val by number': (lambda f: write_input(f, 'folder'), ['--tokenizer=char']),
    'text files, val at their ends': (lambda f: write_input(f, 'folder'), ['--tokenizer=byte', '--val_fraction=0.01']),
    'lines': (write_long_and_empty, ['--tokenizer=byte', '--max_document_mb=0.001']),
    'lines, a bpe': (write_long_and_empty, ['--tokenizer=bpe', '--vocab_size=300', '--val_fraction=0.04']),
    'val given': (write_long_and_empty, ['--tokenizer=byte', f'--val_input={ROOT / "README.md"}']),
}


@pytest.mark.parametrize('kind', INPUTS)
@pytest.mark.parametrize('order', [(1, 2, 3), (3, 1, 2)])
def test_parts_give_the_bytes_of_one_command(prepare_text, tmp_path, kind, order):
    """Val depends on how many documents the parts before have; shards end elsewhere; counts are those of one part."""
    write, flags = INPUTS[kind]
    if '--tokenizer=bpe' in flags:
        pytest.importorskip('tokenizers')
    flags = [f'--input={write(tmp_path / "in")}', '--tokens_per_shard=700', *flags]
    assert prepare_text(tmp_path / 'whole', *flags).returncode == 0
    for number in order:
        done = prepare_text(tmp_path / 'out', *flags, f'--part={number}/3')
        assert done.returncode == 0 and not shards(tmp_path / 'out'), done.stderr
    again = prepare_text(tmp_path / 'out', *flags, '--part=2/3')
    assert again.returncode == 0 and 'nothing to do' in again.stdout
    done = prepare_text(tmp_path / 'out', *flags, '--join=3')
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / 'out') == shards(tmp_path / 'whole') and len(shards(tmp_path / 'out')) > 4
    assert (tmp_path / 'out/meta.json').read_bytes() == (tmp_path / 'whole/meta.json').read_bytes()
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'meta.json', *shards(tmp_path / 'whole')}
    for flag in ('--part=2/3', '--join=3'):
        done = prepare_text(tmp_path / 'out', *flags, flag)
        assert 'nothing to do' in done.stdout and 'parts/' not in done.stdout, done.stdout


def test_parts_of_another_number_are_named(prepare_text, tmp_path):
    """Gigabytes stay in parts/ without a word, or a machine makes a part that no join asks for."""
    flags = f'--input={write_input(tmp_path / "in", "folder")}', '--tokenizer=byte', '--tokens_per_shard=300'
    said = [prepare_text(tmp_path / 'out', *flags, flag).stdout
            for flag in ('--part=3/3', '--part=1/2', '--part=2/2', '--join=2')]
    assert ['3-of-3, which --join=2' in text for text in said] == [False, True, True, True]
    assert [path.name for path in (tmp_path / 'out/parts').iterdir()] == ['3-of-3']


def test_bad_input_leaves_no_folder_of_parts(prepare_text, tmp_path):
    """An empty parts/, which makes the folder look like a data set to replace."""
    (tmp_path / 'in').mkdir()
    for n in range(3):
        (tmp_path / f'in/{n}.jsonl').write_text('{"text": "a"}\n{')
    refused(prepare_text(tmp_path / 'out', f'--input={tmp_path / "in"}', '--tokenizer=byte', '--part=1/2'), '0.jsonl')
    assert not (tmp_path / 'out').exists()


def flip_last_bit(path):
    path.write_bytes(flip_bit(path.read_bytes(), -1))


PART_PROBLEMS = [
    ('--part=0/3', None, ['--part', 'such as 3/16']),
    ('--part=4/3', None, ['--part', 'such as 3/16']),
    ('--part=1/99', None, ['60', '--part=1/99', 'at most 60 parts']),
    ('--join=99', None, ['60', 'at most 60 parts']),
    ('--join=2', None, ['1-of-2', 'is missing', '--part=1/2']),
    ('--join=3', lambda parts: shutil.rmtree(parts / '2-of-3'), ['part 2 of 3', 'is missing', '--part=2/3']),
    ('--join=3', lambda parts: (parts / '3-of-3/ids_00001.bin').unlink(), ['ids_00001.bin is missing', '--part=3/3']),
    ('--join=3', lambda parts: flip_last_bit(parts / '3-of-3/ids_00001.bin'), ['ids_00001.bin', 'checksum']),
    ('--join=3 --val_fraction=0.2', None, ['1-of-3', 'other settings', '--part=1/3']),
    ('--part=1/3 --val_fraction=0.2', None, ['1-of-3', 'another data set', '--overwrite']),
]


@pytest.mark.parametrize('flags, damage, words', PART_PROBLEMS)
def test_parts_that_do_not_fit_together_are_one_line(prepare_text, tmp_path, flags, damage, words):
    """A sixteenth is missing or has other ids, which the loss would show after a week; or the parts are removed."""
    out, source = tmp_path / 'out', write_input(tmp_path / 'in', 'folder')
    for number in (1, 2, 3):
        assert prepare_text(out, source, BYTE, '--tokens_per_shard=300', f'--part={number}/3').returncode == 0
    if damage:
        damage(out / 'parts')
    left = {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}
    refused(prepare_text(out, source, BYTE, '--tokens_per_shard=300', *flags.split()), *words)
    assert {path: path.read_bytes() for path in out.rglob('*') if path.is_file()} == left


def test_a_part_or_join_killed_anywhere_is_finished_by_the_same_command(tmp_path, monkeypatch):
    """A part loses the place in its index; the join has removed a part that it needs again."""
    monkeypatch.setattr(os, 'fsync', lambda fd: None)
    monkeypatch.setattr('data.preparation.BATCH', 300)
    monkeypatch.setattr('data.parts.TOKENS', 300)
    sources = find_sources([write_input(tmp_path / 'in', 'folder')], None)[::3]
    settings = dict(tokens_per_shard=300)
    Preparation(sources, tmp_path / 'whole', 'char', **settings).run()
    out = tmp_path / 'out'
    steps = [lambda number=number: Part(sources, out, 'char', part=(number, 2), **settings).run() for number in (1, 2)]
    steps.append(lambda: Join(sources, out, 'char', n_parts=2, **settings).run())
    n = 0
    while killed_at(n := n + 1, lambda: [step() for step in steps]):
        for step in steps:
            step()
        assert shards(out) == shards(tmp_path / 'whole') and read_meta(out) == read_meta(tmp_path / 'whole'), n
        assert not (out / 'parts').exists(), n
        shutil.rmtree(out)
    assert n > 60


# lines, files and states that are not as they should be

def long_lines(form):
    """A packed file in which one line unfolds to 200 MB, among 40 short ones."""
    lines = [json.dumps({'text': f'document {n}'}).encode() for n in range(40)]
    long = b'{"text": "' + b'a' * (2 * 10**8) + b'"}'
    data = b'\n'.join(lines[:6] + [long] + lines[6:])
    return gzip.compress(data, 1) if form == 'gz' else pytest.importorskip('zstandard').compress(data)


@pytest.mark.parametrize('form', ['gz', 'zst'])
def test_a_line_that_unfolds_to_gigabytes_is_skipped_and_said(tmp_path, form):
    """Two MB of .jsonl.gz took 3.7 GB of memory, which no flag limited."""
    path, out = tmp_path / f'a.jsonl.{form}', tmp_path / 'out'
    path.write_bytes(long_lines(form))
    limited = 'bash', '-c', LIMITED.format('v', 500_000), sys.executable
    env = {'OPENBLAS_NUM_THREADS': '1'}
    done = command('data/prepare.py', f'--input={path}', f'--out={out}', '--tokenizer=byte', '--max_document_mb=1',
                   '--processes=1', launcher=limited, env=env)
    assert done.returncode == 0, done.stderr
    assert f'skipped: {path}, entry 7, is longer than --max_document_mb' in done.stdout
    assert 'skipped 1 in all' in done.stdout
    assert sum(read_meta(out)['documents'].values()) == 40


def test_the_limit_holds_for_rows_and_not_for_text(prepare_text, tmp_path):
    """A limit that a long book meets, although a text file is read in pieces."""
    (tmp_path / 'a.txt').write_bytes(b'some text\n' * 10**5)
    done = prepare_text(tmp_path / 'text', tmp_path / 'a.txt', '--tokenizer=byte', '--max_document_mb=0.001')
    assert done.returncode == 0 and 'NOTE' not in done.stdout
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    parquet.write_table(pyarrow.table({'text': ['short'] * 30 + ['long' * 300]}), tmp_path / 'a.parquet')
    done = prepare_text(tmp_path / 'rows', tmp_path / 'a.parquet', '--tokenizer=byte', '--max_document_mb=0.001')
    assert done.returncode == 0 and 'entry 31, is longer than --max_document_mb' in done.stdout, done.stderr


@pytest.mark.parametrize('name, noted', [('a.csv', True), ('a.json.gz', True), ('a.txt', False), ('README', False)])
def test_a_file_of_another_kind_is_read_as_text_and_said(prepare_text, tmp_path, name, noted):
    """A .csv became one document, commas and all, without a word."""
    data = b'a,b\n' * 99
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith('gz') else data)
    done = prepare_text(tmp_path / 'out', tmp_path / name, '--tokenizer=byte')
    assert done.returncode == 0 and ('read as plain text' in done.stdout) == noted


def test_names_are_printed_without_a_terminals_escapes(prepare_text, tmp_path, text_file):
    """A folder named ESC [ 2 J cleared the screen."""
    done = prepare_text(tmp_path / '\x1b[2J', text_file, '--tokenizer=byte')
    assert done.returncode == 0 and '\x1b' not in done.stdout and r'\x1b[2J' in done.stdout


@pytest.mark.parametrize('text, field', [
    ('[' * 10**5, ''),
    ('{"identity": "x", "position": "far"}', 'position'),
    ('{"identity": "x", "position": [1, 2]}', 'position'),
    ('{"identity": "x", "train": {"documents": -1}}', 'train.documents'),
    ('{"identity": "x", "meta": {"files": {"a": 7}}}', 'files.a'),
    ('{"identity": 5}', 'identity'),
])
def test_a_damaged_state_is_named(prepare_text, tmp_path, text_file, text, field):
    """Some fields gave a traceback; others were taken for no state at all, and the work done so far was removed."""
    left = tmp_path / 'out' / 'unfinished'
    left.mkdir(parents=True)
    (left / 'state.json').write_text(text)
    refused(prepare_text(tmp_path / 'out', text_file, '--tokenizer=byte'), left / 'state.json', field, f'remove {left}')
    assert (left / 'state.json').read_text() == text


# bad input

CUT_GZ = gzip.compress(b'text\n' * 999, mtime=0)[:-9]
BAD_INPUT = [
    ('empty.txt', b'', [BYTE], ['is empty']),
    ('latin.txt', b'caf\xe9 au lait', [BYTE], ['byte 3', 'not UTF-8', '--bad_bytes=replace']),
    ('late.txt', b'a line\n' * 99999 + b'\xff', [BYTE], ['byte 699993']),
    ('cut.txt.gz', CUT_GZ, [BYTE], ['not a whole .gz']),
    ('no.txt.gz', b'text', [BYTE], ['not a whole .gz']),
    ('cut.jsonl.zst', b'\x28\xb5\x2f\xfd\x24', [BYTE], ['not a whole .zst']),
    ('a.jsonl', b'{"text": "a"}\n{"text": \n', [BYTE], ['entry 2', 'not JSON']),
    ('b.jsonl', b'{"body": "a"}\n', [BYTE], ['entry 1', "no field 'text'", "'body'", '--field']),
    ('c.jsonl', b'{"text": 7}', [BYTE], ["no text in field 'text'"]),
    ('d.jsonl', b'{"text": "\\ud83d"}', [BYTE], ['entry 1', 'not UTF-8']),
    ('number.jsonl', b'{"text": %s}' % (b'7' * 5000), [BYTE], ['entry 1', 'not JSON']),
    ('deep.jsonl', b'[' * 10**6, [BYTE], ['entry 1', 'nested too deeply']),
    ('e.jsonl', b'{"text": "one"}\n', [BYTE], ['val', '1 documents', '--val_fraction']),
    ('a.parquet', b'PAR1 and so on', [BYTE], ['not a whole parquet']),
    ('b.parquet.gz', b'text', [BYTE], ['unpack it first']),
    ('one.txt', b'x', [BYTE], ['val']),
]
TEXT = b'text\n' * 99
BAD_FLAGS = [
    (['--tokenizer=missing/tokenizer.json'], ['missing/tokenizer.json', 'no such file']),
    (['--tokenizer=gtp2'], ["'gtp2'", 'cl100k_base']),
    (['--vocab_size=300'], ['--vocab_size']),
    (['--tokenizer=bpe'], ['--vocab_size']),
    (['--tokenizer=bpe', '--vocab_size=99'], ['257']),
    ([BYTE, '--out=..'], ['--out=NAME']),
    ([BYTE, '--val_fraction=0.9'], ['--val_fraction', '0.9']),
    ([BYTE, '--val_fraction=0'], ['--val_fraction']),
    ([BYTE, '--tokens_per_shard=0'], ['--tokens_per_shard']),
    ([BYTE, '--input=missing.txt'], ['missing.txt']),
    ([BYTE, '--glob=*.md', '--input=data'], ['data', '*.md']),
]


@pytest.mark.parametrize('name, data, flags, words', BAD_INPUT + [('t.txt', TEXT, *case) for case in BAD_FLAGS])
def test_bad_input_is_one_line_and_leaves_nothing(prepare_text, tmp_path, name, data, flags, words):
    """An error after an hour should say where it is, and a half-made data set must not pass for one."""
    (tmp_path / name).write_bytes(data)
    if name.endswith(('parquet', 'zst')):
        pytest.importorskip('pyarrow' if name.endswith('parquet') else 'zstandard')
    done = prepare_text(tmp_path / 'out', f'--input={tmp_path / name}', *flags)
    refused(done, 'prepare.py: ', *words)
    assert not (tmp_path / 'out').exists()


def test_a_parquet_column_without_text_is_one_line(prepare_text, tmp_path):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    path, out = tmp_path / 'a.parquet', tmp_path / 'out'
    parquet.write_table(pyarrow.table({'text': [1, 2, 3]}), path)
    refused(prepare_text(out, path, BYTE), 'entry 1', "no text in field 'text'")
    refused(prepare_text(out, path, BYTE, '--field=body'), "no column 'body'", 'text', '--field')


def test_bad_bytes_can_be_replaced(prepare_text, tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'caf\xe9 ' * 20)
    assert prepare_text(tmp_path / 'out', tmp_path / 'a.txt', BYTE, '--bad_bytes=replace').returncode == 0
    assert bytes(ids_of(tmp_path / 'out', 'train')).decode().startswith('caf\ufffd caf\ufffd')


def test_a_folder_that_cannot_be_written_is_one_line(prepare_text, tmp_path, text_file):
    """A full disk does not say which one, and what is done already should not be lost."""
    (tmp_path / 'file').touch()
    refused(prepare_text(tmp_path / 'file' / 'out', text_file, BYTE), tmp_path / 'file')
    text_file.write_bytes(text_file.read_bytes() * 2)
    out, flags = tmp_path / 'out', (f'--input={text_file}', BYTE)
    limited = 'bash', '-c', LIMITED.format('f', 1), sys.executable
    done = command('data/prepare.py', f'--out={out}', *flags, launcher=limited)
    refused(done, out, 'File too large', 'the same command', 'resume')
    assert prepare_text(out, *flags).returncode == 0
