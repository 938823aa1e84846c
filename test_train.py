"""What must stay true of data and training: python -m pytest test_train.py"""
import http.server
import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
import sysconfig
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import Loader, permute, read_meta, write_dataset
from data.source import download
from data.tokenizer import TOKENIZERS, get_tokenizer

ROOT = Path(__file__).resolve().parent
T = 8  # block_size of the loader tests
BYTE = {'vocab_size': 256, 'tokenizer': {'name': 'byte'}}


# data: the loader

@pytest.fixture
def counting(tmp_path):
    """A data set of three shards in which every token's value is its position: 0..999, 1000..1099, 1100..1109."""
    ids = np.arange(1110)
    write_dataset(tmp_path, {'train_0': ids[:1000], 'train_1': ids[1000:1100], 'train_2': ids[1100:], 'val': ids[:101]},
                  {'vocab_size': 1110, 'tokenizer': {'name': 'none'}})
    return tmp_path


def first_tokens(loader, indices):
    return loader.batch(indices)[0][:, 0].tolist()


def one_line(message, *parts):
    text = str(message)
    assert '\n' not in text.strip() and all(str(part) in text for part in parts), text


@pytest.mark.parametrize('n', [*range(1, 70), 1000, 4096, 4097, 10007])
def test_permutation_is_a_bijection(n):
    """A sum that wraps at 2**64 before its modulus would send two indices to one place, once in 2**64 / n draws."""
    for key in (0, 1, 2**64 - 1):
        assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


@pytest.mark.parametrize('n', [2, 3, 4, 5])
def test_every_order_of_a_few_windows_is_equally_likely(n):
    """Too few Feistel rounds never reach some of the orders of a tiny data set."""
    keys = np.arange(12000) * 2654435761
    orders = np.stack([permute(np.full(12000, i), n, keys) for i in range(n)], axis=1)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    expected = 12000 / np.prod(np.arange(1, n + 1))
    assert len(counts) == round(12000 / expected) and (abs(counts - expected) < 5 * expected**0.5).all()


