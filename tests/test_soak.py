"""Rare events, tried many times: kills, damage, resumes in other modes. python -m pytest -m soak --trials=20"""
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from conftest import (
    MODES,
    PARALLEL_MODES,
    PYTHON,
    TORCHRUN,
    assert_equal_states,
    begin,
    checkpoint,
    children,
    command,
    copy_run,
    copy_sharded,
    launcher_of,
    losses,
    losses_from,
    run_logs,
    start,
    succeeded,
    train,
    train_mode,
)
from engine.checkpoint import load_checkpoint

pytestmark = pytest.mark.soak
linux_only = pytest.mark.skipif(sys.platform != 'linux', reason='finds ranks in /proc')


def kill_at_random(process, ranks, trial, out_dir, rng):
    """Kill a process or one of its ranks within a second; every other time while it writes a checkpoint."""
    until = time.time() + rng.uniform(0, 1)
    if trial % 2:
        until += 10
    while time.time() < until and not (trial % 2 and any(out_dir.glob('ckpt*.tmp'))):
        pass
    os.kill(rng.choice(ranks) if ranks else process.pid, signal.SIGKILL)
    printed = process.communicate(timeout=60)[0]
    return max(map(int, re.findall('^iter ([0-9]+) .* left$', printed, re.M)), default=0)


@linux_only
@pytest.mark.parametrize('mode', [*MODES, 'fsdp, sharded', 'one, async', 'fsdp, async'])
def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(text_set, tmp_path, trials, mode):
    """
    A kill -9 costs more than two iterations, or four if a thread writes, leaves a checkpoint that does not
    load or processes that stay, or the run after it is another one.
    """
    name, *kind = mode.split(', ')
    launcher, flags = launcher_of(name), [*MODES[name][1], '--dropout=0.1', '--eval_interval=1000000']
    flags += ['--sharded_checkpoint=True'] * (kind == ['sharded'])
    flags += ['--init_from=auto', '--save_interval=2', f"--async_checkpoint={kind == ['async']}"]
    rng, killed, whole, reached, writing = random.Random(1), tmp_path / 'killed', tmp_path / 'whole', 0, 0
    for trial in trials:
        process = start(text_set, killed, *flags, launcher=launcher)
        ranks = children(process.pid) if launcher == TORCHRUN else []
        last = kill_at_random(process, ranks, trial, killed, rng)
        writing += any(killed.glob('ckpt*.tmp'))
        assert process.returncode and not [pid for pid in ranks if os.path.exists(f'/proc/{pid}')]
        before, reached = reached, load_checkpoint(killed)['iter_num']
        assert reached >= max(before, last + 1 - (4 if kind == ['async'] else 2))
    print(f'{mode}: killed {len(trials)} times in {reached} iterations, {writing} times with a checkpoint half written')
    for out_dir in (killed, whole):
        succeeded(train(text_set, out_dir, *flags, f'--max_iters={reached + 3}', launcher=launcher))
    assert_equal_states(load_checkpoint(whole), load_checkpoint(killed))
    assert losses(killed) == losses(whole) and len(losses(killed)) == reached + 3


def damaged(data, rng):
    """The bytes with one bit flipped and, one time in three, cut anywhere."""
    at = rng.randrange(len(data))
    data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
    return data[:rng.choice([len(data), len(data), rng.randrange(len(data))])]


def is_noticed(path, expected):
    """Whether loading a damaged checkpoint fails; if it does not, the checkpoint must be as it was."""
    try:
        assert_equal_states(expected, load_checkpoint(path))
    except ValueError:
        return True
    return False


def test_damage_anywhere_in_a_checkpoint_is_noticed_or_harmless(text_set, finished, tmp_path, trials):
    """Flipped bits or cuts go into training, or a run does not fall back to the checkpoint before and end the same."""
    rng, out_dir, noticed = random.Random(1), copy_run(finished[0], tmp_path / 'out'), 0
    data, expected = (finished[0] / 'ckpt.pt').read_bytes(), checkpoint(finished[0])
    for _ in trials:
        for _ in range(50):
            (out_dir / 'ckpt.pt').write_bytes(damaged(data, rng))
            noticed += is_noticed(out_dir, expected)
        shutil.copy(finished[0] / 'ckpt_prev.pt', out_dir)
        succeeded(train(text_set, out_dir, '--init_from=auto'))  # a run with the last of them
        assert_equal_states(expected, checkpoint(out_dir))
    print(f'{noticed} of {50 * len(trials)} damages noticed, the others harmless')


