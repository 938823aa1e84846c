"""
Report on a run: its lines on the console, run_*.json and, if asked for, W&B and TensorBoard, all
with the same names.
"""
import atexit
import collections
import html
import json
import math
import os
import shlex
import time

import numpy as np
import torch

from engine.common import GIB, duration, first_line, replacing
from engine.machine import memory
from engine.parallel import Parallel
from engine.run_report import draw_loss, sparkline
from engine.startup_report import QUICK_LOOK
from engine.study import read_run

# -------------------------------------------------------------------------------------------------
# gradients

@torch.no_grad()
def gradient_statistics(model, parallel=None):
    """
    Return statistics of a model's gradients as floats: {'norm', 'layers': {'wte', 'wpe', '0', ...,
    'ln_f', 'lm_head': the norm of each}, 'mean', 'std'}. This takes two passes and one transfer to
    the host. 'norm' is bit for bit clip_grad_norm_'s.
    """
    parallel = parallel or Parallel()
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    names, grads = zip(*named)
    norms = parallel.norms(list(grads))
    n = sum(g.numel() for g in grads)
    mean = parallel.sum_over_shards(torch.stack([parallel.local(g).sum() for g in grads]).sum() / n)
    total = torch.linalg.vector_norm(norms)
    total, mean, *norms = torch.stack((total, mean, *norms)).tolist()
    layers = {}
    for name, norm in zip(names, norms):
        layer = layer_of(name)
        layers[layer] = math.hypot(layers.get(layer, 0.0), norm)
    std = math.sqrt(max(0.0, total ** 2 / n - mean ** 2))
    return dict(norm=total, layers=layers, mean=mean, std=std)


def layer_of(name):
    """
    Return the layer of a parameter name: '0' for transformer.h.0.attn.c_attn.weight, 'wte' for
    transformer.wte.weight, 'lm_head' for lm_head.weight.
    """
    path = name.split('.')
    if path[0] != 'transformer':
        return path[0]
    return path[2] if path[1] == 'h' else path[1]


# -------------------------------------------------------------------------------------------------
# sinks besides the console and the run log

class WandbSink:
    """
    Log to Weights & Biases: numbers, a table of samples, and checkpoints as versions of one
    artifact.
    """
    def __init__(self, out_dir, facts, settings, console):
        folder = os.path.abspath(os.path.join(out_dir, 'wandb'))
        os.environ.setdefault('WANDB_DATA_DIR', folder)  # for its copies of checkpoints
        import wandb
        self.wandb, self.samples, self.artifacts = wandb, [], settings['wandb_artifacts']
        arguments = dict(project=settings['wandb_project'], name=settings['wandb_run_name'],
                         config=facts, dir=out_dir)
        try:
            limits = wandb.Settings(init_timeout=15, login_timeout=15)
            self.run = wandb.init(**arguments, settings=limits)
        except Exception as e:  # no network, no key, no such project
            self.run = wandb.init(**arguments, mode='offline')
            reason = first_line(e).replace('<no message>', 'it gave no reason')[:200]
            console.say(f"WARNING: wandb's server {wandb.setup().settings.base_url} cannot be used "
                        f'({reason}), so this run is recorded offline; to send it later: wandb '
                        f'sync {os.path.dirname(self.run.dir)}')

    def numbers(self, values, sample, step):
        if sample is not None:
            self.samples.append([step, sample])
            table = self.wandb.Table(columns=['iter', 'text'], data=self.samples)
            values = values | {'samples': table}
        self.run.log(values, step=step)

    def checkpoint(self, path, best, facts):
        if not self.artifacts:
            return
        name = f'checkpoint-{self.run.id}'
        artifact = self.wandb.Artifact(name, type='model', metadata=facts)
        add = artifact.add_dir if os.path.isdir(path) else artifact.add_file
        add(path)  # a copy, since the next checkpoint replaces this one
        aliases = ['latest', f"iter-{facts['iter']}"] + ['best'] * best
        self.run.log_artifact(artifact, aliases=aliases)

    def close(self):
        self.run.finish()


class TensorBoardSink:
    """Write TensorBoard event files with the names that wandb gets."""
    def __init__(self, out_dir, facts, settings, console):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(out_dir)
        atexit.register(self.writer.close)  # otherwise queued entries are lost if the run fails
        self.writer.add_text('config', f'<pre>{json.dumps(facts, indent=2)}</pre>')

    def numbers(self, values, sample, step):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        if sample is not None:
            self.writer.add_text('samples', f'<pre>{html.escape(sample)}</pre>', step)

    def checkpoint(self, path, best, facts):
        pass

    def close(self):
        self.writer.close()


