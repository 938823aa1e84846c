"""Runs survive, or end with a line: signals, kills, full disks, other runs, broken numbers, lack of memory."""
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from conftest import (
    BYTE,
    PYTHON,
    ROOT,
    SMALL_DISK,
    TINY,
    TORCHRUN,
    Bomb,
    assert_equal_states,
    assert_finite_checkpoints,
    at_start,
    begin,
    checkpoint,
    children,
    command,
    contents,
    copy_run,
    copy_sharded,
    hang_once_written,
    launcher_of,
    limit_data,
    losses,
    one_line,
    refused,
    run_logs,
    start,
    succeeded,
    train,
    train_mode,
    wait_for_end,
    wait_until,
)
from data.folder import find_datasets, write_dataset
from engine.checkpoint import load_checkpoint
from model import GPT
from tests.warm import HANGS

linux_only = pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc or limits on data segments')


# signals and kills

@pytest.mark.parametrize('signum, code, flags', [
    (signal.SIGTERM, 143, []),
    (signal.SIGINT, 130, ['--save_interval=1', '--async_checkpoint=True']),
])
def test_a_signal_saves_and_the_run_can_be_resumed(text_set, tmp_path, signum, code, flags):
    """A preempted run loses its last iterations, or exits as if it had finished."""
    out_dir, whole = tmp_path / 'out', tmp_path / 'whole'
    process = start(text_set, out_dir, *flags)
    process.send_signal(signum)
    rest = process.communicate(timeout=HANGS)[0]
    assert process.returncode == code and 'saved' in rest
    reached, log = checkpoint(out_dir)['iter_num'], run_logs(out_dir)[0]
    assert reached >= 6 and log['summary']['iter_num'] == len(log['training_iterations']) == reached
    succeeded(train(text_set, out_dir, '--init_from=resume', f'--max_iters={reached + 2}'))
    succeeded(train(text_set, whole, f'--max_iters={reached + 2}'))
    assert checkpoint(out_dir)['iter_num'] == reached + 2
    assert_equal_states(checkpoint(whole), checkpoint(out_dir))


def test_a_terminal_that_closes_does_not_cost_the_run(text_set, tmp_path):
    """SIGHUP arrives, and from then on every print fails, so the run ends without a checkpoint."""
    ours, its = os.openpty()
    process = begin(text_set, tmp_path, '--max_iters=1000000', stdout=its, stderr=its)
    os.close(its)
    printed = b''
    while b'iter 5 ' not in printed:
        printed += os.read(ours, 1000)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(HANGS) == 129 and checkpoint(tmp_path)['iter_num'] >= 6


@pytest.mark.parametrize('mode', ['one', 'ddp'])
def test_a_signal_interrupts_an_evaluation_which_the_resumed_run_makes_up_for(tmp_path, mode):
    """torchrun kills ranks that need more than 30 s to stop; or the final evaluation never comes."""
    data, out_dir = tmp_path / 'data', tmp_path / 'out'
    write_dataset(data, {'train': bytes(range(200)) * 20, 'val': bytes(range(200)) * 20_000}, BYTE)
    flags = '--init_from=auto', '--max_iters=15', '--eval_interval=15'
    succeeded(train_mode(mode, data, out_dir, *flags, '--max_iters=10'))
    slowly = '--batch_size=1', '--gradient_accumulation_steps=8', '--eval_iters=1000000'  # it takes minutes
    process = begin(data, out_dir, '--dropout=0.0', *flags, *slowly, launcher=launcher_of(mode))
    assert any(line.startswith('iter 14 ') for line in process.stdout)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=HANGS)
    saved = checkpoint(out_dir)
    assert process.returncode and (saved['iter_num'], saved['last_eval_iter']) == (15, 10)
    for expected in ('step 15: ', 'nothing to do'):
        succeeded(train_mode(mode, data, out_dir, *flags), expected)
        assert checkpoint(out_dir)['last_eval_iter'] == 15


