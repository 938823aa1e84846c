"""What must stay true: python -m pytest tests/test_prepare.py"""
import gzip
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from conftest import (
    DOCUMENTS,
    LIMITED,
    ROOT,
    children,
    command,
    ids_of,
    llama_json,
    one_line,
    refused,
    shards,
    tokenizer_named,
)
from data.loader import Loader, read_meta
from data.tokenizer import get_tokenizer

T = 8  # block_size of the loader tests


# data: the prepare scripts

@pytest.fixture
def prepare(monkeypatch, capsys):
    """prepare(name, *flags): run data/name/prepare.py as a script; returns its exit status and the last it printed."""
    def run(name, *flags):
        script = ROOT / 'data' / name / 'prepare.py'
        monkeypatch.setattr(sys, 'argv', [str(script), *map(str, flags)])
        try:
            runpy.run_path(str(script), run_name='__main__')
            status = 0
        except SystemExit as e:
            status = e.code or 0
        printed = capsys.readouterr()
        return status, printed.err or printed.out
    return run


def test_shakespeare_char_gives_nanogpts_ids(prepare, tmp_path, text_file):
    """Split by characters and sorted vocabulary are nanoGPT's, so its checkpoints keep their meaning."""
    assert prepare('shakespeare_char', f'--input={text_file}', f'--out_dir={tmp_path}')[0] == 0
    text = text_file.read_text(encoding='utf-8')
    chars, cut = sorted(set(text)), int(len(text) * 0.9)
    for name, part in [('train.bin', text[:cut]), ('val.bin', text[cut:])]:
        assert np.fromfile(tmp_path / name, '<u2').tolist() == [chars.index(c) for c in part]
    assert read_meta(tmp_path)['tokenizer'] == {'name': 'char', 'chars': ''.join(chars)}
    assert Loader(tmp_path, 'val', T).n_windows > 0


def test_shakespeare_gives_nanogpts_ids(prepare, tmp_path, text_file):
    """nanoGPT encodes the literal <|endoftext|> of a corpus as ordinary text."""
    tokenizer_named('gpt2')
    text = 'To be<|endoftext|>\n' * 40
    text_file.write_text(text, encoding='utf-8')
    assert prepare('shakespeare', f'--input={text_file}', f'--out_dir={tmp_path}')[0] == 0
    ids = get_tokenizer('gpt2').encoding.encode_ordinary(text[:int(len(text) * 0.9)])
    assert np.fromfile(tmp_path / 'train.bin', '<u2').tolist() == ids and 50256 not in ids


