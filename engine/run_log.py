"""
The log of a run: everything measured goes into out_dir/run_*.json and, if asked for, to W&B and
TensorBoard with the same names. The last lines of a run are made of it.
"""
import atexit
import json
import math
import os
import shlex
import signal
import time
from importlib.util import find_spec

from engine.common import GIB, duration, first_line, replacing
from engine.forecast import FIRST, forecast
from engine.results import read_run, result_of, runs_beside
from engine.run_report import draw_loss, sparkline
from engine.sinks import SINKS

# numbers of the run log that sinks do not plot: the iteration of 'gradients', and the norm there
BOOKKEEPING = 'gradients/iter', 'gradients/norm_at_iter'


def numbers_in(entry, prefix=''):
    """
    Flatten an entry of the run log to {name: number}. Nested names are joined:
    gradients/layers/wte.
    """
    flat = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            flat |= numbers_in(value, f'{prefix}{key}/')
        elif isinstance(value, (int, float)):
            flat[prefix + key] = value
    return flat


WORTH_A_PICTURE = 10  # seconds of a run; drawing takes about one


class RunLog:
    """
    The run log out_dir/run_*.json, rewritten as a whole, and the sinks, which get the same numbers.
    Only rank 0 writes. `data` is the file's content; its 'config' is train.py's own dict. `outcome`
    says how the run ended.
    """
    def __init__(self, out_dir, config, startup, state, tokens_per_iter, console):
        self.out_dir, self.state, self.console = out_dir, state, console
        self.tokens_per_iter, self.first_iter = tokens_per_iter, state.iter_num
        self.start, self.outcome, self.sinks = time.time(), 'failed', []
        self.others = None  # finished runs, from which the loss at the end is forecast
        self.written, self.cost = 0.0, 0.0  # when the file was written last, and how long it took
        start_time = time.strftime('%Y%m%d_%H%M%S')
        while console.speaks and os.path.exists(f'{out_dir}/run_{start_time}.json'):
            time.sleep(0.1)  # a run that started in the same second has this name
            start_time = time.strftime('%Y%m%d_%H%M%S')
        self.path = os.path.join(out_dir, f'run_{start_time}.json')
        self.data = dict(run_name=f'run_{start_time}', start_time=start_time, config=config,
                         startup_info=startup, training_iterations=[], eval_steps=[],
                         checkpoints=[], summary={})
        atexit.register(self.write)  # however the run ends, so that the file is complete

    def open_sinks(self, settings):
        """Open the sinks that the settings ask for. If one cannot be opened, warn and go on."""
        info = self.data['startup_info']
        counts = ('total_params', 'tokens_per_iter', 'flops_per_token')
        facts = settings | {key: info[key] for key in counts}
        for name, sink in SINKS.items():
            if not (settings[f'{name}_log'] and self.console.speaks):
                continue
            try:
                self.sinks.append((name, sink(self.out_dir, facts, settings, self.console)))
            except Exception as e:
                remedy = f' (pip install {name})' if isinstance(e, ImportError) else ''
                self.console.say(f'WARNING: continuing without {name}: {first_line(e)}{remedy}')

    def tell(self, method, *args):
        """
        Call a method of every sink. A sink that fails is dropped, so that it cannot end the run.
        """
        for name, sink in list(self.sinks):
            try:
                getattr(sink, method)(*args)
            except Exception as e:
                self.sinks.remove((name, sink))
                self.console.say(f'WARNING: continuing without {name}: {first_line(e)}')

    def add(self, kind, entry):
        """
        Append an entry to a list of the log. The file is rewritten only as often as takes 1 % of
        the time.
        """
        self.data[kind].append(entry)
        numbers = numbers_in(entry)
        shown = {name: n for name, n in numbers.items() if name not in BOOKKEEPING}
        self.tell('numbers', shown, entry.get('sample'), entry['iter'])
        if time.time() - self.written > 100 * self.cost:
            self.write()

    def checkpoint_entry(self, paths, best):
        """
        Return a function of the seconds that training waited for a checkpoint of now. It logs the
        checkpoint, and must be called when all paths are there.
        """
        iter_num, losses = self.state.iter_num, self.state.losses

        def when_saved(seconds):
            entry = dict(iter=iter_num, path=paths[0], best=best, seconds=seconds)
            self.data['checkpoints'].append(entry)
            self.tell('checkpoint', paths[0], best, dict(iter=iter_num, losses=losses))
            names = ' and '.join([paths[0], *map(os.path.basename, paths[1:])])
            earlier = f' (iteration {iter_num})' if iter_num < self.state.iter_num else ''
            self.console.say(f'saved {names}{earlier}')
        return when_saved

    def forecast(self):
        """
        Return a forecast of the val loss at the end, for the evaluation line. Return '' where no
        finished run beside this one, or before it in out_dir, is like it.
        """
        done, config = self.state.iter_num, self.data['config']
        middle = config['max_iters'] <= FIRST * done < FIRST * config['max_iters']
        if not self.console.speaks or config['eval_only'] or not middle:
            return ''
        if not (self.data['summary'] and find_spec('scipy')):
            return ''  # nothing written yet since a resume, or no library for the interval
        try:
            if self.others is None:
                self.others = runs_beside(self.out_dir, most_bytes=20e6)
            if not self.others:
                return ''
            found = forecast(result_of(self.out_dir, [self.data]), self.others, seen=done)
        except Exception as e:  # a damaged earlier log: no reason to fail
            self.others = []
            self.console.say(f'WARNING: no forecast of the loss: {first_line(e)}')
            return ''
        return f', about {found.loss:.4f} ± {found.interval:.4f} at the end' if found else ''

    @property
    def n_evaluations(self):
        return len(self.data['eval_steps'])

    def add_evaluation(self, evaluated, val_split, lr, seconds, sample):
        """Log an evaluation. `evaluated` is evaluate()'s result; `sample` is a text or None."""
        state, loader = self.state, val_split.loader
        self.data['eval_windows'] = dict(n=val_split.n, tokens_each=loader.block_size,
                                         crc=val_split.facts['crc'])
        entry = dict(iter=state.iter_num, tokens=state.iter_num * self.tokens_per_iter,
                     train_seconds=state.train_seconds, lr=lr, **evaluated, seconds=seconds)
        if sample is not None:
            entry['sample'] = sample
        self.add('eval_steps', entry)

    def add_out_of_memory(self, batches):
        """Record that micro-batches are smaller from here on."""
        iter_num = self.state.iter_num
        self.data.setdefault('out_of_memory', []).append(dict(
            iter=iter_num, batch_size=batches.batch_size,
            gradient_accumulation_steps=batches.accumulation_steps))
        self.console.say(f'out of memory at iteration {iter_num}: retrying, from here on '
                         f'with batch_size={batches.batch_size} and gradient_accumulation_steps='
                         f'{batches.accumulation_steps}, the same {self.tokens_per_iter:,} tokens '
                         'per iteration')

    def not_finite(self, what):
        """Record that the run ends because `what` is not finite. No checkpoint is saved."""
        self.outcome = 'not finite'
        if what == 'train or val loss':
            self.state.losses = {}
        self.console.say(f'{what} is not finite at iteration {self.state.iter_num}: nothing saved; '
                         'try a lower --learning_rate, a longer --warmup_iters or --grad_clip=1.0')

    def close(self, stop_status, complete, best_path, chat=False):
        """
        Close the sinks, write the log, draw the losses and print how the run ended. stop_status is
        StopSignal's. `complete` says whether all iterations were done or, with eval_only, none was
        due; `chat` says whether the model learned conversations.
        """
        if stop_status > 128:
            self.outcome = signal.Signals(stop_status - 128).name
        elif stop_status:
            self.outcome = 'failed'
        elif self.outcome != 'not finite':
            self.outcome = 'finished' if complete else 'stopped early'
        self.tell('close')
        self.write()
        for line in end_of_run(self, best_path, self.draw(), chat):
            self.console.say(line)

    def draw(self):
        """
        Draw the losses so far into out_dir/loss.png. Return its path, or why there is none. Return
        None for a run that has no curve yet, was short, or was told to end soon.
        """
        has_curve = self.n_evaluations > 2 and time.time() - self.start > WORTH_A_PICTURE
        wanted = has_curve and not self.outcome.startswith('SIG')
        if not (self.console.speaks and wanted):
            return None
        try:
            picture = draw_loss(read_run(self.out_dir))
            return picture or 'none: pip install matplotlib draws loss.png'
        except Exception as e:  # a damaged earlier log, a broken matplotlib: no reason to fail
            self.console.say(f'WARNING: no picture of the losses: {first_line(e)}')
            return None

    def write(self):
        state = self.state
        iterations = state.iter_num - self.first_iter
        best = state.best_val_loss if math.isfinite(state.best_val_loss) else None
        self.data['summary'] = dict(
            outcome=self.outcome, iterations=iterations, iter_num=state.iter_num,
            seconds=time.time() - self.start, losses=state.losses, best_val_loss=best,
            tokens=iterations * self.tokens_per_iter)
        if not self.console.speaks:
            return
        started = time.time()
        try:
            with replacing(self.path, 'w', encoding='utf-8') as f:
                f.write(json.dumps(self.data, separators=(',', ':')))
        except OSError as e:  # a full disk ends a run only when a checkpoint fails
            self.console.say(f"WARNING: the run log '{self.path}' could not be written: "
                             f'{first_line(e)}')
        self.written, self.cost = time.time(), time.time() - started