def test_a_signal_to_a_whole_torchrun_job_saves(text_set, modes, tmp_path):
    """
    torchrun passes on the signal that its workers have received already; two signals end a run without
    a checkpoint. Other tests of two processes set torchrun's variables themselves; torchrun sets others.
    """
    process = start(text_set, tmp_path, '--dropout=0.0', launcher=TORCHRUN)
    os.killpg(process.pid, signal.SIGTERM)
    rest = process.communicate(timeout=HANGS)[0]
    summary = run_logs(tmp_path)[0]['summary']
    assert process.returncode != 0 and 'saved' in rest
    assert checkpoint(tmp_path)['iter_num'] == summary['iter_num'] >= 6 and summary['outcome'] == 'SIGTERM'
    expected = losses(modes('ddp')[0])
    assert [losses(tmp_path)[it] for it in range(6)] == [expected[it] for it in range(6)]


@linux_only
def test_ranks_save_and_end_when_torchrun_is_killed(text_set, tmp_path):
    """Ranks keep training without torchrun, and hold the out_dir."""
    process = start(text_set, tmp_path, launcher=TORCHRUN)
    ranks = children(process.pid)
    process.kill()
    process.communicate(timeout=HANGS)  # ranks that print into a full pipe never end
    wait_for_end(ranks)
    assert ranks and checkpoint(tmp_path)['iter_num'] >= 6


FAULTS = """
import os, signal, time
what, _, where = fault.partition(':')
replace, fsync = os.replace, os.fsync

def faulty_replace(src, dst):
    if str(dst).endswith('.json'):
        time.sleep(0.1)  # a slow log is not written in every iteration
    replace(src, dst)
    if what == 'kill' and os.path.basename(dst) == where:
        os.kill(os.getpid(), signal.SIGKILL)

def faulty_fsync(fd):
    path = os.readlink(f'/proc/self/fd/{fd}')
    if what == 'flip' and path.endswith(where):
        os.pwrite(fd, b'flip', os.fstat(fd).st_size // 2)
    fsync(fd)
    if what == 'kill' and os.path.basename(path) == where:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace, os.fsync = faulty_replace, faulty_fsync
"""


def faulty(fault):
    """
    Code for `before`. 'kill:NAME' kills the process once a file is on the disk or renamed under that
    name; 'flip:END' changes bytes of the files with that ending on their way to the disk.
    """
    return f'fault = {fault!r}\n{FAULTS}'


def test_a_kill_after_the_rename_leaves_log_and_best_of_the_same_iteration(text_set, tmp_path):
    """
    ckpt_best.pt stays stale since a resumed run knows the loss already, or is not found by
    --init_from=auto when it is alone; or iterations are in no log.
    """
    out_dir, flags = tmp_path / 'out', ('--eval_interval=5', '--init_from=auto')
    killed = train(text_set, out_dir, *flags, before=faulty('kill:ckpt_best.pt'))
    assert killed.returncode == -signal.SIGKILL and not (out_dir / 'ckpt.pt').exists()
    killed = train(text_set, out_dir, *flags, before=faulty('kill:ckpt.pt'))
    assert killed.returncode == -signal.SIGKILL
    assert checkpoint(out_dir)['iter_num'] == checkpoint(out_dir, 'ckpt_best.pt')['iter_num'] == 10
    assert list(losses(out_dir)) == list(range(10))


def test_a_kill_between_the_renames_of_a_sharded_checkpoint_never_goes_back(text_set, finished, tmp_path):
    """
    Another run's ckpt.pt, or an older one of this run, counts as the newest checkpoint;
    ckpt_sharded_best is gone before the next one is there; or the log is behind.
    """
    out_dir = copy_run(finished[0], tmp_path / 'out')
    (out_dir / 'ckpt_best.pt').write_bytes(b'')

    def run(fault, *flags):
        return train_mode('fsdp', text_set, out_dir, '--eval_interval=5', '--sharded_checkpoint=True', *flags,
                          before=faulty(fault))

    def reached(name=''):
        return load_checkpoint(out_dir / name)['iter_num']
    assert run('kill:ckpt_sharded', '--overwrite=True').returncode
    assert not contents(out_dir) and list(losses(out_dir)) == [0, 1, 2, 3, 4]
    assert reached() == reached('ckpt_sharded_best') == 5
    older = load_checkpoint(out_dir) | {'iter_num': 3}
    torch.save(older, out_dir / 'ckpt.pt')  # of this run before it was sharded, but copied later
    assert load_checkpoint(out_dir)['path'] == str(out_dir / 'ckpt_sharded')

    assert run('kill:info.pt', '--init_from=auto').returncode
    assert reached() == reached('ckpt_sharded_best') == 5
    done = run('kill:ckpt_sharded_prev', '--init_from=auto')
    assert done.returncode and '15 iterations from 5 on' in done.stdout
    assert load_checkpoint(out_dir)['path'] == str(out_dir / 'ckpt_sharded_prev')
    assert reached('ckpt_sharded_best') == 10

    succeeded(run('', '--init_from=auto'), '15 iterations from 5 on')
    assert reached() == 20 and list(losses(out_dir)) == list(range(20))
    assert not list(out_dir.glob('*.old')) and not list(out_dir.glob('*.tmp'))


