"""Read and check the logs of runs, run_*.json, as train.py writes them."""
import glob
import math
import os
from typing import NamedTuple

import numpy as np

from engine.common import UserError
from engine.schema import Between, check, read_json

MAX_LOSS = 3.5e38  # losses are computed in float32
LOSS = Between(-MAX_LOSS, MAX_LOSS)

# the fields of a run log that are read here; `windows` are those of val
RUN_LOG = {
    'config': {'seed': int, 'max_iters': int, 'eval_only': bool},
    'startup_info': {'total_params': int, 'flops_per_token': float, 'hardware_peak_tflops': float,
                     'peak_source?': str, 'tokens_per_iter': int, 'device': str},
    'training_iterations': [{'iter': int, 'loss': (LOSS, None), 'memory': dict,
                             'mfu': {'tokens_per_sec': float, 'achieved_tflops': float}}],
    'eval_steps': [{'iter': int, 'tokens': int, 'train_seconds': float, 'sample?': str,
                    'train': {'loss': LOSS},
                    'val': {'loss': LOSS, 'bits_per_byte?': float, 'window_losses?': [float]}}],
    'eval_windows?': {'n': int, 'tokens_each': int, 'crc': int},
    'summary': {'outcome': str, 'iterations': int, 'iter_num': int},
}


class Evaluation(NamedTuple):
    iter: int
    tokens: int
    flops: float
    train_seconds: float
    loss: float  # of val
    losses: np.ndarray  # per window of val, in text order
    train_loss: float = math.nan
    bits_per_byte: float | None = None  # of val, where the bytes of a token are known
    sample: str | None = None  # text of the model


# what losses are compared and plotted against: {label: field of Evaluation}
AXES = dict(steps='iter', tokens='tokens', FLOPs='flops', seconds='train_seconds')


class Result(NamedTuple):
    """The content of a run's logs."""
    folder: str
    config: dict
    startup_info: dict
    windows: dict  # n, tokens_each and crc of the windows of val
    evals: list[Evaluation]
    iterations: list[dict]
    outcome: str
    iter_num: int


def files_of(folder, pattern):
    return sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))


def read_run(folder):
    """
    Return the Result of the run in a folder, or None if it has no log. A resumed run has a log per
    start; where two logs have the same iteration, the later one wins.
    """
    return (read_runs(folder) or [None])[-1]


def read_runs(folder):
    """Return the Results of all runs that a folder has seen, the newest last."""
    runs = []
    for log in map(read_log, files_of(folder, 'run_*.json')):
        if log['config']['eval_only'] or not log['training_iterations'] + log['eval_steps']:
            continue
        if first_iter(log) == 0 or not runs:  # a run that starts from scratch
            runs.append([])
        runs[-1].append(log)
    return [result_of(folder, logs) for logs in runs]


def runs_beside(out_dir, most_bytes=math.inf):
    """
    Return the Results of all runs in an out_dir and in the folders beside it. If their logs are
    longer than most_bytes, return the newest ones: 20 MB take seconds to read.
    """
    found = []
    folders = glob.glob(os.path.join(glob.escape(out_dir), os.pardir, '*', ''))
    for folder in sorted(folders, key=os.path.getmtime, reverse=True):
        most_bytes -= sum(map(os.path.getsize, files_of(folder, 'run_*.json')))
        if most_bytes > 0:
            try:
                found += read_runs(os.path.normpath(folder))
            except UserError:  # damaged, or of another program: not a run to compare with
                pass
    return found


def result_of(folder, logs):
    """Return the Result of the logs of one run."""
    last, evals, iterations = logs[-1], {}, {}
    windows = [log['eval_windows'] for log in logs if 'eval_windows' in log][-1:]
    ends = [first_iter(log) for log in logs[1:]] + [math.inf]
    for log, end in zip(logs, ends):
        if [log.get('eval_windows')] == windows:  # losses on other windows cannot be compared
            evals |= {e['iter']: e for e in log['eval_steps'] if e['iter'] <= end}
        iterations |= {e['iter']: e for e in log['training_iterations'] if e['iter'] < end}
    flops_per_token = last['startup_info']['flops_per_token']
    return Result(
        folder=folder,
        config=last['config'],
        startup_info=last['startup_info'],
        windows=windows[0] if windows else None,
        evals=[evaluation(evals[i], flops_per_token) for i in sorted(evals)],
        iterations=[iterations[i] for i in sorted(iterations)],
        outcome=last['summary']['outcome'],
        iter_num=last['summary']['iter_num'])


def read_log(path):
    """Return a run log as a dict, without evaluations that lack window losses (older logs)."""
    log = read_json(path, RUN_LOG)
    log['eval_steps'] = [e for e in log['eval_steps'] if 'window_losses' in e['val']]
    try:
        check_figures(log)
    except ValueError as e:
        raise UserError(f"'{path}' is not a run log as train.py writes it: {e}") from None
    return log


def check_figures(log):
    """Raise ValueError if figures of a run log contradict each other or cannot be."""
    last = log['summary']['iter_num']
    if first_iter(log) < 0:
        raise ValueError('summary.iterations is above summary.iter_num')
    for kind in ('eval_steps', 'training_iterations'):
        iters = [entry['iter'] for entry in log[kind]]
        if iters != sorted(iters) or max(iters, default=0) > last:
            raise ValueError(f'{kind} are not in order, or beyond summary.iter_num, {last}')
    for key in ('hardware_peak_tflops', 'tokens_per_iter'):
        if not log['startup_info'][key] > 0:
            raise ValueError(f'startup_info.{key} must be positive')
    for entry in log['training_iterations']:
        check([*entry['memory'].values()], [int], 'memory')
        if not entry['memory']:
            raise ValueError(f"iteration {entry['iter']} has no memory")
    for entry in log['eval_steps']:
        check_losses(entry, log.get('eval_windows', {}).get('n'))


def check_losses(entry, n):
    """Raise ValueError unless the losses of an evaluation are those of n windows."""
    losses, loss = entry['val']['window_losses'], entry['val']['loss']
    where = f"in the evaluation of iteration {entry['iter']}"
    if not n or len(losses) != n:
        raise ValueError(f'{len(losses)} window_losses, but eval_windows.n is {n}, {where}')
    if not 0 <= min(losses) <= max(losses) < MAX_LOSS:
        raise ValueError(f'window_losses from {min(losses)} to {max(losses)} {where}')
    mean = float(np.mean(losses))
    if abs(mean - loss) > 1e-4 * max(1, mean):  # they are rounded to 5 decimals
        raise ValueError(f'val.loss is {loss:.5f}, but the mean of window_losses {mean:.5f}, '
                         f'{where}')


def first_iter(log):
    return log['summary']['iter_num'] - log['summary']['iterations']


def evaluation(e, flops_per_token):
    losses = np.array(e['val']['window_losses'])
    flops = e['tokens'] * flops_per_token
    return Evaluation(e['iter'], e['tokens'], flops, e['train_seconds'], e['val']['loss'], losses,
                      e['train']['loss'], e['val'].get('bits_per_byte'), e.get('sample'))
