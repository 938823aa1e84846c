"""What must stay true: python -m pytest tests/test_soak.py"""
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from conftest import (
    MODES,
    ROOT,
    TINY,
    TORCHRUN,
    assert_equal_states,
    checkpoint,
    children,
    command,
    copy_run,
    copy_sharded,
    losses,
    run_logs,
    start,
    train,
)
from engine.checkpoint import load_checkpoint


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


