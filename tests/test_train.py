"""A run of train.py: its loop, its log, its learning rates, and when it saves, evaluates and ends."""
import math
import re

import numpy as np
import pytest
import torch

from conftest import (
    MUON,
    PYTHON,
    assert_equal_states,
    checkpoint,
    contents,
    copy_run,
    losses,
    losses_from,
    refused,
    run_logs,
    succeeded,
    train,
)
from engine.statistics import mean_and_error

TOKENS_PER_ITER = 2 * 4 * 16  # of TINY


def test_resume_continues_bit_for_bit(text_set, finished, tmp_path):
    """Dropout's random numbers, AdamW's moments or the data order start over after a resume."""
    out_dir, _ = finished
    half = copy_run(out_dir, tmp_path / 'half', 'ckpt_prev.pt')
    assert checkpoint(half)['iter_num'] == 10
    succeeded(train(text_set, half, '--init_from=resume'))
    assert_equal_states(checkpoint(out_dir), checkpoint(half))
    assert losses(half) == losses_from(out_dir, 10)
    (run,) = run_logs(half)
    second_half = sum(e['time_ms'] for e in run['training_iterations']) / 1000
    seconds = checkpoint(out_dir, 'ckpt_prev.pt')['train_seconds'] + second_half
    train_seconds = checkpoint(half)['train_seconds']
    assert run['eval_steps'][-1]['train_seconds'] == train_seconds and seconds < 1.001 * train_seconds
    assert run['eval_steps'][-1]['tokens'] == 20 * TOKENS_PER_ITER


COUNT_READS = """
import atexit
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class CountReads(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        CountReads.n += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal)
        return func(*args, **(kwargs or {}))

def counted(tensor, read=torch.Tensor.tolist):
    CountReads.n += 1
    return read(tensor)

torch.Tensor.tolist = counted  # on a CPU it reads without an operation of torch
CountReads().__enter__()
atexit.register(lambda: print(f'{CountReads.n} numbers read'))
"""


@pytest.mark.parametrize('flags', [
    [], MUON, ['--grad_clip=0'], ['--gradient_log_interval=1'], ['--dtype=float16'],
], ids=str)
def test_no_step_reads_a_number_from_the_device(text_set, tmp_path, flags):
    """Every step of a GPU waits for Python, and Python for the GPU."""
    counts = []
    for n in (5, 9):
        done = train(text_set, tmp_path / str(n), f'--max_iters={n}', '--log_interval=100', '--gradient_log_interval=0',
                     *flags, before=COUNT_READS)
        succeeded(done)
        counts += re.findall('(\\d+) numbers read', done.stdout)
    assert len(counts) == 2 and counts[0] == counts[1] > '0'


SLOW_READS = """
import time, torch
reads, item = [], torch.Tensor.item
torch.Tensor.item = lambda tensor: reads.append(item(tensor)) or reads[-1]
time.time = lambda: float(len(reads))
"""


def test_a_wait_for_the_device_counts_once(text_set, tmp_path):
    """With a clock that only item() moves on, by a second: time that is counted twice, and half the MFU."""
    succeeded(train(text_set, tmp_path, '--eval_interval=1000', before=SLOW_READS))
    (run,) = run_logs(tmp_path)
    assert {e['time_ms'] for e in run['training_iterations']} == {2000}  # two reads before each update


def test_a_run_without_compile_does_not_import_the_compiler(text_set, finished, tmp_path):
    """A second of every start for torch._dynamo, which an eager optimizer imports to learn that it is not compiled."""
    half, importtime = copy_run(finished[0], tmp_path / 'half', 'ckpt_prev.pt'), (*PYTHON, '-X', 'importtime')
    done = train(text_set, half, '--max_iters=12', '--init_from=resume', launcher=importtime)
    assert done.returncode == 0 and re.search(r'\| +torch\n', done.stderr), done.stderr[-2000:]
    assert not re.search(r'torch\._dynamo|sympy', done.stderr)


def test_a_run_with_muon_resumes_bit_for_bit(text_set, tmp_path):
    """Muon's momentum is lost or given to another matrix, or its learning rate leaves the schedule."""
    whole, half = tmp_path / 'whole', tmp_path / 'half'
    done = train(text_set, whole, *MUON, '--save_interval=10', '--verbose=True')
    succeeded(done, 'qk_norm', 'zero_init_residual', 'logit_softcap 15')
    succeeded(done, 'muon at 0.03 for 8 matrices', 'adamw at 0.001')
    state = checkpoint(copy_run(whole, half, 'ckpt_prev.pt'))['optimizer']
    rates = [group['lr'] for group in state['param_groups']]
    assert rates == pytest.approx([rates[0], rates[0], 30 * rates[0]])
    assert 1e-4 < rates[0] < 1e-3  # of iteration 9, while it decays
    assert sum('momentum_buffer' in moments for moments in state['state'].values()) == 2 * 4
    succeeded(train(text_set, half, '--init_from=resume', *MUON))
    assert_equal_states(checkpoint(whole), checkpoint(half))
    assert losses(half) == losses_from(whole, 10)