# disks

@pytest.mark.parametrize('fault', ['flip:rank_0001.pt', 'flip:info.pt', 'small disk'])
def test_a_sharded_checkpoint_that_cannot_be_written_leaves_the_last_one(text_set, sharded, tmp_path, fault):
    """
    A checkpoint that is damaged on its way to the disk replaces the last good one, or parts of it stay
    on a full disk.
    """
    out_dir = copy_sharded(sharded('fsdp'), tmp_path / 'out')
    folder = out_dir / 'ckpt_sharded'
    before = {path: path.read_bytes() for path in folder.iterdir()}
    flags = '--init_from=resume', '--max_iters=11', '--sharded_checkpoint=True'
    done = train_mode('fsdp', text_set, out_dir, *flags, before=SMALL_DISK if fault == 'small disk' else faulty(fault))
    assert done.returncode and done.stderr.count('could not be written') == 1, done.stderr
    assert ('checksum' in done.stderr) == ('flip' in fault)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    assert not (out_dir / 'ckpt_sharded.tmp').exists()


def test_a_plain_checkpoint_is_read_back(text_set, finished, tmp_path):
    """A checkpoint that is damaged on its way to the disk replaces the last good one."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    before = contents(out_dir)
    done = train(text_set, out_dir, '--init_from=resume', '--max_iters=21', before=faulty('flip:ckpt.pt.tmp'))
    refused(done, out_dir / 'ckpt.pt', 'checksum')
    assert contents(out_dir) == before


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(text_set, finished, tmp_path):
    """A full disk costs the last good checkpoint, or the run exits with status 0 without the final one."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    before = contents(out_dir)
    refused(train(text_set, out_dir, '--init_from=resume', '--max_iters=21', before=SMALL_DISK),
            out_dir / 'ckpt.pt', 'untouched', 'File too large: it needs', 'MB are free')
    assert contents(out_dir) == before
    assert [e['iter'] for e in run_logs(out_dir)[0]['training_iterations']] == [20]


def test_a_disk_that_is_too_small_is_noticed_at_the_start(text_set, finished, tmp_path):
    """A run ends after a night because its checkpoints were never going to fit; an evaluation warns of them, too."""
    per_parameter = 3 * 4  # float32: the weight and two moments
    n_parameters = GPT.from_checkpoint(finished[0]).get_num_params(False)
    flags = '--init_from=resume', '--max_iters=22', '--keep_interval=1'
    for spare, notes in ((-1, 1), (0, 0)):
        out_dir = copy_run(finished[0], tmp_path / f'out{spare}')
        free = (4 + 2) * per_parameter * n_parameters + spare
        before = f'import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free={free})'
        done = train(text_set, out_dir, *flags, before=before)
        succeeded(done)
        assert done.stdout.count('the checkpoints may need') == notes
    done = train(text_set, out_dir, '--init_from=resume', '--eval_only=True', before=before.replace(str(free), '0'))
    succeeded(done)
    assert 'the checkpoints may need' not in done.stdout


