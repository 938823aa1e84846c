"""The loader and its shards: windows, their order, and damage: python -m pytest tests/test_loader.py"""
import os
import pickle
import threading
import zlib

import numpy as np
import pytest
import torch

from conftest import BYTE, Bomb, llmc_shard, one_line, rewrite
from data import shards
from data.folder import prepare_facts, read_meta, write_dataset
from data.loader import Loader, MicroBatches, copy_stream, permute
from data.tokenizer import get_tokenizer
from engine.common import UserError

T = 8  # block_size of the loader tests


# the loader

@pytest.fixture
def counting(tmp_path):
    """A data set of three shards in which every token's value is its position: 0..999, 1000..1099, 1100..1109."""
    ids = np.arange(1110)
    write_dataset(tmp_path, {'train_0': ids[:1000], 'train_1': ids[1000:1100], 'train_2': ids[1100:], 'val': ids[:101]},
                  {'vocab_size': 1110, 'tokenizer': {'name': 'none'}})
    return tmp_path


def first_tokens(loader, indices):
    return loader.batch(indices)[0][:, 0].tolist()


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_batch_is_copied_beside_the_work_that_is_queued(counting):
    """A copy waits for the step before it; or memory that a queued kernel has yet to read goes to the next batch."""
    expected = Loader(counting, 'train', T).batch(np.arange(64))
    loader = Loader(counting, 'train', T, device='cuda:0')

    def read(first):
        return [ids + 0 for ids in loader.batch(np.arange(64) + first)]
    for first in range(5):  # taking new memory may wait for the device
        read(first)
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**9)  # cycles, about a second
    found = [read(first) for first in range(5)]
    copy_stream(loader.device).synchronize()
    assert not torch.cuda.current_stream().query(), 'the copies have waited for the kernel'
    assert all(torch.equal(mine.cpu(), its) for mine, its in zip(found[0], expected))


def test_stream_raises_the_threads_error_and_closes(counting):
    """An error in a thread is silent unless somebody asks for the result; a generator left early must not hang."""
    loader = Loader(counting, 'train', T, vocab_size=1000, shuffle=False)
    stream = loader.stream([i] for i in range(10**9))
    good = []
    with pytest.raises(ValueError, match='vocab_size 1000'):
        for x, _ in stream:
            good.append(x[0, 0].item())
    assert good == [i * T for i in range(len(good))]
    assert 999 // T - 16 < len(good) <= 999 // T  # up to 16 batches are read together
    before = set(threading.enumerate())
    stream = loader.stream([i] for i in range(10**9))
    next(stream)
    assert len(set(threading.enumerate()) - before) == 1
    stream.close()
    assert not set(threading.enumerate()) - before


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


def taken(batches, n):
    return [next(batches)[0] for _ in range(n)]


