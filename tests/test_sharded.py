"""Sharded checkpoints: a folder with a file per process, in place of ckpt.pt."""
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from conftest import (
    MUON,
    SMALL_DISK,
    Bomb,
    assert_equal_states,
    checkpoint,
    command,
    contents,
    copy_run,
    copy_sharded,
    flip_bit,
    losses,
    losses_from,
    one_line,
    refused,
    rewrite,
    succeeded,
    train,
    train_mode,
)
from engine.checkpoint import load_checkpoint, newest_checkpoint


@pytest.mark.parametrize('mode', ['zero1', 'fsdp', 'hybrid'])
def test_a_sharded_checkpoint_holds_what_ckpt_pt_would(modes, sharded, tmp_path, mode):
    """A rank's part is lost or put in another place: made into one file, it must equal ckpt.pt bit for bit."""
    out_dir, plain = sharded(mode), modes(mode)[0]
    assert not list(out_dir.glob('*.pt')) and not list(out_dir.glob('*.tmp'))
    files = sorted(path.name for path in (out_dir / 'ckpt_sharded').iterdir())
    n_processes = 4 if mode == 'hybrid' else 2
    assert files == ['info.pt', *(f'rank_{rank:04d}.pt' for rank in range(n_processes))]
    succeeded(command('model.py', f'--ckpt={out_dir}', f'--consolidate={tmp_path / "ckpt.pt"}'), 'ckpt_sharded')
    a, b = checkpoint(plain), checkpoint(tmp_path)
    assert_equal_states(a, b)
    assert a.keys() == b.keys() and a['optimizer']['param_groups'] == b['optimizer']['param_groups']
    assert list(a['optimizer']['state']) == list(b['optimizer']['state'])
    assert all(a[key] == b[key] for key in ('iter_num', 'best_val_loss', 'model_args'))
    sizes = [(folder / 'ckpt.pt').stat().st_size for folder in (plain, tmp_path)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


def test_sampling_reads_a_sharded_checkpoint(modes, sharded):
    """Only train.py can read the folder."""
    flags = '--num_samples=1 --max_new_tokens=5 --device=cpu --dtype=float32'.split()
    from_folder = command('sample.py', f'--out_dir={sharded("fsdp")}', *flags)
    from_file = command('sample.py', f'--out_dir={modes("fsdp")[0]}', *flags)
    succeeded(from_folder)
    assert from_folder.stdout == from_file.stdout != ''


@pytest.mark.parametrize('writer, reader', [('fsdp', 'one'), ('zero1', 'fsdp'), ('fsdp', 'ddp'), ('hybrid', 'fsdp')])
def test_a_sharded_checkpoint_resumes_in_every_mode(text_set, modes, sharded, tmp_path, writer, reader):
    """Only as many processes as wrote the parts can read them."""
    out_dir = copy_sharded(sharded(writer), tmp_path)
    flags = [] if reader == 'one' else ['--sharded_checkpoint=True']
    succeeded(train_mode(reader, text_set, out_dir, '--init_from=auto', *flags))
    assert losses(out_dir) == pytest.approx(losses_from(modes('one')[0], 10), rel=1e-5)
    assert (out_dir / 'ckpt_sharded_prev').exists() == (reader != 'one') == (not (out_dir / 'ckpt.pt').exists())


@pytest.mark.parametrize('mode', ['zero1', 'fsdp'])
def test_a_sharded_checkpoint_holds_muons_momentum(text_set, modes, tmp_path, mode):
    """Momentum of the parts that two processes write is lost when one process resumes."""
    succeeded(train_mode(mode, text_set, tmp_path, *MUON, '--sharded_checkpoint=True', '--max_iters=10'))
    succeeded(train_mode('one', text_set, tmp_path, *MUON, '--init_from=resume'))
    tolerance = 1e-4 if mode == 'fsdp' else 1e-5  # see docs/parts.md
    assert losses(tmp_path) == pytest.approx(losses(modes('one', *MUON)[0]), rel=tolerance)


DAMAGES = {
    'a part with a flipped bit': ('rank_0001.pt', lambda data: flip_bit(data, len(data) // 2)),
    'a part that is cut': ('rank_0001.pt', lambda data: data[:-100]),
    'an empty part': ('rank_0000.pt', lambda data: b''),
    'a part that runs code': ('rank_0001.pt', lambda data: pickle.dumps(Bomb())),
    'empty facts': ('info.pt', lambda data: b''),
    'facts with a flipped bit': ('info.pt', lambda data: flip_bit(data, len(data) // 2)),
    'facts that are cut': ('info.pt', lambda data: data[:-100]),
    'facts that run code': ('info.pt', lambda data: pickle.dumps(Bomb())),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_or_malicious_sharded_checkpoint_is_refused(sharded, tmp_path, damage):
    """Damage goes into training, since torch.load does not check CRCs, or a pickle in the folder runs code."""
    folder = copy_sharded(sharded('fsdp'), tmp_path, 'ckpt_sharded') / 'ckpt_sharded'
    load_checkpoint(folder)
    Bomb.path = tmp_path / 'executed'
    name, change = DAMAGES[damage]
    rewrite(folder / name, change)
    with pytest.raises(ValueError) as e:
        load_checkpoint(folder)
    one_line(e.value, folder)
    assert not Bomb.path.exists()


@pytest.mark.parametrize('name', ['rank_0000.pt', 'info.pt'])
def test_a_sharded_checkpoint_with_a_missing_file_is_refused(sharded, tmp_path, name):
    """Half a copy of a folder is loaded."""
    folder = copy_sharded(sharded('fsdp'), tmp_path, 'ckpt_sharded') / 'ckpt_sharded'
    (folder / name).unlink()
    with pytest.raises(ValueError) as e:
        load_checkpoint(tmp_path)
    one_line(e.value, folder)


def test_a_damaged_sharded_checkpoint_falls_back_to_the_one_before(text_set, sharded, tmp_path):
    """A run cannot be resumed although ckpt_sharded_prev is whole; or the damage is a traceback."""
    out_dir = copy_sharded(sharded('fsdp'), tmp_path / 'out', 'ckpt_sharded')
    shutil.copytree(sharded('fsdp') / 'ckpt_sharded_prev', out_dir / 'ckpt_sharded_prev')
    rewrite(out_dir / 'ckpt_sharded' / 'rank_0001.pt', lambda data: flip_bit(data, len(data) // 2))
    refused(command('model.py', f'--ckpt={out_dir}'), out_dir / 'ckpt_sharded')
    done = train_mode('one', text_set, out_dir, '--init_from=resume', '--max_iters=11')
    succeeded(done)
    assert done.stdout.count('WARNING') == 1 and list(losses(out_dir)) == [10]


def test_what_is_further_on_counts_and_not_what_is_newer_or_of_another_run(text_set, sharded, finished, tmp_path):
    """
    The times of files decide, which a copy changes; a kill between two renames leaves no checkpoint;
    another run's checkpoints survive --overwrite=True.
    """
    out_dir = copy_sharded(sharded('fsdp'), tmp_path / 'out', 'ckpt_sharded')
    earlier = checkpoint(finished[0]) | {'iter_num': load_checkpoint(out_dir)['iter_num'] - 1}
    torch.save(earlier, out_dir / 'ckpt.pt')
    assert Path(newest_checkpoint(out_dir)).name == 'ckpt_sharded'
    (out_dir / 'ckpt_sharded').rename(out_dir / 'ckpt_sharded_prev')
    assert Path(newest_checkpoint(out_dir)).name == 'ckpt_sharded_prev'
    (out_dir / 'ckpt_sharded_prev').rename(out_dir / 'ckpt_sharded_best')
    (out_dir / 'ckpt.pt').unlink()
    assert Path(newest_checkpoint(out_dir)).name == 'ckpt_sharded_best'
    refused(train(text_set, out_dir), 'ckpt_sharded_best', '--overwrite=True')
    (out_dir / 'ckpt_prev.pt').write_bytes(b'')
    succeeded(train(text_set, out_dir, '--overwrite=True', '--max_iters=2'))
    assert sorted(path.name for path in out_dir.glob('ckpt*')) == ['ckpt.pt', 'ckpt_best.pt']


def test_consolidating_leaves_what_is_there(sharded, finished, tmp_path):
    """A typing mistake replaces another run's checkpoint; a full disk leaves a traceback and half a file."""
    other = copy_run(finished[0], tmp_path / 'other') / 'ckpt.pt'
    before = contents(tmp_path)

    def consolidate(path, **kwargs):
        return command('model.py', f"--ckpt={sharded('fsdp')}", f'--consolidate={path}', **kwargs)
    refused(consolidate(other), other, 'already')
    refused(consolidate(tmp_path), tmp_path, 'already')
    refused(consolidate(tmp_path / 'no' / 'folder.pt'), tmp_path / 'no' / 'folder.pt')
    refused(consolidate(tmp_path / 'full.pt', before=SMALL_DISK), tmp_path / 'full.pt')
    assert contents(tmp_path) == before