@pytest.mark.parametrize('keep', [lambda n: 0, lambda n: n // 10, lambda n: n // 2, lambda n: n - 1])
def test_a_cut_checkpoint_is_noticed(finished, tmp_path, keep):
    """A copy that ran out of disk is loaded."""
    data = (finished[0] / 'ckpt.pt').read_bytes()
    (tmp_path / 'ckpt.pt').write_bytes(data[:keep(len(data))])
    with pytest.raises(ValueError) as e:
        load_checkpoint(tmp_path)
    one_line(e.value, tmp_path / 'ckpt.pt')


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which('setpriv'), reason='root may write everywhere')
def test_a_read_only_out_dir_is_refused(text_set, finished, tmp_path):
    """A run finds out at its first checkpoint that it cannot write one."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    launcher = ('setpriv', '--bounding-set=-dac_override', *PYTHON) if os.geteuid() == 0 else PYTHON
    out_dir.chmod(0o555)
    refused(train(text_set, out_dir, '--init_from=auto', '--max_iters=21', launcher=launcher), out_dir, 'writable')
    refused(train(text_set, out_dir / 'new', launcher=launcher), out_dir / 'new')
    out_dir.chmod(0o755)
    assert os.listdir(out_dir) == ['ckpt.pt']


# other runs and other nodes

def test_a_second_run_in_one_out_dir_is_refused(text_set, finished, tmp_path):
    """Two runs replace each other's checkpoints, or a lock outlives a killed run."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    process = start(text_set, out_dir, '--init_from=resume', '--eval_interval=1000000')
    before, holder = contents(out_dir), f'process {process.pid} on '
    refused(train(text_set, out_dir, '--init_from=auto'), out_dir, holder, '--out_dir')
    refused(train(text_set, out_dir, '--overwrite=True'), holder)
    done = train_mode('ddp', text_set, out_dir, '--init_from=auto')  # rank 0 meets it and all ranks end
    assert done.returncode and holder in done.stderr and len(re.findall('^train.py: ', done.stderr, re.M)) == 1
    assert contents(out_dir) == before
    process.kill()
    process.communicate(timeout=HANGS)
    succeeded(train(text_set, out_dir, '--init_from=auto', '--max_iters=21'))
    assert checkpoint(out_dir)['iter_num'] == 21


def test_a_used_out_dir_is_replaced_only_when_asked(text_set, finished, tmp_path):
    """A new run overwrites a week of training because --init_from=resume was forgotten."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    shutil.copy(finished[0] / 'ckpt_prev.pt', out_dir)
    before = contents(out_dir)
    choices = '--init_from=resume', '--init_from=auto', '--out_dir', '--overwrite=True'
    for flags in ((), (f'--init_from={finished[0]}',)):
        refused(train(text_set, out_dir, *flags), out_dir, 'ckpt.pt', *choices)
    succeeded(train(text_set, out_dir, '--eval_only=True'))
    assert contents(out_dir) == before
    done = train(text_set, out_dir, '--overwrite=True', '--max_iters=2')
    succeeded(done, 'WARNING: overwrite')
    assert checkpoint(out_dir)['iter_num'] == 2 and set(contents(out_dir)) == {'ckpt.pt', 'ckpt_best.pt'}


def test_a_config_replaces_only_its_own_folder(text_set, finished, tmp_path):
    """A config with overwrite=True deletes the model in a folder that only a flag has named."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    config = tmp_path / 'config.py'
    config.write_text(f'overwrite = True\nout_dir = {str(out_dir)!r}\n')
    argv = str(config), *TINY, f'--dataset={text_set}', '--max_iters=2'
    refused(command('train.py', *argv, f'--out_dir={out_dir}'), 'holds a run', '--init_from=auto')
    succeeded(command('train.py', *argv), 'WARNING: overwrite')


def test_auto_resumes_from_the_checkpoint_before_and_starts_in_an_empty_folder(text_set, finished, tmp_path):
    """--init_from=auto starts again although ckpt_prev.pt is there, or needs a checkpoint to start."""
    (tmp_path / 'out').mkdir()
    shutil.copy(finished[0] / 'ckpt_prev.pt', tmp_path / 'out')
    done = train(text_set, tmp_path / 'out', '--init_from=auto')
    succeeded(done)
    assert done.stdout.count('WARNING') == 1
    assert_equal_states(checkpoint(finished[0]), checkpoint(tmp_path / 'out'))
    succeeded(train(text_set, tmp_path / 'new', '--init_from=auto', '--max_iters=1'))
    assert checkpoint(tmp_path / 'new')['iter_num'] == 1


A_FOLDER_PER_RANK = "import os; os.chdir(os.environ['RANK'])"


def test_ranks_that_see_different_checkpoints_end(text_set, finished, tmp_path):
    """Two nodes, each with an out_dir of its own, train on from two places and average the gradients."""
    (tmp_path / '0').mkdir()
    (tmp_path / '1').mkdir()
    copy_run(finished[0], tmp_path / '0' / 'out')
    done = train_mode('ddp', text_set, 'out', '--init_from=auto', cwd=tmp_path, before=A_FOLDER_PER_RANK)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    first, second = done.stderr.strip().splitlines()
    one_line(first, 'iteration 20', 'out', 'share')
    one_line(second, 'rank 1', 'out', 'share')


def test_an_out_dir_that_nodes_do_not_share_is_noticed(text_set, tmp_path):
    """Two nodes keep one half of a sharded checkpoint each, and say that it is saved."""
    for node in '01':
        (tmp_path / node).mkdir()
    flags = '--sharded_checkpoint=True', '--save_interval=2'
    done = train_mode('fsdp', text_set, 'out', *flags, cwd=tmp_path, before=A_FOLDER_PER_RANK)
    assert done.returncode and 'saved' not in done.stdout
    assert 'out_dir must be a folder that all nodes share' in done.stderr
    assert not list(tmp_path.glob('*/out/ckpt*'))


# numbers that are not finite

DIVERGING = '--grad_clip=0', '--warmup_iters=0', '--save_interval=1'


@pytest.mark.parametrize('flags', [
    ('--learning_rate=1e30',),
    ('--learning_rate=1e30', '--min_lr=1e30', '--dtype=float16', '--max_iters=100'),
    ('--learning_rate=1e30', '--min_lr=1e30', '--weight_decay=1e30', '--eval_interval=1'),
])
def test_a_run_that_is_not_finite_ends_and_saves_nothing(text_set, tmp_path, flags):
    """
    NaN weights replace the last good checkpoint with exit status 0; the scaler of fp16 skips every
    step for ever; or an evaluation of broken weights saves them.
    """
    done = train(text_set, tmp_path, *DIVERGING, *flags)
    assert done.returncode == 1 and 'not finite' in done.stdout + done.stderr
    assert run_logs(tmp_path)[0]['summary']['outcome'] in ('not finite', 'failed')
    assert_finite_checkpoints(tmp_path)


NAN_ON_RANK_1 = """
import itertools, math, os
if os.environ['RANK'] == '1':
    import torch
    calls, embedding = itertools.count(), torch.nn.functional.embedding
    def broken(idx, *args, **kwargs):
        out = embedding(idx, *args, **kwargs)
        return out * math.nan if idx.device.type == 'cpu' and next(calls) == 20 else out
    torch.nn.functional.embedding = broken
import torch
step = torch.optim.AdamW.step
def checked(self):
    if not all(p.grad.isfinite().all() for group in self.param_groups for p in group['params']):
        print('the update was taken', flush=True)
    return step(self)
torch.optim.AdamW.step = checked
"""


def test_nan_on_one_rank_stops_all_before_the_update(text_set, tmp_path):
    """One rank stops while the other waits for it, or takes the step."""
    done = train_mode('ddp', text_set, tmp_path, '--save_interval=1', before=NAN_ON_RANK_1)
    (stopped,) = re.findall(r'not finite at iteration (\d+)', done.stdout)
    assert done.returncode and 0 < int(stopped) < 20 and checkpoint(tmp_path)['iter_num'] == int(stopped)
    assert 'the update was taken' not in done.stdout
    assert_finite_checkpoints(tmp_path)


# files of strangers

@pytest.mark.parametrize('inside_a_checkpoint', [False, True])
def test_checkpoints_cannot_run_code(text_set, finished, tmp_path, inside_a_checkpoint):
    """torch.load runs what a pickle names."""
    Bomb.path = tmp_path / 'executed'
    out_dir = copy_run(finished[0], tmp_path / 'out')
    if inside_a_checkpoint:
        torch.save(checkpoint(finished[0]) | {'config': Bomb()}, out_dir / 'ckpt.pt')
    else:
        (out_dir / 'ckpt.pt').write_bytes(pickle.dumps(Bomb()))
    refused(command('sample.py', f'--out_dir={out_dir}'), out_dir / 'ckpt.pt')
    for flags in (('--init_from=auto', '--max_iters=21'), ('--init_from=auto', '--eval_only=True')):
        refused(train(text_set, out_dir, *flags), out_dir / 'ckpt.pt', '' if inside_a_checkpoint else 'zip')
    assert not Bomb.path.exists()


def test_checkpoints_cannot_point_to_a_strangers_vocabulary(finished, tmp_path):
    """A checkpoint whose data set is '../..' has the meta.pkl there loaded, which is a pickle."""
    Bomb.path = tmp_path / 'executed'
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(Bomb()))
    nanogpt = {key: value for key, value in checkpoint(finished[0]).items() if key != 'tokenizer'}
    for dataset in (str(tmp_path), f'../../{tmp_path}', '..', 7):
        torch.save(nanogpt | {'config': {'dataset': dataset}}, tmp_path / 'ckpt.pt')
        done = command('sample.py', f'--out_dir={tmp_path}')
        refused(done, tmp_path / 'ckpt.pt', 'data set', repr(dataset))
        assert done.stdout == '' and not Bomb.path.exists()