@pytest.mark.parametrize('ranks, batch_size', [(1, 1), (1, 7), (2, 3), (3, 4)])
def test_an_epoch_visits_every_window_once_on_any_number_of_ranks(counting, ranks, batch_size):
    """Per-rank random offsets, as nanoGPT draws them, repeat some windows and miss others."""
    loader = Loader(counting, 'train', T)
    n = loader.n_windows
    assert n == (999 // T - 1) + (99 // T - 1) + 1
    seen = []
    for start in range(0, n, ranks * batch_size):
        for rank in range(ranks):
            indices = np.arange(start, min(n, start + ranks * batch_size))[rank::ranks]
            seen.append(loader.batch(indices)[0])
    tokens = torch.cat(seen).flatten()
    assert len(tokens) == n * T == len(tokens.unique())


def test_a_sample_index_gives_the_same_window_in_any_batch(counting):
    """Order must not depend on how samples are grouped, or a resumed or rescaled run reads other data."""
    loader = Loader(counting, 'train', T, seed=5)
    indices = np.arange(3 * loader.n_windows)  # across epochs
    x, y = loader.batch(indices)
    again = Loader(counting, 'train', T, seed=5)
    assert torch.equal(x, torch.cat([again.batch(part)[0] for part in np.array_split(indices, 41)]))
    assert torch.equal(y, torch.cat([again.batch([i])[1] for i in indices]))
    assert not torch.equal(x, Loader(counting, 'train', T, seed=6).batch(indices)[0])
    assert torch.equal(x, Loader(counting, 'train', T, seed=5 - 2**64).batch(indices)[0])  # a negative seed is a seed


def test_targets_are_the_inputs_shifted_by_one_inside_one_shard(counting):
    """A window across two shards, or a last target past the end, would train on text that does not exist."""
    loader = Loader(counting, 'train', T)
    x, y = loader.batch(np.arange(4 * loader.n_windows))
    assert x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
    assert torch.equal(y, x + 1)
    shard = torch.bucketize(torch.stack([x, y]), torch.tensor([1000, 1100]), right=True)
    assert (shard == shard[0, :, :1]).all()


def test_epochs_differ_in_order_and_reach_every_alignment(counting):
    """Fixed window starts show a small data set at one alignment only, and it is overfitted sooner."""
    loader = Loader(counting, 'train', T)
    n = loader.n_windows
    epochs = [first_tokens(loader, np.arange(e * n, e * n + n)) for e in range(60)]
    assert len({tuple(epoch) for epoch in epochs}) == 60
    assert {start % T for epoch in epochs for start in epoch if start < 1000} == set(range(T))
    assert {start - 1100 for epoch in epochs for start in epoch if start >= 1100} == {0, 1}  # all that 10 tokens allow


def test_without_shift_every_usable_window_counts(counting):
    """Evaluation would leave out windows of val that the shift needs as room."""
    everything = [T * i for i in range(100 // T)]
    shuffled = Loader(counting, 'val', T, seed=0, shift=False)
    assert shuffled.n_windows == len(everything)
    assert first_tokens(shuffled, np.arange(len(everything))) != everything
    assert sorted(first_tokens(shuffled, np.arange(len(everything)))) == everything
    assert first_tokens(Loader(counting, 'val', T, shuffle=False), np.arange(len(everything))) == everything


def test_a_shard_of_one_window_works(tmp_path):
    """Shards of exactly block_size + 1 tokens are the smallest there are."""
    np.arange(T + 1, dtype='<u2').tofile(tmp_path / 'train.bin')
    loader = Loader(tmp_path, 'train', T)
    assert loader.n_windows == 1 and first_tokens(loader, [0, 1, 2]) == [0, 0, 0]


def test_stream_yields_what_batch_gives(counting):
    """A prefetched batch must be neither skipped, nor repeated, nor left unread at the end."""
    loader = Loader(counting, 'train', T)
    arrays = np.arange(30).reshape(6, 5)
    streamed = list(loader.stream(iter(arrays)))
    assert len(streamed) == 6 and list(loader.stream([])) == []
    for (x, y), indices in zip(streamed, arrays):
        assert torch.equal(x, loader.batch(indices)[0]) and torch.equal(y, loader.batch(indices)[1])


def test_stream_raises_the_threads_error_and_closes(counting):
    """An error in a thread is silent unless somebody asks for the result; a generator left early must not hang."""
    loader = Loader(counting, 'train', T, vocab_size=1000, shuffle=False)
    stream = loader.stream([i] for i in range(10**9))
    for i in range(999 // T):
        assert next(stream)[0][0, 0] == i * T
    with pytest.raises(ValueError, match='vocab_size 1000'):
        next(stream)
    threads = threading.active_count()
    stream = loader.stream([i] for i in range(10**9))
    next(stream)
    assert threading.active_count() == threads + 1
    stream.close()
    assert threading.active_count() == threads


@pytest.mark.parametrize('bad_token', [20, 24])
def test_an_id_past_the_vocabulary_is_named_with_its_place(tmp_path, bad_token):
    """On a GPU such an id is an assertion of the embedding kernel that names nothing; token 24 is only a target."""
    ids = np.zeros(25, '<u2')
    ids[bad_token] = 65
    ids.tofile(tmp_path / 'train.bin')
    loader = Loader(tmp_path, 'train', T, vocab_size=65, shuffle=False)
    with pytest.raises(ValueError) as e:
        loader.batch([0, 1, 2])
    one_line(e.value, tmp_path / 'train.bin', 'id 65', f'token {bad_token} ', 'vocab_size 65')
    assert Loader(tmp_path, 'train', T, vocab_size=66).batch([0])[0].shape == (1, T)


def rewrite(path, change):
    path.write_bytes(change(path.read_bytes()))


BAD_SHARDS = {
    'odd length': (lambda b: b[:-1], 'whole number'),
    'cut': (lambda b: b[:-2], '99 tokens'),
    'grown': (lambda b: b + b, '200 tokens'),
    'empty': (lambda b: b'', 'empty'),
    'flipped bit': (lambda b: b[:77] + bytes([b[77] ^ 1]) + b[78:], 'crc32'),
    'zero tail': (lambda b: b[:100] + bytes(100), 'crc32'),
}


@pytest.mark.parametrize('case', BAD_SHARDS)
@pytest.mark.parametrize('name', ['train_0.bin', 'train_1.bin'])
def test_a_damaged_shard_is_refused_by_name(tmp_path, case, name):
    """nanoGPT reads whatever is in the file, and trains on it."""
    change, says = BAD_SHARDS[case]
    write_dataset(tmp_path, {'train_0': bytes(range(1, 101)), 'train_1': bytes(range(100))}, BYTE)
    Loader(tmp_path, 'train', T)
    rewrite(tmp_path / name, change)
    with pytest.raises(ValueError) as e:
        Loader(tmp_path, 'train', T)
    one_line(e.value, tmp_path / name, says, 'prepare.py')


def test_damage_is_noticed_without_meta_json(tmp_path):
    """Files that nanoGPT prepared have no checksum; length and a tail of zeros still say something."""
    path = tmp_path / 'train.bin'
    for data, says in [(b'', 'empty'), (bytes(101), 'whole number'), (bytes(2 * T), 'block_size'),
                       (b'\1\0' * 5000 + bytes(2048), 'zeros')]:
        path.write_bytes(data)
        with pytest.raises(ValueError) as e:
            Loader(tmp_path, 'train', T)
        one_line(e.value, path, says)


def test_missing_files_and_strangers_are_named(counting, tmp_path):
    """A lost shard, or one left over from an earlier preparation, changes the data without a word."""
    with pytest.raises(ValueError) as e:
        Loader(counting / 'nowhere', 'train', T)
    one_line(e.value, counting / 'nowhere', 'prepare.py')
    with pytest.raises(ValueError) as e:
        Loader(counting, 'test', T)
    one_line(e.value, counting / 'test*.bin', 'prepare.py')
    with pytest.raises(ValueError) as e:
        Loader(counting, 'train', 10)
    one_line(e.value, counting / 'train_2.bin', '10 tokens', 'block_size + 1 = 11')
    (counting / 'train_2.bin').rename(counting / 'train_3.bin')
    with pytest.raises(ValueError) as e:
        Loader(counting, 'train', T)
    one_line(e.value, counting / 'train_2.bin', 'missing')


@pytest.mark.parametrize('text', ['{"dtype": "float32"}', '{"dtype": ["uint16"]}', '{"files": [1]}', '{"vocab_size": "65"}',
                                  '{', '[]', '\0\xff'])
def test_a_malformed_meta_json_is_named(tmp_path, text):
    """A KeyError or TypeError from deep inside tells nobody which file is wrong."""
    (tmp_path / 'meta.json').write_bytes(text.encode('latin-1'))
    np.arange(100, dtype='<u2').tofile(tmp_path / 'train.bin')
    with pytest.raises(ValueError) as e:
        Loader(tmp_path, 'train', T)
    one_line(e.value, tmp_path / 'meta.json')


def test_wrong_dtype_in_meta_json_is_refused(counting):
    """uint16 ids read as uint32 are half as many, and nonsense."""
    rewrite(counting / 'meta.json', lambda b: b.replace(b'uint16', b'uint32'))
    with pytest.raises(ValueError, match='500 tokens of uint32, meta.json says 1000'):
        Loader(counting, 'train', T)


def test_uint32_ids_survive(tmp_path):
    """Vocabularies past 65536 do not fit into uint16, where they would wrap."""
    ids = np.arange(65530, 65630)
    assert write_dataset(tmp_path, {'train': ids}, {'vocab_size': 65630, 'tokenizer': {'name': 'none'}})['dtype'] == 'uint32'
    assert Loader(tmp_path, 'train', 99, shuffle=False).batch([0])[1].tolist() == [ids[1:].tolist()]


def llmc_shard(n_tokens, version=1, says=None):
    header = np.zeros(256, '<i4')
    header[:3] = 20240520, version, n_tokens if says is None else says
    return header.tobytes() + np.arange(n_tokens, dtype='<u2').tobytes()


def test_llmc_header_is_skipped_and_checked(tmp_path):
    """Read as tokens, the header is 512 ids of nonsense."""
    path = tmp_path / 'train_000.bin'
    path.write_bytes(llmc_shard(100))
    loader = Loader(tmp_path, 'train', T, shuffle=False)
    assert loader.n_tokens == 100 and first_tokens(loader, [0, 1]) == [0, T]
    for data in (llmc_shard(100, version=2), llmc_shard(100, says=101), llmc_shard(100)[:-1]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="train_000.bin: llm.c's header"):
            Loader(tmp_path, 'train', T)


# data: nanoGPT's meta.pkl

def test_nanogpts_pickle_is_read(tmp_path):
    """Data sets prepared with nanoGPT keep working."""
    itos = dict(enumerate('\n abc'))
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 5, 'itos': itos, 'stoi': {c: i for i, c in itos.items()}}))
    meta = read_meta(tmp_path)
    assert meta['dtype'] == 'uint16' and meta['vocab_size'] == 5
    assert get_tokenizer(meta['tokenizer']).encode('a b\n') == [2, 1, 3, 0]
    assert read_meta(tmp_path / 'elsewhere') == {}


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_does_not_execute(tmp_path):
    """pickle.load runs whatever the file names."""
    bomb = Bomb()
    Bomb.path = tmp_path / 'executed'
    for value in ({'vocab_size': bomb}, bomb, b'', b'junk', [1], {'vocab_size': 3}):
        data = value if isinstance(value, bytes) else pickle.dumps(value)
        (tmp_path / 'meta.pkl').write_bytes(data)
        with pytest.raises(ValueError) as e:
            read_meta(tmp_path)
        one_line(e.value, tmp_path / 'meta.pkl')
    assert not Bomb.path.exists()


# data: writing

def test_meta_json_says_what_was_written(tmp_path):
    """Checksums are what later damage is noticed by."""
    write_dataset(tmp_path, {'train': b'abc', 'val': np.array([255])}, {**BYTE, 'source': 'here'})
    assert (tmp_path / 'train.bin').read_bytes() == b'a\0b\0c\0'
    assert read_meta(tmp_path) == {
        **BYTE, 'source': 'here', 'dtype': 'uint16', 'files': {
            'train.bin': {'tokens': 3, 'crc32': zlib.crc32(b'a\0b\0c\0')},
            'val.bin': {'tokens': 1, 'crc32': zlib.crc32(b'\xff\0')}}}


def test_ids_that_do_not_fit_are_not_written(tmp_path):
    """astype(uint16) wraps in silence."""
    for ids, says in [([1, 2, 70000], '70000'), ([1, -1], '-1'), ([], 'empty')]:
        with pytest.raises(ValueError) as e:
            write_dataset(tmp_path, {'train': [1], 'val': ids}, BYTE)
        one_line(e.value, tmp_path / 'val.bin', says)
    assert list(tmp_path.iterdir()) == []


def test_failing_writes_leave_the_old_data_set_and_nothing_temporary(counting, monkeypatch):
    """A half-written shard under its final name is trained on."""
    before = {path: path.read_bytes() for path in counting.iterdir()}
    calls = []

    def full_disk(fd):
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full_disk)
    with pytest.raises(OSError):
        write_dataset(counting, {'train_0': b'new', 'val': b'new'}, BYTE)
    assert {path: path.read_bytes() for path in counting.iterdir()} == before


