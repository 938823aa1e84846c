"""What must stay true: python -m pytest tests/test_sharded.py"""
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch

from conftest import (
    LIMITED,
    Bomb,
    assert_equal_states,
    checkpoint,
    command,
    contents,
    copy_run,
    copy_sharded,
    losses,
    one_line,
    refused,
    rewrite,
    train,
    train_mode,
)
from engine.checkpoint import load_checkpoint, newest_checkpoint


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