SINKS = {'wandb': WandbSink, 'tensorboard': TensorBoardSink}  # by the setting NAME_log


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


# -------------------------------------------------------------------------------------------------
# the run log

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
        changed = dict(batch_size=batches.batch_size,
                       gradient_accumulation_steps=batches.accumulation_steps)
        iter_num = self.state.iter_num
        self.data.setdefault('out_of_memory', []).append(dict(iter=iter_num) | changed)
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

    def close(self, best_path):
        """Close the sinks, write the log, draw the losses and print how the run ended."""
        self.tell('close')
        self.write()
        for line in end_of_run(self, best_path, self.draw()):
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


# -------------------------------------------------------------------------------------------------
# evaluations and iterations

def evaluation_line(iter_num, evaluated, best):
    train, val = evaluated['train'], evaluated['val']
    line = (f"step {iter_num}: train loss {train['loss']:.4f}, val loss {val['loss']:.4f}, "
            f"perplexity {val['perplexity']:.2f}")
    return line + bits_per_byte(val) + ' (best)' * best


def bits_per_byte(val):
    return f", {val['bits_per_byte']:.4f} bits per byte" if 'bits_per_byte' in val else ''


def end_of_run(run_log, best_path, picture):
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
        command = f'python sample.py --out_dir={shlex.quote(out_dir)}'
        if run_log.outcome.startswith('SIG'):
            command = 'the same command with --init_from=resume continues it'
        lines.append(f'next      {command}')
    return lines


def evaluation_lines(val, split):
    """Return everything that an evaluation of val found, as text, for --eval_only."""
    of = f'all {split.n:,}' if split.n == split.total else f'{split.n:,} of {split.total:,}'
    line = (f'val, {of} windows of {split.loader.block_size} tokens: {with_error(val)}, '
            f"perplexity {val['perplexity']:.2f}{bits_per_byte(val)}")
    lines = [line]
    for part in val['by_position']:
        first, last = part['first'], part['last']
        at = f'{first}-{last}' if last > first else f'{first}'
        lines.append(f'  position {at:<11} {with_error(part)}')
    return '\n'.join(lines)


def with_error(values):
    line = f"loss {values['loss']:.4f}"
    if values['standard_error'] is not None:
        line += f", standard error {values['standard_error']:.4f}"
    return line


