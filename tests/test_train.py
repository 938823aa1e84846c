"""What must stay true: python -m pytest tests/test_train.py"""
import math
import re
import sys

import numpy as np
import pytest
import torch

from conftest import (
    MUON,
    assert_equal_states,
    checkpoint,
    contents,
    copy_run,
    losses,
    refused,
    run_logs,
    train,
    train_mode,
)
from data.loader import fingerprint
from engine.statistics import mean_and_error
from model import GPT


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
    model, ids = GPT.from_checkpoint(out_dir), torch.from_numpy(np.fromfile(text_set / 'val.bin', np.uint16).astype(np.int64))
    n = (len(ids) - 1) // 16
    logits = model(ids[:n * 16].view(n, 16), all_logits=True)[0]
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 256), ids[1:n * 16 + 1], reduction='none').view(n, 16).mean(1)
    (run,) = run_logs(out_dir)
    assert run['eval_steps'][0]['val']['loss'] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert run['eval_steps'][0]['val']['window_losses'] == pytest.approx(expected.tolist(), abs=2e-5)  # in the order of the text
    windows = ids[np.arange(n)[:, None] * 16 + np.arange(17)]
    assert run['eval_windows'] == dict(n=n, tokens_each=16, crc=fingerprint(windows))


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