# data: tokenizers

TEXTS = ['', 'First Citizen:\n', 'naïve café', '👩‍🚀 \U0001f9d1🏽', '\0\x01\t\r\n\x7f\u2028', 'ﷺ 漢字 ' * 3]


def tokenizer_named(name):
    if name == 'char':
        return get_tokenizer({'name': 'char', 'chars': sorted(set(''.join(TEXTS)))})
    try:
        return get_tokenizer(name)
    except ValueError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize('name', TOKENIZERS)
def test_tokenizers_round_trip(name):
    """Splitting text anywhere but between characters, or in another order, loses it on the way back."""
    tokenizer = tokenizer_named(name)
    again = get_tokenizer(json.loads(json.dumps(tokenizer.spec)))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert isinstance(ids, list) and all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text and tokenizer.decode(torch.tensor(ids)) == text
        assert b''.join(tokenizer.decode_bytes([i]) for i in ids) == text.encode('utf-8')
        assert again.encode(text) == ids
        n_bytes = tokenizer.token_bytes()
        assert n_bytes.shape == (tokenizer.vocab_size,)
        assert n_bytes[ids].sum() == len(text.encode('utf-8')) - ids.count(tokenizer.eot)
    for i in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f'id {i} '):
            tokenizer.decode([i])


