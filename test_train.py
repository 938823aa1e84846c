"""What must stay true of data and training: python -m pytest test_train.py"""
import gzip
import http.server
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from data import loader
from data.loader import Loader, Mixture, find_datasets, fingerprint, mean_and_error, permute, prepare_facts, read_meta, write_dataset
from data.prepare import cut_before
from data.source import download
from data.tokenizer import get_tokenizer, tokenizer_from_file, train_bpe
from model import GPT, GPTConfig, load_checkpoint, newest_checkpoint

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
    good = []
    with pytest.raises(ValueError, match='vocab_size 1000'):
        for x, _ in stream:
            good.append(x[0, 0].item())
    assert good == [i * T for i in range(len(good))] and 999 // T - 16 < len(good) <= 999 // T  # up to 16 batches are read together
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


def test_a_large_shard_is_read_whole_once_until_it_changes(tmp_path, monkeypatch):
    """Every start of every rank read 20 GB of FineWeb for its checksums."""
    write_dataset(tmp_path, {'train_0': b'\1' * 2**25, 'val': b'\1' * 100}, BYTE)
    read = []
    whole = loader.crc32.__wrapped__
    monkeypatch.setattr(loader, 'crc32', lambda path, *args: (read.append(path.name), whole(path, *args))[1])
    for split, reads in [('train', ['train_0.bin']), ('train', []), ('val', ['val.bin']), ('val', ['val.bin'])]:
        Loader(tmp_path, split, T)
        assert read == reads
        read.clear()
    with open(tmp_path / 'train_0.bin', 'r+b') as f:
        f.seek(1000)
        f.write(b'\7')
    for _ in range(2):
        with pytest.raises(ValueError, match='crc32'):
            Loader(tmp_path, 'train', T)


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


def llama_json(metaspace=False):
    """A tokenizer.json of LLaMA 2's kind: no byte-level, spaces as U+2581, one before the text, bytes outside the vocabulary as <0xNN>."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
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


KINDS = ['byte', 'char', 'gpt2', 'bpe', 'byte-level of llama 3', 'llama', 'llama metaspace']


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


@pytest.mark.parametrize('name', KINDS)
def test_tokenizers_round_trip(name):
    """Splitting text anywhere but between characters, or in another order, loses it on the way back."""
    tokenizer = tokenizer_named(name)
    again = get_tokenizer(json.loads(json.dumps(tokenizer.spec)))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert isinstance(ids, list) and all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text and tokenizer.decode(torch.tensor(ids)) == text
        prefix = b' ' if name.startswith('llama') and text else b''
        assert b''.join(tokenizer.decode_bytes([i]) for i in ids) == prefix + text.encode('utf-8')
        assert again.encode(text) == ids == tokenizer.encode_corpus(text).tolist()
        n_bytes = tokenizer.token_bytes()
        assert n_bytes.shape == (tokenizer.vocab_size,)
        assert n_bytes[ids].sum() == len(prefix + text.encode('utf-8')) - ids.count(tokenizer.eot)
    for i in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f'id {i} '):
            tokenizer.decode([i])


def test_gpt2_ids_are_tiktokens():
    """Another split or another vocabulary would make pretrained weights useless."""
    tokenizer, tiktoken = tokenizer_named('gpt2'), pytest.importorskip('tiktoken')
    for text in TEXTS:
        assert tokenizer.encode(text) == tiktoken.get_encoding('gpt2').encode_ordinary(text)
    assert tokenizer.encode('a<|endoftext|>') == [64, 50256] and tokenizer.eot == 50256 and tokenizer.vocab_size == 50257


def test_any_encoding_of_tiktokens_is_read(monkeypatch):
    """cl100k_base has ids between its special tokens that stand for nothing, and more than one special token."""
    registry = pytest.importorskip('tiktoken.registry')
    ranks = {bytes([b]): b for b in range(256)} | {b'ab': 256}
    monkeypatch.setitem(registry.ENCODING_CONSTRUCTORS or registry._find_constructors() or registry.ENCODING_CONSTRUCTORS, 'holes', lambda: dict(
        name='holes', pat_str=r'\w+|\W+', mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 260, '<|fim|>': 262}))
    tokenizer = get_tokenizer({'name': 'holes'})
    assert tokenizer.vocab_size == 263 and tokenizer.eot == 260 and tokenizer.table[256:] == [b'ab', b'', b'', b'', b'<|endoftext|>', b'', b'<|fim|>']
    assert tokenizer.encode('ab<|fim|>') == [256, 262] and tokenizer.token_bytes()[255:].tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
    assert tokenizer.decode(tokenizer.encode_corpus('ab<|fim|>')) == 'ab<|fim|>' and 262 not in tokenizer.encode_corpus('ab<|fim|>')


@pytest.mark.parametrize('name', ['bpe', 'byte-level of llama 3', 'llama', 'llama metaspace'])
def test_ids_of_a_tokenizer_json_are_the_librarys(name):
    """The file says much that is easily left out: normalizers, the space before a text, bytes outside the vocabulary."""
    tokenizer, tokenizers = tokenizer_named(name), pytest.importorskip('tokenizers')
    reader = tokenizers.Tokenizer.from_str(tokenizer.spec['json'])
    eot = {'bpe': '<|endoftext|>', 'byte-level of llama 3': '<|end_of_text|>'}.get(name, '</s>')
    assert tokenizer.spec['eot'] == eot and tokenizer.eot == reader.token_to_id(eot) and tokenizer.vocab_size == reader.get_vocab_size()
    for text in TEXTS + [' the mat', '  the', "12345 I'LL\n\n  go.\n", f'the{eot} end']:
        ids = reader.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == reader.decode(ids, skip_special_tokens=False)
    corpus = tokenizer.encode_corpus(f'the{eot} end').tolist()
    assert tokenizer.eot not in corpus and tokenizer.decode(corpus) == f'the{eot} end' and tokenizer.encode(f'the{eot}')[-1] == tokenizer.eot
    assert tokenizer.token_bytes()[tokenizer.eot] == 0
    reader.enable_truncation(3)
    reader.enable_padding(length=9)
    assert get_tokenizer({'name': 'huggingface', 'json': reader.to_str()}).encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])


def test_a_byte_level_token_may_have_other_characters():
    """A token that was put into the vocabulary by hand is not written in GPT-2's characters for bytes."""
    tokenizers = pytest.importorskip('tokenizers')
    config = json.loads(llama3_json())
    config['model']['vocab'] |= {'a \u2581': 400, '\u4e2d': 401}
    tokenizer = get_tokenizer({'name': 'huggingface', 'json': json.dumps(config)})
    reader = tokenizers.Tokenizer.from_str(json.dumps(config))
    assert [tokenizer.decode([i]) for i in (400, 401)] == [reader.decode([i]) for i in (400, 401)] == ['a \u2581', '\u4e2d']


def test_what_is_no_tokenizer_json_is_one_line(tmp_path):
    """The library's own errors are of no class of its own."""
    tokenizers = pytest.importorskip('tokenizers')
    lossy = tokenizers.Tokenizer(tokenizers.models.WordPiece({'[UNK]': 0}))
    lossy.decoder = tokenizers.decoders.WordPiece()
    for text, says in [('{}', 'not a tokenizer.json'), ('no', 'not a tokenizer.json'), (lossy.to_str(), 'cannot give back the text')]:
        (tmp_path / 'tokenizer.json').write_text(text)
        with pytest.raises(ValueError) as e:
            tokenizer_from_file(tmp_path)
        one_line(e.value, tmp_path / 'tokenizer.json', says)
    (tmp_path / 'tokenizer.json').write_text(llama_json())
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": {"content": "<s>"}}')
    assert tokenizer_from_file(tmp_path).eot == tokenizer_from_file(tmp_path / 'tokenizer.json').eot == 1


@pytest.mark.parametrize('name', KINDS)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(name, monkeypatch):
    """Cut between two letters, a word has other tokens; a space before each piece would be in the text it gives back."""
    tokenizer = tokenizer_named(name if name != 'char' else 'byte')
    text = ('The cat sat on the mat.\nIn the end,\n\n    all is well: 漢字 naïve\n' * 40 + 'x' * 700 + '漢' * 300 + '  \n' * 90 + 'the end\r\nof it' * 99)
    rest, ids = text.encode(), []
    while rest:
        end = cut_before(rest, 500) if len(rest) > 500 else len(rest)
        assert 0 < end <= 500
        piece, continued = rest[:end].decode(), len(rest) < len(text.encode())
        ids, rest = ids + tokenizer.encode_corpus(piece, continued).tolist(), rest[end:]
    assert tokenizer.decode(ids) == text
    ordinary = text[:text.index('xxx')]
    first = len(tokenizer.encode_corpus(ordinary[:2000]))
    assert ids[:first - 5] == tokenizer.encode_corpus(text).tolist()[:first - 5]


def test_invalid_utf8_becomes_a_replacement_character():
    """A model can sample half a character; that must not end the program."""
    assert get_tokenizer('byte').decode([104, 255, 105]) == 'h\ufffdi'


@pytest.mark.parametrize('spec', ['bpe', {'name': 'bpe'}, 'huggingface', {}, None, 7])
def test_unknown_tokenizers_list_the_choices(spec):
    """A bare KeyError does not say what there is."""
    with pytest.raises(ValueError, match='byte, char, gpt2, .*cl100k_base.* tokenizer.json'):
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
            status = 0
        except SystemExit as e:
            status = e.code or 0
        printed = capsys.readouterr()
        return status, printed.err or printed.out
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

DOCUMENTS = [f'{text} document {n}\nwith <|endoftext|> in it' + '.' * (n % 7) + '\n' for n, text in enumerate(TEXTS * 10)]


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


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob('*.bin'))}


def ids_of(folder, split):
    meta = read_meta(folder)
    return np.concatenate([np.fromfile(path, f"<u{int(meta['dtype'][4:]) // 8}") for path in sorted(Path(folder).glob(f'{split}_*.bin'))]).tolist()


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


# data: the recipes, with files of the same format from a folder and from a hub on this machine

def sample_of(recipe, folder):
    """Small files as the data set of a recipe has them: {name: bytes}."""
    folder.mkdir(exist_ok=True)
    if recipe == 'slimpajama_627b':
        zstandard = pytest.importorskip('zstandard')
        part = lambda first, last: zstandard.ZstdCompressor().compress(b''.join(json.dumps(
            {'text': text, 'meta': {'redpajama_set_name': 'RedPajamaC4'}}).encode() + b'\n' for text in DOCUMENTS[first:last]))
        return {'train/chunk1/example_train_0.jsonl.zst': part(0, 20), 'train/chunk1/example_train_1.jsonl.zst': part(20, 30),
                'train/chunk2/example_train_0.jsonl.zst': part(30, 50), 'validation/chunk1/example_holdout_0.jsonl.zst': part(50, 60), 'README.md': b'no data'}
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')

    def part(first, last):
        parquet.write_table(pyarrow.table({'text': DOCUMENTS[first:last]}), folder / 'part')
        return (folder / 'part').read_bytes()
    if recipe == 'openwebtext':
        return {'README.md': b'no data', **{f'plain_text/train-0000{n}-of-00003.parquet': part(20 * n, 20 * n + 20) for n in range(3)}}
    return {'data/train-00000-of-00002-ab2b.parquet': part(0, 20), 'data/train-00001-of-00002-cd3c.parquet': part(20, 50),
            'data/validation-00000-of-00001-869c.parquet': part(50, 60), 'data/test-00000-of-00001-9a.parquet': part(0, 9)}


RECIPES = ['openwebtext', 'slimpajama_627b', 'slimpajama_6b', 'tinystories']


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of Hugging Face as huggingface_hub asks for; files are {name: bytes}, fetched counts downloads, and names in broken answer 403."""
    protocol_version = 'HTTP/1.1'
    files, fetched, broken = {}, [], set()

    def do_GET(self):
        path, status, headers = self.path.split('?')[0], 200, {'X-Repo-Commit': 'c0ffee' * 6 + 'abcd'}
        name = path.split('/resolve/')[-1].split('/', 1)[-1]
        if '/resolve/' in path and name in self.files and name not in self.broken:
            body = self.files[name]
            headers |= {'ETag': f'"{zlib.crc32(body)}"', 'Accept-Ranges': 'bytes'}
            first = int((re.findall(r'bytes=(\d+)-', self.headers.get('Range', '')) or ['0'])[0])
            if first:
                status, headers, body = 206, headers | {'Content-Range': f'bytes {first}-{len(body) - 1}/{len(body)}'}, body[first:]
            if self.command == 'GET':
                self.fetched.append(name)
        elif '/tree/' in path:
            body = json.dumps([{'type': 'directory', 'path': 'data', 'oid': '0'}, *(
                {'type': 'file', 'path': name, 'size': len(data), 'oid': str(zlib.crc32(data))} for name, data in self.files.items())]).encode()
        elif path.startswith('/api/datasets/') and '/resolve/' not in path:
            body = json.dumps({'id': path.removeprefix('/api/datasets/'), 'sha': 'c0ffee' * 6 + 'abcd', 'tags': [], 'siblings': []}).encode()
        else:
            status, body = 403 if name in self.broken else 404, b'{}'  # 500 would be tried again for half a minute
        self.send_response(status)
        for key, value in {**headers, 'Content-Type': 'application/json', 'Content-Length': len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    pytest.importorskip('huggingface_hub')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Hub.fetched, Hub.broken = [], set()
        yield {'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'HF_HOME': str(tmp_path / 'home'), 'no_proxy': '*', 'HF_HUB_DISABLE_XET': '1'}
        server.shutdown()


@pytest.mark.parametrize('recipe', RECIPES)
def test_recipes_fetch_resume_and_read_local_samples_alike(tmp_path, hub, recipe):
    """A download that ends after a day should not begin again, and what the recipe reads from the hub is what it reads from a folder."""
    Hub.files = sample_of(recipe, tmp_path / 'sample')
    for name, data in Hub.files.items():
        (tmp_path / 'sample' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'sample' / name).write_bytes(data)
    local = {split: [tmp_path / 'sample' / name for name in sorted(Hub.files) if pattern in name] for split, pattern in
             [('input', 'train'), ('val_input', 'validation')]}
    script, flags = f'data/{recipe}/prepare.py', ['--tokenizer=byte', '--val_fraction=0.1']
    done = command(script, *flags, f'--out_dir={tmp_path / "local"}', *(f'--{flag}={path}' for flag, paths in local.items() for path in paths))
    assert done.returncode == 0, done.stderr
    wanted = [name for name in sorted(Hub.files) if 'train-' in name or 'train_' in name or 'validation' in name]
    Hub.broken = {wanted[1]}
    done = command(script, *flags, f'--out_dir={tmp_path / "out"}', env=hub)
    assert done.returncode == 2 and 'GB to download' in done.stdout and 'of disk' in done.stdout and not shards(tmp_path / 'out')
    one_line(done.stderr, script, 'Hugging Face', '--input=PATH', 'goes on')
    assert wanted[0] in Hub.fetched and wanted[1] not in Hub.fetched
    Hub.broken = set()
    done = command(script, *flags, f'--out_dir={tmp_path / "out"}', env=hub)
    assert done.returncode == 0, done.stderr
    assert sorted(Hub.fetched) == wanted  # each once
    assert shards(tmp_path / 'out') == shards(tmp_path / 'local') and {path.name for path in (tmp_path / 'out').iterdir()} == {'meta.json', *shards(tmp_path / 'out')}
    text = {split: bytes(ids_of(tmp_path / 'out', split)) for split in ('train', 'val')}
    if recipe != 'openwebtext':  # whose val is drawn from the rest
        assert text == {'train': b''.join(d.encode() + b'\0' for d in DOCUMENTS[:50]), 'val': b''.join(d.encode() + b'\0' for d in DOCUMENTS[50:])}
    assert len(text['train']) + len(text['val']) == sum(len(d.encode()) + 1 for d in DOCUMENTS)


def test_recipes_take_llamas_tokenizer(tmp_path):
    """SlimPajama is mostly trained on with LLaMA's."""
    pytest.importorskip('tokenizers')
    (tmp_path / 'tokenizer.json').write_text(llama_json())
    files = sample_of('slimpajama_627b', tmp_path / 'sample')
    (tmp_path / 'a.jsonl.zst').write_bytes(files['train/chunk1/example_train_0.jsonl.zst'])
    done = command('data/slimpajama_627b/prepare.py', f'--input={tmp_path / "a.jsonl.zst"}', f'--tokenizer={tmp_path}', '--val_fraction=0.2', f'--out_dir={tmp_path / "out"}')
    assert done.returncode == 0, done.stderr
    tokenizer = get_tokenizer(read_meta(tmp_path / 'out')['tokenizer'])
    ids = ids_of(tmp_path / 'out', 'train')
    first = tokenizer.decode(ids[:ids.index(tokenizer.eot)])
    assert first in DOCUMENTS[:2] and ids.count(tokenizer.eot) == 16


def test_ready_made_shards_are_fetched_as_they_are(tmp_path, hub):
    """llm.c's shards need no tokenizer; a cut one must not get a name."""
    Hub.files = {'fineweb_val_000000.bin': llmc_shard(90), **{f'fineweb_train_{n:06d}.bin': llmc_shard(100 + n) for n in range(1, 5)}}
    script, out = 'data/fineweb10B/prepare.py', tmp_path / 'out'
    Hub.broken = {'fineweb_train_000002.bin'}
    refused(command(script, '--shards=3', f'--out_dir={out}', env=hub), script, 'Hugging Face')
    assert not shards(out)
    Hub.broken = set()
    done = command(script, '--shards=3', f'--out_dir={out}', env=hub)
    assert done.returncode == 0 and sorted(Hub.fetched) == sorted(name for name in Hub.files if '4' not in name), done.stderr
    assert {path.name for path in out.iterdir()} == {'meta.json', 'val_000000.bin', *(f'train_{n:06d}.bin' for n in (1, 2, 3))}
    assert read_meta(out)['files']['train_000002.bin']['tokens'] == 102 and Loader(out, 'train', T).n_tokens == 306
    folder = tmp_path / 'folder'
    folder.mkdir()
    for name, data in Hub.files.items():
        (folder / name).write_bytes(data)
    assert command(script, '--shards=3', f'--input={folder}', f'--out_dir={tmp_path / "copy"}').returncode == 0
    assert shards(tmp_path / 'copy') == shards(out)
    (folder / 'fineweb_train_000002.bin').write_bytes(llmc_shard(102)[:-2])
    refused(command(script, '--shards=3', f'--input={folder}', f'--out_dir={tmp_path / "cut"}'), 'fineweb_train_000002.bin')
    assert not shards(tmp_path / 'cut')