@pytest.mark.parametrize('split', ['train', 'val'])
def test_an_id_past_the_vocabulary_ends_the_run(tmp_path, split):
    """On a GPU this is a failed assertion in a kernel, and checkpoints of whatever was trained before it."""
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 5, 'itos': dict(enumerate('abcde'))}))
    for name in ('train', 'val'):
        (np.arange(200) % (6 if name == split else 5)).astype('<u2').tofile(tmp_path / f'{name}.bin')
    done = train(tmp_path, tmp_path / 'out', '--dropout=0')
    refused(done, tmp_path / f'{split}.bin', 'id 5 at token ', 'vocab_size 5')
    assert contents(tmp_path / 'out') == {}


# memory

BIG = ('--block_size=512 --n_head=8 --attention_backend=manual --batch_size=12 --gradient_accumulation_steps=2 '
       '--max_iters=1 --dropout=0 --eval_iters=1').split()  # 470 MB, and 250 MB with half of its batch size


@linux_only
def test_out_of_memory_shrinks_the_micro_batch_and_not_the_step(text_set, tmp_path):
    """
    A run ends for want of memory that it can do without, or silently trains on fewer or other tokens per step.
    The first micro-batch cannot fit in any case. It once did so by chance, because only what malloc wastes was over
    the limit.
    """
    limited, free = tmp_path / 'limited', tmp_path / 'free'
    done = train(text_set, limited, *BIG, before=limit_data(400))
    succeeded(done)
    (log,) = run_logs(limited)
    events = [(e['iter'], e['batch_size'], e['gradient_accumulation_steps']) for e in log['out_of_memory']]
    pattern = r'out of memory at iteration (\d+): .*batch_size=(\d+) and gradient_accumulation_steps=(\d+)'
    said = [tuple(map(int, event)) for event in re.findall(pattern, done.stdout)]
    assert events == said and events[0] == (0, 6, 4)  # later events depend on the allocator
    assert all(size * accumulated == 12 * 2 for _, size, accumulated in events)
    assert checkpoint(limited)['config']['batch_size'] == events[-1][1]
    succeeded(train(text_set, free, *BIG))
    assert list(losses(limited).values()) == pytest.approx(list(losses(free).values()), rel=1e-5)
    evals = [[e['val']['loss'] for e in run_logs(out_dir)[0]['eval_steps']] for out_dir in (limited, free)]
    assert evals[0] == pytest.approx(evals[1], rel=1e-5)


