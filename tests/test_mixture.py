"""Several data sets at once: python -m pytest tests/test_mixture.py"""

import numpy as np
import pytest
import torch

from conftest import (
    BYTE,
    assert_equal_states,
    checkpoint,
    losses,
    one_line,
    refused,
    train,
)
from data.folder import write_dataset
from data.loader import Loader, Mixture

T = 8  # block_size of the loader tests


@pytest.fixture
def three(tmp_path):
    """Three data sets of 9, 99 and 999 windows; a token is its position plus 1000, 2000 or 3000."""
    folders = []
    for n in range(3):
        folders.append(tmp_path / f'set{n}')
        ids = np.arange(T * 9 * 11 ** n + T) % 1000 + 1000 * (n + 1)
        write_dataset(folders[-1], {'train': ids, 'val': ids}, {**BYTE, 'vocab_size': 4000})
    return folders


def test_a_mixture_keeps_its_shares_over_any_stretch(three):
    """Drawn by chance, shares of 4,000 samples are off by a percent, and on resume by another."""
    loaders, shares = [Loader(folder, 'train', T, seed=7) for folder in three], [0.5, 0.3, 0.2]
    mixture = Mixture(loaders, shares)
    chosen, within = mixture.choose(np.arange(20000))
    for number, share in enumerate(shares):
        in_order = list(range((chosen == number).sum()))
        assert within[chosen == number].tolist() == in_order  # none left out
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
    assert len(set(zip(chosen, within))) == mixture.n_windows >= 15
    for n, loader in enumerate(mixture.loaders):
        assert within[chosen == n].max() < loader.n_windows


def test_a_run_on_several_sets_resumes_bit_for_bit(text_set, tmp_path):
    """Shares counted from where a run was resumed are not those of the run."""
    write_dataset(tmp_path / 'other', {'train': b'other text, ' * 200, 'val': b'other text, ' * 20}, BYTE)
    mixed = f'{text_set}:0.7,{tmp_path / "other"}:0.3'
    whole = train(mixed, tmp_path / 'whole', '--verbose=True')
    assert whole.returncode == 0 and f'0.3 from {tmp_path / "other"}' in whole.stdout, whole.stderr
    assert train(mixed, tmp_path / 'parts', '--max_iters=7', '--lr_decay_iters=20').returncode == 0
    assert train(mixed, tmp_path / 'parts', '--init_from=resume').returncode == 0
    assert_equal_states(checkpoint(tmp_path / 'whole'), checkpoint(tmp_path / 'parts'))
    assert losses(tmp_path / 'whole') == losses(tmp_path / 'parts')
    other = '--batch_size=8', '--gradient_accumulation_steps=1'  # the same windows in other micro-batches
    resumed = train(mixed, tmp_path / 'parts', '--init_from=resume', '--max_iters=21', *other)
    assert resumed.returncode == 0 and 'NOTE: resumed' not in resumed.stdout
    swapped = mixed.replace('0.7', '0.4').replace('0.3', '0.6')
    resumed = train(swapped, tmp_path / 'parts', '--init_from=resume', '--max_iters=22', '--batch_size=6')
    [note] = [line for line in resumed.stdout.splitlines() if line.startswith('NOTE: resumed')]
    one_line(note, f'dataset {swapped} instead of {mixed}', 'sequences per iteration 12 instead of 8')
    assert 'seed' not in note


def test_sets_that_do_not_mix_are_refused(text_set, tmp_path):
    """Ids of two tokenizers train without a sign of it."""
    meta = {'vocab_size': 256, 'tokenizer': {'name': 'char', 'chars': 'a'}}
    write_dataset(tmp_path / 'a', {'train': b'a' * 200, 'val': b'a' * 200}, meta)
    refused(train(f'{text_set}:0.5,{tmp_path / "a"}:0.5', tmp_path / 'out'), text_set, tmp_path / 'a', 'tokenizers')
    for shares, says in [(('0', '1'), 'share'), (('x', '1'), 'share'), (('-1', '2'), 'share')]:
        refused(train(f'{text_set}:{shares[0]},{text_set}:{shares[1]}', tmp_path / 'out'), says)
    refused(train(f'{text_set}:0.5,nowhere:0.5', tmp_path / 'out'), 'nowhere')
    assert not (tmp_path / 'out').exists()