@pytest.mark.parametrize('name', [*RECIPES, 'fineweb10B'])
def test_recipes_say_what_they_take(name):
    """train.py prints the size of a download instead of starting it, and the page of flags says both sizes."""
    facts = prepare_facts(ROOT / 'data' / name / 'prepare.py')
    done = command(f'data/{name}/prepare.py', '--help')
    assert done.returncode == 0 and 'GB' in done.stdout and facts['about'] in done.stdout and facts['download_mb'] > 1000 and facts['vocab_size'] == 50257
    refused(command('train.py', f'--dataset={name}', '--device=cpu', f'--out_dir=/nonexistent/{name}'), f"{facts['download_mb']:,} MB", f'python data/{name}/prepare.py')


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


# data: what an evaluation says of its windows

def autoregressive(rho, n, rows, seed=0):
    """(rows, n) values of mean 0 and variance 1 of which neighbours correlate by rho."""
    noise = np.random.default_rng(seed).standard_normal((rows, n))
    values = noise.copy()
    for i in range(1, n):
        values[:, i] = rho * values[:, i - 1] + math.sqrt(1 - rho ** 2) * noise[:, i]
    return values


T_975 = {9: 2.262, 15: 2.131, 30: 2.042, 40: 2.021}  # Student's t by degrees of freedom, from the usual table


@pytest.mark.parametrize('n', [100, 256, 1000, 1700])
@pytest.mark.parametrize('rho', [0.0, 0.5])
def test_an_interval_of_batch_means_covers_the_true_mean(rho, n):
    """An error as if windows were independent: with rho 0.5 its interval has the true mean, here 0, in 74 % of the cases and not in 95 %."""
    found = [mean_and_error(row) for row in autoregressive(rho, n, rows=2000)]
    mean, error, df = map(np.array, zip(*found))
    assert set(df) == {math.isqrt(n) - 1}
    covered = (abs(mean) < T_975[df[0]] * error).mean()
    assert (0.935 if rho == 0 else 0.90 if n == 100 else 0.92) < covered < 0.965, covered
    naive = 1 / math.sqrt(n)
    assert np.sqrt((error ** 2).mean()) / naive == pytest.approx(1.0 if rho == 0 else math.sqrt(3), rel=0.1)  # (1 + rho) / (1 - rho) = 3, for large n


def test_the_standard_error_is_that_of_block_means():
    """By hand: blocks (1, 2), (3, 8) have means 1.5 and 5.5, whose standard deviation is sqrt(8); below 4 values there is none."""
    mean, error, df = mean_and_error([1, 2, 3, 8])
    assert (mean, df) == (3.5, 1) and error == pytest.approx(math.sqrt(8) / math.sqrt(2))
    assert mean_and_error([1, 2, 6])[0] == 3 and math.isnan(mean_and_error([1, 2, 6])[1])
    assert mean_and_error(np.ones(11))[1] == 0  # blocks of 4, 4 and 3


def test_a_fingerprint_tells_windows_and_not_their_order():
    """Two runs that were evaluated on other text taken for comparable, or the same text for other."""
    windows = np.random.default_rng(0).integers(0, 1000, (50, 9))
    whole = fingerprint(windows)
    assert whole == fingerprint(windows[::-1]) == fingerprint(windows[:7]) + fingerprint(torch.from_numpy(windows[7:])) == sum(map(zlib.crc32, windows.astype('<i8')))
    windows[3, 4] += 1
    assert whole != fingerprint(windows)


# whole runs, through the command line

TINY = ('--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 --gradient_accumulation_steps=2 --dropout=0.1 --max_iters=20 '
        '--lr_decay_iters=20 --warmup_iters=2 --eval_interval=100 --eval_iters=2 --learning_rate=1e-3 --min_lr=1e-4 '
        '--sample_interval=0 --device=cpu --dtype=float32 --compile=False --peak_tflops=1').split()


@pytest.fixture(scope='module')
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


@pytest.fixture(scope='module')
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


def test_resume_continues_bit_for_bit(text_set, finished, tmp_path):
    """Dropout's random numbers, AdamW's moments or the data order starting over after a resume."""
    out_dir, _ = finished
    half = copy_run(out_dir, tmp_path / 'half', 'ckpt_prev.pt')
    assert checkpoint(half)['iter_num'] == 10
    assert train(text_set, half, '--init_from=resume').returncode == 0
    assert_equal_states(checkpoint(out_dir), checkpoint(half))
    assert losses(half) == {i: loss for i, loss in losses(out_dir).items() if i >= 10}
    (run,) = run_logs(half)
    seconds = checkpoint(out_dir, 'ckpt_prev.pt')['train_seconds'] + sum(e['time_ms'] for e in run['training_iterations']) / 1000
    assert run['eval_steps'][-1]['train_seconds'] == pytest.approx(seconds) == checkpoint(half)['train_seconds'] and run['eval_steps'][-1]['tokens'] == 20 * 2 * 4 * 16


def test_a_small_run_does_not_import_the_compiler(text_set, tmp_path):
    """A second of every start goes into torch.compile's front end, where nothing is compiled."""
    done = train(text_set, tmp_path, '--max_iters=3', '--compile=False', launcher=(sys.executable, '-X', 'importtime'))
    assert done.returncode == 0 and re.search(r'\| +torch\n', done.stderr) and not re.search(r'torch\._dynamo|sympy', done.stderr), done.stderr[-2000:]


MUON = '--optimizer=muon', '--arch_preset=modern', '--muon_learning_rate=0.03', '--muon_momentum=0.9'


def test_a_run_with_muon_resumes_bit_for_bit(text_set, tmp_path):
    """Muon's momentum lost or given to another matrix; its learning rate out of step with the schedule; moments of one optimizer taken for the other's."""
    whole, half = tmp_path / 'whole', tmp_path / 'half'
    done = train(text_set, whole, *MUON, '--save_interval=10')
    assert done.returncode == 0 and ', qk_norm, zero_init_residual, logit_softcap 15' in done.stdout and 'muon at 0.03 for 8 matrices, adamw at 0.001' in done.stdout
    copy_run(whole, half, 'ckpt_prev.pt')
    state = checkpoint(half)['optimizer']
    rates = [group['lr'] for group in state['param_groups']]
    assert rates == pytest.approx([rates[0], rates[0], 30 * rates[0]]) and 1e-4 < rates[0] < 1e-3  # of iteration 9, decaying
    assert sum('momentum_buffer' in moments for moments in state['state'].values()) == 2 * 4
    before = contents(half)
    refused(train(text_set, half, '--init_from=resume', '--arch_preset=modern'), "optimizer='adamw'", 'state of muon', 'or --optimizer=muon')
    (half / 'lock').unlink()
    assert contents(half) == before
    assert train(text_set, half, '--init_from=resume', *MUON).returncode == 0
    assert_equal_states(checkpoint(whole), checkpoint(half))
    assert losses(half) == {i: loss for i, loss in losses(whole).items() if i >= 10}


@pytest.mark.parametrize('mode', ['zero1', 'fsdp'])
def test_a_sharded_checkpoint_holds_muons_momentum(text_set, tmp_path, mode):
    """Written by two processes, each its part, and resumed by one: the losses of a run that was never stopped."""
    done = train_mode(mode, text_set, tmp_path / 'out', *MUON, '--sharded_checkpoint=True', '--max_iters=10')
    assert done.returncode == 0, done.stderr[-3000:]
    assert train_mode('one', text_set, tmp_path / 'out', *MUON, '--init_from=resume').returncode == 0
    assert train_mode('one', text_set, tmp_path / 'one', *MUON).returncode == 0
    assert losses(tmp_path / 'out') == pytest.approx(losses(tmp_path / 'one'), rel=1e-3 if mode == 'fsdp' else 1e-5)


def test_eval_and_log_intervals_do_not_change_training(text_set, finished, tmp_path):
    """Evaluation or sampling drawing from the generator of training, or taking its batches."""
    assert train(text_set, tmp_path, '--eval_interval=3', '--log_interval=7', '--gradient_log_interval=0', '--sample_interval=1').returncode == 0
    assert_equal_states(checkpoint(finished[0]), checkpoint(tmp_path))


def test_the_run_log_has_everything_and_the_console_says_it(finished):
    """A key of the log that readers rely on gone or renamed; a start-up report that leaves out a line."""
    out_dir, console = finished
    (run,) = run_logs(out_dir)
    assert {'run_name', 'start_time', 'config', 'startup_info', 'training_iterations', 'eval_steps', 'checkpoints', 'summary'} <= run.keys()
    assert [e['iter'] for e in run['training_iterations']] == list(range(20))
    for e in run['training_iterations']:
        assert {'iter', 'loss', 'lr', 'time_ms', 'mfu', 'memory', 'gradients'} <= e.keys() and e['memory'] and e['gradients']['norm'] > 0
        assert {'mfu_percent', 'achieved_tflops', 'hardware_peak_tflops', 'tokens_per_sec', 'flops_per_token'} <= e['mfu'].keys()
        assert e['mfu']['tokens_per_sec'] == pytest.approx(2 * 4 * 16 / e['time_ms'] * 1000)
        assert e['mfu']['mfu_percent'] == pytest.approx(100 * e['mfu']['tokens_per_sec'] * e['mfu']['flops_per_token'] / 1e12)
        assert ('layers' in e['gradients']) == (e['iter'] % 5 == 0)
        assert e['loss_variance'] == pytest.approx(np.var([other['loss'] for other in run['training_iterations'][:e['iter'] + 1]]))
    assert [e['iter'] for e in run['eval_steps']] == [0, 20] and all('sample' in e for e in run['eval_steps'])
    for e in run['eval_steps']:
        assert e['val']['perplexity'] == pytest.approx(np.exp(e['val']['loss']))
        assert e['val']['bits_per_byte'] == pytest.approx(e['val']['loss'] / np.log(2))  # a byte is a token here
        assert len(e['val']['window_losses']) == 8 and np.mean(e['val']['window_losses']) == pytest.approx(e['val']['loss'], abs=1e-5)
        assert e['val']['standard_error'] == pytest.approx(mean_and_error(e['val']['window_losses'])[1], abs=1e-4) and e['tokens'] == e['iter'] * 2 * 4 * 16
    assert run['eval_steps'][1]['train_seconds'] == pytest.approx(sum(e['time_ms'] for e in run['training_iterations']) / 1000) and run['eval_steps'][0]['train_seconds'] == 0
    assert run['eval_steps'][1]['val']['loss'] < run['eval_steps'][0]['val']['loss'] < 5.7  # ln 256 = 5.55
    assert [c['iter'] for c in run['checkpoints']] == [10, 20]
    assert run['summary']['iterations'] == 20 and run['summary']['tokens'] == 20 * 2 * 4 * 16
    assert all(type(value) is float for values in checkpoint(out_dir)['losses'].values() for value in values.values())
    assert run['config']['n_layer'] == 2 and run['config']['normalization'] == 'layernorm'  # what arch_preset left open is resolved
    estimate, measured = (run['startup_info'][key] for key in ('memory_estimate', 'memory_measured'))
    assert 0 < estimate['process'] < estimate['peak'] and measured['peak'] > 0
    for word in ('GiB a device estimated', 'GiB at its peak', 'parameters', 'non-embedding', 'accumulation', 'float32', 'compile False', 'TFLOP/s', 'FLOPs a token', 'left', '% of peak', 'bits per byte'):
        assert word in console


def test_gradients_clip_to_the_global_norm(text_set, tmp_path):
    """Clipping a tensor at a time, or not at all: AdamW's first moment after one step is (1 - beta1) times what it was given."""
    done = train(text_set, tmp_path, '--gradient_log_interval=1', '--max_iters=1', '--grad_clip=0.01', '--peak_tflops=1e-9')
    assert done.returncode == 0 and re.search(r'% \(over 100 %: .*--peak_tflops', done.stdout)
    gradients = run_logs(tmp_path)[0]['training_iterations'][0]['gradients']
    assert gradients['norm'] > 0.1 and gradients['layers'].keys() == {'wte', 'wpe', '0', '1', 'ln_f'}
    assert math.hypot(*gradients['layers'].values()) == pytest.approx(gradients['norm'], rel=1e-4)
    moments = [s['exp_avg'] for s in checkpoint(tmp_path)['optimizer']['state'].values()]
    assert torch.stack([m.norm() for m in moments]).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_max_iters_is_exact_and_the_same_command_again_does_nothing(text_set, finished, tmp_path):
    """nanoGPT takes max_iters + 1 steps; a finished run that trains on or rewrites its checkpoint."""
    out_dir = copy_run(finished[0], tmp_path / 'again')
    assert {int(s['step']) for s in checkpoint(out_dir)['optimizer']['state'].values()} == {20}
    before = (out_dir / 'ckpt.pt').read_bytes()
    done = train(text_set, out_dir, '--init_from=auto')
    assert done.returncode == 0 and 'nothing to do' in done.stdout
    assert (out_dir / 'ckpt.pt').read_bytes() == before


def test_eval_only_takes_no_step(text_set, finished, tmp_path):
    """An evaluation that saves, or trains a step."""
    out_dir = copy_run(finished[0], tmp_path / 'eval')
    before = (out_dir / 'ckpt.pt').read_bytes()
    done = train(text_set, out_dir, '--init_from=resume', '--eval_only=True', '--eval_iters=1000')
    assert done.returncode == 0 and 'step 20: train loss' in done.stdout
    assert (out_dir / 'ckpt.pt').read_bytes() == before and losses(out_dir) == {}


def test_eval_loss_is_that_of_the_whole_split(text_set, finished, tmp_path):
    """Means of means, a window left out or read twice: against the model run over val by hand."""
    out_dir = copy_run(finished[0], tmp_path / 'eval')
    assert train(text_set, out_dir, '--init_from=resume', '--eval_only=True', '--eval_iters=100000', '--batch_size=1').returncode == 0
    from model import GPT
    model, ids = GPT.from_checkpoint(out_dir), torch.from_numpy(np.fromfile(text_set / 'val.bin', np.uint16).astype(np.int64))
    n = (len(ids) - 1) // 16
    logits = model(ids[:n * 16].view(n, 16), all_logits=True)[0]
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 256), ids[1:n * 16 + 1], reduction='none').view(n, 16).mean(1)
    (run,) = run_logs(out_dir)
    assert run['eval_steps'][0]['val']['loss'] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert run['eval_steps'][0]['val']['window_losses'] == pytest.approx(expected.tolist(), abs=2e-5)  # in the order of the text
    windows = ids[np.arange(n)[:, None] * 16 + np.arange(17)]
    assert run['eval_windows'] == dict(n=n, tokens_each=16, crc=fingerprint(windows))


EVALUATE = '--eval_only=True --init_from=resume --device=cpu --dtype=float32 --peak_tflops=1 --sample_interval=0'.split()


@pytest.fixture(scope='module')
def val_losses(text_set, finished):
    """(windows, positions) losses of the finished run on all of val, from its logits, by torch."""
    model, ids = GPT.from_checkpoint(finished[0]), torch.from_numpy(np.fromfile(text_set / 'val.bin', np.uint16).astype(np.int64))
    n = (len(ids) - 1) // 16
    with torch.no_grad():
        logits = model(ids[:n * 16].view(n, 16), all_logits=True)[0].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:n * 16 + 1], reduction='none').view(n, 16).numpy()


