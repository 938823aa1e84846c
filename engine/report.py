"""Report on a run while it trains: gradient statistics, evaluations, log lines."""
import collections
import math

import numpy as np
import torch

from engine.common import GIB, duration
from engine.machine import memory
from engine.run_log import bits_per_byte
from engine.startup_report import QUICK_LOOK

# -------------------------------------------------------------------------------------------------
# gradients

class GradientStatistics:
    """
    Statistics of a model's gradients at an iteration. Creating them takes two passes on the device,
    and does not wait for it; read() does, with one transfer to the host.
    """
    @torch.no_grad()
    def __init__(self, model, iter_num, parallel):
        self.iter_num = iter_num
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        self.names, grads = zip(*named)
        self.n = sum(g.numel() for g in grads)
        norms = parallel.norms(list(grads))
        total = torch.linalg.vector_norm(norms)
        sums = torch.stack([parallel.local(g).sum() for g in grads])
        mean = parallel.sum_over_shards(sums.sum() / self.n)
        self.numbers = torch.stack((total, mean, *norms))

    def read(self):
        """
        Return floats: {'norm', 'layers': {'wte', 'wpe', '0', ..., 'ln_f', 'lm_head': the norm of
        each}, 'mean', 'std', 'iter'}. 'norm' is bit for bit clip_grad_norm_'s.
        """
        total, mean, *norms = self.numbers.tolist()
        layers = {}
        for name, norm in zip(self.names, norms):
            layer = layer_of(name)
            layers[layer] = math.hypot(layers.get(layer, 0.0), norm)
        std = math.sqrt(max(0.0, total ** 2 / self.n - mean ** 2))
        return dict(norm=total, layers=layers, mean=mean, std=std, iter=self.iter_num)


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
# evaluations and iterations

def evaluation_line(iter_num, evaluated, best):
    train, val = evaluated['train'], evaluated['val']
    line = (f"step {iter_num}: train loss {train['loss']:.4f}, val loss {val['loss']:.4f}, "
            f"perplexity {val['perplexity']:.2f}")
    return line + bits_per_byte(val) + ' (best)' * best


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
        self.gradients = None  # the GradientStatistics for the next log line

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

    def add(self, loss, lr, grad_norm, more):
        """
        Log the current iteration, with self.gradients if they were computed since the last line.
        `loss` is the mean since then. `more`, {name: number}, is printed and logged as it is.
        """
        state, costs, say = self.run_log.state, self.costs, self.run_log.console.say
        seconds = (state.train_seconds - self.logged_seconds) / self.n_since_log
        self.update_mean(seconds)
        speed = self.run_log.tokens_per_iter / seconds
        used = memory(self.parallel.device)
        achieved = costs.flops_per_token * speed / self.parallel.world_size
        mfu_percent = 100 * achieved / costs.peak_flops
        mfu = dict(mfu_percent=mfu_percent, achieved_tflops=achieved / 1e12,
                   hardware_peak_tflops=costs.peak_flops / 1e12, tokens_per_sec=speed,
                   flops_per_token=costs.flops_per_token)
        norms = self.gradient_norms(grad_norm)
        if math.isfinite(loss):
            self.recent_losses.append(loss)
        self.run_log.add('training_iterations', dict(
            iter=state.iter_num, loss=loss if math.isfinite(loss) else None,
            loss_variance=float(np.var(self.recent_losses or [0])), lr=lr,
            time_ms=1000 * seconds, mfu=mfu, memory=used, gradients=norms, **more))
        rate = f'{speed:,.0f} tok/s' + self.mfu_text(mfu_percent)
        self.summary = f', loss {loss:.4f}, {rate}'
        percent_done = 100 * (state.iter_num + 1) / self.max_iters
        more_text = ''.join(f'{name} {value:.4g}, ' for name, value in more.items())
        say(f'iter {state.iter_num} ({percent_done:.1f}%): loss {loss:.4f}, lr {lr:.2e}, '
            f'{1000 * seconds:.0f} ms, {rate}, {more_text}{duration(self.seconds_left())} left')
        if self.verbose:
            say(f'    {self.compute_text(mfu)}; {memory_text(used)}; {gradient_text(norms)}')
        if state.iter_num == self.run_log.first_iter + 2:  # by now the moments exist
            self.check_memory_and_time(used)
        self.n_since_log, self.logged_seconds = 0, state.train_seconds

    def gradient_norms(self, norm):
        """Return this iteration's norm, and the statistics measured since the last line, if any."""
        measured, self.gradients = self.gradients, None
        if measured is None:
            return dict(norm=norm if math.isfinite(norm) else None)
        found = measured.read()
        if not math.isfinite(norm + found['norm']):  # a step that fp16's scaler skipped
            return dict(norm=None)
        return found | dict(norm=norm, norm_at_iter=found['norm'])

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
        """Log the measured peak memory, and say if the run will take more than an hour."""
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