@pytest.mark.parametrize('ranks, batch_size, accumulation', [(1, 4, 3), (1, 12, 1), (2, 2, 6), (3, 4, 3), (2, 6, 2)])
def test_an_iteration_reads_the_same_windows_however_it_is_divided(counting, ranks, batch_size, accumulation):
    """A run resumed on other ranks, or after a lack of memory, would train on other data."""
    loader = Loader(counting, 'train', T)
    expected = [loader.batch(np.arange(12) + 12 * i)[0] for i in range(5, 8)]
    ranked = [MicroBatches(loader, batch_size, accumulation, rank, ranks, iter_num=5) for rank in range(ranks)]
    assert all(batches.per_rank == accumulation // ranks for batches in ranked)
    for x in expected:
        parts = [part for _ in range(ranked[0].per_rank) for batches in ranked for part in taken(batches, 1)]
        assert torch.equal(torch.cat(parts), x)
    for batches in ranked:
        batches.close()


def test_shrunk_micro_batches_start_the_iteration_again(counting):
    """Out of memory at the second of three micro-batches: the iteration is redone on the same windows."""
    loader, before = Loader(counting, 'train', T), set(threading.enumerate())
    expected = loader.batch(np.arange(18) + 18 * 2)[0]
    batches = MicroBatches(loader, 6, 3)
    taken(batches, 7)  # into iteration 2
    for batch_size, accumulation in [(3, 6), (1, 18)]:
        assert batches.smaller() == (batch_size, accumulation)
        batches.shrink(iter_num=2)
        assert (batches.batch_size, batches.accumulation_steps) == (batch_size, accumulation)
        assert batches.per_rank == accumulation
        assert torch.equal(torch.cat(taken(batches, accumulation)), expected)
    assert batches.smaller() is None
    assert len(set(threading.enumerate()) - before) == 1
    batches.close()
    assert not set(threading.enumerate()) - before
    assert MicroBatches(loader, 4, 1, rank=1, world_size=2).per_rank == 1  # evaluation alone allows this


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
    whole = shards.crc32.__wrapped__
    monkeypatch.setattr(shards, 'crc32', lambda path, *args: (read.append(path.name), whole(path, *args))[1])
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


@pytest.mark.parametrize('text', [
    '{"dtype": "float32"}', '{"dtype": ["uint16"]}', '{"files": [1]}', '{"vocab_size": "65"}', '{', '[]', '\0\xff',
    '{"tokenizer": ["byte"]}', '{"tokenizer": {"name": "char", "chars": 5}}', '{"tokenizer": {"name": ["char"]}}',
    '{"vocab_size": 9999999999}', '{"files": {"train.bin": {"tokens": "100"}}}', '{"a": ' * 10**5])
def test_a_malformed_meta_json_is_named(tmp_path, text):
    """A KeyError or TypeError from deep inside tells nobody which file is wrong."""
    (tmp_path / 'meta.json').write_bytes(text.encode('latin-1'))
    np.arange(100, dtype='<u2').tofile(tmp_path / 'train.bin')
    with pytest.raises(ValueError) as e:
        Loader(tmp_path, 'train', T)
    one_line(e.value, tmp_path / 'meta.json')


def test_the_wrong_field_of_a_meta_json_is_named(tmp_path):
    (tmp_path / 'meta.json').write_text('{"tokenizer": {"name": "char", "chars": 5}}')
    with pytest.raises(UserError, match='tokenizer.chars must be .*, not 5'):
        read_meta(tmp_path)


@pytest.mark.parametrize('text', ['[1]', '[' * 10**5, '{"train.bin": 5}', '7', '{'])
def test_a_damaged_list_of_checked_shards_means_that_nothing_was_checked(counting, text):
    """.checked.json only saves time, and gave a traceback."""
    (counting / '.checked.json').write_text(text)
    assert Loader(counting, 'train', T).n_tokens == 1110


@pytest.mark.parametrize('size', [0, 101])
def test_a_shard_that_becomes_shorter_is_named(tmp_path, size):
    """numpy's "could not broadcast" in the middle of a run, and no word of a file."""
    write_dataset(tmp_path, {'train': bytes(1000)}, BYTE)
    loader = Loader(tmp_path, 'train', T)
    os.truncate(tmp_path / 'train.bin', size)
    with pytest.raises(UserError) as e:
        loader.batch(range(loader.n_windows))
    one_line(e.value, tmp_path / 'train.bin', '1000 tokens', f'{size // 2} now')


@pytest.mark.parametrize(
    'text', ['download_mb = "2"', 'download_mb = f()', 'x = (', 'vocab_size = 0', 'x = ' + '(' * 10**5])
def test_a_foreign_recipe_that_states_nonsense_is_named(tmp_path, text):
    """A traceback from the parser, or from comparing a word with 100."""
    (tmp_path / 'prepare.py').write_text(text)
    with pytest.raises(UserError, match='prepare.py'):
        prepare_facts(tmp_path / 'prepare.py')


def test_wrong_dtype_in_meta_json_is_refused(counting):
    """uint16 ids read as uint32 are half as many, and nonsense."""
    rewrite(counting / 'meta.json', lambda b: b.replace(b'uint16', b'uint32'))
    with pytest.raises(ValueError, match='500 tokens of uint32, meta.json says 1000'):
        Loader(counting, 'train', T)


def test_uint32_ids_survive(tmp_path):
    """Vocabularies past 65536 do not fit into uint16, where they would wrap."""
    ids = np.arange(65530, 65630)
    meta = write_dataset(tmp_path, {'train': ids}, {'vocab_size': 65630, 'tokenizer': {'name': 'none'}})
    assert meta['dtype'] == 'uint32'
    assert Loader(tmp_path, 'train', 99, shuffle=False).batch([0])[1].tolist() == [ids[1:].tolist()]


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


# nanoGPT's meta.pkl

def test_nanogpts_pickle_is_read(tmp_path):
    """Data sets prepared with nanoGPT keep working."""
    itos = dict(enumerate('\n abc'))
    table = {'vocab_size': 5, 'itos': itos, 'stoi': {c: i for i, c in itos.items()}}
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(table))
    meta = read_meta(tmp_path)
    assert meta['dtype'] == 'uint16' and meta['vocab_size'] == 5
    assert get_tokenizer(meta['tokenizer']).encode('a b\n') == [2, 1, 3, 0]
    assert read_meta(tmp_path / 'elsewhere') == {}


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


# writing

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


