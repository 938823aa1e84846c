"""One run of train.py as a process: started or resumed, watched, and ended early."""
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

from engine.common import Locked, UserError, end_with_parent, printable, replacing, try_lock
from engine.results import files_of, read_run
from engine.schema import read_json


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


def check_same_settings(run, defaults):
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
