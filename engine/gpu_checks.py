"""
Check that training is right on a GPU, against a CPU and against itself (bench.py --report).

Every check is a run of train.py by its command line, and its losses are compared with those of a
reference run. With --sections=correctness --device=cpu all but the last ones can be tried on a CPU.
"""
import os
import shutil
from typing import NamedTuple

from engine.common import UserError
from engine.machine_commands import run_log, train_flags
from engine.machine_rows import ROOT, Row, command_line, run

ITERS = 10
SIZE = (
    '--dataset=pystdlib', '--n_layer=4', '--n_head=4', '--n_embd=256', '--block_size=256',
    '--batch_size=8', '--gradient_accumulation_steps=2', '--warmup_iters=5', '--dropout=0.0',
    '--eval_interval=1000', '--eval_iters=1', '--log_interval=1', '--sample_interval=0',
    f'--max_iters={ITERS}', f'--lr_decay_iters={ITERS}')
FLOAT32, BFLOAT16 = '--dtype=float32', '--dtype=bfloat16'
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
    plain = '--compile=False'
    cpu = '--device=cpu'
    one, other = 'CPU, float32', 'float32'
    masked = '--doc_mask=True', FLOAT32
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
    yield memory_row(report)
    if report.device.type == 'cuda':
        yield out_of_memory_row(report)
        yield tests_row()


def train_words(report, folder, *flags, torchrun=False):
    launcher = ['python']
    if torchrun:
        launcher += ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1']
    out_dir = os.path.relpath(os.path.join(report.folder, folder), ROOT)
    return [*launcher, 'train.py', *SIZE, f'--device={report.device}', *train_flags(report),
            f'--out_dir={out_dir}', *flags]


def check_row(report, check, losses):
    """Return the row of a check, which adds its losses to `losses`."""
    folder = 'check'
    words = [train_words(report, folder, *check.flags, '--overwrite=True', torchrun=check.torchrun)]
    if check.first:
        words = [[*words[0], check.first],
                 train_words(report, folder, *check.flags, '--init_from=resume')]

    def measure(left):
        for each in words:
            run(each, left)
        log = run_log(os.path.join(report.folder, folder))
        entries = log['training_iterations']
        losses[check.name] = {entry['iter']: entry['loss'] for entry in entries}
        last = f"{entries[-1]['loss']:.4f}"
        shutil.rmtree(os.path.join(report.folder, folder))
        if not check.reference:
            return {'last loss': last}, dict(passed=True, losses=losses[check.name])
        worst = worst_difference(losses[check.name], losses.get(check.reference, {}))
        cells, numbers = verdict(f'with {check.reference}', worst, check.tolerance)
        return {'last loss': last} | cells, numbers | dict(losses=losses[check.name])
    return Row('correctness', check.name, ' && '.join(map(command_line, words)), 10, measure)


def worst_difference(losses, reference):
    """Return the largest relative difference of losses. A step that fp16 skipped has no loss."""
    common = [it for it, loss in losses.items() if loss is not None and reference.get(it)]
    if not common:
        raise UserError('there are no losses to compare, because the reference run failed')
    return max(abs(losses[it] - reference[it]) / abs(reference[it]) for it in common)


def verdict(compared, difference, tolerance):
    passed = difference <= tolerance
    cells = {'compared': compared, 'worst relative difference': f'{difference:.1e}',
             'tolerance': f'{tolerance:g}', 'passed': 'yes' if passed else '**no**'}
    return cells, dict(difference=difference, tolerance=tolerance, passed=passed)


def memory_row(report):
    """Return the row that compares the peak memory of a run with its estimate."""
    words = train_words(report, 'check', BFLOAT16, '--compile=False', '--overwrite=True')

    def measure(left):
        run(words, left)
        log = run_log(os.path.join(report.folder, 'check'))
        shutil.rmtree(os.path.join(report.folder, 'check'))
        estimated = log['startup_info']['memory_estimate']['peak']
        used = max(entry['memory']['peak'] for entry in log['training_iterations'])
        return verdict('with the estimate', abs(used - estimated) / estimated, 0.3)
    return Row('correctness', 'peak memory', command_line(words), 10, measure)


def out_of_memory_row(report):
    """Return the row of a run whose first micro-batch takes more memory than any GPU has."""
    large = ('--n_embd=1024', '--n_head=8', '--block_size=1024', '--batch_size=2048',
             '--gradient_accumulation_steps=1', '--max_iters=2', '--compile=False')
    words = train_words(report, 'check', *large, '--overwrite=True')

    def measure(left):
        run(words, left)
        log = run_log(os.path.join(report.folder, 'check'))
        shutil.rmtree(os.path.join(report.folder, 'check'))
        found = log.get('out_of_memory', [])
        passed = bool(found) and len(log['training_iterations']) == 2
        batch = found[-1]['batch_size'] if found else 'never out of memory'
        return {'compared': f'batch_size 2048, then {batch}',
                'passed': 'yes' if passed else '**no**'}, dict(passed=passed)
    return Row('correctness', 'out of memory', command_line(words), 40, measure)


def tests_row():
    """Return the row of the tests that need a GPU."""
    words = ['python', '-m', 'pytest', '-q', '-m', 'gpu', '-p', 'no:cacheprovider']

    def measure(left):
        last = run(words, left).strip().splitlines()[-1]
        return {'compared': last.strip('= '), 'passed': 'yes'}, dict(passed=True)
    return Row('correctness', 'tests', command_line(words), 30, measure)


def failed_checks(rows):
    """Return the names of checks that did not pass, other than those there was no time for."""
    return [row['name'] for row in rows
            if not row['numbers'].get('passed') and not row['note'].startswith('left out')]
