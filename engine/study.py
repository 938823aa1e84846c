"""
Manage a study: many runs of train.py, each in its own folder. This file reads their logs and runs
the unfinished ones, several at a time. Interrupted runs are resumed.
"""
import glob
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.common import (
    CLEAR_LINE,
    Locked,
    UserError,
    duration,
    end_with_parent,
    printable,
    replacing,
    try_lock,
)
from engine.schema import Between, check, read_json

CLEAR = CLEAR_LINE if sys.stdout.isatty() else ''

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


@dataclass(eq=False)
class Run:
    """One cell (a choice of settings) trained with one seed."""
    cell: str
    seed: int
    folder: str
    settings: dict  # the flags of train.py that were set
    max_iters: int
    cost: float = 1.0  # relative to the other runs, for the estimate of the time left

    def __str__(self):
        return printable(f'{self.cell}, seed {self.seed}')


class Launcher(NamedTuple):
    """The script, defaults and slots used to start runs."""
    script: str  # train.py
    defaults: dict  # settings of a run without flags
    jobs: int  # runs at a time
    gpus: list[str]  # shared in turn
    files: tuple = ()  # override files of the script, which come before all settings

    def environment(self, slot):
        """
        Return the environment of the run in a slot, with its GPU or its share of the CPU cores.
        """
        env = dict(os.environ)
        if self.gpus:
            env['CUDA_VISIBLE_DEVICES'] = self.gpus[slot % len(self.gpus)]
        elif self.jobs > 1:
            env.setdefault('OMP_NUM_THREADS', str(max(1, os.cpu_count() // self.jobs)))
        return env


def open_no_link(path, flags):
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


class Job:
    """A run that should reach iteration `until`."""
    def __init__(self, run, until):
        self.run, self.until = run, until
        before = read_run(run.folder)
        self.first = before.iter_num if before else 0
        self.cost = run.cost * max(0, until - self.first) / run.max_iters
        self.console = os.path.join(run.folder, 'console.txt')
        self.process, self.given_up, self.too_slow = None, False, False

    def result(self):
        """Return the Result if the run reached `until` or stopped early, otherwise None."""
        result = read_run(self.run.folder)
        if result is None or not result.evals:
            return None
        reached = self.given_up or result.evals[-1].iter >= self.until
        return result if reached or result.outcome == 'stopped early' else None

    def start(self, launcher, slot):
        """Start train.py. It saves a checkpoint and ends if this process dies."""
        folder, settings = self.run.folder, self.run.settings
        os.makedirs(folder, exist_ok=True)
        wait_for_lock(folder)
        with replacing(os.path.join(folder, 'settings.json'), 'w', encoding='utf-8') as f:
            json.dump(settings, f, indent=1)
        # a fine-tuning run names weights
        init_from = settings.get('init_from', launcher.defaults['init_from'])
        if files_of(folder, 'ckpt*') or init_from == 'scratch':
            init_from = 'auto'
        flags = settings | dict(out_dir=folder, max_iters=self.until, init_from=init_from)
        command = [sys.executable, launcher.script, *launcher.files]
        command += [f'--{key}={value}' for key, value in flags.items()]
        with open(self.console, 'ab', opener=open_no_link) as console:
            self.offset = console.tell()
            self.process = subprocess.Popen(
                command, env=launcher.environment(slot), stdin=subprocess.DEVNULL, stdout=console,
                stderr=subprocess.STDOUT, preexec_fn=end_with_parent)
        self.started = time.time()

    def end_if(self, give_up):
        """End the run early if give_up(its Result so far) says so."""
        result = read_run(self.run.folder) if give_up and not self.given_up else None
        if result and result.evals and give_up(result):
            self.given_up = True
            if self.process:
                self.process.terminate()  # it saves, and its log is complete

    def end_after(self, seconds):
        """End the run if it has taken longer than that: by SIGTERM first, later by SIGKILL."""
        if time.time() - self.started > seconds and not self.too_slow:
            self.too_slow = True
            self.process.terminate()  # only once: a second signal would end it without saving
        if time.time() - self.started > seconds + 30:
            self.process.kill()

    def tail(self):
        """Return the last lines of its output."""
        with open(self.console, 'rb') as f:
            f.seek(max(self.offset, os.fstat(f.fileno()).st_size - 4000))
            lines = f.read().decode('utf-8', 'replace').strip().splitlines() or ['']
        return [printable(line) for line in lines]

    def progress(self):
        """Return the fraction of its iterations that are done."""
        if self.process is None:
            return 0.0
        if self.process.returncode is not None:
            return 1.0
        reached = re.findall(r'^iter (\d+) ', '\n'.join(self.tail()), re.M)
        done = int(reached[-1]) + 1 - self.first if reached else 0
        return done / max(1, self.until - self.first)


def wait_for_lock(folder):
    """Wait until no other train.py uses the folder, e.g. one that is saving after a kill."""
    told = False
    while True:
        try:
            return try_lock(os.path.join(folder, 'lock'), 'compare.py').close()
        except Locked as e:
            if not told:
                print(f"waiting for {printable(e.holder)}, which uses '{folder}' and may be saving "
                      'after a kill', flush=True)
            told = True
            time.sleep(0.1)


def check_settings(run, defaults):
    """Raise UserError if the run in this folder was started with other settings."""
    if read_run(run.folder) is None:
        return
    path, remedy = os.path.join(run.folder, 'settings.json'), 'another --out_dir, or remove it'
    if not os.path.exists(path):
        raise UserError(f"'{run.folder}' holds a run that compare.py did not start: choose "
                        f'{remedy}')
    before = read_json(path, {'max_iters?': int})
    for key, default in defaults.items():
        had, asked = before.get(key, default), run.settings.get(key, default)
        longer = key == 'max_iters' and had < run.max_iters
        if had != asked and key != 'device' and not longer:
            raise UserError(f"'{run.folder}' was run with {key}={had}, but now {key}={asked}: "
                            f'choose {remedy}')


def run_all(runs, launcher, target=math.inf, give_up=None, limit=math.inf):
    """
    Run the unfinished runs, each to its end or to iteration `target`. Return the runs that failed.
    A run ends early if give_up(its Result so far) says so, and fails after `limit` seconds.
    """
    for run in runs:
        check_settings(run, launcher.defaults)
    todo = [Job(run, min(target, run.max_iters)) for run in runs]
    for job in todo:
        job.end_if(give_up)
    todo = [job for job in todo if not job.result()]
    waiting, active, failed = list(todo), {}, []
    at_a_time = f'; {launcher.jobs} at a time' if launcher.jobs > 1 else ''
    if len(runs) > 1:
        print(f'{len(runs)} runs, {len(runs) - len(todo)} of them finished{at_a_time}', flush=True)
    began = shown = looked = time.time()
    try:
        while waiting or active:
            for slot in range(launcher.jobs):
                if waiting and slot not in active:
                    job = waiting.pop(0)
                    job.start(launcher, slot)
                    active[slot] = job
            time.sleep(0.1)
            if time.time() - looked > 1:
                looked = time.time()
                for job in active.values():
                    job.end_if(give_up)
                    job.end_after(limit)
            for slot, job in list(active.items()):
                if job.process.poll() is not None:
                    del active[slot]
                    ended = len(runs) - len(waiting) - len(active)
                    if not report_end(job, f'[{ended}/{len(runs)}]'):
                        failed.append(job.run)
            if active and time.time() - shown > (1 if CLEAR else 60):
                shown = time.time()
                show_progress(todo, next(iter(active.values())), shown - began)
    finally:  # also after a signal: active runs save, and the same command resumes them
        for job in active.values():
            job.process.terminate()
        for job in active.values():
            job.process.wait()
    return failed


def remove_checkpoints(runs):
    for run in runs:
        for path in files_of(run.folder, 'ckpt*'):
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def report_end(job, count):
    """Print how a job ended. Return whether it succeeded."""
    status, title = job.process.returncode, f'{CLEAR}{count} {job.run}:'
    result = job.result() if status == 0 or job.given_up else None
    if result:
        last = result.evals[-1]
        end = f', given up at iteration {last.iter}' if job.given_up else ''
        seconds = time.time() - job.started
        print(f'{title} val loss {last.loss:.4f}, {duration(seconds)}{end}', flush=True)
        return True
    if job.too_slow:
        print(f'{title} FAILED: no end after {duration(time.time() - job.started)}', flush=True)
        return False
    lines = job.tail()
    reasons = [line for line in lines if line.startswith('train.py:') or 'not finite' in line]
    reason = (reasons or lines[-1:])[0]
    print(f'{title} FAILED with status {status}: {reason} ({job.console})', flush=True)
    return False


def show_progress(jobs, active, seconds):
    """Print how much of all jobs is done, the time left, and the last line of an active one."""
    done = sum(job.cost * job.progress() for job in jobs)
    total = sum(job.cost for job in jobs) or 1
    left = f', about {duration(seconds * (total - done) / done)} left' if done > 0 else ''
    line = f'{100 * done / total:.0f}%{left}; {active.run}: {active.tail()[-1]}'
    width = os.get_terminal_size().columns - 1 if CLEAR else 150
    print(CLEAR + line[:width], end='' if CLEAR else '\n', flush=True)


def halving(runs, launcher):
    """
    Run successive halving (https://arxiv.org/abs/1502.07943). All cells train to 1/16 of max_iters
    (1/8 with fewer than 16 cells, and so on); the better half then trains twice as far, until
    max_iters. The learning rate schedule is always that of the whole run. Return the runs that
    failed.
    """
    failed, alive = [], list(dict.fromkeys(run.cell for run in runs))
    for k in range(min(4, int(math.log2(len(alive)))), -1, -1):
        target = max(1, runs[0].max_iters // 2 ** k)
        print(f'{len(alive)} cells up to iteration {target}')
        at_work = [run for run in runs if run.cell in alive and run not in failed]
        failed += run_all(at_work, launcher, target)
        losses = {}
        for run in at_work:
            if run not in failed:
                evals = [e.loss for e in read_run(run.folder).evals if e.iter <= target]
                losses.setdefault(run.cell, []).append(evals[-1])
        alive = sorted(losses, key=lambda cell: np.mean(losses[cell]))
        alive = alive[:math.ceil(len(alive) / 2)]
    return failed
