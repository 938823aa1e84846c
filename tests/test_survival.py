"""What must stay true: python -m pytest tests/test_survival.py"""
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from conftest import (
    LIMITED,
    MODES,
    ROOT,
    TINY,
    TORCHRUN,
    Bomb,
    assert_equal_states,
    checkpoint,
    children,
    command,
    contents,
    copy_run,
    copy_sharded,
    losses,
    one_line,
    refused,
    run_logs,
    start,
    train,
    train_mode,
)
from engine.checkpoint import load_checkpoint


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


# what a run must survive, each from outside; further down the same with many trials

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