def test_pystdlib_is_deterministic_and_leaves_tests_out(prepare, tmp_path):
    """Directory order differs between file systems; tests are half of the library."""
    for folder in ('a', 'b'):
        assert prepare('pystdlib', f'--out_dir={tmp_path / folder}')[0] == 0
    for name in ('train.bin', 'val.bin', 'meta.json'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    module = runpy.run_path(str(ROOT / 'data/pystdlib/prepare.py'))
    found, _ = module['sources'](Path(sysconfig.get_path('stdlib')))
    paths = [path for path, _ in found]
    assert paths == sorted(paths) and 'argparse.py' in paths and 'json/decoder.py' in paths
    assert not [path for path in paths if {'test', 'tests', 'site-packages', '_bundled'} & set(path.split('/'))]
    meta, val = read_meta(tmp_path / 'a'), np.fromfile(tmp_path / 'a' / 'val.bin', '<u2')
    expected = b''.join(source + b'\0' for path, source in found if zlib.crc32(path.encode()) % 20 == 0)
    assert val.astype(np.uint8).tobytes() == expected
    assert meta['tokenizer'] == {'name': 'byte'} and meta['vocab_size'] == 256 and sum(meta['n_files'].values()) == len(found)
    for split in ('train', 'val'):
        assert meta['bytes'][split] + meta['n_files'][split] == meta['files'][f'{split}.bin']['tokens']


def test_pystdlib_bpe_is_the_text_of_pystdlib(prepare, tmp_path):
    """Bits per byte of the two compare only if val is the same files, and nothing of them was seen in training."""
    pytest.importorskip('tokenizers')
    meta, texts = {}, {}
    for name in ('pystdlib', 'pystdlib_bpe'):
        assert prepare(name, f'--out_dir={tmp_path / name}')[0] == 0
        meta[name] = read_meta(tmp_path / name)
        for split in ('train', 'val'):
            tokenizer, ids = get_tokenizer(meta[name]['tokenizer']), np.fromfile(tmp_path / name / f'{split}.bin', '<u2')
            texts[name, split] = [tokenizer.decode_bytes(part) for part in np.split(ids, np.flatnonzero(ids == tokenizer.eot)) if len(part) > 1]
            texts[name, split] = b''.join(texts[name, split]).replace(b'\0', b'').replace(b'<|endoftext|>', b'')
    for split in ('train', 'val'):
        assert texts['pystdlib', split] == texts['pystdlib_bpe', split]
        assert meta['pystdlib']['bytes'][split] == meta['pystdlib_bpe']['bytes'][split] == len(texts['pystdlib', split])
    assert meta['pystdlib_bpe']['vocab_size'] == 4096 and 3.4 < meta['pystdlib_bpe']['bytes']['val'] / meta['pystdlib_bpe']['files']['val.bin']['tokens'] < 3.6


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
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')  # nobody listens there, so the download fails at once
    for flags, says in [(['--input=nowhere.txt'], 'nowhere.txt'), ([f'--input={tmp_path}'], tmp_path), ([f'--input={tmp_path}/empty'], 'is empty'),
                        ([f'--input={tmp_path}/latin'], 'UTF-8'), (['--inptu=x'], '--inptu'), (['x'], 'x'), ([], '--input=FILE')]:
        status, printed = prepare(name, f'--out_dir={out}', *flags)
        assert status == 2
        one_line(printed, says, f'data/{name}/prepare.py')
        assert not out.exists()


@pytest.mark.parametrize('name', ['shakespeare_char', 'shakespeare', 'pystdlib', 'pystdlib_bpe'])
def test_prepare_help_says_what_and_how_large(prepare, name):
    """Somebody about to download wants to know how much."""
    status, printed = prepare(name, '--help')
    assert status == 0 and 'MB' in printed and '--out_dir' in printed


@pytest.mark.parametrize('stop', ['ulimit -f 1', 'kill'])
def test_a_stopped_preparation_leaves_no_file_under_its_final_name(tmp_path, text_file, stop):
    """A cut train.bin looks like a whole one."""
    out = tmp_path / 'out'
    code = 'import os, runpy, sys\n'
    if stop == 'kill':
        code += 'os.fsync = lambda fd: os.kill(os.getpid(), 9)\n'
    code += 'sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'
    script = ROOT / 'data/shakespeare_char/prepare.py'
    command = [sys.executable, '-B', '-c', code, script, f'--input={text_file}', f'--out_dir={out}']
    command = command if stop == 'kill' else ['bash', '-c', f'{stop}; exec "$@"', '-', *command]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    if stop == 'kill':
        assert done.returncode == -signal.SIGKILL
    else:
        assert done.returncode == 2 and list(out.iterdir()) == []
        one_line(done.stderr, 'File too large')
    assert not [path for path in out.iterdir() if path.suffix != '.tmp']
    for folder in (out, tmp_path / 'other'):
        assert subprocess.run([sys.executable, '-B', script, f'--input={text_file}', f'--out_dir={folder}'], capture_output=True).returncode == 0
    assert read_meta(out) == read_meta(tmp_path / 'other') and (out / 'train.bin').read_bytes() == (tmp_path / 'other' / 'train.bin').read_bytes()


# data: any text, by data/prepare.py


def write_input(folder, form):
    """DOCUMENTS in one of the forms that prepare.py reads; returns the flag for them."""
    folder.mkdir()
    lines = ''.join(json.dumps({'id': n, 'text': text}, ensure_ascii=n % 2 == 0) + '\n' for n, text in enumerate(DOCUMENTS)).encode()
    if form.startswith('folder'):
        for n, text in enumerate(DOCUMENTS):
            sub = folder / f'{n // 10:03}'
            sub.mkdir(exist_ok=True)
            (sub / f'{n:03}.txt').write_bytes(text.encode())
        (folder / '.hidden').write_bytes(b'\xff')
        return folder
    if form == 'parquet':
        pyarrow = pytest.importorskip('pyarrow')
        pytest.importorskip('pyarrow.parquet').write_table(pyarrow.table({'id': range(len(DOCUMENTS)), 'text': DOCUMENTS}), folder / 'a.parquet', row_group_size=7)
    elif form == 'jsonl.zst':
        zstandard, half = pytest.importorskip('zstandard'), len(lines) // 2
        (folder / 'a.jsonl.zst').write_bytes(b''.join(zstandard.ZstdCompressor().compress(part) for part in (lines[:half], lines[half:])))
    else:
        (folder / f'a.{form}').write_bytes(gzip.compress(lines) if form.endswith('gz') else lines.rstrip(b'\n'))
    return folder / f'a.{form}'


def prepare_text(out, *flags, **kwargs):
    return command('data/prepare.py', f'--out={out}', *flags, **kwargs)


@pytest.mark.parametrize('form', ['folder', 'jsonl', 'jsonl.gz', 'jsonl.zst', 'parquet'])
def test_every_form_of_the_same_documents_gives_their_ids(tmp_path, form):
    """Against tiktoken itself: each document whole, in train or in val, in order, with an end of text behind it and none inside."""
    encode = tokenizer_named('gpt2').encoding.encode_ordinary
    out = tmp_path / 'out'
    done = prepare_text(out, f'--input={write_input(tmp_path / "in", form)}', '--tokens_per_shard=400')
    assert done.returncode == 0, done.stderr
    meta, expected = read_meta(out), [encode(text) + [50256] for text in DOCUMENTS]
    found, at = {split: ids_of(out, split) for split in ('train', 'val')}, {'train': 0, 'val': 0}
    held_out = []
    for number, ids in enumerate(expected):
        split = 'val' if found['val'][at['val']:][:len(ids)] == ids else 'train'
        assert found[split][at[split]:][:len(ids)] == ids
        at[split] += len(ids)
        held_out += [number] * (split == 'val')
    assert at == {split: len(ids) for split, ids in found.items()} and [number // 10 for number in held_out] == list(range(6))  # one of every ten
    assert meta['documents'] == {'train': 54, 'val': 6} and sum(meta['bytes'].values()) == sum(len(text.encode()) for text in DOCUMENTS)
    assert meta['tokenizer'] == {'name': 'gpt2'} and meta['vocab_size'] == 50257 and meta['dtype'] == 'uint16' and not (out / 'unfinished').exists()
    assert {len(data) // 2 for name, data in list(shards(out).items())[:-2] if name.startswith('train')} == {400}
    for name, data in shards(out).items():
        assert meta['files'][name] == {'tokens': len(data) // 2, 'crc32': zlib.crc32(data)}
    assert Loader(out, 'train', T).n_tokens == len(found['train'])


@pytest.mark.parametrize('flags', ['byte', 'char', 'gpt2', 'bpe --vocab_size=300', 'LLAMA'])
def test_a_single_text_comes_back_whole_from_any_tokenizer(tmp_path, flags):
    """Its end is val; between the two parts nothing is lost, and meta.json says how to read both."""
    text = ''.join(DOCUMENTS).replace('<|endoftext|>', 'end')
    (tmp_path / 'book.txt').write_bytes(text.encode())
    if flags == 'LLAMA':
        pytest.importorskip('tokenizers')
        (tmp_path / 'tokenizer.json').write_text(llama_json())
        flags = str(tmp_path / 'tokenizer.json')
    elif flags == 'gpt2':
        tokenizer_named('gpt2')
    done = prepare_text(tmp_path / 'out', tmp_path / 'book.txt', f'--tokenizer={flags.split()[0]}', *flags.split()[1:])
    assert done.returncode == 0, done.stderr
    meta = read_meta(tmp_path / 'out')
    tokenizer = get_tokenizer(meta['tokenizer'])
    assert meta['vocab_size'] == tokenizer.vocab_size and (tokenizer.vocab_size == 300 or 'bpe' not in flags)
    parts = [ids_of(tmp_path / 'out', split) for split in ('train', 'val')]
    if tokenizer.eot is not None:
        assert [part.pop() for part in parts] == [tokenizer.eot] * 2
    assert tokenizer.decode(parts[0] + parts[1]) == text
    assert 0.05 < len(tokenizer.decode_bytes(parts[1])) / len(text.encode()) < 0.15
    again = prepare_text(tmp_path / 'out', tmp_path / 'book.txt', f'--tokenizer={flags.split()[0]}', *flags.split()[1:])
    assert again.returncode == 0 and 'nothing to do' in again.stdout
    other = prepare_text(tmp_path / 'out', tmp_path / 'book.txt', '--tokenizer=byte', '--val_fraction=0.2')
    refused(other, tmp_path / 'out', '--overwrite')


def test_more_than_65536_ids_are_uint32(tmp_path):
    """A 16-bit shard of LLaMA 3's ids would wrap in silence."""
    tokenizers = pytest.importorskip('tokenizers')
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    reader = tokenizers.Tokenizer(tokenizers.models.BPE({**{f'x{i}': i for i in range(70000)}, **{c: 70000 + i for i, c in enumerate(alphabet)}}, []))
    reader.pre_tokenizer, reader.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    reader.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'a.txt').write_text('hello\n' * 50)
    assert prepare_text(tmp_path / 'out', tmp_path / 'a.txt', f'--tokenizer={tmp_path}').returncode == 0
    assert read_meta(tmp_path / 'out')['dtype'] == 'uint32' and ids_of(tmp_path / 'out', 'train')[0] == 70000 + alphabet.index('h')
    assert Loader(tmp_path / 'out', 'train', T).batch([0])[0].min() >= 70000


def test_processes_do_not_change_the_result(tmp_path):
    """Batches come back in any order."""
    for n in range(3):
        (tmp_path / f'{n}.txt').write_text(''.join(f'{n} line {i} of a text\n' * 3 for i in range(40000)))
    inputs = [f'--input={tmp_path / f"{n}.txt"}' for n in range(3)]
    for n in (1, 3):
        assert prepare_text(tmp_path / f'out{n}', *inputs, '--tokenizer=byte', f'--processes={n}', '--tokens_per_shard=3000000').returncode == 0
    assert shards(tmp_path / 'out1') == shards(tmp_path / 'out3') and read_meta(tmp_path / 'out1') == read_meta(tmp_path / 'out3')
    assert len(shards(tmp_path / 'out1')) == 4


def test_text_for_val_can_be_given_apart(tmp_path):
    """A benchmark's own split should stay what it is."""
    (tmp_path / 'a.txt').write_text('train text')
    (tmp_path / 'b.txt').write_text('val text')
    assert prepare_text(tmp_path / 'out', tmp_path / 'a.txt', f'--val_input={tmp_path / "b.txt"}', '--tokenizer=byte').returncode == 0
    assert [bytes(ids_of(tmp_path / 'out', split)) for split in ('train', 'val')] == [b'train text\0', b'val text\0']


def test_what_is_written_inside_the_input_is_not_read(tmp_path, text_file):
    """Shards taken for text would make another data set of the second try."""
    for said in ('train:', 'nothing to do'):
        assert said in prepare_text(tmp_path / 'out', f'--input={tmp_path}', '--tokenizer=byte').stdout
    assert sum(read_meta(tmp_path / 'out')['bytes'].values()) == text_file.stat().st_size
    refused(prepare_text(tmp_path, f'--input={tmp_path}', '--tokenizer=byte'), 'no file', 'outside')


def test_what_another_command_left_unfinished_is_not_lost_to_a_mistyped_flag(tmp_path, text_file):
    """Nor does it open a finished data set beside it to being replaced."""
    out, left = tmp_path / 'out', tmp_path / 'out' / 'unfinished'
    left.mkdir(parents=True)
    (left / 'state.json').write_text('{"identity": "another"}')
    refused(prepare_text(out, text_file, '--tokenizer=byte'), left, '--overwrite')
    assert [path.name for path in left.iterdir() if path.name != 'lock'] == ['state.json']
    assert prepare_text(out, text_file, '--tokenizer=byte', '--overwrite').returncode == 0 and not left.exists()
    whole = shards(out)
    left.mkdir()
    for name in ('state.json', 'meta.json'):
        (left / name).write_text('{"identity": "another"}')
    assert prepare_text(out, text_file, '--tokenizer=byte').returncode == 0 and left.exists()
    refused(prepare_text(out, text_file, '--tokenizer=char'), 'another data set', '--overwrite')
    assert shards(out) == whole and left.exists()


KILL = '''
import os, sys, runpy
left = [int(sys.argv[1])]
def killing(function):
    def call(*args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), 9)
        return function(*args)
    return call
for name in ('fsync', 'replace', 'truncate', 'unlink', 'rmdir'):
    setattr(os, name, killing(getattr(os, name)))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def test_killed_anywhere_the_same_command_finishes_with_the_same_bytes(tmp_path):
    """Before and after each call that the file system remembers: shards, state, names, the last clearing up."""
    flags = [f'--input={write_input(tmp_path / "in", "folder")}', '--tokenizer=char', '--tokens_per_shard=150']
    assert prepare_text(tmp_path / 'whole', *flags).returncode == 0
    whole, meta = shards(tmp_path / 'whole'), read_meta(tmp_path / 'whole')
    assert len(whole) > 10
    n, out = 1, tmp_path / 'out'
    while True:
        killed = command('-c', KILL, str(n), str(ROOT / 'data/prepare.py'), f'--out={out}', *flags)
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert (out / 'meta.json').exists() or not shards(out)
        done = prepare_text(out, *flags)
        assert done.returncode == 0, (n, done.stderr)
        assert shards(out) == whole and read_meta(out) == meta and {path.name for path in out.iterdir()} == {'meta.json', *whole}, n
        shutil.rmtree(out)
        n += 1 if n < 6 or n > 20 else 4
    assert n > 20


@pytest.mark.parametrize('signum, code', [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_killed_in_the_middle_of_many_processes_it_goes_on_and_leaves_none(tmp_path, signum, code):
    """Workers of a killed pool wait for work for ever; what is encoded already should not be encoded again."""
    with open(tmp_path / 'big.txt', 'w') as f:
        f.writelines(f'line {i} of a text that takes a while, {i * i}\n' for i in range(300000))
    flags = [f'--input={tmp_path / "big.txt"}', f'--tokenizer={"gpt2" if tokenizer_named("gpt2") else ""}', '--tokens_per_shard=500000', '--processes=2']
    assert prepare_text(tmp_path / 'whole', *flags).returncode == 0
    out = tmp_path / 'out'
    process = subprocess.Popen([sys.executable, 'data/prepare.py', f'--out={out}', *flags], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (out / 'unfinished' / 'train_00002.bin').exists():
        assert process.poll() is None
        time.sleep(0.01)
    workers = children(process.pid)
    process.send_signal(signum)
    said = process.communicate()[1]
    assert process.returncode == code and not shards(out) and len(workers) >= 2
    if signum == signal.SIGINT:
        one_line(said, 'goes on from here')
    done = prepare_text(out, *flags)
    share = re.search(r'going on at (\d+)% of the input', done.stdout)
    assert done.returncode == 0 and 10 < int(share[1]) < 90, done.stdout
    assert shards(out) == shards(tmp_path / 'whole') and read_meta(out) == read_meta(tmp_path / 'whole')
    assert not [pid for pid in workers if os.path.exists(f'/proc/{pid}') and 'Z' not in Path(f'/proc/{pid}/stat').read_text().split()[2]]


@pytest.mark.parametrize('name, data, flags, words', [
    ('empty.txt', b'', [], ['is empty']), ('latin.txt', b'caf\xe9 au lait', [], ['byte 3', 'not UTF-8', '--bad_bytes=replace']),
    ('late.txt', b'a line\n' * 99999 + b'\xff', [], ['byte 699993']), ('cut.txt.gz', gzip.compress(b'text\n' * 999, mtime=0)[:-9], [], ['not a whole .gz']),
    ('no.txt.gz', b'text', [], ['not a whole .gz']), ('cut.jsonl.zst', b'\x28\xb5\x2f\xfd\x24', [], ['not a whole .zst']),
    ('a.jsonl', b'{"text": "a"}\n{"text": \n', [], ['entry 2', 'not JSON']), ('b.jsonl', b'{"body": "a"}\n', [], ['entry 1', "no field 'text'", "'body'", '--field']),
    ('c.jsonl', b'{"text": 7}', [], ["no text in field 'text'"]), ('d.jsonl', b'{"text": "\\ud83d"}', [], ['entry 1', 'not UTF-8']),
    ('a.parquet', b'PAR1 and so on', [], ['not a whole parquet']), ('e.jsonl', b'{"text": "one"}\n', [], ['val', '1 documents', '--val_fraction']),
    ('t.txt', b'text\n' * 99, ['--tokenizer=missing/tokenizer.json'], ['missing/tokenizer.json', 'no such file']),
    ('out.txt', b'text\n' * 99, ['--out=..'], ['--out=NAME']), ('deep.jsonl', b'[' * 10**6, [], ['entry 1', 'nested too deeply']),
    ('b.parquet.gz', b'text', [], ['unpack it first']),
    ('f.txt', b'text\n' * 99, ['--tokenizer=gtp2'], ["'gtp2'", 'cl100k_base']), ('g.txt', b'text\n' * 99, ['--vocab_size=300'], ['--vocab_size']),
    ('h.txt', b'text\n' * 99, ['--tokenizer=bpe'], ['--vocab_size']), ('i.txt', b'text\n' * 99, ['--tokenizer=bpe', '--vocab_size=99'], ['257']),
    ('j.txt', b'text\n' * 99, ['--val_fraction=0.9'], ['0.9']), ('k.txt', b'text\n' * 99, ['--val_fraction=0'], ['--val_fraction']),
    ('l.txt', b'text\n' * 99, ['--tokens_per_shard=0'], ['--tokens_per_shard']), ('m.txt', b'text\n' * 99, ['--input=missing.txt'], ['missing.txt']),
    ('n.txt', b'text\n' * 99, ['--glob=*.md', '--input=config'], ['config']), ('o.txt', b'x', ['--tokenizer=byte'], ['val']),
])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, name, data, flags, words):
    """What is found after an hour should say where it is, and a half-made data set must not pass for one."""
    (tmp_path / name).write_bytes(data)
    if name.endswith(('parquet', 'zst')):
        pytest.importorskip('pyarrow' if name.endswith('parquet') else 'zstandard')
    flags = flags if any('tokenizer' in flag for flag in flags) or '--vocab_size=300' in flags else [*flags, '--tokenizer=byte']
    done = prepare_text(tmp_path / 'out', f'--input={tmp_path / name}', *flags)
    if name.startswith('n.'):
        assert done.returncode == 0  # config/ALL.md is text
    else:
        assert done.returncode == 2
        one_line(done.stderr, 'data/prepare.py', *words)
        assert not (tmp_path / 'out').exists()


def test_a_parquet_column_without_text_is_one_line(tmp_path):
    pyarrow = pytest.importorskip('pyarrow')
    pytest.importorskip('pyarrow.parquet').write_table(pyarrow.table({'text': [1, 2, 3]}), tmp_path / 'a.parquet')
    refused(prepare_text(tmp_path / 'out', tmp_path / 'a.parquet', '--tokenizer=byte'), 'entry 1', "no text in field 'text'")


def test_bad_bytes_can_be_replaced(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'caf\xe9 ' * 20)
    assert prepare_text(tmp_path / 'out', tmp_path / 'a.txt', '--tokenizer=byte', '--bad_bytes=replace').returncode == 0
    assert bytes(ids_of(tmp_path / 'out', 'train')).decode().startswith('caf\ufffd caf\ufffd')


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, text_file):
    (tmp_path / 'file').touch()
    done = prepare_text(tmp_path / 'file' / 'out', text_file, '--tokenizer=byte')
    assert done.returncode == 2
    one_line(done.stderr, tmp_path / 'file')
    text_file.write_bytes(text_file.read_bytes() * 2)
    flags = f'--out={tmp_path / "out"}', f'--input={text_file}', '--tokenizer=byte'
    limited = 'bash', '-c', LIMITED.format('f', 1), sys.executable
    refused(command('data/prepare.py', *flags, launcher=limited), tmp_path / 'out', 'File too large', 'goes on from here')
    assert prepare_text(tmp_path / 'out', *flags[1:]).returncode == 0