def test_gpt2_ids_are_tiktokens():
    """Another split or another vocabulary would make pretrained weights useless."""
    tokenizer, tiktoken = tokenizer_named('gpt2'), pytest.importorskip('tiktoken')
    for text in TEXTS:
        assert tokenizer.encode(text) == tiktoken.get_encoding('gpt2').encode_ordinary(text)
    assert tokenizer.encode('a<|endoftext|>') == [64, 50256] and tokenizer.eot == 50256 and tokenizer.vocab_size == 50257


def test_invalid_utf8_becomes_a_replacement_character():
    """A model can sample half a character; that must not end the program."""
    assert get_tokenizer('byte').decode([104, 255, 105]) == 'h\ufffdi'


@pytest.mark.parametrize('spec', ['bpe', {'name': 'bpe'}, {}, None, 7])
def test_unknown_tokenizers_list_the_choices(spec):
    """A bare KeyError does not say what there is."""
    with pytest.raises(ValueError, match='byte, char, gpt2'):
        get_tokenizer(spec)


def test_a_character_outside_the_vocabulary_is_named():
    """nanoGPT ends in a KeyError."""
    with pytest.raises(ValueError, match=r"character '€' .*'abc'"):
        get_tokenizer({'name': 'char', 'chars': 'abc'}).encode('a€')
    for chars in ('', 'aa', ['ab'], None):
        with pytest.raises(ValueError, match='chars'):
            get_tokenizer({'name': 'char', 'chars': chars})