def test_moments_of_another_optimizer_are_refused(text_set, tmp_path):
    """A resumed run takes one optimizer's moments for another's, or touches the checkpoint that it cannot use."""
    succeeded(train(text_set, tmp_path, *MUON, '--max_iters=2'))
    before = contents(tmp_path)
    done = train(text_set, tmp_path, '--init_from=resume', '--arch_preset=modern', '--max_iters=3')
    refused(done, "optimizer='adamw'", 'muon', '--optimizer=muon')
    assert contents(tmp_path) == before


def test_eval_and_log_intervals_do_not_change_training(text_set, finished, tmp_path):
    """Evaluation or sampling draws from the random numbers of training, or takes its batches."""
    intervals = '--eval_interval=3', '--log_interval=7', '--gradient_log_interval=0', '--sample_interval=1'
    succeeded(train(text_set, tmp_path, *intervals))
    assert_equal_states(checkpoint(finished[0]), checkpoint(tmp_path))


RUN_KEYS = 'run_name start_time config startup_info training_iterations eval_steps checkpoints summary'
STEP_KEYS = 'iter loss lr time_ms mfu memory gradients loss_variance'
MFU_KEYS = 'mfu_percent achieved_tflops hardware_peak_tflops tokens_per_sec flops_per_token'


def test_the_run_log_has_every_training_step(finished):
    """A key that readers of the log rely on is gone or renamed, or a number means something else."""
    (run,) = run_logs(finished[0])
    assert set(RUN_KEYS.split()) <= run.keys()
    steps = run['training_iterations']
    assert [e['iter'] for e in steps] == list(range(20))
    for e in steps:
        mfu = e['mfu']
        assert set(STEP_KEYS.split()) <= e.keys() and set(MFU_KEYS.split()) <= mfu.keys()
        assert e['memory'] and e['gradients']['norm'] > 0
        assert mfu['tokens_per_sec'] == pytest.approx(TOKENS_PER_ITER / e['time_ms'] * 1000)
        assert mfu['mfu_percent'] == pytest.approx(100 * mfu['tokens_per_sec'] * mfu['flops_per_token'] / 1e12)
        assert ('layers' in e['gradients']) == (e['iter'] % 5 == 0)
        assert e['loss_variance'] == pytest.approx(np.var([other['loss'] for other in steps[:e['iter'] + 1]]))
    assert [c['iter'] for c in run['checkpoints']] == [10, 20]
    assert run['summary']['iterations'] == 20 and run['summary']['tokens'] == 20 * TOKENS_PER_ITER
    assert run['config']['n_layer'] == 2
    assert run['config']['normalization'] == 'layernorm'  # arch_preset left it open; the log has the answer


def test_the_run_log_has_every_evaluation(finished):
    """An evaluation is logged with errors, bits per byte or times that do not belong to its losses."""
    out_dir, _ = finished
    (run,) = run_logs(out_dir)
    first, last = run['eval_steps']
    assert (first['iter'], last['iter']) == (0, 20)
    for e in first, last:
        val = e['val']
        assert ('sample' in e) == (e is last) and e['tokens'] == e['iter'] * TOKENS_PER_ITER
        assert val['perplexity'] == pytest.approx(np.exp(val['loss']))
        assert val['bits_per_byte'] == pytest.approx(val['loss'] / np.log(2))  # a byte is a token here
        assert len(val['window_losses']) == 8
        assert np.mean(val['window_losses']) == pytest.approx(val['loss'], abs=1e-5)
        assert val['standard_error'] == pytest.approx(mean_and_error(val['window_losses'])[1], abs=1e-4)
    seconds = sum(e['time_ms'] for e in run['training_iterations']) / 1000
    assert first['train_seconds'] == 0 and seconds < 1.001 * last['train_seconds'] < run['summary']['seconds']
    assert last['val']['loss'] < first['val']['loss'] < 5.7  # ln 256 = 5.55
    for of_split in checkpoint(out_dir)['losses'].values():
        assert all(type(value) is float for value in of_split.values())


def test_a_run_compares_its_memory_with_the_estimate(finished):
    """A run does not log the memory that it took, or estimates less than the process."""
    startup = run_logs(finished[0])[0]['startup_info']
    assert 0 < startup['memory_estimate']['process'] < startup['memory_estimate']['peak']
    assert startup['memory_measured']['peak'] > 0