def test_damage_anywhere_in_a_sharded_checkpoint_is_noticed_or_harmless(sharded, tmp_path, trials):
    """Rows are put in the wrong place, or a part of another size is accepted."""
    folder = copy_sharded(sharded('fsdp'), tmp_path / 'out', 'ckpt_sharded') / 'ckpt_sharded'
    rng, noticed, expected, files = random.Random(1), 0, load_checkpoint(folder), sorted(folder.iterdir())
    for _ in range(50 * len(trials)):
        path = rng.choice(files)
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, rng))
        noticed += is_noticed(folder, expected)
        path.write_bytes(whole)
    print(f'{noticed} of {50 * len(trials)} damages noticed, the others harmless')


@pytest.fixture(scope='module')
def whole(text_set, tmp_path_factory):
    """whole(mode): the out_dir of a run of 30 iterations in two parts, with a checkpoint at 10 as ckpt_10.pt."""
    folders = {}

    def run(mode):
        if mode not in folders:
            out_dir = folders[mode] = tmp_path_factory.mktemp('whole') / 'out'
            for max_iters in (10, 30):
                flags = '--init_from=auto', f'--max_iters={max_iters}'
                succeeded(train_mode(mode, text_set, out_dir, *flags, launcher=launcher_of(mode)))
                shutil.copy(out_dir / 'ckpt.pt', out_dir / f'ckpt_{max_iters}.pt')
        return folders[mode]
    return run


@pytest.mark.parametrize('second', MODES)
@pytest.mark.parametrize('first', MODES)
def test_a_run_resumes_in_any_mode(text_set, whole, tmp_path, first, second):
    """Moments or data are lost on the way from one parallelism to another."""
    out_dir = copy_run(whole(first), tmp_path / 'out', 'ckpt_10.pt')
    flags = '--init_from=resume', '--max_iters=30'
    succeeded(train_mode(second, text_set, out_dir, *flags, launcher=launcher_of(second)))
    expected = losses_from(whole('one'), 10)
    assert len(expected) == 20 and losses(out_dir) == pytest.approx(expected, rel=1e-5)
    if first == second:
        assert_equal_states(checkpoint(whole(first)), checkpoint(out_dir))
        assert losses(out_dir) == losses_from(whole(first), 10)
    flags = '--num_samples=1', '--max_new_tokens=5', '--device=cpu'
    succeeded(command('sample.py', f'--out_dir={out_dir}', *flags))


@pytest.mark.parametrize('mode', PARALLEL_MODES)
def test_clean_runs_of_two_processes_all_exit_0(text_set, tmp_path, trials, mode):
    """Now and then, a rank leaves while another still talks to it."""
    for trial in trials:
        succeeded(train_mode(mode, text_set, tmp_path / str(trial), '--max_iters=2', launcher=TORCHRUN))


@linux_only
def test_a_node_that_is_killed_and_started_again_joins_the_run(text_set, tmp_path):
    """Two agents as on two nodes: one dies with its worker, and the other, or its replacement, waits for ever."""
    with socket.create_server(('127.0.0.1', 0)) as free:
        endpoint = f'127.0.0.1:{free.getsockname()[1]}'
    torchrun = (*PYTHON, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--max-restarts=3',
                '--rdzv_backend=c10d', f'--rdzv_endpoint={endpoint}', '--rdzv_id=a')
    flags = '--max_iters=3000', '--eval_interval=1000000', '--save_interval=20', '--init_from=auto'

    def join():
        return begin(text_set, tmp_path, *flags, launcher=torchrun, stderr=subprocess.STDOUT,
                     env={'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})
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
    assert checkpoint(tmp_path)['iter_num'] == 3000 and last['summary']['outcome'] == 'finished'
    assert last['training_iterations'][0]['iter'] >= reached


def test_an_unreachable_wandb_delays_the_start_and_no_more(text_set, finished, tmp_path):
    """A run waits for a server for ever, or is another run without it."""
    server = {'WANDB_BASE_URL': 'http://127.0.0.1:9', 'WANDB_API_KEY': 'x' * 40, 'WANDB_MODE': 'online'}
    started = time.time()
    done = train(text_set, tmp_path, '--wandb_log=True', env=server)
    succeeded(done)
    assert done.stdout.count('recorded offline') == 1 and time.time() - started < 40
    assert_equal_states(checkpoint(finished[0]), checkpoint(tmp_path))