# data: the prepare scripts

@pytest.fixture
def prepare(monkeypatch, capsys):
    """prepare(name, *flags): run data/name/prepare.py as a script; returns its exit status and the last it printed."""
    def run(name, *flags):
        script = ROOT / 'data' / name / 'prepare.py'
        monkeypatch.setattr(sys, 'argv', [str(script), *map(str, flags)])
        try:
            runpy.run_path(str(script), run_name='__main__')
            status, message = 0, ''
        except SystemExit as e:
            status, message = (1, e.code) if isinstance(e.code, str) else (e.code or 0, '')
        printed = capsys.readouterr()
        return status, message or printed.err or printed.out
    return run


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / 'text.txt'
    path.write_bytes('Où sont les neiges d’antan?\r\n'.encode() * 40)
    return path


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
    for flags, status, says in [(['--input=nowhere.txt'], 1, 'nowhere.txt'), ([f'--input={tmp_path}'], 1, tmp_path),
                                ([f'--input={tmp_path}/empty'], 1, 'is empty'), ([f'--input={tmp_path}/latin'], 1, 'UTF-8'),
                                (['--inptu=x'], 2, '--inptu'), (['x'], 2, 'x'), ([], 1, '--input=FILE')]:
        got = prepare(name, f'--out_dir={out}', *flags)
        assert got[0] == status
        one_line(got[1], says, f'data/{name}/prepare.py')
        assert not out.exists()


@pytest.mark.parametrize('name', ['shakespeare_char', 'shakespeare', 'pystdlib'])
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
        assert done.returncode == 1 and list(out.iterdir()) == []
        one_line(done.stderr, 'File too large')
    assert not [path for path in out.iterdir() if path.suffix != '.tmp']


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if 'short' in self.path or 'whole' in self.path else 404)
        self.send_header('Content-Length', '9' if 'short' in self.path else '5')
        self.end_headers()
        self.wfile.write(b'hello')

    def log_message(self, *args):
        pass


def test_a_failed_download_leaves_no_file(tmp_path, monkeypatch):
    """nanoGPT writes a 404 page to input.txt and trains on it."""
    monkeypatch.setenv('no_proxy', '*')
    with http.server.HTTPServer(('127.0.0.1', 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}'
        for name, says in [('missing', '404'), ('short', 'IncompleteRead')]:
            with pytest.raises(ValueError) as e:
                download(f'{url}/{name}', tmp_path / 'input.txt')
            one_line(e.value, url, says, '--input=FILE')
        assert list(tmp_path.iterdir()) == []
        download(f'{url}/whole', tmp_path / 'input.txt')
        download(f'{url}/missing', tmp_path / 'input.txt')  # there already, so nothing is fetched
        server.shutdown()
    assert (tmp_path / 'input.txt').read_bytes() == b'hello'