def test_gradients_clip_to_the_global_norm(text_set, tmp_path):
    """
    Clipping works per tensor, or not at all. AdamW's first moment after one step is (1 - beta1) times
    the gradient.
    """
    flags = '--gradient_log_interval=1', '--max_iters=1', '--grad_clip=0.01', '--peak_tflops=1e-9'
    done = train(text_set, tmp_path, *flags)
    succeeded(done, 'over 100 %', '--peak_tflops')
    gradients = run_logs(tmp_path)[0]['training_iterations'][0]['gradients']
    assert gradients['norm'] > 0.1 and gradients['layers'].keys() == {'wte', 'wpe', '0', '1', 'ln_f'}
    assert math.hypot(*gradients['layers'].values()) == pytest.approx(gradients['norm'], rel=1e-4)
    moments = [state['exp_avg'] for state in checkpoint(tmp_path)['optimizer']['state'].values()]
    assert torch.stack([m.norm() for m in moments]).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_max_iters_is_exact_and_the_same_command_again_does_nothing(text_set, finished, tmp_path):
    """A run takes max_iters + 1 steps, as nanoGPT's does; a finished one trains on or rewrites its checkpoint."""
    out_dir = copy_run(finished[0], tmp_path / 'again')
    assert {int(state['step']) for state in checkpoint(out_dir)['optimizer']['state'].values()} == {20}
    before = contents(out_dir)
    succeeded(train(text_set, out_dir, '--init_from=auto'), 'nothing to do')
    assert contents(out_dir) == before


def reference_lr(schedule, it, lr=1.0, low=0.1, warmup=4, decay=20, restart=6, cooldown=0.25):
    """The learning rate by torch's own schedulers, after a warmup by hand."""
    if it < warmup:
        return lr * (it + 1) / (warmup + 1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedulers, after = torch.optim.lr_scheduler, decay - warmup
    if schedule == 'cosine':
        scheduler = schedulers.CosineAnnealingLR(optimizer, after, eta_min=low)
    elif schedule == 'sgdr':
        scheduler = schedulers.CosineAnnealingWarmRestarts(optimizer, restart, 2, eta_min=low)
    elif schedule == 'linear':
        scheduler = schedulers.LinearLR(optimizer, 1.0, low / lr, after)
    else:
        scheduler = schedulers.ConstantLR(optimizer, 1.0)
    if schedule == 'wsd':
        cooled = schedulers.LinearLR(optimizer, 1.0, low / lr, int(decay * cooldown))
        scheduler = schedulers.SequentialLR(optimizer, [scheduler, cooled], [int(decay * (1 - cooldown)) - warmup])
    for _ in range(it - warmup if schedule == 'sgdr' else min(it, decay) - warmup):
        optimizer.step()
        scheduler.step()
    return optimizer.param_groups[0]['lr']


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('schedule', ['cosine', 'sgdr', 'wsd', 'linear', 'constant'])
def test_learning_rate_schedules_are_torchs(text_set, tmp_path, schedule):
    """A schedule is off by one at the end of warmup, at a restart or at the last iteration."""
    flags = ('--learning_rate=1 --min_lr=0.1 --warmup_iters=4 --lr_decay_iters=20 --restart_iters=6 '
             '--cooldown_frac=0.25 --max_iters=23 --gradient_accumulation_steps=1 --eval_iters=1').split()
    succeeded(train(text_set, tmp_path, f'--lr_schedule={schedule}', *flags))
    rates = [e['lr'] for e in run_logs(tmp_path)[0]['training_iterations']]
    assert rates == pytest.approx([reference_lr(schedule, it) for it in range(23)])


def test_a_broken_compiler_costs_a_warning_and_not_the_run(text_set, tmp_path):
    """A laptop without a C++ compiler cannot train."""
    env = {'CXX': str(tmp_path / 'no-such-compiler'), 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache'),
           'PATH': str(tmp_path)}
    done = train(text_set, tmp_path, '--compile=True', '--max_iters=2', env=env)
    succeeded(done)
    assert done.stdout.count('WARNING: torch.compile failed') == 1 and sorted(losses(tmp_path)) == [0, 1]


def test_patience_stops_early(text_set, tmp_path):
    """Patience counts evaluations without looking at their losses. This learning rate only makes them worse."""
    flags = '--eval_interval=2', '--learning_rate=3', '--min_lr=3', '--warmup_iters=0'
    succeeded(train(text_set, tmp_path, '--patience=2', *flags), 'stopping early')
    assert run_logs(tmp_path)[0]['summary']['outcome'] == 'stopped early'
    assert checkpoint(tmp_path)['iter_num'] < 20


@pytest.mark.parametrize('always_save, last', [(True, 20), (False, 10)])
def test_best_and_last_checkpoints(text_set, tmp_path, always_save, last):
    """ckpt_best.pt follows the last evaluation; always_save_checkpoint=False saves more than the lowest val loss."""
    flags = '--eval_interval=5', f'--always_save_checkpoint={always_save}'
    succeeded(train(text_set, tmp_path, *flags, '--max_iters=10'))
    worse = '--learning_rate=3', '--min_lr=3'
    succeeded(train(text_set, tmp_path, *flags, '--init_from=resume', *worse))
    evals = {e['iter']: e['val']['loss'] for run in run_logs(tmp_path) for e in run['eval_steps']}
    assert sorted(evals) == [0, 5, 10, 15, 20] and min(evals, key=evals.get) == 10
    assert checkpoint(tmp_path, 'ckpt_best.pt')['iter_num'] == 10 and checkpoint(tmp_path)['iter_num'] == last
