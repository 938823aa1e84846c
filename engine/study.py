"""
Manage a study: many runs of train.py, each in its own folder. Run the unfinished ones, several at a
time. Interrupted runs are resumed.
"""
import math
import os
import sys
import time

import numpy as np

from engine.common import CLEAR_LINE, duration, remove
from engine.job import Job, check_same_settings
from engine.results import files_of, read_run

CLEAR = CLEAR_LINE if sys.stdout.isatty() else ''


def devices_to_use(config):
    """Return (runs at a time, the GPUs that they share in turn)."""
    gpus = []
    if config['device'] in ('auto', 'cuda'):
        import torch  # takes seconds, and --device=cpu does not need it
        count = torch.cuda.device_count()
        visible = os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(map(str, range(count))))
        gpus = visible.split(',')[:count]
    jobs = max(1, len(gpus)) if config['jobs'] == 'auto' else config['jobs']
    if jobs > max(1, len(gpus)):
        print('NOTE: runs that share a device slow each other down, so speeds and equal time are '
              'less meaningful')
    return jobs, gpus


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


def run_all(runs, launcher, target=math.inf, give_up=None, limit=math.inf):
    """
    Run the unfinished runs, each to its end or to iteration `target`. Return the runs that failed.
    A run ends early if give_up(its Result so far) says so, and fails after `limit` seconds.
    """
    for run in runs:
        check_same_settings(run, launcher.defaults)
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


def remove_checkpoints(runs):
    for run in runs:
        for path in files_of(run.folder, 'ckpt*'):
            remove(path)