class IterationReport:
    """Print and log iterations, with the time left."""
    def __init__(self, run_log, costs, max_iters, eval_interval, parallel, verbose):
        self.run_log, self.costs, self.parallel = run_log, costs, parallel
        self.max_iters, self.eval_interval, self.verbose = max_iters, eval_interval, verbose
        self.n_since_log, self.logged_seconds = 0, run_log.state.train_seconds
        self.mean_seconds, self.eval_seconds = 0.0, 0.0
        self.recent_losses = collections.deque(maxlen=100)
        self.summary = ''  # of the last log line, for the progress line

    def due(self, iter_num, log_interval):
        """
        Return whether to log this iteration. The third one is always logged, because it shows the
        speed.
        """
        return (iter_num % log_interval == 0 or iter_num + 1 == self.max_iters
                or iter_num == self.run_log.first_iter + 2)

    def show_progress(self):
        """Show on the console how far the run is, once per iteration."""
        n, console = self.run_log.state.iter_num + 1, self.run_log.console
        console.share_done = n / self.max_iters
        console.status = f'iter {n}/{self.max_iters}{self.summary}'
        if self.mean_seconds:
            console.status += f', {duration(self.seconds_left())} left'
        console.progress()

    def add(self, loss, lr, grad_norm, gradients, more):
        """
        Log the current iteration. `loss` is the mean since the last line. `gradients` is what
        gradient_statistics() returned for this or an earlier iteration, or {}. `more`,
        {name: number}, is printed and logged as it is.
        """
        state, costs = self.run_log.state, self.costs
        seconds = (state.train_seconds - self.logged_seconds) / self.n_since_log
        self.update_mean(seconds)
        speed, used = self.run_log.tokens_per_iter / seconds, memory(self.parallel.device)
        achieved = costs.flops_per_token * speed / self.parallel.world_size
        mfu_percent = 100 * achieved / costs.peak_flops
        mfu = dict(mfu_percent=mfu_percent, achieved_tflops=achieved / 1e12,
                   hardware_peak_tflops=costs.peak_flops / 1e12, tokens_per_sec=speed,
                   flops_per_token=costs.flops_per_token)
        if math.isfinite(grad_norm + gradients.get('norm', 0.0)):
            norms = gradients | dict(norm=grad_norm)
        else:  # a step that fp16's scaler skipped
            norms = dict(norm=None)
        if math.isfinite(loss):
            self.recent_losses.append(loss)
        self.run_log.add('training_iterations', dict(
            iter=state.iter_num, loss=loss if math.isfinite(loss) else None,
            loss_variance=float(np.var(self.recent_losses or [0])), lr=lr,
            time_ms=1000 * seconds, mfu=mfu, memory=used, gradients=norms, **more))
        rate = f'{speed:,.0f} tok/s' + self.mfu_text(mfu_percent)
        self.summary = f', loss {loss:.4f}, {rate}'
        done, say = 100 * (state.iter_num + 1) / self.max_iters, self.run_log.console.say
        say(f'iter {state.iter_num} ({done:.1f}%): loss {loss:.4f}, lr {lr:.2e}, '
            f'{1000 * seconds:.0f} ms, {rate}, '
            f"{''.join(f'{name} {value:.4g}, ' for name, value in more.items())}"
            f'{duration(self.seconds_left())} left')
        if self.verbose:
            say(f'    {self.compute_text(mfu)}; {memory_text(used)}; {gradient_text(norms)}')
        if state.iter_num == self.run_log.first_iter + 2:  # by now the moments exist
            self.check_memory_and_time(used)
        self.n_since_log, self.logged_seconds = 0, state.train_seconds

    def update_mean(self, seconds):
        """Average the seconds per iteration over about ten iterations."""
        weight = min(1.0, self.n_since_log / 10)
        if self.run_log.state.iter_num < self.run_log.first_iter + 10:
            weight = 1.0  # the first iterations are slower
        self.mean_seconds = weight * seconds + (1 - weight) * self.mean_seconds

    def seconds_left(self):
        """Return the seconds until the end of the run, if its speed stays what it is."""
        iter_num = self.run_log.state.iter_num
        evaluations = (self.max_iters - iter_num - 2) // self.eval_interval + 1
        return self.mean_seconds * (self.max_iters - iter_num - 1) + self.eval_seconds * evaluations

    def check_memory_and_time(self, used):
        """Log how much memory the run takes, and say so if it is not as estimated."""
        self.run_log.data['startup_info']['memory_measured'] = used
        if self.verbose:
            self.run_log.console.say(
                f"    memory: {max(used.values()) / GIB:.2f} GiB at its peak, "
                f"{self.costs.estimate['peak'] / GIB:.2f} estimated")
        left = self.seconds_left()
        if left > 3600:
            self.run_log.console.say(f'NOTE: at this speed the run needs another {duration(left)}; '
                                     f'{QUICK_LOOK}')

    def mfu_text(self, percent):
        """Return the MFU for a line, or '' where the peak is only measured, which says little."""
        if self.costs.peak_source.startswith('measured'):
            return ''
        if percent <= 100:
            return f', mfu {percent:.1f}%'
        if self.costs.peak_source.startswith('dense'):
            return f', mfu {percent:.1f}% (over 100 %: a bug, please report it)'
        return f', mfu {percent:.1f}% (over 100 %: --peak_tflops is too low)'

    def compute_text(self, mfu):
        return (f"{mfu['achieved_tflops']:.4g} TFLOP/s per device of "
                f"{mfu['hardware_peak_tflops']:.4g} ({self.costs.peak_source})")


def memory_text(used):
    return ', '.join(f'{kind} {size / GIB:.2f}' for kind, size in used.items()) + ' GiB'


def gradient_text(norms):
    """Return the gradient's norm now, and its mean and deviation when they were last computed."""
    if norms['norm'] is None:
        return 'gradient not finite'
    text = f"gradient norm {norms['norm']:.4g}"
    if 'mean' in norms:
        text += f", mean {norms['mean']:.2e}, std {norms['std']:.2e} at iteration {norms['iter']}"
    return text
