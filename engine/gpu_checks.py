"""
Check that training is right on a GPU, against a CPU and against itself (bench.py --report).

Every check is a run of train.py, whose losses are compared with those of a reference run.
--sections=correctness --device=cpu tries the runs that do not need a GPU.
"""
import functools
import os
import shutil
from typing import NamedTuple

from engine.common import ROOT, UserError
from engine.machine_commands import START, run_log, train_flags
from engine.machine_rows import Row, command_line, run

ITERS = 10
SIZE = (
    '--dataset=pystdlib', '--n_layer=4', '--n_head=4', '--n_embd=256', '--block_size=256',
    '--batch_size=8', '--gradient_accumulation_steps=2', '--warmup_iters=5', '--dropout=0.0',
    '--eval_interval=1000', '--eval_iters=1', '--log_interval=1', '--sample_interval=0',
    f'--max_iters={ITERS}', f'--lr_decay_iters={ITERS}')
FLOAT32, BFLOAT16 = '--dtype=float32', '--dtype=bfloat16'
LARGER = ('--n_embd=1024', '--n_head=8', '--block_size=1024', '--gradient_accumulation_steps=1',
          '--dtype=bfloat16', '--compile=False', '--max_iters=3')
YES = {True: 'yes', False: '**no**'}
MUON = '--arch_preset=modern', '--optimizer=muon'


class Check(NamedTuple):
    name: str
    flags: list
    reference: str = ''  # the name of an earlier check
    tolerance: float = 0.0  # of the relative difference of losses
    torchrun: bool = False
    first: str = ''  # a flag of a first run, which this one resumes


def checks():
    """Return the checks, without the device, which is in the flags only where it is the CPU."""
    plain, cpu, masked = '--compile=False', '--device=cpu', ('--doc_mask=True', FLOAT32)
    one, other = 'CPU, float32', 'float32'
    return [
        Check(one, [cpu, FLOAT32, plain]),
        Check(other, [FLOAT32, plain], one, 5e-3),  # TF32 has 10 bits
        Check('bfloat16', [BFLOAT16, plain], one, 2e-2),
        Check('bfloat16, compiled', [BFLOAT16, '--compile=True'], 'bfloat16', 2e-2),
        Check('float16 with the scaler', ['--dtype=float16', plain], one, 5e-2),
        Check('CPU, Muon', [cpu, FLOAT32, plain, *MUON]),
        Check('Muon', [FLOAT32, plain, *MUON], 'CPU, Muon', 2e-2),
        Check('doc_mask, dense', [*masked, plain]),
        Check('doc_mask, flex attention', [*masked, '--compile=True'], 'doc_mask, dense', 5e-3),
        Check('DDP', [FLOAT32, plain], other, 5e-3, torchrun=True),
        Check('ZeRO-1', [FLOAT32, plain, '--use_zero1=True'], other, 5e-3, torchrun=True),
        Check('FSDP', [FLOAT32, plain, '--use_fsdp=True'], other, 5e-3, torchrun=True),
        Check('resumed', [BFLOAT16, plain], 'bfloat16', 2e-3, first=f'--max_iters={ITERS // 2}'),
    ]


def gpu_checks(report):
    """Yield the rows of all checks."""
    losses = {}  # {check: {iteration: loss}}
    for check in checks():
        yield check_row(report, check, losses)
    if report.device.type == 'cuda':
        larger = functools.partial(train_words, report, *LARGER, '--overwrite=True')
        yield log_row(report, 'peak memory', [larger('--batch_size=8')], memory_verdict)
        yield log_row(report, 'out of memory', [larger('--batch_size=2048')], memory_ran_out)
        yield tests_row()


def train_words(report, *flags, torchrun=False):
    launcher = ['python']
    if torchrun:
        launcher += ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1']
    out_dir = os.path.relpath(os.path.join(report.folder, 'check'), ROOT)
    return [*launcher, 'train.py', *SIZE, f'--device={report.device}', *train_flags(report),
            f'--out_dir={out_dir}', *flags]


def log_row(report, name, runs, read):
    """Return the row of commands; read(log) makes (cells, numbers) of the log of the last one."""
    def measure(left):
        for words in runs:
            run(words, left)
        folder = os.path.join(report.folder, 'check')
        log = run_log(folder)
        shutil.rmtree(folder)
        return read(log)
    return Row('correctness', name, ' && '.join(map(command_line, runs)), START, measure)


def check_row(report, check, losses):
    """Return the row of a check, which adds its losses to `losses`."""
    runs = [train_words(report, *check.flags, '--overwrite=True', torchrun=check.torchrun)]
    if check.first:
        resume = train_words(report, *check.flags, '--init_from=resume')
        runs = [[*runs[0], check.first], resume]

    def read(log):
        own = {entry['iter']: entry['loss'] for entry in log['training_iterations']}
        losses[check.name] = own
        cells, numbers = {'compared': 'the reference'}, dict(passed=True)
        if check.reference:
            worst = worst_difference(own, losses.get(check.reference, {}))
            cells, numbers = verdict(f'with {check.reference}', worst, check.tolerance)
        return cells, numbers | dict(losses=own)
    return log_row(report, check.name, runs, read)


def worst_difference(losses, reference):
    """Return the largest relative difference of losses. A step that fp16 skipped has no loss."""
    common = [it for it, loss in losses.items() if loss is not None and reference.get(it)]
    if not common:
        raise UserError('there are no losses to compare, because the reference run failed')
    return max(abs(losses[it] - reference[it]) / abs(reference[it]) for it in common)


def verdict(compared, difference, tolerance):
    passed = difference <= tolerance
    cells = {'compared': compared, 'worst relative difference': f'{difference:.1e}',
             'tolerance': f'{tolerance:g}', 'passed': YES[passed]}
    return cells, dict(difference=difference, tolerance=tolerance, passed=passed)


def memory_verdict(log):
    """Compare the peak memory of a run with its estimate."""
    estimated = log['startup_info']['memory_estimate']['peak']
    used = max(entry['memory']['peak'] for entry in log['training_iterations'])
    return verdict('with the estimate', abs(used - estimated) / estimated, 0.3)


def memory_ran_out(log):
    """Check that a run went on with less, after a micro-batch that no GPU has memory for."""
    smaller = [found['batch_size'] for found in log.get('out_of_memory', [])]
    passed = bool(smaller) and log['summary']['iterations'] == 3
    return dict(compared=f'then batch_size {smaller}', passed=YES[passed]), dict(passed=passed)


def tests_row():
    """Return the row of the tests that need a GPU."""
    words = ['python', '-m', 'pytest', '-q', '-m', 'gpu', '-p', 'no:cacheprovider']

    def measure(left):
        last = run(words, left).strip().splitlines()[-1]
        return {'compared': last.strip('= '), 'passed': YES[True]}, dict(passed=True)
    return Row('correctness', 'tests', command_line(words), 3 * START, measure)


def failed_checks(rows):
    """Return the names of checks that did not pass, other than those there was no time for."""
    return [row['name'] for row in rows
            if not row['numbers'].get('passed') and not row['note'].startswith('left out')]