@pytest.mark.parametrize('batch_size, backend, launcher', [(1, 'sdpa', 'one'), (3, 'manual', 'one'), (8, 'chunked', 'one'), (None, 'sdpa', 'ddp'), (3, 'chunked', 'fsdp')])
def test_an_evaluation_is_the_same_for_any_batches_ranks_and_backend(finished, val_losses, tmp_path, batch_size, backend, launcher):
    """A last batch that counts as a whole one, windows that two ranks both count, sums in float32 that depend on the order; data or batch of another run."""
    out_dir = copy_run(finished[0], tmp_path / 'eval')
    launcher, more = MODES[launcher]
    more = [*more, f'--attention_backend={backend}'] + [f'--batch_size={batch_size}'] * (batch_size is not None)
    done = command('train.py', *EVALUATE, f'--out_dir={out_dir}', *more, launcher=launcher)
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = run_logs(out_dir)
    (entry,), n = run['eval_steps'], len(val_losses)
    val, by_window = entry['val'], val_losses.mean(1)
    assert run['eval_windows']['n'] == n and entry['tokens'] == 20 * 16 * 2 * (batch_size or 4)
    assert val['loss'] == pytest.approx(val_losses.mean(), abs=1e-5) and val['perplexity'] == pytest.approx(math.exp(val_losses.mean()), rel=1e-5)
    assert val['standard_error'] == pytest.approx(mean_and_error(by_window)[1], abs=1e-5) and val['window_losses'] == pytest.approx(by_window.tolist(), abs=2e-5)
    places = [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    assert [(part['first'], part['last']) for part in val['by_position']] == places
    for part, (first, last) in zip(val['by_position'], places):
        mean, error, _ = mean_and_error(val_losses[:, first:last + 1].mean(1))
        assert part['loss'] == pytest.approx(mean, abs=1e-5) and part['standard_error'] == pytest.approx(error, abs=1e-5)
    assert f"all {n} windows of 16 tokens: loss {val['loss']:.4f}, standard error {val['standard_error']:.4f}, perplexity" in done.stdout
    assert f"position 8-15        loss {val['by_position'][-1]['loss']:.4f}" in done.stdout


def test_an_evaluation_takes_as_many_windows_as_asked(text_set, finished, val_losses, tmp_path):
    """A config file's eval_iters, meant for training, that cut the final evaluation short; one for evaluation that did not count."""
    (tmp_path / 'training.py').write_text('eval_iters = 2\n')
    (tmp_path / 'evaluation.py').write_text('eval_iters = 2\neval_only = True\n')
    cases = [(['--eval_iters=2'], 8), ([tmp_path / 'training.py'], len(val_losses)), ([tmp_path / 'evaluation.py'], 8)]
    for i, (flags, n) in enumerate(cases):
        out_dir = copy_run(finished[0], tmp_path / str(i))
        done = command('train.py', *flags, *EVALUATE[1:], *EVALUATE[:1] * (i < 2), f'--out_dir={out_dir}')
        assert done.returncode == 0 and run_logs(out_dir)[0]['eval_windows']['n'] == n, done.stderr
        assert (f'8 of {len(val_losses)} windows' in done.stdout) == (n == 8)


def test_an_evaluation_reads_nanogpts_and_other_runs_checkpoints(text_set, finished, val_losses, tmp_path):
    """nanoGPT's has fewer keys and neither tokenizer nor our parts; --init_from=FOLDER has a data set of its own, too."""
    ours, names = checkpoint(finished[0]), 'n_layer n_head n_embd block_size bias vocab_size dropout'.split()
    (tmp_path / 'nanogpt').mkdir()
    torch.save(dict(model={'_orig_mod.' + k: v for k, v in ours['model'].items()}, optimizer=ours['optimizer'], model_args={k: ours['model_args'][k] for k in names},
                    iter_num=20, best_val_loss=torch.tensor(4.0), config=dict(dataset=str(text_set), batch_size=5, gradient_accumulation_steps=1)), tmp_path / 'nanogpt/ckpt.pt')
    for out_dir, init_from in (('nanogpt', 'resume'), ('a', tmp_path / 'nanogpt'), ('b', finished[0] / 'ckpt.pt')):
        done = command('train.py', *EVALUATE, f'--out_dir={tmp_path / out_dir}', f'--init_from={init_from}')
        assert done.returncode == 0, done.stderr
        assert run_logs(tmp_path / out_dir)[0]['eval_steps'][0]['val']['loss'] == pytest.approx(val_losses.mean(), abs=1e-5)


def test_an_evaluation_never_prepares_what_a_checkpoint_names(finished, tmp_path):
    """A prepare.py in a folder that a stranger's checkpoint points to would be run."""
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/prepare.py').write_text(f'"""Bad."""\nopen({str(tmp_path / "ran")!r}, "w")\n')
    (tmp_path / 'val').mkdir()
    shutil.copy(tmp_path / 'data/prepare.py', tmp_path / 'val')
    (tmp_path / 'val/val.bin').write_bytes(bytes(2000))
    for i, dataset in enumerate((str(tmp_path / 'data'), str(tmp_path / 'val'), 'nowhere', 7)):
        out_dir = copy_run(finished[0], tmp_path / str(i))
        torch.save(checkpoint(out_dir) | {'config': {'dataset': dataset}}, out_dir / 'ckpt.pt')
        refused(command('train.py', *EVALUATE, f'--out_dir={out_dir}'), out_dir / 'ckpt.pt', repr(dataset), '--dataset=')
    assert not (tmp_path / 'ran').exists()


def test_an_evaluation_needs_no_moments_and_finds_no_best(text_set, tmp_path):
    """A run of Muon's that cannot be evaluated without saying so; (best) for other windows; a damaged ckpt.pt that resumes and is not evaluated."""
    assert train(text_set, tmp_path, '--optimizer=muon', '--save_interval=10').returncode == 0
    done = command('train.py', *EVALUATE, f'--out_dir={tmp_path}', '--eval_iters=1')
    assert done.returncode == 0 and '(best)' not in done.stdout and 'standard error' in done.stdout, done.stderr
    rewrite(tmp_path / 'ckpt.pt', lambda b: b[:20000])
    done = command('train.py', *EVALUATE, f'--out_dir={tmp_path}')
    assert done.returncode == 0 and 'going back' in done.stdout and 'step 10' in done.stdout, done.stderr


def test_the_error_of_a_mixture_is_not_what_its_sets_differ_by():
    """Blocks across the sets of a mixture, whose shares are fixed, take the difference between the sets for chance: 17 times too much here."""
    rng, means, errors = np.random.default_rng(0), [], []
    sets = np.repeat([0, 1], [140, 60])
    for _ in range(400):
        mean, error, df = mean_and_error(np.where(sets, 1.0, 3.0) + 0.2 * rng.normal(size=200), sets)
        means.append(mean)
        errors.append(error)
    assert df == 10 + 6 and np.mean(np.square(errors)) == pytest.approx(np.var(means), rel=0.15)


@pytest.mark.parametrize('signum, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on(text_set, tmp_path, signum, code):
    """A preempted run that loses its last iterations, or exits as if all was well."""
    tmp_path, whole = tmp_path / 'out', tmp_path / 'whole'
    process = start(text_set, tmp_path)
    process.send_signal(signum)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == code and 'saved' in rest
    reached, logged = checkpoint(tmp_path)['iter_num'], run_logs(tmp_path)[0]
    assert reached >= 6 and logged['summary']['iter_num'] == reached and len(logged['training_iterations']) == reached
    assert train(text_set, tmp_path, '--init_from=resume', f'--max_iters={reached + 2}').returncode == 0
    assert train(text_set, whole, f'--max_iters={reached + 2}').returncode == 0
    assert checkpoint(tmp_path)['iter_num'] == reached + 2
    assert_equal_states(checkpoint(whole), checkpoint(tmp_path))


def test_a_terminal_that_closes_does_not_cost_the_run(text_set, tmp_path):
    """SIGHUP, and from then on every print fails."""
    ours, its = os.openpty()
    process = subprocess.Popen([sys.executable, 'train.py', *TINY, f'--dataset={text_set}', f'--out_dir={tmp_path}', '--max_iters=1000000'], cwd=ROOT,
                               stdout=its, stderr=its, start_new_session=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    os.close(its)
    printed = b''
    while b'iter 5 ' not in printed:
        printed += os.read(ours, 1000)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 129 and checkpoint(tmp_path)['iter_num'] >= 6


@pytest.mark.parametrize('mode', ['one', 'ddp'])
def test_a_signal_in_an_evaluation_is_obeyed_and_the_evaluation_made_up_for(tmp_path, mode):
    """torchrun kills ranks that go on for 30 s; a final evaluation that never comes."""
    launcher, flags = MODES[mode]
    flags = '--init_from=auto', '--max_iters=15', '--eval_interval=15', *flags
    process = subprocess.Popen([*launcher, 'train.py', *TINY, '--dataset=pystdlib', f'--out_dir={tmp_path}', *flags, '--eval_iters=2', '--max_iters=10'], cwd=ROOT)
    assert process.wait(100) == 0 and checkpoint(tmp_path)['iter_num'] == 10
    process = subprocess.Popen([*launcher, 'train.py', *TINY, '--dataset=pystdlib', f'--out_dir={tmp_path}', *flags, '--eval_iters=100000'], cwd=ROOT,
                               stdout=subprocess.PIPE, text=True)
    assert any(line.startswith('iter 14 ') for line in process.stdout)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=28)
    assert process.returncode and checkpoint(tmp_path)['iter_num'] == 15 and checkpoint(tmp_path)['last_eval_iter'] == 10
    for expected in ('step 15: ', 'nothing to do'):
        done = command('train.py', *TINY, '--dataset=pystdlib', f'--out_dir={tmp_path}', *flags, '--eval_iters=2', launcher=launcher)
        assert done.returncode == 0 and expected in done.stdout and checkpoint(tmp_path)['last_eval_iter'] == 15


@pytest.mark.skipif(sys.platform != 'linux', reason='finds ranks in /proc')
def test_ranks_save_and_end_when_torchrun_is_killed(text_set, tmp_path):
    """Ranks that train on without it, and hold the out_dir."""
    process = start(text_set, tmp_path, launcher=TORCHRUN)
    ranks = children(process.pid)
    process.kill()
    process.wait()
    until = time.time() + 60
    while (left := [pid for pid in ranks if os.path.exists(f'/proc/{pid}')]) and time.time() < until:
        time.sleep(0.1)
    assert ranks and not left and checkpoint(tmp_path)['iter_num'] >= 6


def test_ranks_that_see_different_checkpoints_end(text_set, finished, tmp_path):
    """Two nodes with an out_dir each train on from two places, and average the gradients."""
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = str(free.getsockname()[1])
    out_dirs = copy_run(finished[0], tmp_path / '0'), tmp_path / '1'
    processes = [subprocess.Popen([sys.executable, 'train.py', *TINY, f'--dataset={text_set}', f'--out_dir={out_dir}', '--init_from=auto'], cwd=ROOT,
                                  env=os.environ | dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port),
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank, out_dir in enumerate(out_dirs)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    one_line(errors[0], 'iteration 20', out_dirs[0], 'share')
    one_line(errors[1], 'rank 1', out_dirs[1], 'share')


MODES = {'one': ((sys.executable,), []), 'ddp': (TORCHRUN, []), 'zero1': (TORCHRUN, ['--use_zero1=True']), 'fsdp': (TORCHRUN, ['--use_fsdp=True'])}  # launcher, flags


def train_mode(mode, text_set, out_dir, *flags, **kwargs):
    """Dropout 0, because it is drawn a rank and not a sequence."""
    launcher, more = MODES[mode]
    return train(text_set, out_dir, '--dropout=0.0', *more, *flags, launcher=launcher, **kwargs)


@pytest.fixture(scope='module')
def modes(text_set, tmp_path_factory):
    """{mode: (out_dir, console)} of the same 20 iterations by one process and by two in every mode, with checkpoints at 10 and 20."""
    out = {}
    for mode in MODES:
        folder = tmp_path_factory.mktemp(mode) / 'out'
        done = train_mode(mode, text_set, folder, '--save_interval=10', '--gradient_log_interval=2')
        assert done.returncode == 0, (mode, done.stderr[-3000:])
        out[mode] = folder, done.stdout
    return out


@pytest.mark.parametrize('mode', [mode for mode in MODES if mode != 'one'])
def test_every_mode_trains_as_one_process(modes, mode):
    """Ranks that read the same data; losses, gradients or their norms that are not averaged over micro-steps and ranks, or are of one shard."""
    (one, _), (two, console) = modes['one'], modes[mode]
    assert len(losses(two)) == 20 and list(losses(two).values()) == pytest.approx(list(losses(one).values()), rel=1e-5)
    (a,), (b,) = run_logs(one), run_logs(two)
    assert b['eval_steps'][1]['val']['loss'] == pytest.approx(a['eval_steps'][1]['val']['loss'], rel=0.1)  # eval_iters are over all processes
    for x, y in zip(a['training_iterations'], b['training_iterations']):
        assert y['gradients']['norm'] == pytest.approx(x['gradients']['norm'], rel=1e-4)
        assert y['gradients'].get('layers') == (pytest.approx(x['gradients']['layers'], rel=1e-3) if 'layers' in x['gradients'] else None)
        assert y['gradients'].get('std', 0) == pytest.approx(x['gradients'].get('std', 0), rel=1e-3)
    assert console.count('iter 3 ') == 1 and {'ddp': 'DDP', 'zero1': 'ZeRO-1', 'fsdp': 'FSDP'}[mode] in console  # only rank 0 speaks


@pytest.mark.parametrize('mode', [mode for mode in MODES if mode != 'one'])
def test_a_checkpoint_does_not_tell_the_mode_that_wrote_it(modes, mode):
    """Optimizer state keyed by name, on one rank's parameters only, or in DTensors; a tied matrix saved twice."""
    a, b = checkpoint(modes['one'][0]), checkpoint(modes[mode][0])
    assert list(a) == list(b) and list(a['model']) == list(b['model']) and a['optimizer']['param_groups'] == b['optimizer']['param_groups']
    assert list(a['optimizer']['state']) == list(b['optimizer']['state'])
    assert b['model']['lm_head.weight'].data_ptr() == b['model']['transformer.wte.weight'].data_ptr()
    for name, tensor in a['model'].items():
        assert type(b['model'][name]) is torch.Tensor and torch.allclose(tensor, b['model'][name], atol=1e-5), name
    for i, state in a['optimizer']['state'].items():
        for key, value in state.items():
            other = b['optimizer']['state'][i][key]
            assert type(other) is torch.Tensor and other.dtype == value.dtype and torch.allclose(value, other, rtol=1e-3, atol=1e-6), (i, key)
    sizes = [(modes[m][0] / 'ckpt.pt').stat().st_size for m in ('one', mode)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


@pytest.mark.parametrize('writer, reader', [('one', 'fsdp'), ('fsdp', 'zero1'), ('zero1', 'ddp'), ('ddp', 'one'), ('fsdp', 'fsdp')])
def test_every_mode_resumes_every_others_checkpoint(text_set, modes, tmp_path, writer, reader):
    """Moments lost or given to another tensor: losses of the first steps would tell. A ring, because the checkpoints are all alike."""
    out_dir = copy_run(modes[writer][0], tmp_path / 'out', 'ckpt_prev.pt')
    done = train_mode(reader, text_set, out_dir, '--init_from=resume')
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {i: loss for i, loss in losses(modes['one'][0]).items() if i >= 10}
    assert losses(out_dir) == pytest.approx(expected, rel=1e-5)
    if writer == reader or {writer, reader} == {'zero1', 'ddp'}:  # the same arithmetic on the same ranks
        assert_equal_states(checkpoint(modes[writer][0]), checkpoint(out_dir))


def test_sampling_reads_what_fsdp_wrote(modes):
    """A checkpoint that only torchrun can read."""
    texts = [command('sample.py', f'--out_dir={modes[mode][0]}', '--num_samples=1', '--max_new_tokens=20', '--device=cpu', '--dtype=float32', '--temperature=0')
             for mode in ('one', 'fsdp')]
    assert texts[0].returncode == texts[1].returncode == 0 and texts[0].stdout == texts[1].stdout


def copy_sharded(out_dir, to, name='ckpt_sharded_prev'):
    shutil.copytree(out_dir / name, to / 'ckpt_sharded')
    return to


@pytest.fixture(scope='module')
def sharded(text_set, tmp_path_factory):
    """{mode: out_dir} of the run of `modes` with sharded checkpoints."""
    out = {}
    for mode in ('zero1', 'fsdp'):
        out[mode] = tmp_path_factory.mktemp(mode) / 'out'
        done = train_mode(mode, text_set, out[mode], '--save_interval=10', '--sharded_checkpoint=True')
        assert done.returncode == 0 and not list(out[mode].glob('*.tmp')), done.stderr[-3000:]
    return out


@pytest.mark.parametrize('mode', ['zero1', 'fsdp'])
def test_a_sharded_checkpoint_holds_what_ckpt_pt_would(modes, sharded, tmp_path, mode):
    """A rank's part lost, or put in another place: bit for bit, as one file."""
    assert not list(sharded[mode].glob('*.pt')) and len(list((sharded[mode] / 'ckpt_sharded').glob('*.distcp'))) == 2
    done = command('model.py', f'--ckpt={sharded[mode]}', f'--consolidate={tmp_path / "ckpt.pt"}')
    assert done.returncode == 0 and 'ckpt_sharded' in done.stdout, done.stderr
    a, b = checkpoint(modes[mode][0]), checkpoint(tmp_path)
    assert_equal_states(a, b)
    assert a.keys() == b.keys() and a['optimizer']['param_groups'] == b['optimizer']['param_groups']
    assert list(a['optimizer']['state']) == list(b['optimizer']['state']) and all(a[key] == b[key] for key in ('iter_num', 'best_val_loss', 'model_args'))
    assert (tmp_path / 'ckpt.pt').stat().st_size == pytest.approx((modes[mode][0] / 'ckpt.pt').stat().st_size, rel=0.01)
    text = [command('sample.py', f'--out_dir={d}', '--num_samples=1', '--max_new_tokens=5', '--device=cpu', '--dtype=float32').stdout for d in (sharded[mode], tmp_path)]
    assert text[0] == text[1] != ''


@pytest.mark.parametrize('writer, reader', [('fsdp', 'one'), ('zero1', 'fsdp'), ('fsdp', 'ddp')])
def test_a_sharded_checkpoint_resumes_in_every_mode(text_set, modes, sharded, tmp_path, writer, reader):
    """Parts that only as many processes as wrote them can read."""
    out_dir = copy_sharded(sharded[writer], tmp_path)
    done = train_mode(reader, text_set, out_dir, '--init_from=auto', *([] if reader == 'one' else ['--sharded_checkpoint=True']))
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(out_dir) == pytest.approx({i: loss for i, loss in losses(modes['one'][0]).items() if i >= 10}, rel=1e-5)
    assert (out_dir / 'ckpt_sharded_prev').exists() == (reader != 'one') == (not (out_dir / 'ckpt.pt').exists())


def test_a_damaged_or_malicious_sharded_checkpoint_is_refused(text_set, sharded, tmp_path):
    """Its .metadata is a pickle; torch.load does not check CRCs."""
    out_dir = copy_sharded(sharded['fsdp'], tmp_path / 'out', 'ckpt_sharded')
    folder = out_dir / 'ckpt_sharded'
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    data = max(folder.glob('*.distcp'))
    rewrite(data, lambda b: b[:len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1:])
    one_line(command('model.py', f'--ckpt={out_dir}').stderr, folder)
    shutil.copytree(sharded['fsdp'] / 'ckpt_sharded_prev', out_dir / 'ckpt_sharded_prev')
    done = train_mode('one', text_set, out_dir, '--init_from=resume', '--max_iters=11')
    assert done.returncode == 0 and done.stdout.count('WARNING') == 1 and list(losses(out_dir)) == [10]
    (out_dir / 'ckpt.pt').unlink()
    Bomb.path = tmp_path / 'executed'
    for path, change in ((data, lambda b: b[:-100]), (data, lambda b: b''), (folder / 'info.pt', lambda b: b''), (folder / '.metadata', lambda b: pickle.dumps(Bomb())),
                         (folder / '.metadata', lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:]),
                         (folder / 'info.pt', lambda b: pickle.dumps(Bomb())), (data, lambda b: pickle.dumps(Bomb()))):
        for name, content in whole.items():
            name.write_bytes(content)
        assert command('model.py', f'--ckpt={folder}').returncode == 0
        rewrite(path, change)
        refused = command('model.py', f'--ckpt={folder}')
        assert refused.returncode == 2
        one_line(refused.stderr, folder)
    assert not Bomb.path.exists()


def test_what_is_further_on_counts_and_not_what_is_newer_or_of_another_run(text_set, sharded, finished, tmp_path):
    """A copy, whose times mean nothing; a kill between two renames; another run's checkpoints beside those of the run that replaced it."""
    out_dir = copy_sharded(sharded['fsdp'], tmp_path / 'out', 'ckpt_sharded')
    reached = load_checkpoint(out_dir)['iter_num']
    early = torch.load(finished[0] / 'ckpt.pt', weights_only=True)
    torch.save(early | {'iter_num': reached - 1}, out_dir / 'ckpt.pt')
    assert Path(newest_checkpoint(out_dir)).name == 'ckpt_sharded'
    (out_dir / 'ckpt_sharded').rename(out_dir / 'ckpt_sharded_prev')
    assert Path(newest_checkpoint(out_dir)).name == 'ckpt_sharded_prev'
    (out_dir / 'ckpt_sharded_prev').rename(out_dir / 'ckpt_sharded_best')
    (out_dir / 'ckpt.pt').unlink()
    assert Path(newest_checkpoint(out_dir)).name == 'ckpt_sharded_best'
    refused(train(text_set, out_dir), 'ckpt_sharded_best', '--overwrite=True')
    (out_dir / 'ckpt_prev.pt').write_bytes(b'')
    assert train(text_set, out_dir, '--overwrite=True', '--max_iters=2').returncode == 0
    assert sorted(path.name for path in out_dir.glob('ckpt*')) == ['ckpt.pt', 'ckpt_best.pt']


def test_consolidating_leaves_what_is_there(sharded, finished, tmp_path):
    """Another run's checkpoint replaced by a typing mistake; a traceback and half a file where there is no room."""
    other = copy_run(finished[0], tmp_path / 'other') / 'ckpt.pt'
    before = contents(tmp_path)
    consolidate = lambda path, **kwargs: command('model.py', f"--ckpt={sharded['fsdp']}", f'--consolidate={path}', **kwargs)
    refused(consolidate(other), other, 'already')
    refused(consolidate(tmp_path), tmp_path, 'already')
    refused(consolidate(tmp_path / 'no' / 'folder.pt'), tmp_path / 'no' / 'folder.pt')
    refused(consolidate(tmp_path / 'full.pt', launcher=('bash', '-c', LIMITED.format('f', 100), sys.executable)), tmp_path / 'full.pt')
    assert contents(tmp_path) == before


FAULTS = """
import os, signal, time
replace, fsync, (what, _, where) = os.replace, os.fsync, os.environ['FAULT'].partition(':')

def faulty_replace(src, dst):
    if str(dst).endswith('.json'):
        time.sleep(0.1)  # a log that takes long is not written with every iteration
    replace(src, dst)
    if what == 'kill' and os.path.basename(dst) == where:
        os.kill(os.getpid(), signal.SIGKILL)

def faulty_fsync(fd):
    if what == 'flip' and os.readlink(f'/proc/self/fd/{fd}').endswith(where):
        os.pwrite(fd, b'flip', os.fstat(fd).st_size // 2)
    fsync(fd)

os.replace, os.fsync = faulty_replace, faulty_fsync
if what == 'chdir' and os.environ.get('RANK') == '1':
    os.chdir(where)
"""


@pytest.fixture
def faulty(tmp_path):
    """faulty('kill:NAME') or ('flip:END'): the environment of a process that is killed once a file is renamed to NAME, or has bytes changed before it reaches the disk."""
    (tmp_path / 'faults').mkdir()
    (tmp_path / 'faults' / 'sitecustomize.py').write_text(FAULTS)
    return lambda fault: {'FAULT': fault, 'PYTHONPATH': str(tmp_path / 'faults')}


def test_a_kill_after_the_rename_leaves_log_and_best_of_the_same_iteration(text_set, tmp_path, faulty):
    """ckpt_best.pt that stays stale, as a resumed run knows the loss already, or that auto finds alone; iterations that no log has."""
    out_dir, flags = tmp_path / 'out', ('--eval_interval=5', '--init_from=auto')
    assert train(text_set, out_dir, *flags, env=faulty('kill:ckpt_best.pt')).returncode == -signal.SIGKILL and not (out_dir / 'ckpt.pt').exists()
    assert train(text_set, out_dir, *flags, env=faulty('kill:ckpt.pt')).returncode == -signal.SIGKILL
    assert checkpoint(out_dir)['iter_num'] == checkpoint(out_dir, 'ckpt_best.pt')['iter_num'] == 10
    assert list(losses(out_dir)) == list(range(10))


def test_a_kill_between_the_renames_of_a_sharded_checkpoint_never_goes_back(text_set, finished, tmp_path, faulty):
    """Another run's ckpt.pt, or an older one of this run, taken for the last; ckpt_sharded_best gone before the next is there; a log that is behind."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    (out_dir / 'ckpt_best.pt').write_bytes(b'')
    flags = '--eval_interval=5', '--sharded_checkpoint=True'
    assert train_mode('fsdp', text_set, out_dir, '--overwrite=True', *flags, env=faulty('kill:ckpt_sharded')).returncode
    assert not contents(out_dir) and list(losses(out_dir)) == [0, 1, 2, 3, 4]
    saved = load_checkpoint(out_dir)
    assert saved['iter_num'] == load_checkpoint(out_dir / 'ckpt_sharded_best')['iter_num'] == 5
    torch.save(saved | {'iter_num': 3}, out_dir / 'ckpt.pt')  # of this run before it was sharded, but copied later
    assert load_checkpoint(out_dir)['path'] == str(out_dir / 'ckpt_sharded')
    assert train_mode('fsdp', text_set, out_dir, '--init_from=auto', *flags, env=faulty('kill:.metadata')).returncode
    assert load_checkpoint(out_dir)['iter_num'] == load_checkpoint(out_dir / 'ckpt_sharded_best')['iter_num'] == 5
    done = train_mode('fsdp', text_set, out_dir, '--init_from=auto', *flags, env=faulty('kill:ckpt_sharded_prev'))
    assert done.returncode and 'iteration 5 of 20' in done.stdout
    assert load_checkpoint(out_dir)['path'] == str(out_dir / 'ckpt_sharded_prev') and load_checkpoint(out_dir / 'ckpt_sharded_best')['iter_num'] == 10
    done = train_mode('fsdp', text_set, out_dir, '--init_from=auto', *flags)
    assert done.returncode == 0 and 'iteration 5 of 20' in done.stdout and load_checkpoint(out_dir)['iter_num'] == 20
    assert list(losses(out_dir)) == list(range(20)) and not list(out_dir.glob('*.old')) and not list(out_dir.glob('*.tmp'))


@pytest.mark.parametrize('fault', ['flip:.distcp', 'flip:info.pt', 'ulimit'])
def test_a_sharded_checkpoint_that_cannot_be_written_leaves_the_last_one(text_set, sharded, tmp_path, faulty, fault):
    """One that is damaged on its way to the disk; parts that stay on a full one."""
    out_dir = copy_sharded(sharded['fsdp'], tmp_path / 'out')
    before = {path: path.read_bytes() for path in (out_dir / 'ckpt_sharded').iterdir()}
    launcher = ('bash', '-c', LIMITED.format('f', 100), *TORCHRUN) if fault == 'ulimit' else TORCHRUN
    done = train(text_set, out_dir, '--init_from=resume', '--max_iters=11', '--use_fsdp=True', '--sharded_checkpoint=True', launcher=launcher, env=faulty(fault))
    assert done.returncode and done.stderr.count('could not be written') == 1 and ('checksum' in done.stderr) == ('flip' in fault), done.stderr
    assert before == {path: path.read_bytes() for path in (out_dir / 'ckpt_sharded').iterdir()} and not (out_dir / 'ckpt_sharded.tmp').exists()


def test_a_plain_checkpoint_is_read_back(text_set, finished, tmp_path, faulty):
    """One that is damaged on its way to the disk."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    before = contents(out_dir)
    refused(train(text_set, out_dir, '--init_from=resume', '--max_iters=21', env=faulty('flip:ckpt.pt.tmp')), out_dir / 'ckpt.pt', 'checksum')
    assert contents(out_dir) == before


def test_an_out_dir_that_nodes_do_not_share_is_noticed(text_set, tmp_path, faulty):
    """Two nodes that keep a half each, and "saved"."""
    for node in '01':
        (tmp_path / node).mkdir()
    done = command(ROOT / 'train.py', *TINY, f'--dataset={text_set}', '--out_dir=out', '--use_fsdp=True', '--sharded_checkpoint=True', '--save_interval=2',
                   cwd=tmp_path / '0', launcher=TORCHRUN, env=faulty(f'chdir:{tmp_path / "1"}'))
    assert done.returncode and 'saved' not in done.stdout and 'out_dir must be a folder that all nodes share' in done.stderr
    assert not list(tmp_path.glob('*/out/ckpt*'))




COUNT_BYTES = """
import json, os, sys
import torch
import torch.optim.optimizer as optim
out, script, sys.argv = sys.argv[1], sys.argv[2], sys.argv[2:]
names, most = {'__name__': '__main__', '__file__': script}, {}
def storages(tensors):
    local = [t.to_local() if hasattr(t, 'to_local') else t for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in local)}.values())
def count(optimizer, *_):
    params = list(names['raw_model'].parameters())
    moments = [v for state in getattr(optimizer, 'optim', optimizer).state.values() for v in state.values() if v.dim()]
    most.update(weights=storages(params), gradients=storages([p.grad for p in params]), moments=storages(moments), parameters=sum(p.numel() for p in params))
    with open(f"{out}/{os.environ['RANK']}.json", 'w') as f:
        json.dump(most, f)
optim.register_optimizer_step_post_hook(count)
exec(compile(open(script).read(), script, 'exec'), names)
"""


@pytest.mark.parametrize('mode, per_parameter', [('ddp', 16), ('zero1', 8 + 8 / 2), ('fsdp', 16 / 2)])
def test_bytes_of_model_states_a_rank_are_those_of_the_formulas(text_set, tmp_path, mode, per_parameter):
    """Sharding that is switched on and saves nothing: every parameter, gradient and moment that each of two ranks holds after a step."""
    (tmp_path / 'count.py').write_text(COUNT_BYTES)
    done = command(tmp_path / 'count.py', tmp_path, ROOT / 'train.py', *TINY, f'--dataset={text_set}', f'--out_dir={tmp_path / "out"}', '--max_iters=2', *MODES[mode][1],
                   launcher=TORCHRUN, env={'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f'{rank}.json').read_text()) for rank in (0, 1)]
    for held in ranks:  # ZeRO-1 gives whole tensors to ranks, here 1 % off the half
        assert held['weights'] + held['gradients'] + held['moments'] == pytest.approx(per_parameter * held['parameters'], rel=0.005 if mode == 'zero1' else 1e-9)
    assert sum(held['moments'] for held in ranks) == 8 * ranks[0]['parameters'] * (2 if mode == 'ddp' else 1)


COMBINATIONS = {
    'fsdp, llama, checkpointing, accumulation': ('fsdp', '--arch_preset=llama', '--activation_checkpointing=True', '--gradient_accumulation_steps=6', '--grad_clip=0.1'),
    'fsdp, gathered until backward': ('fsdp', '--fsdp_reshard_after_forward=False', '--gradient_accumulation_steps=6', '--logit_softcap=5', '--qk_norm=True'),
    'fsdp, blocks with the root': ('fsdp', '--fsdp_min_num_params=1000000', '--arch_preset=gpt2', '--attention_backend=chunked', '--activation_checkpointing=True'),
    'fsdp, compile, checkpointing': ('fsdp', '--compile=True', '--activation_checkpointing=True', '--arch_preset=hybrid', '--gradient_accumulation_steps=4'),
    'zero1, llama, checkpointing, accumulation': ('zero1', '--arch_preset=llama', '--activation_checkpointing=True', '--gradient_accumulation_steps=6', '--grad_clip=0.1'),
    'zero1, compile': ('zero1', '--compile=True', '--gradient_accumulation_steps=4'),
    'ddp, muon': ('ddp', *MUON), 'zero1, muon': ('zero1', *MUON), 'fsdp, muon': ('fsdp', *MUON, '--gradient_accumulation_steps=4'),
}


@pytest.mark.parametrize('name', COMBINATIONS)
def test_modes_compose(text_set, tmp_path, name):
    """A combination that hangs, fails or trains something else: against one process without checkpointing and compiler."""
    mode, *flags = COMBINATIONS[name]
    flags += ['--max_iters=5', '--eval_interval=3', '--sample_interval=1', '--gradient_log_interval=2']
    plain = [flag for flag in flags if 'compile' not in flag and 'checkpointing' not in flag and 'fsdp' not in flag]
    one, two = (train_mode(m, text_set, tmp_path / m, *f) for m, f in (('one', plain), (mode, flags)))
    assert one.returncode == two.returncode == 0, (one.stderr + two.stderr)[-3000:]
    assert 'WARNING' not in two.stdout and ('compiled in' in two.stdout) == ('compile' in name)
    assert losses(tmp_path / mode) == pytest.approx(losses(tmp_path / 'one'), rel=1e-4 if name == 'fsdp, muon' else 1e-5)  # whose bfloat16 sums are in parts
    sample = lambda out_dir: run_logs(tmp_path / out_dir)[0]['eval_steps'][0]['sample']
    assert sample(mode) == sample('one')  # of the untrained model


@pytest.mark.parametrize('mode, dtype, flags', [('fsdp', 'bfloat16', ()), ('fsdp', 'float16', ()), ('zero1', 'float16', ()), ('zero1', 'float16', MUON)],
                         ids=str)
def test_modes_train_in_mixed_precision(text_set, tmp_path, mode, dtype, flags):
    """A residual stream in 16 bits, a loss scale that differs between ranks: against one process in float32."""
    done = train_mode(mode, text_set, tmp_path, f'--dtype={dtype}', '--sample_interval=1', *flags)
    reference = train_mode('one', text_set, tmp_path / 'one', *flags)
    assert done.returncode == reference.returncode == 0, done.stderr[-3000:]
    assert list(losses(tmp_path).values()) == pytest.approx(list(losses(tmp_path / 'one').values()), rel=3e-3)


HUGE_STEP = '--learning_rate=1e39', '--min_lr=1e39', '--warmup_iters=0', '--grad_clip=0', '--save_interval=1'  # not a finite weight after it


@pytest.mark.parametrize('mode, flags', [('ddp', []), ('zero1', []), ('fsdp', []), ('fsdp', ['--sharded_checkpoint=True'])])
def test_ranks_stop_together(text_set, tmp_path, mode, flags):
    """Rank 0 fails to write, or a loss is not finite, and the other ranks wait for it for half an hour."""
    (tmp_path / 'full' / 'ckpt.pt.tmp').mkdir(parents=True)  # a file that cannot be opened, for root too
    (tmp_path / 'full' / 'ckpt_sharded.tmp').touch()
    done = train_mode(mode, text_set, tmp_path / 'full', '--save_interval=2', *flags)
    assert done.returncode != 0 and done.stderr.count('could not be written') == 1 and 'iter 1 ' in done.stdout and 'iter 2 ' not in done.stdout
    done = train_mode(mode, text_set, tmp_path / 'nan', '--learning_rate=1e30', '--grad_clip=0', '--warmup_iters=0', '--save_interval=1', *flags)
    assert done.returncode != 0 and done.stdout.count('nothing saved') == 1 and 'Traceback' not in done.stderr.split('torch/distributed/elastic')[0]
    for path in (tmp_path / 'nan').glob('ckpt*'):
        assert all(torch.isfinite(t).all() for t in load_checkpoint(path)['model'].values()), path
    done = train_mode(mode, text_set, tmp_path / 'inf', *HUGE_STEP, *flags)
    assert done.returncode != 0 and 'a weight is not finite' in done.stderr and not list((tmp_path / 'inf').glob('ckpt*'))


def reference_lr(schedule, it, lr=1.0, low=0.1, warmup=4, decay=20, restart=6, mult=2, cooldown=0.25):
    """After warmup, by torch's own schedulers where it has one."""
    if it < warmup:
        return lr * (it + 1) / (warmup + 1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=lr)
    scheduler = {
        'cosine': lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, decay - warmup, eta_min=low),
        'sgdr': lambda: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, restart, mult, eta_min=low),
        'linear': lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, low / lr, decay - warmup),
        'constant': lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        'wsd': lambda: torch.optim.lr_scheduler.SequentialLR(optimizer, [
            torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, low / lr, int(decay * cooldown))],
            [int(decay * (1 - cooldown)) - warmup])}[schedule]()
    for _ in range(min(it, decay if schedule != 'sgdr' else it) - warmup):
        optimizer.step()
        scheduler.step()
    return optimizer.param_groups[0]['lr']


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('schedule', ['cosine', 'sgdr', 'wsd', 'linear', 'constant'])
def test_learning_rate_schedules_are_torchs(text_set, tmp_path, schedule):
    """Off by one at warmup's end, at a restart or at the last iteration."""
    done = train(text_set, tmp_path, f'--lr_schedule={schedule}', '--learning_rate=1', '--min_lr=0.1', '--warmup_iters=4', '--lr_decay_iters=20',
                 '--restart_iters=6', '--cooldown_frac=0.25', '--max_iters=23', '--gradient_accumulation_steps=1', '--eval_iters=1')
    assert done.returncode == 0, done.stdout + done.stderr
    assert [e['lr'] for e in run_logs(tmp_path)[0]['training_iterations']] == pytest.approx([reference_lr(schedule, it) for it in range(23)])


def test_a_broken_compiler_costs_a_warning_and_not_the_run(text_set, tmp_path):
    """A laptop without a C++ compiler that cannot train."""
    done = train(text_set, tmp_path, '--compile=True', '--max_iters=2',
                 env={'CXX': str(tmp_path / 'no-such-compiler'), 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache'), 'PATH': str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('WARNING: torch.compile failed') == 1 and sorted(losses(tmp_path)) == [0, 1]


def test_patience_stops_early(text_set, tmp_path):
    """Patience that counts evaluations without looking at them: this learning rate can only make it worse."""
    done = train(text_set, tmp_path, '--patience=2', '--eval_interval=2', '--learning_rate=3', '--min_lr=3', '--warmup_iters=0')
    assert done.returncode == 0 and 'stopping early' in done.stdout
    assert run_logs(tmp_path)[0]['summary']['outcome'] == 'stopped early' and checkpoint(tmp_path)['iter_num'] < 20


@pytest.mark.parametrize('always_save, last', [(True, 20), (False, 10)])
def test_best_and_last_checkpoints(text_set, tmp_path, always_save, last):
    """ckpt_best.pt following the last one; with always_save_checkpoint=False, nanoGPT's meaning: ckpt.pt is the model of the lowest val loss."""
    flags = '--eval_interval=5', f'--always_save_checkpoint={always_save}'
    assert train(text_set, tmp_path, *flags, '--max_iters=10').returncode == 0
    assert train(text_set, tmp_path, *flags, '--init_from=resume', '--learning_rate=3', '--min_lr=3').returncode == 0  # only makes it worse
    evals = {e['iter']: e['val']['loss'] for run in run_logs(tmp_path) for e in run['eval_steps']}
    assert sorted(evals) == [0, 5, 10, 15, 20] and min(evals, key=evals.get) == 10
    assert checkpoint(tmp_path, 'ckpt_best.pt')['iter_num'] == 10 and checkpoint(tmp_path)['iter_num'] == last


def test_a_loss_that_is_not_finite_is_never_saved(text_set, tmp_path):
    """NaN weights over the last good checkpoint, and exit status 0."""
    done = train(text_set, tmp_path, '--learning_rate=1e30', '--grad_clip=0', '--warmup_iters=0', '--save_interval=1')
    assert done.returncode == 1 and 'not finite' in done.stdout
    for path in tmp_path.glob('*.pt'):
        assert all(torch.isfinite(t).all() for t in checkpoint(tmp_path, path.name)['model'].values()), path


@pytest.mark.parametrize('flags', [('--dtype=float16',), ('--eval_interval=1', '--learning_rate=1e39', '--min_lr=1e39')])
def test_a_run_that_is_not_finite_ends(text_set, tmp_path, flags):
    """fp16's scaler skipping every step for ever; an evaluation of broken weights that saves them."""
    done = train(text_set, tmp_path, '--max_iters=100', '--learning_rate=1e30', '--min_lr=1e30', '--grad_clip=0', '--warmup_iters=0', '--save_interval=1', *flags)
    assert done.returncode == 1 and 'not finite' in done.stdout + done.stderr
    assert run_logs(tmp_path)[0]['summary']['outcome'] in ('not finite', 'failed')
    for path in tmp_path.glob('*.pt'):
        assert all(torch.isfinite(t).all() for t in checkpoint(tmp_path, path.name)['model'].values()), path


def test_a_signal_to_a_whole_torchrun_job_saves(text_set, tmp_path):
    """torchrun passes on the signal that its workers have got already: two, and they leave at once without a checkpoint."""
    process = start(text_set, tmp_path, launcher=TORCHRUN)
    os.killpg(process.pid, signal.SIGTERM)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and 'saved' in rest
    assert checkpoint(tmp_path)['iter_num'] == run_logs(tmp_path)[0]['summary']['iter_num'] >= 6
    assert run_logs(tmp_path)[0]['summary']['outcome'] == 'SIGTERM'


def test_another_tokenizer_is_noticed(finished, tmp_path):
    """A byte model that goes on with ids of characters."""
    write_dataset(tmp_path / 'chars', {'train': np.arange(99) % 3, 'val': np.arange(50) % 3}, {'vocab_size': 3, 'tokenizer': {'name': 'char', 'chars': 'abc'}})
    out_dir = copy_run(finished[0], tmp_path / 'out')
    refused = train(tmp_path / 'chars', out_dir, '--init_from=resume', '--max_iters=21')
    assert refused.returncode == 2 and 'byte' in refused.stderr and 'char' in refused.stderr
    tuned = train(tmp_path / 'chars', tmp_path / 'tuned', f'--init_from={out_dir}', '--max_iters=1')
    assert tuned.returncode == 0 and 'WARNING' in tuned.stdout


def test_equal_settings_written_differently_resume(text_set, finished, tmp_path):
    """n_kv_head=2 refused where the checkpoint says None and means 2."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    assert train(text_set, out_dir, '--init_from=resume', '--max_iters=21', '--n_kv_head=2', '--d_ff=128').returncode == 0
    assert 'n_kv_head=1' in train(text_set, out_dir, '--init_from=resume', '--max_iters=22', '--n_kv_head=1').stderr


def test_fine_tuning_takes_weights_only(text_set, finished, tmp_path):
    """The other run's optimizer, iteration or best loss carried along."""
    done = train(text_set, tmp_path / 'tuned', f'--init_from={finished[0]}', '--max_iters=1', '--learning_rate=1e-12', '--min_lr=0', '--block_size=8')
    assert done.returncode == 0, done.stderr
    before, after = checkpoint(finished[0]), checkpoint(tmp_path / 'tuned')
    assert after['iter_num'] == 1 and after['model_args']['block_size'] == 8
    assert torch.allclose(before['model']['lm_head.weight'], after['model']['lm_head.weight'], atol=1e-6)
    assert {int(s['step']) for s in after['optimizer']['state'].values()} == {1}


def hub_cache(home, name, model):
    """Environment in which a hub id has been downloaded already, as huggingface_hub keeps it."""
    repository = home / 'hub' / f"models--{name.replace('/', '--')}"
    (repository / 'refs').mkdir(parents=True)
    (repository / 'refs/main').write_text('0' * 40)
    model.save_pretrained(repository / 'snapshots' / ('0' * 40))
    return {'HF_HOME': str(home), 'HF_HUB_OFFLINE': '1'}


def test_fine_tuning_starts_at_a_pretrained_model(text_set, tmp_path):
    """nanoGPT's --init_from=gpt2: weights from the hub, in float32 whatever they come in, a shorter context, dropout of one's own."""
    pytest.importorskip('safetensors')
    torch.manual_seed(1)
    model = GPT(GPTConfig.from_settings(dict(arch_preset='gpt2', block_size=64, vocab_size=256, n_layer=1, n_head=2, n_embd=16))).bfloat16()
    env = hub_cache(tmp_path / 'home', 'gpt2', model)
    flags = ['--init_from=gpt2', '--max_iters=1', '--learning_rate=1e-12', '--min_lr=0', '--dropout=0.1', '--eval_interval=1', '--eval_iters=1000']
    script = [f for f in TINY if not f.startswith(('--n_', '--arch', '--norm', '--pos', '--act', '--ffn', '--bias'))]
    done = command('train.py', *script, f'--dataset={text_set}', f'--out_dir={tmp_path}/out', *flags, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = checkpoint(tmp_path / 'out')
    T = saved['model_args']['block_size']
    assert T < 64 and saved['model_args']['dropout'] == 0.1 and saved['config']['n_layer'] == 1
    for name, tensor in saved['model'].items():
        assert tensor.dtype == torch.float32
        close = model.state_dict()[name].float()
        assert torch.allclose(tensor, close[:T] if 'wpe' in name else close, atol=1e-6), name
    assert command('train.py', *script, f'--dataset={text_set}', f'--out_dir={tmp_path}/out', '--init_from=resume', '--max_iters=2').returncode == 0
    refused(command('train.py', *script, f'--dataset={text_set}', f'--out_dir={tmp_path}/new', *flags, '--n_layer=3', env=env), 'n_layer=3', 'n_layer=1')
    evaluated = command('train.py', *script, f'--dataset={text_set}', f'--out_dir={tmp_path}/new', '--init_from=gpt2', '--eval_only=True', env=env)
    assert evaluated.returncode == 0 and 'step 0: train loss 5.' in evaluated.stdout
    sampled = command('sample.py', '--init_from=gpt2', '--num_samples=1', '--max_new_tokens=5', '--start=abc', env=env)
    assert sampled.returncode == 2 and "GPT-2's" in sampled.stderr and '256' in sampled.stderr  # the folder names no tokenizer, and this model cannot be GPT-2
    missing = command('sample.py', '--init_from=gpt2-xl', env=env)
    assert missing.returncode == 2 and missing.stderr.count('\n') == 1 and 'gpt2-xl' in missing.stderr


def test_resume_takes_new_optimizer_settings_and_refuses_another_architecture(text_set, finished, tmp_path):
    """load_state_dict brings back the old betas and decay; a model of other parts loaded in silence."""
    out_dir = copy_run(finished[0], tmp_path / 'other')
    refused = train(text_set, out_dir, '--init_from=resume', '--n_embd=64', '--max_iters=21')
    assert refused.returncode == 2 and 'n_embd=64' in refused.stderr and 'n_embd=32' in refused.stderr
    assert 'rmsnorm' in train(text_set, out_dir, '--init_from=resume', '--arch_preset=llama', '--max_iters=21').stderr
    assert train(text_set, out_dir, '--init_from=resume', '--max_iters=21', '--weight_decay=0.3', '--beta2=0.9', '--lr_schedule=constant', '--learning_rate=7e-4').returncode == 0
    groups = checkpoint(out_dir)['optimizer']['param_groups']
    assert [g['weight_decay'] for g in groups] == [0.3, 0.0] and all(g['betas'] == (0.9, 0.9) and g['lr'] == 7e-4 for g in groups)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(text_set, finished, tmp_path):
    """torch.load does not check CRCs: a flipped bit goes into training unnoticed."""
    out_dir = copy_run(finished[0], tmp_path / 'damaged')
    (out_dir / 'ckpt_prev.pt').write_bytes((finished[0] / 'ckpt_prev.pt').read_bytes())
    data = bytearray((out_dir / 'ckpt.pt').read_bytes())
    data[len(data) // 2] ^= 1
    (out_dir / 'ckpt.pt').write_bytes(data)
    done = train(text_set, out_dir, '--init_from=resume')
    assert done.returncode == 0 and done.stdout.count('WARNING') == 1
    assert_equal_states(checkpoint(finished[0]), checkpoint(out_dir))
    (out_dir / 'ckpt.pt').write_bytes(data)
    refused = command('sample.py', f'--out_dir={out_dir}')
    assert refused.returncode == 2 and 'ckpt.pt' in refused.stderr and refused.stdout == ''


@pytest.mark.parametrize('flags, words', [
    (['--device=cuda'], ['cuda', 'not available']), (['--device=tpu9'], ['tpu9']), (['--n_head=3'], ['n_embd', 'n_head']),
    (['--optimizer=mion'], ['muon']), (['--muon_momentum=1.0'], ['muon_momentum']), (['--muon_learning_rate=0'], ['muon_learning_rate']),
    (['--normalization=rmsnrm'], ['rmsnrm', 'rmsnorm']), (['--arch_preset=gpt3'], ['gpt3', 'llama']), (['--batch_size=0'], ['batch_size']),
    (['--max_iters=-5'], ['max_iters']), (['--init_from=resume'], ['no checkpoint']), (['--init_from=nowhere'], ['nowhere', 'resume']),
    (['--dataset=shakspeare'], ['shakspeare', 'pystdlib']), (['--vocab_size=100'], ['vocab_size', '256']), (['--block_size=99999'], ['train.bin', 'block_size']),
    (['--use_fsdp=True'], ['use_fsdp', 'torchrun']), (['--sharded_checkpoint=True'], ['sharded_checkpoint', 'torchrun']), (['--use_zero1=True', '--use_fsdp=True'], ['use_zero1', 'use_fsdp']),
    (['--backend=foo'], ['backend', 'gloo']), (['--beta2=1.5'], ['beta2']), (['--compile', 'False'], ['--compile=False']), (['--max_iters=0'], ['max_iters']), (['--max_iters=1.5'], ['max_iters', 'int']), (['--max_itres=5'], ['max_itres', 'max_iters']), (['--dropout=1.0'], ['dropout'])])
def test_a_wrong_setting_is_one_line_and_nothing_is_written(text_set, tmp_path, flags, words):
    """A traceback, or a folder half made, for a typing mistake."""
    done = train(text_set, tmp_path / 'out', *flags)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / 'out').exists()
    done = train(text_set, tmp_path / 'out', *flags, launcher=(sys.executable, '-O')) if flags[0] in ('--n_head=3', '--batch_size=0') else done
    assert done.returncode == 2  # nothing relies on assert


def test_accumulation_must_divide_among_processes(text_set, tmp_path):
    """Fewer tokens a step than asked for, in silence."""
    done = train(text_set, tmp_path, '--gradient_accumulation_steps=3', env={'RANK': '0', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0'})
    assert done.returncode == 2 and 'gradient_accumulation_steps=3' in done.stderr and '2 processes' in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_process_without_a_gpu_says_so(text_set, tmp_path):
    """CUDA's 'invalid device ordinal' from deep inside."""
    done = train(text_set, tmp_path, '--device=auto', env={'RANK': '0', 'WORLD_SIZE': '2', 'LOCAL_RANK': '99'})
    assert done.returncode == 2
    one_line(done.stderr, 'local rank 99', f'--nproc_per_node={torch.cuda.device_count()}')


def test_a_folder_of_text_is_answered_with_the_command_that_prepares_it(tmp_path, text_file):
    done = train(tmp_path, tmp_path / 'out', '--wandb_artifacts=True')
    refused(done, f'python data/prepare.py --input={tmp_path} --out=NAME')
    assert 'NOTE: --wandb_artifacts=True does nothing' in done.stdout


def test_flags_that_do_nothing_are_named(tmp_path):
    flags = '--fsdp_min_num_params=5', '--backend=gloo', '--muon_momentum=0.9', '--cooldown_frac=0.5', '--restart_iters=5', '--min_lr=1'
    notes = lambda *more: re.findall(r'NOTE: (?:--)?(\w+) ', train(tmp_path, tmp_path / 'out', *flags, *more).stdout)
    assert notes() == ['fsdp_min_num_params', 'backend', 'muon_momentum', 'cooldown_frac', 'restart_iters', 'min_lr']
    assert notes('--optimizer=muon', '--lr_schedule=sgdr', '--learning_rate=1') == ['fsdp_min_num_params', 'backend', 'cooldown_frac']


def test_a_large_download_is_never_started_unasked(tmp_path):
    """A first run that fills somebody's disk."""
    (tmp_path / 'prepare.py').write_text('"""Big."""\ndownload_mb = 54000\nopen("started", "w")\n')
    done = train(tmp_path, tmp_path / 'out')
    assert done.returncode == 2 and '54,000 MB' in done.stderr and 'prepare.py' in done.stderr and not (tmp_path / 'started').exists()


def test_a_missing_data_set_prepares_itself(tmp_path):
    """'No such file' where a prepare.py lies beside."""
    (tmp_path / 'prepare.py').write_text('"""A small set of numbers."""\ndownload_mb = 0\nimport sys\nsys.path.insert(0, %r)\nfrom data.loader import write_dataset\n'
                                         'write_dataset(%r, {"train": bytes(range(200)), "val": bytes(range(100))}, {"vocab_size": 256, "tokenizer": {"name": "byte"}})\n' % (str(ROOT), str(tmp_path)))
    done = train(tmp_path, tmp_path / 'out', '--max_iters=1')
    assert done.returncode == 0 and 'A small set of numbers' in done.stdout and 'no download' in done.stdout


def test_a_file_of_text_is_a_data_set(finished, tmp_path):
    """Preparing a book should not be the first lesson; once is enough, until the book changes."""
    book = tmp_path / 'my book.txt'
    book.write_bytes(''.join(f'line {i} says {i * i % 97}\n' for i in range(900)).encode())
    caches = []
    try:
        for n, prepared in enumerate((True, False, True)):
            if n == 2:
                book.write_bytes(book.read_bytes() + 'the end ☺\n'.encode() * 9)
            done = train('my book.txt', tmp_path / 'out', '--overwrite=True', '--max_iters=2', cwd=tmp_path, launcher=(sys.executable, '-c', INSIDE))
            assert done.returncode == 0, done.stderr
            assert ('with tokenizer byte; another choice: python data/prepare.py' in done.stdout) == prepared
            caches.append(find_datasets(str(book))[0][2])
        assert caches[0] == caches[1] != caches[2] and read_meta(caches[2])['tokenizer'] == {'name': 'byte'}
        assert bytes(ids_of(caches[2], 'train')[:-1] + ids_of(caches[2], 'val')[:-1]) == book.read_bytes()
        assert command('sample.py', f'--out_dir={tmp_path / "out"}', '--num_samples=1', '--max_new_tokens=5').returncode == 0
        book.write_bytes(b'')
        refused(train(book, tmp_path / 'other'), 'data/prepare.py', book, 'is empty')
    finally:
        for folder in caches:
            shutil.rmtree(folder, ignore_errors=True)


# train.py from another working directory
INSIDE = f"import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"


# data: several sets at once

@pytest.fixture
def three(tmp_path):
    """Three data sets of windows of 9, 99 and 999, each token's value its position plus 1000, 2000 or 3000, and Loaders of them."""
    folders = []
    for n in range(3):
        folders.append(tmp_path / f'set{n}')
        write_dataset(folders[-1], {split: np.arange(T * 9 * 11 ** n + T) % 1000 + 1000 * (n + 1) for split in ('train', 'val')}, {**BYTE, 'vocab_size': 4000})
    return folders


def test_a_mixture_keeps_its_shares_over_any_stretch(three):
    """Drawn by chance, shares of 4,000 samples are off by a percent, and on resume by another."""
    loaders, shares = [Loader(folder, 'train', T, seed=7) for folder in three], [0.5, 0.3, 0.2]
    mixture = Mixture(loaders, shares)
    chosen, within = mixture.choose(np.arange(20000))
    for number, share in enumerate(shares):
        assert within[chosen == number].tolist() == list(range((chosen == number).sum()))  # each set in order, none left out
        assert np.abs((chosen == number).cumsum() - share * np.arange(1, 20001)).max() < 3
        for start in (0, 777, 15000):
            assert abs((chosen[start:start + 100] == number).sum() - 100 * share) <= 3
    late = np.array([10**12, 3, 10**12 + 1])
    assert mixture.choose(late)[0].tolist() == [mixture.choose([i])[0][0] for i in late]
    x, y = mixture.batch(np.arange(100))
    assert (x[:, 0] // 1000 - 1).tolist() == chosen[:100].tolist()
    for row in range(100):
        a, b = loaders[chosen[row]].batch([within[row]])
        assert torch.equal(x[row], a[0]) and torch.equal(y[row], b[0])
    for a, b in zip(mixture.stream(np.split(np.arange(40), 10)), np.split(np.arange(40), 10)):
        assert torch.equal(a[0], x[b])


def test_evaluation_of_a_mixture_reads_no_window_twice(three):
    """An epoch that is as long as the largest set would read the smallest many times."""
    mixture = Mixture([Loader(folder, 'val', T, seed=0, shift=False) for folder in three], [0.5, 0.3, 0.2])
    chosen, within = mixture.choose(np.arange(mixture.n_windows))
    assert len(set(zip(chosen, within))) == mixture.n_windows >= 15 and all(within[chosen == n].max() < loader.n_windows for n, loader in enumerate(mixture.loaders))


def test_a_run_on_several_sets_resumes_bit_for_bit(text_set, tmp_path):
    """Shares counted from where a run was resumed are not those of the run."""
    write_dataset(tmp_path / 'other', {'train': b'other text, ' * 200, 'val': b'other text, ' * 20}, BYTE)
    mixed = f'{text_set}:0.7,{tmp_path / "other"}:0.3'
    whole = train(mixed, tmp_path / 'whole')
    assert whole.returncode == 0 and f'0.3 from {tmp_path / "other"}' in whole.stdout, whole.stderr
    assert train(mixed, tmp_path / 'parts', '--max_iters=7', '--lr_decay_iters=20').returncode == 0
    assert train(mixed, tmp_path / 'parts', '--init_from=resume').returncode == 0
    assert_equal_states(checkpoint(tmp_path / 'whole'), checkpoint(tmp_path / 'parts'))
    assert losses(tmp_path / 'whole') == losses(tmp_path / 'parts')
    resumed = train(mixed, tmp_path / 'parts', '--init_from=resume', '--max_iters=21', '--batch_size=8', '--gradient_accumulation_steps=1')
    assert resumed.returncode == 0 and 'NOTE: resumed' not in resumed.stdout  # the same windows in other micro-batches
    swapped = mixed.replace('0.7', '0.4').replace('0.3', '0.6')
    resumed = train(swapped, tmp_path / 'parts', '--init_from=resume', '--max_iters=22', '--batch_size=6')
    [note] = [line for line in resumed.stdout.splitlines() if line.startswith('NOTE: resumed')]
    one_line(note, f'dataset {swapped} instead of {mixed}', 'sequences an iteration 12 instead of 8')
    assert 'seed' not in note


DOC = dict(block_size=48, vocab_size=60, n_layer=2, n_head=4, n_embd=32, attention_chunk_size=7)


@pytest.mark.parametrize('position_encoding', ['rope', 'none'])
@pytest.mark.parametrize('backend', ['sdpa', 'manual', 'chunked'])
def test_packed_documents_have_the_logits_of_documents_alone(backend, position_encoding):
    """One key too many and a page learns from the unrelated page before it; the mask must also hold in every row of its own."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**DOC, attention_backend=backend, position_encoding=position_encoding, n_kv_head=2, doc_mask_token=0))
    idx = torch.randint(1, 60, (3, 48))
    starts = [[0, 9, 10, 30], [0, 47], [0]]
    for row, places in enumerate(starts):
        idx[row, places[1:]] = 0
    logits, loss = model(idx, idx.roll(-1, 1), all_logits=True)
    assert all(torch.isfinite(p.grad).all() for p in (loss.backward(), model.parameters())[1])
    plain = GPT(GPTConfig(**DOC, position_encoding=position_encoding, n_kv_head=2))
    plain.load_state_dict(model.state_dict())
    for row, places in enumerate(starts):
        for start, end in zip(places, [*places[1:], 48]):
            alone = plain(idx[row:row + 1, start:end], all_logits=True)[0]
            torch.testing.assert_close(logits[row, start:end], alone[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain(idx, all_logits=True)[0][0, 12], logits[0, 12], atol=1e-3)


@pytest.mark.parametrize('options', [{}, {'n_kv_head': 1}, {'position_encoding': 'rope', 'n_kv_head': 2}, {'qk_norm': True, 'activation_checkpointing': True}],
                         ids=['custom', 'mqa', 'rope-gqa', 'qk_norm-checkpointing'])
def test_flex_attention_is_the_dense_mask(options, monkeypatch):
    """A GPU takes it, and here it is made to be taken: torch only checks that no gradient is wanted on a CPU, and its plain path has one."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**DOC | dict(block_size=200, n_embd=64) | options, doc_mask_token=0)).train()
    idx = torch.randint(1, 60, (3, 200))
    idx[0, [9, 10, 130]] = idx[1, 199] = 0

    def run(forward, autocast=False):
        model.zero_grad()
        with torch.autocast('cpu', enabled=autocast):
            logits, loss = forward(idx, idx.roll(-1, 1), all_logits=True)
        loss.backward()
        return [logits.detach().float(), *(p.grad for p in model.parameters())]
    dense, dense16 = run(model), run(model, True)
    taken = []
    monkeypatch.setattr(model, 'takes_flex', lambda device_type: True)
    monkeypatch.setattr('torch.nn.attention.flex_attention._validate_device', lambda *tensors: None)

    def backend(graph, inputs):
        taken.append(any('flex_attention' in getattr(m, 'code', '') for m in graph.modules()))
        return graph.forward
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(run(compiled), dense, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run(compiled, True), dense16, atol=2e-2, rtol=2e-2)
    assert taken == [True, True]
    if 'position_encoding' in options:
        alone = torch.cat([model(part, all_logits=True)[0] for part in idx[:1].split([9, 1, 120, 70], dim=1)], dim=1)
        torch.testing.assert_close(dense[0][:1], alone, atol=1e-5, rtol=1e-4)
    if 'position_encoding' in options and shutil.which('g++'):  # torch's own compiler, which without .contiguous() has given wrong logits here
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model)(idx, all_logits=True)[0], dense[0], atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_flex_attention_on_a_gpu_is_the_dense_mask():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**DOC | dict(block_size=200, n_embd=64, position_encoding='rope', n_kv_head=2), doc_mask_token=0)).cuda().train()
    idx = torch.randint(0, 60, (3, 200), device='cuda')
    results = []
    for forward in (model, torch.compile(model)):
        model.zero_grad()
        logits, loss = forward(idx, idx.roll(-1, 1), all_logits=True)
        loss.backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    assert model.takes_flex('cuda')
    torch.testing.assert_close(results[1], results[0], atol=1e-3, rtol=1e-2)


def test_doc_mask_holds_with_a_cache_too():
    """Keys before the end of a text are still in the cache."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**DOC, doc_mask_token=0)).eval()
    idx = torch.randint(1, 60, (2, 48))
    idx[0, [5, 20, 21]], idx[1, 30] = 0, 0
    with torch.no_grad():
        whole, cache, parts = model(idx, all_logits=True)[0], model.new_cache(2, 48), []
        for start, end in [(0, 3), (3, 20), (20, 21), (21, 22), (22, 47), (47, 48)]:
            parts.append(model(idx[:, start:end], cache=cache, all_logits=True)[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
    a, b = (list(model.stream(idx[:, :40], 20, seed=1, slide=4, use_cache=use_cache)) for use_cache in (True, False))
    assert torch.equal(torch.stack(a), torch.stack(b))


def test_doc_mask_trains_and_says_what_it_needs(text_set, tmp_path):
    """Characters have no end of text, so a mask by it would do nothing."""
    write_dataset(tmp_path / 'docs', {split: b'a short text\0' * 200 for split in ('train', 'val')}, BYTE)
    for folder, flag in [('a', True), ('b', False), ('c', True)]:
        done = train(tmp_path / 'docs', tmp_path / folder, f'--doc_mask={flag}', '--max_iters=5')
        assert done.returncode == 0 and ('doc_mask by a dense mask' in done.stdout) == flag, done.stderr
    assert losses(tmp_path / 'a') == losses(tmp_path / 'c') != losses(tmp_path / 'b')
    assert checkpoint(tmp_path / 'a')['model_args']['doc_mask_token'] == 0 and checkpoint(tmp_path / 'b')['model_args']['doc_mask_token'] is None
    assert command('sample.py', f'--out_dir={tmp_path / "a"}', '--num_samples=1', '--max_new_tokens=30', '--stop=False').returncode == 0
    write_dataset(tmp_path / 'chars', {split: b'\0\1' * 99 for split in ('train', 'val')}, {'vocab_size': 2, 'tokenizer': {'name': 'char', 'chars': 'ab'}})
    refused(train(tmp_path / 'chars', tmp_path / 'd', '--doc_mask=True'), 'doc_mask', 'end-of-text')


def test_sets_that_do_not_mix_are_refused(text_set, tmp_path):
    """Ids of two tokenizers train without a sign of it."""
    write_dataset(tmp_path / 'a', {'train': b'a' * 200, 'val': b'a' * 200}, {'vocab_size': 256, 'tokenizer': {'name': 'char', 'chars': 'a'}})
    refused(train(f'{text_set}:0.5,{tmp_path / "a"}:0.5', tmp_path / 'out'), text_set, tmp_path / 'a', 'tokenizers')
    for shares, says in [(('0', '1'), 'share'), (('x', '1'), 'share'), (('-1', '2'), 'share')]:
        refused(train(f'{text_set}:{shares[0]},{text_set}:{shares[1]}', tmp_path / 'out'), says)
    refused(train(f'{text_set}:0.5,nowhere:0.5', tmp_path / 'out'), 'nowhere')
    assert not (tmp_path / 'out').exists()


def test_a_run_without_wandb_is_the_same_run(text_set, finished, tmp_path):
    """A missing logger that ends the run, or changes it."""
    (tmp_path / 'stub' / 'wandb').mkdir(parents=True)
    (tmp_path / 'stub' / 'wandb' / '__init__.py').write_text('raise ImportError("No module named wandb")')
    done = train(text_set, tmp_path / 'out', '--wandb_log=True', env={'PYTHONPATH': str(tmp_path / 'stub')})
    assert done.returncode == 0 and 'without wandb' in done.stdout
    assert_equal_states(checkpoint(finished[0]), checkpoint(tmp_path / 'out'))


@pytest.fixture(scope='module')
def watched(text_set, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp('watched')
    done = train(text_set, out_dir, '--save_interval=10', '--sample_interval=1', '--gradient_log_interval=5', '--wandb_log=True', '--wandb_artifacts=True', '--tensorboard_log=True',
                 '--wandb_run_name=seen', env={'HOME': str(out_dir), 'WANDB_API_KEY': ''})
    assert done.returncode == 0 and done.stdout.count('WARNING') == done.stdout.count('recorded offline') == 1, done.stdout + done.stderr
    return out_dir


def numbers(entry, prefix=''):
    for key, value in entry.items():
        yield from numbers(value, f'{prefix}{key}/') if isinstance(value, dict) else [(prefix + key, value)] * isinstance(value, (int, float))


def logged(out_dir):
    """{iteration: {name: number}} of the run log."""
    log, steps = run_logs(out_dir)[-1], {}
    for entry in log['eval_steps'] + log['training_iterations']:
        steps.setdefault(entry['iter'], {}).update(numbers(entry))
    assert {'loss', 'lr', 'val/loss', 'train/loss', 'val/bits_per_byte', 'gradients/norm', 'gradients/layers/wte', 'mfu/mfu_percent', 'memory/peak'} <= steps[0].keys()
    return steps


def test_wandb_has_everything_and_its_own_reader_finds_it(watched):
    """A dashboard that lacks what was measured, or shows it at another iteration."""
    run, = (watched / 'wandb').glob('offline-run-*')
    printed = subprocess.run([Path(sys.executable).parent / 'wandb', 'leet', 'inspect', '--json', run], capture_output=True, text=True, timeout=100, check=True).stdout
    records = list(map(json.loads, printed.splitlines()))
    start = next(r['run'] for r in records if 'run' in r)
    assert start['display_name'] == 'seen' and start['config']['update']['n_layer'] == 2 and start['config']['update']['total_params'] > 0
    history = [r['history']['item'] for r in records if 'history' in r]
    steps = {row['_step']: {k: v for k, v in row.items() if not k.startswith(('_', 'samples'))} for row in history}
    evaluations = [e['iter'] for e in run_logs(watched)[-1]['eval_steps']]
    assert steps == logged(watched) and [row['_step'] for row in history if any(k.startswith('samples') for k in row)] == evaluations
    table = json.loads(sorted((run / 'files/media/table').glob('samples_*'), key=os.path.getmtime)[-1].read_text())
    assert table['columns'] == ['iter', 'text'] and table['data'] == [[e['iter'], e['sample']] for e in run_logs(watched)[-1]['eval_steps']]
    artifacts = [r['artifact'] for r in records if r.get('artifact', {}).get('type') == 'model']
    assert len(artifacts) == len(run_logs(watched)[-1]['checkpoints']) and len({a['name'] for a in artifacts}) == 1 and {'latest', 'iter-20'} <= set(artifacts[-1]['aliases'])
    copies = [Path(content['local_path']) for a in artifacts for content in a['manifest']['contents']]
    assert copies[-1].read_bytes() == (watched / 'ckpt.pt').read_bytes() and len(set(copies)) == len(copies) and all(watched in path.parents for path in copies)


def test_tensorboard_has_the_same_under_the_same_names(watched):
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator').EventAccumulator(str(watched), size_guidance={'scalars': 0, 'tensors': 0})
    reader.Reload()
    steps = {}
    for name in reader.Tags()['scalars']:
        for event in reader.Scalars(name):
            steps.setdefault(event.step, {})[name] = event.value
    expected = logged(watched)
    assert {i: values.keys() for i, values in steps.items()} == {i: values.keys() for i, values in expected.items()}
    for i, values in steps.items():
        assert values == pytest.approx(expected[i], rel=1e-6)
    samples = [e.tensor_proto.string_val[0].decode() for e in reader.Tensors('samples/text_summary')]
    assert len(samples) == len(run_logs(watched)[-1]['eval_steps']) and 'n_layer' in reader.Tensors('config/text_summary')[0].tensor_proto.string_val[0].decode()


def test_a_run_that_is_watched_is_the_same_run(finished, watched):
    assert_equal_states(checkpoint(finished[0]), checkpoint(watched))


def test_tensorboard_that_is_missing_is_one_line(text_set, tmp_path):
    (tmp_path / 'tensorboard.py').write_text('raise ImportError("not here")')
    refused(train(text_set, tmp_path / 'out', '--tensorboard_log=True', env={'PYTHONPATH': str(tmp_path)}), 'pip install tensorboard')
    assert not (tmp_path / 'out').exists()


def test_samples_are_repeatable_and_start_with_the_prompt(finished, tmp_path):
    """A seed that is ignored, a prompt file that is not read, the samples of a batch all alike."""
    (tmp_path / 'prompt.txt').write_text('line 7 says')
    flags = [f'--out_dir={finished[0]}', '--num_samples=3', '--max_new_tokens=30', '--device=cpu', '--dtype=float32', '--stop=False']
    a = command('sample.py', *flags, '--start=line 7 says')
    assert a.returncode == 0, a.stderr
    assert a.stdout == command('sample.py', *flags, f'--start=FILE:{tmp_path / "prompt.txt"}').stdout
    assert a.stdout != command('sample.py', *flags, '--start=line 7 says', '--seed=2').stdout
    texts = a.stdout.split('---------------\n')
    assert len(set(texts)) == 3 and all(t.startswith('line 7 says') for t in texts)


def test_streamed_text_is_the_generated_text(finished):
    """Characters cut apart or lost between tokens: against generate() and decode()."""
    from model import GPT
    out = command('sample.py', f'--out_dir={finished[0]}', '--num_samples=1', '--max_new_tokens=60', '--device=cpu', '--dtype=float32', '--stop=False', '--start=über ', text=False).stdout.decode()
    tokenizer, model = get_tokenizer('byte'), GPT.from_checkpoint(finished[0])
    model.config.unpadded_vocab_size = 256
    ids = model.generate(torch.tensor([tokenizer.encode('über ')]), 60, temperature=0.8, top_k=200, seed=1337)[0].tolist()
    assert out == tokenizer.decode(ids) + '\n'


def test_interactive_answers_prompt_after_prompt(finished):
    """One prompt, then the end."""
    done = subprocess.run([sys.executable, 'sample.py', f'--out_dir={finished[0]}', '--interactive=True', '--num_samples=1', '--max_new_tokens=5', '--device=cpu'],
                          cwd=ROOT, input='first\nsecond\n', capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and 'first' in done.stdout and 'second' in done.stdout


SAMPLE = '--device=cpu --dtype=float32 --stop=False --max_new_tokens=50'.split()


@pytest.fixture(scope='module')
def sampler(finished):
    """The functions of sample.py, with the finished run's model loaded."""
    argv, sys.argv = sys.argv, ['sample.py', f'--out_dir={finished[0]}', *SAMPLE, '--num_samples=1']
    try:
        yield runpy.run_path(str(ROOT / 'sample.py'))
    finally:
        sys.argv = argv


def test_metrics_of_words_are_those_counted_by_hand(sampler):
    """n-grams across the end, matches that are not clipped, a brevity penalty by the wrong text."""
    distinct, repetition, bleu = (sampler[name] for name in ('distinct', 'repetition', 'bleu'))
    assert distinct('a b a b c'.split(), 1) == 3 / 5 and distinct('a b a b c'.split(), 2) == 3 / 4  # ab ba ab bc
    assert repetition('a b c d a b c d e'.split()) == pytest.approx(1 / 6)  # abcd bcda cdab dabc abcd bcde
    assert all(map(math.isnan, (distinct([], 1), repetition('a b c'.split()), bleu('a b c'.split(), ['a b c'.split()]), bleu('a b c d'.split(), []))))
    words = 'a b c d e'.split()
    assert bleu(words, [words, ['x']]) == 1
    assert bleu(words, ['a b c d x y'.split()]) == pytest.approx(math.exp(-0.2) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    clipped = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25
    assert bleu('a a a a'.split(), ['a a b c d e f'.split()]) == pytest.approx(math.exp(1 - 7 / 4) * clipped)
    assert bleu('a a a a'.split(), ['a a b'.split(), 'c c c c c'.split()]) == pytest.approx(clipped)  # as near, and shorter


@pytest.mark.parametrize('n, t', [(4, 3.182), (10, 2.262), (31, 2.042)])
def test_the_interval_of_metrics_is_students(sampler, n, t):
    values = np.random.default_rng(n).standard_normal(n)
    mean, half = map(float, sampler['interval']([*values, math.nan]).split(' +- '))
    assert mean == pytest.approx(values.mean(), abs=5e-4) and half == pytest.approx(t * values.std(ddof=1) / math.sqrt(n), rel=0.01, abs=5e-4)
    assert sampler['interval']([1.0, 2.0]) == '1.500' and sampler['interval']([math.nan]) == '-'


@pytest.mark.parametrize('length, n', [(5, 3), (17, 16), (60, 50)])
def test_perplexity_of_a_sample_is_that_of_its_tokens_one_by_one(sampler, length, n):
    """Tokens of the prompt counted in, the first of each window predicted from nothing."""
    model, ids, losses = sampler['model'], np.random.default_rng(0).integers(0, 256, length).tolist(), []
    for j in range(length - n, length):  # token j from those before it: all, or past 16 of them the window that moves by 8
        first = 0 if j <= 16 else ((j - 1) // 8 - 1) * 8
        losses.append(-model(torch.tensor([ids[first:j]]))[0][0, -1].double().log_softmax(-1)[ids[j]].item())
    assert sampler['perplexity'](ids, n) == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_real_text_beside_samples_is_of_val_and_as_long(sampler, text_set):
    """Text that the model was trained on; the same stretch twice; longer texts, which repeat more."""
    val, lengths = np.fromfile(text_set / 'val.bin', np.uint16).astype(np.uint8).tobytes(), [70, 61, 70, 5]
    texts = [bytes(ids) for ids in sampler['real_texts'](lengths)]
    assert [len(text) for text in texts] == lengths and all(text in val for text in texts) and len({text[:5] for text in texts}) == 4
    assert [bytes(ids) for ids in sampler['real_texts'](lengths)] == texts


def test_metrics_are_those_of_the_samples(finished, sampler):
    """A table of other texts than those above it: against generate() with the same seed."""
    done = command('sample.py', f'--out_dir={finished[0]}', *SAMPLE, '--num_samples=5', '--start=line 7', '--metrics=True')
    assert done.returncode == 0, done.stderr
    table = {line[:14].strip(): (line[14:36].strip(), line[36:58].strip()) for line in done.stdout.split('---------------\n')[-1].splitlines()}
    assert table.pop('') == ('5 samples', '5 of real text')
    prompt = list(b'line 7')
    rows = sampler['model'].generate(torch.tensor([prompt] * 5), 50, temperature=0.8, top_k=200, seed=1337).tolist()
    for column, texts in enumerate((rows, sampler['real_texts']([56] * 5))):
        expected = sampler['measure'](6, texts)
        words = [get_tokenizer('byte').decode([t for t in ids[6:] if t]).split() for ids in texts]
        assert expected['distinct-1'] == [len(set(w)) / len(w) for w in words]
        assert {metric: columns[column] for metric, columns in table.items()} == {metric: sampler['interval'](values) for metric, values in expected.items()}


def test_metrics_without_the_data_set_are_of_samples_alone(finished, tmp_path):
    """A checkpoint that came without its data, or whose data set is now of another tokenizer."""
    write_dataset(tmp_path / 'other', {'train': b'\1' * 500, 'val': b'\1' * 500}, {'vocab_size': 256, 'tokenizer': {'name': 'char', 'chars': 'ab'}})
    for i, (dataset, says) in enumerate({'nowhere': 'not here', str(tmp_path / 'other'): 'another tokenizer'}.items()):
        out_dir = copy_run(finished[0], tmp_path / str(i))
        torch.save(checkpoint(out_dir) | {'config': {'dataset': dataset}}, out_dir / 'ckpt.pt')
        done = command('sample.py', f'--out_dir={out_dir}', *SAMPLE, '--num_samples=2', '--metrics=True')
        assert done.returncode == 0 and says in done.stderr and '2 samples' in done.stdout and 'of real text' not in done.stdout, done.stderr


@pytest.mark.parametrize('prompt, few', [('line $x$ 7 says', True), ('line 7 says 8 ' * 6, False)])
def test_attention_is_drawn_for_each_head(finished, tmp_path, prompt, few):
    """A picture that fails on a dollar sign, which is mathematics to matplotlib, or on a long prompt."""
    image = pytest.importorskip('matplotlib.image')
    out_dir = copy_run(finished[0], tmp_path / 'out')
    ckpt = checkpoint(out_dir)
    ckpt['model_args'].update(block_size=100, position_encoding='none')
    ckpt['model'] = {k: v for k, v in ckpt['model'].items() if 'wpe' not in k}
    torch.save(ckpt, out_dir / 'ckpt.pt')
    done = command('sample.py', f'--out_dir={out_dir}', f'--attention={tmp_path / "map.png"}', f'--start={prompt}')
    assert done.returncode == 0 and f'2 layers x 2 heads over {len(prompt)} tokens' in done.stdout and done.stdout.count('\n') == 1, done.stderr
    pixels = image.imread(tmp_path / 'map.png')[..., :3]
    height, width = pixels.shape[:2]
    size = max(1.2, 0.13 * (len(prompt) + 1) if few else len(prompt) / 60)  # inches a head
    assert (width, height) == (pytest.approx(120 * (2 * size + 2.1), abs=1), pytest.approx(120 * (2 * size + 1.3), abs=1))
    for layer in range(2):
        for head in range(2):
            x, y = 120 * (0.8 + head * size), 120 * (0.5 + layer * size)
            seen, unseen = (pixels[round(y + down * 120 * size), round(x + right * 120 * size)] for down, right in ((0.8, 0.2), (0.2, 0.8)))
            assert unseen.min() == 1 and seen.min() < 0.9  # white above the diagonal, a colour below it


def test_attention_without_matplotlib_is_one_line(finished, tmp_path):
    (tmp_path / 'matplotlib.py').write_text('raise ImportError("not here")')
    refused(command('sample.py', f'--out_dir={finished[0]}', f'--attention={tmp_path / "map.png"}', env={'PYTHONPATH': str(tmp_path)}), 'pip install matplotlib')


@pytest.mark.parametrize('flags, words', [
    (['--attention=map.nonsense', '--start=a'], ['nonsense']), (['--attention=nowhere/map.png', '--start=a'], ['nowhere']), (['--attention=map.png', '--start=' + 'a' * 17], ['block_size']),
    (['--temperature=-1.0'], ['temperature']), (['--top_p=1.5'], ['top_p']), (['--num_samples=0'], ['num_samples']), (['--start=FILE:nowhere.txt'], ['nowhere.txt']),
    (['--out_dir=nowhere'], ['nowhere']), (['--device=cuda'], ['cuda'])])
def test_sampling_mistakes_are_one_line(finished, flags, words):
    """A traceback for a typing mistake."""
    done = command('sample.py', f'--out_dir={finished[0]}', *flags)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    one_line(done.stderr.splitlines()[-1], 'sample.py: ', *words)  # what was loaded may stand before it


# what a run must survive, each from outside; further down the same with many trials

def refused(done, *words):
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stdout + done.stderr
    one_line(done.stderr, *words)


def contents(out_dir):
    return {path.name: path.read_bytes() for path in Path(out_dir).glob('*.pt*')}


def test_a_second_run_in_one_out_dir_is_refused(text_set, finished, tmp_path):
    """Two runs that replace each other's checkpoints; a lock that outlives a kill."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    process = start(text_set, out_dir, '--init_from=resume', '--eval_interval=1000000')
    before = contents(out_dir)
    refused(train(text_set, out_dir, '--init_from=auto'), str(out_dir), f'process {process.pid} on ', '--out_dir')
    refused(train(text_set, out_dir, '--overwrite=True'), f'process {process.pid} on ')
    done = train(text_set, out_dir, '--init_from=auto', launcher=TORCHRUN)  # what rank 0 has met ends all ranks
    assert done.returncode and f'process {process.pid} on ' in done.stderr and len(re.findall('^train.py: ', done.stderr, re.M)) == 1
    assert contents(out_dir) == before
    process.kill()
    process.communicate()
    assert train(text_set, out_dir, '--init_from=auto', '--max_iters=21').returncode == 0 and checkpoint(out_dir)['iter_num'] == 21


def test_a_used_out_dir_is_replaced_only_when_asked(text_set, finished, tmp_path):
    """A new run that overwrites a week of training, because --init_from=resume was forgotten."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    (out_dir / 'ckpt_prev.pt').write_bytes((finished[0] / 'ckpt_prev.pt').read_bytes())
    before = contents(out_dir)
    for flags in ((), (f'--init_from={finished[0]}',)):
        refused(train(text_set, out_dir, *flags), str(out_dir), 'ckpt.pt', '--init_from=resume', '--init_from=auto', '--out_dir', '--overwrite=True')
    assert train(text_set, out_dir, '--eval_only=True').returncode == 0 and contents(out_dir) == before
    (out_dir / 'ckpt.pt').unlink()
    done = train(text_set, out_dir, '--init_from=auto')  # goes on from the one before it
    assert done.returncode == 0 and done.stdout.count('WARNING') == 1
    assert_equal_states(checkpoint(finished[0]), checkpoint(out_dir))
    done = train(text_set, out_dir, '--overwrite=True', '--max_iters=2')
    assert done.returncode == 0 and 'WARNING: overwrite' in done.stdout
    assert checkpoint(out_dir)['iter_num'] == 2 and set(contents(out_dir)) == {'ckpt.pt', 'ckpt_best.pt'}
    assert train(text_set, tmp_path / 'new', '--init_from=auto', '--max_iters=1').returncode == 0 and checkpoint(tmp_path / 'new')['iter_num'] == 1


LIMITED = 'ulimit -{} {}; exec "$0" "$@"'


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(text_set, finished, tmp_path):
    """Exit status 0 without the final checkpoint; half a file over the last good one."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    before = contents(out_dir)
    done = train(text_set, out_dir, '--init_from=resume', '--max_iters=21', launcher=('bash', '-c', LIMITED.format('f', 100), sys.executable))
    refused(done, out_dir / 'ckpt.pt', 'untouched')
    assert contents(out_dir) == before and [e['iter'] for e in run_logs(out_dir)[0]['training_iterations']] == [20]


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which('setpriv'), reason='root writes everywhere')
def test_a_read_only_out_dir_is_refused(text_set, finished, tmp_path):
    """A run that finds out at its first checkpoint."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    launcher = ('setpriv', '--bounding-set=-dac_override', sys.executable) if os.geteuid() == 0 else (sys.executable,)
    out_dir.chmod(0o555)
    refused(train(text_set, out_dir, '--init_from=auto', '--max_iters=21', launcher=launcher), str(out_dir), 'writable')
    refused(train(text_set, out_dir / 'new', launcher=launcher), str(out_dir / 'new'))
    out_dir.chmod(0o755)
    assert os.listdir(out_dir) == ['ckpt.pt']


@pytest.mark.parametrize('keep', [lambda n: 0, lambda n: n // 10, lambda n: n // 2, lambda n: n - 1])
def test_a_cut_checkpoint_is_noticed(finished, tmp_path, keep):
    """A copy that ran out of disk."""
    data = (finished[0] / 'ckpt.pt').read_bytes()
    (tmp_path / 'ckpt.pt').write_bytes(data[:keep(len(data))])
    with pytest.raises(ValueError) as e:
        load_checkpoint(tmp_path)
    one_line(e.value, tmp_path / 'ckpt.pt')


def test_nan_on_one_rank_stops_all_before_the_update(text_set, tmp_path):
    """One rank that stops while the other waits for it, or takes the step."""
    (tmp_path / 'sitecustomize.py').write_text('''
import itertools, math, os
if os.environ.get('RANK') == '1':
    import torch
    calls, embedding = itertools.count(), torch.nn.functional.embedding
    def broken(idx, *args, **kwargs):
        out = embedding(idx, *args, **kwargs)
        return out * math.nan if idx.device.type == 'cpu' and next(calls) == 20 else out
    torch.nn.functional.embedding = broken
''')
    done = train(text_set, tmp_path / 'out', '--save_interval=1', launcher=TORCHRUN, env={'PYTHONPATH': str(tmp_path)})
    (stopped,) = re.findall(r'not finite at iteration (\d+): nothing saved', done.stdout)
    assert done.returncode and 0 < int(stopped) < 20 and checkpoint(tmp_path / 'out')['iter_num'] == int(stopped)
    for path in (tmp_path / 'out').glob('*.pt'):
        assert all(torch.isfinite(t).all() for t in checkpoint(tmp_path / 'out', path.name)['model'].values()), path


def test_checkpoints_cannot_run_code_or_point_elsewhere(text_set, finished, tmp_path):
    """torch.load runs what a pickle names; a data set of '../..' has a meta.pkl of somebody else's."""
    Bomb.path = tmp_path / 'executed'
    for data in (pickle.dumps(Bomb()), None):
        out_dir = copy_run(finished[0], tmp_path / ('raw' if data else 'zip'))
        if data:
            (out_dir / 'ckpt.pt').write_bytes(data)
        else:
            torch.save(checkpoint(finished[0]) | {'config': Bomb()}, out_dir / 'ckpt.pt')
        refused(command('sample.py', f'--out_dir={out_dir}'), out_dir / 'ckpt.pt')
        refused(train(text_set, out_dir, '--init_from=auto', '--max_iters=21'), out_dir / 'ckpt.pt')
    assert not Bomb.path.exists()
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(Bomb()))
    nanogpt = {k: v for k, v in checkpoint(finished[0]).items() if k != 'tokenizer'}
    for dataset in (str(tmp_path), f'../../{tmp_path}', '..', 7):
        torch.save(nanogpt | {'config': {'dataset': dataset}}, tmp_path / 'ckpt.pt')
        done = command('sample.py', f'--out_dir={tmp_path}')
        refused(done, tmp_path / 'ckpt.pt', 'data set', repr(dataset))
        assert done.stdout == '' and not Bomb.path.exists()


@pytest.mark.parametrize('split', ['train', 'val'])
def test_an_id_past_the_vocabulary_ends_the_run(tmp_path, split):
    """On a GPU a failed assertion in a kernel, with checkpoints of whatever was trained before it."""
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 5, 'itos': dict(enumerate('abcde'))}))
    for name in ('train', 'val'):
        (np.arange(200) % (6 if name == split else 5)).astype('<u2').tofile(tmp_path / f'{name}.bin')
    refused(train(tmp_path, tmp_path / 'out', '--dropout=0'), tmp_path / f'{split}.bin', 'id 5 at token ', 'vocab_size 5')
    assert contents(tmp_path / 'out') == {}


BIG = '--block_size=512 --n_head=8 --attention_backend=manual --batch_size=12 --gradient_accumulation_steps=2 --max_iters=3 --dropout=0 --eval_iters=1'.split()


@pytest.mark.skipif(sys.platform != 'linux', reason='limits of data segments are Linux\'s')
def test_out_of_memory_shrinks_the_micro_batch_and_not_the_step(text_set, tmp_path):
    """A run that ends for want of memory that it can do without; fewer tokens a step, or other ones, in silence."""
    limited = ('bash', '-c', LIMITED.format('d', 900_000), sys.executable)
    done = train(text_set, tmp_path / 'limited', *BIG, launcher=limited)
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.findall(r'out of memory at iteration (\d+): .* batch_size=(\d+) and gradient_accumulation_steps=(\d+)', done.stdout)
    noted = [(e['iter'], e['batch_size'], e['gradient_accumulation_steps']) for e in run_logs(tmp_path / 'limited')[0]['out_of_memory']]
    assert noted == [tuple(map(int, event)) for event in said] and noted[0] == (0, 6, 4)  # later ones depend on the allocator
    assert all(size * accumulated == 12 * 2 for _, size, accumulated in noted)
    assert checkpoint(tmp_path / 'limited')['config']['batch_size'] == noted[-1][1]
    assert train(text_set, tmp_path / 'free', *BIG).returncode == 0
    assert list(losses(tmp_path / 'limited').values()) == pytest.approx(list(losses(tmp_path / 'free').values()), rel=1e-5)
    evals = [[e['val']['loss'] for e in run_logs(tmp_path / name)[0]['eval_steps']] for name in ('limited', 'free')]
    assert evals[0] == pytest.approx(evals[1], rel=1e-5)


@pytest.mark.skipif(sys.platform != 'linux', reason='limits of data segments are Linux\'s')
def test_out_of_memory_that_cannot_be_helped_is_one_line(text_set, tmp_path):
    """A traceback of the allocator's; several ranks that wait for the one that has gone."""
    flags = '--block_size=2048', '--batch_size=1', '--gradient_accumulation_steps=2'
    refused(train(text_set, tmp_path / 'one', *BIG, *flags, launcher=('bash', '-c', LIMITED.format('d', 600_000), sys.executable)),
            'out of memory', '--activation_checkpointing=True', '--block_size')
    done = train(text_set, tmp_path / 'two', *BIG, launcher=('bash', '-c', LIMITED.format('d', 900_000), *TORCHRUN))
    assert done.returncode and '--batch_size=6 --gradient_accumulation_steps=4' in done.stderr
    assert contents(tmp_path / 'one') == contents(tmp_path / 'two') == {}


# the soak: python -m pytest -m soak --trials=20

@pytest.fixture
def trials(request):
    return range(request.config.getoption('--trials'))


def children(pid):
    """All processes under pid."""
    found = [int(child) for path in Path(f'/proc/{pid}/task').glob('*/children') for child in path.read_text().split()]
    return found + [grandchild for child in found for grandchild in children(child)]


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != 'linux', reason='finds ranks in /proc')
@pytest.mark.parametrize('mode', [*MODES, 'fsdp, sharded'])
def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(text_set, tmp_path, trials, mode):
    """A kill -9 that costs more than two iterations, a checkpoint that does not load, another run after it, processes that stay behind."""
    launcher, flags = MODES[mode.split(',')[0]]
    flags = flags + ['--sharded_checkpoint=True'] * ('sharded' in mode)
    rng, killed, reached, writing = random.Random(1), tmp_path / 'killed', 0, 0
    for trial in trials:
        process = start(text_set, killed, '--init_from=auto', '--save_interval=2', '--eval_interval=1000000', *flags, launcher=launcher)
        ranks = children(process.pid) if launcher == TORCHRUN else []
        until = time.time() + rng.uniform(0, 1)
        while not (trial % 2 and any(killed.glob('ckpt*.tmp'))) and time.time() < until + 10 * (trial % 2):
            pass
        os.kill(rng.choice(ranks) if ranks else process.pid, signal.SIGKILL)
        printed = process.communicate(timeout=60)[0]
        last = max(map(int, re.findall('^iter ([0-9]+) .* left$', printed, re.M)), default=0)
        writing += any(killed.glob('ckpt*.tmp'))
        assert process.returncode and not [pid for pid in ranks if os.path.exists(f'/proc/{pid}')]
        assert last + 1 - 2 <= load_checkpoint(killed)['iter_num'] >= reached
        reached = load_checkpoint(killed)['iter_num']
    print(f'{mode}: killed {len(trials)} times in {reached} iterations, {writing} times with a checkpoint half written')
    for out_dir in (killed, tmp_path / 'whole'):
        done = train(text_set, out_dir, '--init_from=auto', '--save_interval=2', '--eval_interval=1000000', f'--max_iters={reached + 3}', *flags, launcher=launcher)
        assert done.returncode == 0, done.stderr
    assert_equal_states(load_checkpoint(tmp_path / 'whole'), load_checkpoint(killed))
    assert losses(killed) == losses(tmp_path / 'whole') and len(losses(killed)) == reached + 3


@pytest.mark.soak
def test_damage_anywhere_in_a_checkpoint_is_noticed_or_harmless(text_set, finished, tmp_path, trials):
    """Flipped bits and cuts that go into training: the run falls back to the checkpoint before and ends the same."""
    rng, data, out_dir, noticed = random.Random(1), (finished[0] / 'ckpt.pt').read_bytes(), copy_run(finished[0], tmp_path / 'out'), 0
    expected = checkpoint(finished[0])
    for trial in trials:
        for _ in range(50):  # the file alone
            damaged = bytearray(data)
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            damaged = damaged[:rng.choice([len(data), len(data), rng.randrange(len(data))])]
            (out_dir / 'ckpt.pt').write_bytes(damaged)
            try:
                assert_equal_states(expected, load_checkpoint(out_dir))
            except ValueError:
                noticed += 1
        (out_dir / 'ckpt_prev.pt').write_bytes((finished[0] / 'ckpt_prev.pt').read_bytes())
        done = train(text_set, out_dir, '--init_from=auto')  # a run with the last of them
        assert done.returncode == 0, done.stderr
        assert_equal_states(expected, checkpoint(out_dir))
    print(f'{noticed} of {50 * len(trials)} damages noticed, the others harmless')


@pytest.mark.soak
def test_damage_anywhere_in_a_sharded_checkpoint_is_noticed_or_harmless(sharded, tmp_path, trials):
    """Parts put in the wrong place, since its .metadata is a pickle without checksums."""
    rng, noticed, folder = random.Random(1), 0, copy_sharded(sharded['fsdp'], tmp_path / 'out', 'ckpt_sharded') / 'ckpt_sharded'
    expected, files = load_checkpoint(folder), sorted(folder.iterdir())
    for _ in range(50 * len(trials)):
        path = rng.choice(files)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged[:rng.choice([len(whole), len(whole), rng.randrange(len(whole))])])
        try:
            assert_equal_states(expected, load_checkpoint(folder))
        except ValueError:
            noticed += 1
        path.write_bytes(whole)
    print(f'{noticed} of {50 * len(trials)} damages noticed, the others harmless')


@pytest.fixture(scope='module')
def whole(text_set, tmp_path_factory):
    """whole(mode): the folder of an uninterrupted run of 30 iterations, with a checkpoint at 10 as ckpt_10.pt."""
    folders = {}

    def run(mode):
        if mode not in folders:
            launcher, flags = MODES[mode]
            out_dir = folders[mode] = tmp_path_factory.mktemp('whole') / 'out'
            for max_iters in (10, 30):
                done = train(text_set, out_dir, *flags, '--init_from=auto', '--dropout=0', f'--max_iters={max_iters}', launcher=launcher)
                assert done.returncode == 0, done.stderr
                (out_dir / f'ckpt_{max_iters}.pt').write_bytes((out_dir / 'ckpt.pt').read_bytes())
        return folders[mode]
    return run


@pytest.mark.soak
@pytest.mark.parametrize('second', MODES)
@pytest.mark.parametrize('first', MODES)
def test_a_run_goes_on_in_any_mode(text_set, whole, tmp_path, first, second):
    """Moments or data lost on the way from one parallelism to another."""
    launcher, flags = MODES[second]
    out_dir = copy_run(whole(first), tmp_path / 'out', 'ckpt_10.pt')
    done = train(text_set, out_dir, *flags, '--init_from=resume', '--dropout=0', '--max_iters=30', launcher=launcher)
    assert done.returncode == 0, done.stderr
    expected = {it: loss for it, loss in losses(whole('one')).items() if it >= 10}
    assert len(expected) == 20 and losses(out_dir) == pytest.approx(expected, rel=1e-5)
    if first == second:
        assert_equal_states(checkpoint(whole(first)), checkpoint(out_dir))
        assert losses(out_dir) == {it: loss for it, loss in losses(whole(first)).items() if it >= 10}
    assert command('sample.py', f'--out_dir={out_dir}', '--num_samples=1', '--max_new_tokens=5', '--device=cpu').returncode == 0


@pytest.mark.soak
@pytest.mark.parametrize('mode', [mode for mode in MODES if mode != 'one'])
def test_clean_runs_of_two_processes_all_exit_0(text_set, tmp_path, trials, mode):
    """A rank that leaves while another still talks to it, now and then."""
    launcher, flags = MODES[mode]
    codes = [train(text_set, tmp_path / str(trial), *flags, '--max_iters=2', launcher=launcher).returncode for trial in trials]
    assert codes == [0] * len(trials)


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != 'linux', reason='finds ranks in /proc')
def test_a_node_that_is_killed_and_started_again_goes_on(text_set, tmp_path):
    """Two agents as on two nodes: one that dies with its worker, and the other, or its replacement, waits for ever."""
    with socket.create_server(('127.0.0.1', 0)) as free:
        endpoint = f'127.0.0.1:{free.getsockname()[1]}'
    agent = (*TORCHRUN[:3], '--nnodes=2', '--nproc_per_node=1', '--max-restarts=3', '--rdzv_backend=c10d', f'--rdzv_endpoint={endpoint}', '--rdzv_id=a')
    flags = f'--dataset={text_set}', f'--out_dir={tmp_path}', '--max_iters=3000', '--eval_interval=1000000', '--save_interval=20', '--init_from=auto'
    env = os.environ | {'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}

    def join():
        return subprocess.Popen([*agent, 'train.py', *TINY, *flags], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    stays = join()
    time.sleep(5)  # it holds the store
    dies = join()
    while not (tmp_path / 'ckpt.pt').exists():
        assert stays.poll() is None and dies.poll() is None
        time.sleep(0.1)
    for pid in (dies.pid, *children(dies.pid)):
        os.kill(pid, signal.SIGKILL)
    reached = checkpoint(tmp_path)['iter_num']
    comes = join()
    printed = [process.communicate(timeout=200)[0] for process in (stays, comes)]
    assert stays.returncode == comes.returncode == 0, printed
    last = run_logs(tmp_path)[-1]
    assert checkpoint(tmp_path)['iter_num'] == 3000 and last['training_iterations'][0]['iter'] >= reached and last['summary']['outcome'] == 'finished'


@pytest.mark.soak
def test_an_unreachable_wandb_delays_the_start_and_no_more(text_set, finished, tmp_path):
    """A run that waits for a server, or is another run without it."""
    t0 = time.time()
    done = train(text_set, tmp_path, '--wandb_log=True', env={'WANDB_BASE_URL': 'http://127.0.0.1:9', 'WANDB_API_KEY': 'x' * 40, 'WANDB_MODE': 'online'})
    assert done.returncode == 0 and done.stdout.count('recorded offline') == 1 and time.time() - t0 < 40, done.stdout
    assert_equal_states(checkpoint(finished[0]), checkpoint(tmp_path))


# bench.py

NANOGPT_LIKE = '''
from dataclasses import dataclass
import torch
@dataclass
class GPTConfig:
    block_size: int = 8
    vocab_size: int = 8
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8
    dropout: float = 0.0
    bias: bool = True
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print('number of parameters: some')
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, idx, targets=None):
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, fused=device_type == 'cuda')
'''


def bench(tmp_path, *flags, **kwargs):
    """What bench.py printed, and what it wrote to --json, of a tiny model."""
    path = tmp_path / 'bench.json'
    done = command('bench.py', *TINY, '--dataset=pystdlib', '--vocab_size=256', '--warmup=0', '--repeats=3', f'--json={path}', *flags, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def test_bench_figures_follow_from_the_times_it_took(tmp_path):
    """A rate from another number of tokens, or a share of another device's peak."""
    out, result = bench(tmp_path, '--accumulation=3', '--gradient_log_interval=10')
    (side,) = result['sides'].values()
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=256, bias=False))
    median = lambda part: sorted(side['times'][part])[1]
    assert all(len(side['times'][part]) == 3 for part in ('forward', 'backward', 'optimizer', 'gradient statistics', 'whole'))
    assert side['parameters'] == model.get_num_params(False) and side['flops_per_token'] == model.flops_per_token()
    assert side['tokens_per_sec'] == pytest.approx(3 * 4 * 16 / median('whole'))
    assert side['mfu'] == pytest.approx(model.flops_per_token() * 3 * 4 * 16 / median('whole') / 1e12)  # --peak_tflops=1
    assert side['peak_bytes'] > 10**7 and side['first_step'] > 0 and side['compile'] == 0
    for row in ('parameters', 'forward', 'backward', 'optimizer', 'whole step', 'tokens/s', 'TFLOP/s', 'MFU', 'peak memory', 'to the first step', 'of a step'):
        assert row in out


@pytest.mark.parametrize('what, parts', [('forward', {'whole'}), ('generate', {'whole', 'prefill'}), ('data', {'whole', 'waiting', 'reading'}), ('memory', {'whole'})])
def test_bench_times_each_kind_of_work(tmp_path, what, parts):
    """A choice that --help offers and nobody has run."""
    out, result = bench(tmp_path, f'--what={what}', '--prompt_tokens=8', '--new_tokens=4')
    (side,) = result['sides'].values()
    assert set(side['times']) == parts
    if what == 'data':
        assert 0 < side['waiting_share'] < 1
    if what == 'generate':
        assert side['tokens_per_sec'] == pytest.approx(4 / sorted(side['times']['whole'])[1]) and 'share of the limit' in out
    if what == 'memory':
        sizes = side['memory_estimate']
        assert sizes['peak'] == sum(size for part, size in sizes.items() if part != 'peak') and 'estimated: activations' in out


def test_bench_puts_archs_side_by_side(tmp_path):
    """Columns that are all the same model, because a file's parts won over the arch that the column names."""
    _, result = bench(tmp_path, 'config/full_custom.py', '--archs=gpt2,llama,config/speedrun_shakespeare_char.py', '--what=forward', '--n_kv_head=2')
    kinds = {name: side['settings']['model']['activation'] for name, side in result['sides'].items()}
    assert kinds == {'gpt2': 'gelu_tanh', 'llama': 'silu', 'speedrun_shakespeare_char.py': 'relu_squared'}
    assert result['sides']['gpt2']['settings']['model']['d_ff'] is None and len({side['parameters'] for side in result['sides'].values()}) == 3


def test_bench_times_another_checkout(tmp_path):
    """nanoGPT prints while it is built, knows none of our parts, and takes turns with us."""
    other = tmp_path / 'other.py'
    other.write_text(NANOGPT_LIKE)
    out, result = bench(tmp_path, f'--versus={other}', '--versus_dtype=bfloat16', '--normalization=rmsnorm')
    ours, theirs = result['sides'].values()
    assert theirs['parameters'] == 256 * 256 and theirs['settings']['dtype'] == 'bfloat16' and ours['settings']['dtype'] == 'float32'
    ratios = sorted(b / a for a, b in zip(ours['times']['whole'], theirs['times']['whole']))
    assert theirs['first_is_faster_by'] == pytest.approx(ratios[1])
    assert 'does not know normalization' in out and 'some' not in out
    _, result = bench(tmp_path, '--versus=model.py')  # an unchanged copy of our own
    ours, theirs = result['sides'].values()
    assert ours['parameters'] == theirs['parameters']


@pytest.mark.parametrize('flags, words', [
    (['--archs=gpt2,gpt7'], ['gpt7', 'hybrid']), (['--versus=nowhere.py'], ['nowhere.py']), (['--versus=configurator.py'], ['configurator.py', 'GPT']),
    (['--versus=README.md'], ['README.md']), (['--what=sing'], ['what', 'generate']), (['--what=generate', '--block_size=100'], ['block_size', '320']),
    (['--batch_size=0'], ['batch_size']), (['--batch_size=auto'], ['find_batch_size']), (['--what=data', '--versus=model.py'], ['versus']),
    (['--plan=8', '--plan_tflops=-3'], ['plan_tflops']), (['--json=nowhere/at/all.json'], ['nowhere']), (['--n_head=5'], ['n_head'])])
def test_a_wrong_use_of_bench_is_one_line(flags, words):
    """A traceback from another process."""
    done = command('bench.py', '--dataset=pystdlib', '--device=cpu', '--n_layer=1', '--n_embd=64', '--n_head=4', '--peak_tflops=1', *flags)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    one_line(done.stderr, *words)


def test_bench_profiles(tmp_path):
    """A trace that no viewer opens."""
    done = command(ROOT / 'bench.py', *TINY, '--dataset=pystdlib', '--vocab_size=256', '--warmup=0', '--repeats=1', '--profile=True', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'aten::mm' in done.stdout and json.loads((tmp_path / 'trace.json').read_text())['traceEvents']


FSDP_TRAFFIC = '''
import torch, torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from model import GPT, GPTConfig
dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=4)
mesh = dist.init_device_mesh('cpu', (4,))
model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=64, vocab_size=256, block_size=32, bias=False, normalization='rmsnorm'))
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
for block in model.transformer.h:
    fully_shard(block, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh)
sent = 0
class Count(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        global sent
        if str(func).startswith('c10d'):  # a ring sends (n - 1)/n of the whole, which is the larger of input and output
            sent += max(t.nbytes for t in args if isinstance(t, torch.Tensor)) * 3 / 4
        return func(*args, **(kwargs or {}))
idx = torch.zeros(2, 32, dtype=torch.long)
with Count():
    for _ in range(3):
        with torch.autocast('cpu', torch.bfloat16):
            loss = model(idx, idx)[1]
        loss.backward()
print(sent)
'''


def test_planned_traffic_is_what_torch_sends(tmp_path):
    """A gather too few: counted among 4 ranks of torch's fake process group, 3 micro-batches."""
    sizes = '--n_layer=2 --n_head=4 --n_embd=64 --vocab_size=256 --block_size=32 --normalization=rmsnorm --dtype=bfloat16'.split()
    out, result = bench(tmp_path, '--plan=4,64', '--plan_tflops=0.001', '--interconnect_gbps=8', '--gradient_accumulation_steps=12', *sizes)
    counted = command('-c', FSDP_TRAFFIC)
    assert counted.returncode == 0, counted.stderr
    rows = {(row['ranks'], row['mode']): row for row in result['plan']}
    n = 256 * 64 + 32 * 64 + 2 * 12 * 64 ** 2 + 5 * 64
    assert rows[4, 'fsdp']['micro_batches'] == 3 and rows[4, 'fsdp']['sent'] == float(counted.stdout)
    assert rows[4, 'ddp']['sent'] == 2 * 4 * n * 3 / 4 and rows[64, 'zero1']['sent'] == 3 * 4 * n * 63 / 64
    low, high = rows[4, 'ddp']['seconds']
    assert high - low == pytest.approx(rows[4, 'ddp']['sent'] / 1e9) and rows[4, 'ddp']['tokens'] == 12 * 4 * 32 and '64' in out


FSDP_MEMORY = """
import ctypes, gc, os
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from model import GPT, GPTConfig, memory_estimate
dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=64)
mesh = dist.init_device_mesh('cpu', (64,))
config = GPTConfig(n_layer=2, n_head=8, n_embd=512, vocab_size=50304, block_size=32, bias=False, weight_tying=False, position_encoding='rope')
model = GPT(config)
for block in model.transformer.h:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
read = lambda: {line.split()[0]: int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(('VmRSS', 'VmHWM'))}
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
open('/proc/self/clear_refs', 'w').write('5')  # the peak counts from here
before, idx = read()['VmRSS:'], torch.zeros(1, 32, dtype=torch.long)
for _ in range(2):
    model(idx, idx)[1].backward()
    optimizer.step()
    optimizer.zero_grad()
estimate = memory_estimate(config, 1, 'float32', torch.device('cpu'), 1, 'fsdp', 64)
print(read()['VmHWM:'] - before, estimate['peak'] - estimate['weights'], flush=True)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_of_fsdp_counts_what_is_gathered():
    """A plan for 64 ranks that forgets the embeddings: on torch's fake process group the rest is next to nothing. malloc's holes make it rough."""
    done = command('-c', FSDP_MEMORY)
    assert done.returncode == 0, done.stderr
    measured, estimated = map(int, done.stdout.split())
    assert estimated == pytest.approx(measured, rel=0.5)


@pytest.mark.skipif(sys.platform != 'linux', reason='limits of data segments are Linux\'s')
def test_the_largest_batch_size_is_found(tmp_path):
    """A search that stops at a power of two, or counts on the kernel's killer."""
    limited = ('bash', '-c', 'ulimit -d 1500000; exec "$0" "$@"', sys.executable)
    flags = ('--find_batch_size=True', '--block_size=1024', '--attention_backend=manual', '--n_head=8', '--batch_size=32', '--gradient_accumulation_steps=3')
    out, result = bench(tmp_path, *flags, launcher=limited)
    largest, batch_size = result['largest'], result['batch_size']
    assert 1 <= largest < 32 and batch_size <= largest and batch_size * result['gradient_accumulation_steps'] == 96
    assert f'batch_size {largest:>5}: fits' in out and f'batch_size {largest + 1:>5}: does not fit' in out


def test_batch_size_auto_keeps_the_tokens_of_an_iteration(text_set, tmp_path):
    """A run that fits its memory by becoming another run."""
    asked = train(text_set, tmp_path / 'asked', '--max_iters=4', '--dropout=0')
    found = train(text_set, tmp_path / 'auto', '--max_iters=4', '--dropout=0', '--batch_size=auto')
    assert asked.returncode == found.returncode == 0, found.stderr
    assert (checkpoint(tmp_path / 'auto')['config']['batch_size'], checkpoint(tmp_path / 'auto')['config']['gradient_accumulation_steps']) == (8, 1)
    for it, loss in losses(tmp_path / 'asked').items():
        assert losses(tmp_path / 'auto')[it] == pytest.approx(loss, rel=1e-5)
    again = train(text_set, tmp_path / 'asked', '--max_iters=6', '--dropout=0', '--batch_size=auto', '--init_from=resume')  # its own, not searched for
    assert again.returncode == 0 and checkpoint(tmp_path / 'asked')['config']['batch_size'] == 4 and 'looking for' not in again.stdout


def test_the_readme_example_runs_as_printed(tmp_path):
    """Documentation that nobody has run since."""
    readme = (ROOT / 'README.md').read_text()
    part = readme.split('```python\n')[1].split('```')[0]
    line = next(line for line in readme.splitlines() if '--ffn_type=maxout' in line and line.startswith('python train.py'))
    ignore = shutil.ignore_patterns('.git', '.venv', 'out*', '__pycache__', 'wandb')
    shutil.copytree(ROOT, tmp_path / 'copy', ignore=ignore)
    source = (tmp_path / 'copy' / 'model.py').read_text()
    at = source.index('\n\n# ' + '-' * 100, source.index('class SwiGLU'))
    (tmp_path / 'copy' / 'model.py').write_text(source[:at] + '\n\n' + part + source[at:])
    done = command(*line.split()[1:], '--out_dir=out', cwd=tmp_path / 'copy')
    assert done.returncode == 0, done.stderr
    first, *_, last = losses(tmp_path / 'copy' / 'out').values()
    assert 'maxout' in done.stdout and last < first - 1