def end_of_run(run_log, best_path, picture, chat):
    """Return the last lines of a run: how it ended, what it learned, where that is, what next."""
    data, out_dir = run_log.data, run_log.out_dir
    first, last = run_log.first_iter, run_log.state.iter_num
    where = f' at iteration {last}' if first else ''
    line = (f'{run_log.outcome}{where} after {last - first} iterations in '
            f'{duration(time.time() - run_log.start)}')
    if data['training_iterations']:
        highest = max(data['training_iterations'][-1]['memory'].values())
        line += f', {highest / GIB:.2f} GiB at most'
    lines = [line]
    evals = data['eval_steps']
    if len(evals) > 1:
        losses = [e['val']['loss'] for e in evals]
        since = f" (iteration {evals[0]['iter']})" if first else ''
        lines.append(f"val loss  {losses[0]:.4f}{since} to {losses[-1]:.4f} {sparkline(losses)}"
                     f"{bits_per_byte(evals[-1]['val'])}")
    saved_best = first or any(checkpoint['best'] for checkpoint in data['checkpoints'])
    if last > first and saved_best and os.path.exists(best_path):
        lines.append(f'best      {run_log.state.best_val_loss:.4f}, {best_path}')
    lines.append(f'log       {run_log.path}')
    if picture:
        lines.append(f'picture   {picture}')
    if data['checkpoints']:
        command = f'python sample.py --out_dir={shlex.quote(out_dir)}' + ' --chat=True' * chat
        if run_log.outcome.startswith('SIG'):
            command = 'the same command with --init_from=resume continues it'
        lines.append(f'next      {command}')
    return lines


def bits_per_byte(val):
    return f", {val['bits_per_byte']:.4f} bits per byte" if 'bits_per_byte' in val else ''