@linux_only
def test_out_of_memory_that_cannot_be_helped_is_one_line(text_set, tmp_path):
    """The allocator's traceback is shown, or ranks wait for one that has ended."""
    one, two = tmp_path / 'one', tmp_path / 'two'
    long = '--block_size=2048', '--batch_size=1', '--gradient_accumulation_steps=2'
    refused(train(text_set, one, *BIG, *long, before=limit_data(400)),
            'out of memory', '--activation_checkpointing=True', '--block_size')
    more = limit_data(660)  # ranks have more threads
    done = train(text_set, two, *BIG, '--batch_size=24', processes=2, before=more)
    assert done.returncode and '--batch_size=12 --gradient_accumulation_steps=4' in done.stderr
    assert contents(one) == contents(two) == {}


# before the first step, and without data

UNTIL_STEP = """
from engine.common import StopSignal
stop = StopSignal()
{listen}
print('ready', flush=True)
{work}
print('status', stop.status)
"""
LONG_CALL = 'sum(range(10 ** 12))'  # in C, so that Python's own handlers would wait for its end


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize('listens', [False, True])
def test_signals_end_a_process_at_once_until_there_is_something_to_save(signum, listens):
    """
    A signal waits for the compiler, which takes minutes; clusters kill a job 30 s after it. The status
    -signum says that the kernel ended the process, without waiting for Python.
    """
    code = UNTIL_STEP.format(listen='stop.listen()' if listens else '',
                             work='while not stop.status: pass' if listens else LONG_CALL)
    process = subprocess.Popen([*PYTHON, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'ready\n'
    process.send_signal(signum)
    rest = process.communicate(timeout=HANGS)[0]
    if listens:
        assert process.returncode == 0 and rest.endswith(f'status {128 + signum}\n')
    else:
        assert process.returncode == -signum and not rest


@pytest.mark.parametrize('listens', [False, True])
def test_a_signal_that_nohup_ignores_stays_ignored(listens):
    """A run under nohup ends when its terminal closes."""
    code = UNTIL_STEP.format(listen='stop.listen()' * listens, work='import os; os.kill(os.getpid(), 1)')
    code = f'import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{code}'
    done = subprocess.run([*PYTHON, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert done.stdout == 'ready\nstatus 0\n', done.stderr


@linux_only
def test_a_signal_ends_the_preparation_of_a_text(tmp_path):
    """A signal waits until a text is prepared, or leaves prepare.py at work alone."""
    book = tmp_path / 'book.txt'
    book.write_bytes(b'all work and no play makes a dull line\n' * 100_000)
    folder = find_datasets(str(book))[0][2]
    process = begin(book, tmp_path / 'out', env=at_start(tmp_path, hang_once_written('.bin')))
    try:
        assert any(line.startswith('preparing ') for line in process.stdout)
        wait_until((tmp_path / 'hung').exists, process)
        preparing = children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert preparing and process.wait(HANGS) == -signal.SIGTERM
        wait_for_end(preparing)
        assert not (folder / 'meta.json').exists() and not (tmp_path / 'out').exists()
    finally:
        process.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize('mode, signum', [
    ('one', signal.SIGINT),
    ('ddp', signal.SIGTERM),
    pytest.param('one', signal.SIGTERM, marks=pytest.mark.soak),
    pytest.param('ddp', signal.SIGINT, marks=pytest.mark.soak),
])
def test_a_signal_before_the_first_step_leaves_the_checkpoint_as_it_is(text_set, finished, tmp_path, mode, signum):
    """A run saves a second time what it has just loaded, or waits for its first evaluation."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    before = contents(out_dir)
    flags = '--init_from=resume', '--max_iters=30', '--eval_interval=10', '--eval_iters=1000000'
    process = begin(text_set, out_dir, *flags, launcher=launcher_of(mode))
    assert any(line.startswith('cost ') for line in process.stdout)
    process.send_signal(signum)
    process.communicate(timeout=HANGS)
    assert process.returncode == (-signum if mode == 'one' else 1)
    assert contents(out_dir) == before


GONE = """
import os
pread, left = os.pread, {reads}

def read_what_is_left(fd, *args):
    global left
    path = os.readlink(f'/proc/self/fd/{{fd}}')
    left -= path.endswith({name!r})
    if left < 0:
        raise FileNotFoundError(2, 'No such file or directory', path)
    return pread(fd, *args)

if os.environ.get('RANK') != '0':
    os.pread = read_what_is_left
"""


@linux_only
@pytest.mark.parametrize('mode, name, reads', [
    ('one', 'train.bin', 100),
    ('one', 'val.bin', 10),  # in its second evaluation
    ('ddp', 'train.bin', 100),
    ('fsdp', 'val.bin', 5),
])
def test_a_run_whose_data_vanish_saves_before_it_ends(text_set, modes, tmp_path, mode, name, reads):
    """What was trained since the last checkpoint is lost, or other ranks wait for the one that cannot read."""
    flags = '--eval_interval=7', '--always_save_checkpoint=False'
    done = train_mode(mode, text_set, tmp_path, *flags, before=GONE.format(name=name, reads=reads))
    refused(done, 'No such file', text_set / name)
    assert 'saved' in done.stdout and 0 < checkpoint(tmp_path)['iter_num'] < 20
    assert run_logs(tmp_path)[0]['summary']['outcome'] == 'failed'
    succeeded(train_mode(mode, text_set, tmp_path, '--init_from=resume'))
    assert_equal_states(checkpoint(modes(mode)[0]), checkpoint(tmp_path))
