"""
Which choice is better: a grid of runs through train.py, or runs that are there, in a table with error bars and a picture.

    python compare.py config/preset_quick_test.py --out_dir=out-parts --normalization=layernorm,rmsnorm --position_encoding=learned_absolute,rope --seed=1,2,3
    python compare.py config/ablate_gpt2_to_llama.py                                        # a study: cells that are no grid
    python compare.py out-a out-b out-c                                                     # finished runs
    python compare.py config/preset_quick_test.py --out_dir=out-search --search=32 --learning_rate=1e-4..1e-2     # random search, successive halving
    python compare.py --scaling=config/preset_quick_test.py --ffn_type=standard --out_dir=out-scaling --n_embd=64,96,128,192   # loss against size

Every cell is a run of train.py in a folder of its own under out_dir; after a kill the same command goes on where it was. Writes
out_dir/compare.md, compare.json and compare.png.

Every run is evaluated on the same windows of val, so two cells are compared window by window: the difference of their losses, each a mean
over seeds, has a standard error from the text (means of contiguous blocks of windows, since neighbours are alike) and one from the seeds
(their variance within cells, pooled over all cells, as in an analysis of variance). The two variances add up; interval and p-value are
Student's t with Welch and Satterthwaite's degrees of freedom. A p-value is that of one comparison: of twenty, one is below 0.05 by chance.
The variance between seeds is taken to be the same in all cells, and a NOTE says where it is not.
"""
import ast
import ctypes
import fcntl
import glob
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Literal, NamedTuple

import numpy as np

from configurator import coerce, configure, fail, read_block
from data.loader import find_datasets, prepare_facts, read_meta
from engine.statistics import mean_and_error

HERE = os.path.dirname(os.path.abspath(__file__))
TRAIN = os.path.join(HERE, 'train.py')
AXES = {'steps': 'iter', 'tokens': 'tokens', 'FLOPs': 'flops', 'seconds': 'train_seconds'}  # what loss is drawn against, and its name in an evaluation


class Range(NamedTuple):
    """Numbers from low to high, which a search draws from: by their logarithm where low is above 0 and high at least 10 times as much."""
    low: float
    high: float

    def draw(self, rng):
        log = 0 < 10 * self.low <= self.high
        value = math.exp(rng.uniform(math.log(self.low), math.log(self.high))) if log else rng.uniform(self.low, self.high)
        return round(value) if type(self.low) is int else float(f'{value:.4g}')


def several(name, value, default, kind):
    """configurator.coerce for a key of train.py that may have several values: 'a,b' or (a, b) becomes a list, 'low..high' a Range."""
    if name in read_block(__file__) or name in ('dataset', 'out_dir'):  # a comma there means something else
        return coerce(value, default, kind)

    def one(text):
        try:
            literal = ast.literal_eval(text.strip()) if isinstance(text, str) and kind is not str else text
        except (ValueError, SyntaxError):
            literal = text
        return coerce(None if kind is str and text == 'None' else literal, default, kind)
    ends = value.split('..') if isinstance(value, str) and kind in (int, float) and name != 'seed' else ()
    if len(ends) == 2:
        found = Range(*map(one, ends))
        if not found.low < found.high:
            raise ValueError(f'low..high with low below high, of type {kind.__name__}')
        return found
    values = value.split(',') if isinstance(value, str) else value
    values = [one(v) for v in (values if isinstance(values, (list, tuple)) else [values])]
    return values[0] if len(values) == 1 else list(dict.fromkeys(values))


# ---------------------------------------------------------------------------------------------------------------------
# which runs

def make_cells(config, given, rng=None):
    """{name of a cell: its settings}: the named cells times every combination of the keys with several values but seed; with rng, `search` draws of them."""
    named, axes = config['cells'] or {'': {}}, {k: v for k, v in config.items() if isinstance(v, (list, Range)) and k != 'seed'}
    block = read_block(TRAIN)
    for name, settings in named.items():
        for key, value in settings.items():
            if key not in block or key in ('out_dir', 'seed'):
                raise ValueError(f"cell '{name}': '{key}' is not a key that a cell can set")
            if key in axes or given.get(key) == 'on the command line':
                raise ValueError(f"cell '{name}' sets {key} itself, so --{key} would do nothing there")
            try:
                settings[key] = coerce(value, *block[key][:2])
            except ValueError as expected:
                raise ValueError(f"cell '{name}': {key} must be {expected}, not {value!r}") from None
    ranges = [k for k, v in axes.items() if isinstance(v, Range)]
    if ranges and rng is None:
        raise ValueError(f"{ranges[0]} is a range: --search=32 draws 32 cells from it; a grid takes values, as in --{ranges[0]}=1,2")
    if rng is None:
        combinations = [{}]
        for key, values in axes.items():
            combinations = [c | {key: v} for c in combinations for v in values]
    else:
        combinations = [{k: v.draw(rng) if isinstance(v, Range) else v[rng.integers(len(v))] for k, v in axes.items()} for _ in range(config['search'])]
    cells = {}
    for name, settings in named.items():
        for chosen in combinations:
            label = ', '.join(filter(None, [name, *(v if isinstance(v, str) else f'{k}={v}' for k, v in chosen.items())]))
            cells[label or 'as configured'] = chosen | settings
    return cells


def make_runs(config, given, cells):
    """A dict a run: cell, seed, folder, and settings, the keys of train.py that somebody set. Seeds outermost, so that an early end leaves a comparison."""
    seeds = config['seed'] if isinstance(config['seed'], list) else [config['seed']]
    keys = [k for k in read_block(TRAIN) if k in given and k not in ('seed', 'overwrite', 'out_dir')]
    runs, windows = [], None
    for seed in seeds:
        for cell, own in cells.items():
            settings = {k: config[k] for k in keys if not isinstance(config[k], (list, Range))} | own | {'seed': seed}
            batch_size, block_size, eval_iters = (settings.get(k, config[k]) for k in ('batch_size', 'block_size', 'eval_iters'))
            if batch_size != 'auto':
                windows = windows or (block_size, batch_size * eval_iters)
                if batch_size * eval_iters != windows[1] and windows[1] % batch_size == 0:  # as many windows in other batches
                    settings['eval_iters'] = eval_iters = windows[1] // batch_size
                if (block_size, batch_size * eval_iters) != windows:
                    raise ValueError(f"cell '{cell}' would be evaluated on {batch_size * eval_iters} windows of {block_size} tokens, the first cell on "
                                     f'{windows[1]} of {windows[0]}: to be compared they need the same block_size and eval_iters * batch_size')
            folder = os.path.join(config['out_dir'], re.sub(r'[^\w.,=+-]+', '_', cell)[:150] + f',seed={seed}')
            runs.append(dict(cell=cell, seed=seed, folder=folder, settings=settings,
                             max_iters=settings.get('max_iters', config['max_iters']), cost=1.0))
    if len({run['folder'] for run in runs}) < len(runs):
        raise ValueError('two cells would have the same folder: give them names that differ in letters or digits')
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# running them

def duration(seconds):
    s = int(seconds)
    return f'{s // 3600}h{s // 60 % 60:02d}m' if s >= 3600 else f'{s // 60}m{s % 60:02d}s'


def read_run(folder):
    """
    What the logs of the run in a folder say, as one dict: config, startup_info, windows, evals and iterations in order, outcome. A run that was
    resumed has a log for each start: what a later one did again counts. None without a log; ValueError for one that is not ours.
    """
    chain = []
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), 'run_*.json'))):
        try:
            with open(path, encoding='utf-8') as f:
                log = json.load(f)
            first = log['summary']['iter_num'] - log['summary']['iterations']
            log['summary']['outcome'], log['startup_info']['flops_per_token']
            if log['config']['eval_only'] or not log['training_iterations'] and not log['eval_steps']:
                continue
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"'{path}' is no run log of train.py, or half of one: remove it ({e!r})") from None
        chain = [] if first == 0 else chain
        chain.append((first, log))
    if not chain:
        return None
    evals, iterations, last = {}, {}, chain[-1][1]
    for (_, log), (end, _) in zip(chain, chain[1:] + [(math.inf, None)]):
        evals |= {e['iter']: e for e in log['eval_steps'] if e['iter'] <= end and 'window_losses' in e['val']}
        iterations |= {e['iter']: e for e in log['training_iterations'] if e['iter'] < end}
    flops_token, summary = last['startup_info']['flops_per_token'], last['summary']
    evals = [dict(iter=i, tokens=e['tokens'], flops=e['tokens'] * flops_token, train_seconds=e['train_seconds'], loss=e['val']['loss'],
                  losses=np.array(e['val']['window_losses'])) for i, e in sorted(evals.items())]
    return dict(folder=folder, config=last['config'], startup_info=last['startup_info'], windows=last.get('eval_windows'), evals=evals,
                iterations=[e for _, e in sorted(iterations.items())], outcome=summary['outcome'], iter_num=summary['iter_num'])


def finished(run, until):
    """Whether the run in its folder has come to iteration `until`; ValueError if what is there was asked for with other settings."""
    done, path = read_run(run['folder']), os.path.join(run['folder'], 'settings.json')
    if done is None:
        return False
    if not os.path.exists(path):
        raise ValueError(f"'{run['folder']}' holds a run that compare.py did not start: another --out_dir, or remove that folder")
    with open(path, encoding='utf-8') as f:
        before = json.load(f)
    for key, (default, _, _) in read_block(TRAIN).items():
        had, asked = before.get(key, default), run['settings'].get(key, default)
        if had != asked and key != 'device' and not (key == 'max_iters' and had < run['max_iters']):  # which goes on
            raise ValueError(f"'{run['folder']}' was run with {key}={had}, and now it is {asked}: another --out_dir, or remove that folder")
    return bool(done['evals']) and (done['evals'][-1]['iter'] >= until or done['outcome'] == 'stopped early')


def start(run, until, slot, jobs, gpus):
    """train.py for a run, up to iteration `until`, its words into console.txt. It ends, with a checkpoint, when this process does."""
    os.makedirs(run['folder'], exist_ok=True)
    with open(os.path.join(run['folder'], 'lock'), 'a') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that works in '{run['folder']}', as one does that is saving after a kill", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
    with open(os.path.join(run['folder'], 'settings.json.tmp'), 'w', encoding='utf-8') as f:
        json.dump(run['settings'], f, indent=1)
    os.replace(f.name, f.name.removesuffix('.tmp'))
    begun = glob.glob(os.path.join(glob.escape(run['folder']), 'ckpt*'))
    first = run['settings'].get('init_from', 'scratch')  # or whose weights to fine-tune, the first time
    flags = run['settings'] | dict(out_dir=run['folder'], max_iters=until, init_from='auto' if begun or first == 'scratch' else first)
    env = os.environ | ({'CUDA_VISIBLE_DEVICES': gpus[slot % len(gpus)]} if gpus else {})
    if jobs > 1 and not gpus:
        env.setdefault('OMP_NUM_THREADS', str(max(1, os.cpu_count() // jobs)))
    die_with_parent = (lambda libc=ctypes.CDLL(None): libc.prctl(1, signal.SIGTERM)) if sys.platform == 'linux' else None  # PR_SET_PDEATHSIG
    with open(os.path.join(run['folder'], 'console.txt'), 'ab') as console:
        run['console'] = console.tell()
        return subprocess.Popen([sys.executable, TRAIN, *(f'--{k}={v}' for k, v in flags.items())], stdin=subprocess.DEVNULL, stdout=console,
                                stderr=subprocess.STDOUT, env=env, preexec_fn=die_with_parent)


def tail(run):
    """The last lines that a run has printed since its start."""
    with open(os.path.join(run['folder'], 'console.txt'), 'rb') as f:
        f.seek(max(run['console'], os.fstat(f.fileno()).st_size - 4000))
        return f.read().decode('utf-8', 'replace').strip().splitlines() or ['']


def run_all(runs, jobs, gpus, target=math.inf):
    """Run what is not finished, each to its end or to iteration `target`, `jobs` at a time, with progress and time left. Returns the runs that failed."""
    until = lambda run: min(target, run['max_iters'])
    waiting = [run for run in runs if not finished(run, until(run))]
    for run in waiting:  # what of its cost is left, and where it goes on
        run['from'] = (read_run(run['folder']) or {}).get('iter_num', 0)
        run['left'] = run['cost'] * max(0, until(run) - run['from']) / run['max_iters']
    total, done, failed, active, t0, shown = sum(run['left'] for run in waiting) or 1, 0.0, [], {}, time.time(), 0.0
    print(f'{len(runs)} runs, {len(runs) - len(waiting)} of them finished' + (f'; {jobs} at a time' if jobs > 1 else ''), flush=True)
    clear = '\r\033[K' if sys.stdout.isatty() else ''
    try:
        while waiting or active:
            for slot in sorted(set(range(jobs)) - active.keys())[:len(waiting)]:
                run = waiting.pop(0)
                active[slot] = run, start(run, until(run), slot, jobs, gpus), time.time()
            time.sleep(0.1)
            share = done
            for slot, (run, process, since) in list(active.items()):
                lines = tail(run)
                reached = re.findall(r'^iter (\d+) ', '\n'.join(lines), re.M)
                share += run['left'] * (int(reached[-1]) + 1 - run['from']) / max(1, until(run) - run['from']) if reached else 0.0
                if process.poll() is None:
                    continue
                del active[slot]
                done += run['left']
                at = f'{clear}[{len(runs) - len(waiting) - len(active)}/{len(runs)}] {run["cell"]}, seed {run["seed"]}: '
                if process.returncode == 0 and finished(run, until(run)):
                    print(f"{at}val loss {read_run(run['folder'])['evals'][-1]['loss']:.4f}, {duration(time.time() - since)}", flush=True)
                else:
                    failed.append(run)
                    why = [line for line in lines if line.startswith('train.py:') or 'not finite' in line] or lines[-1:]
                    print(f"{at}FAILED with status {process.returncode}: {why[0]} ({os.path.join(run['folder'], 'console.txt')})", flush=True)
            if active and time.time() - shown > (1 if clear else 60):
                shown, run = time.time(), next(iter(active.values()))[0]
                left = f', about {duration((time.time() - t0) * (total - share) / share)} left' if share > 0 else ''
                now = f"{100 * share / total:.0f}%{left}; {run['cell']}, seed {run['seed']}: {tail(run)[-1]}"
                print(clear + now[:os.get_terminal_size().columns - 1 if clear else 150], end='' if clear else '\n', flush=True)
    finally:  # also when a signal came: let the runs save, then the same command goes on with them
        for _, process, _ in active.values():
            process.terminate()
        for _, process, _ in active.values():
            process.wait()
    return failed


def halving(runs, jobs, gpus):
    """
    Successive halving (https://arxiv.org/abs/1502.07943): all cells to 1/16 of max_iters (1/8 for fewer than 16 cells, and so on), the better
    half of them to twice that, until one rung reaches max_iters. The schedule is that of the whole run. Returns the runs that failed.
    """
    failed, alive = [], list(dict.fromkeys(run['cell'] for run in runs))
    for k in range(min(4, int(math.log2(len(alive)))), -1, -1):
        target = max(1, runs[0]['max_iters'] // 2 ** k)
        print(f'{len(alive)} cells up to iteration {target}')
        failed += run_all([run for run in runs if run['cell'] in alive and run not in failed], jobs, gpus, target)
        losses = {}
        for run in runs:
            if run['cell'] in alive and run not in failed:
                at = [e['loss'] for e in read_run(run['folder'])['evals'] if e['iter'] <= target]
                losses.setdefault(run['cell'], []).append(at[-1])
        ranked = sorted(losses, key=lambda cell: np.mean(losses[cell]))
        alive = ranked[:math.ceil(len(ranked) / 2)] if k else ranked
    return failed


# ---------------------------------------------------------------------------------------------------------------------
# statistics

def seed_variance(groups):
    """(variance over seeds within cells, pooled; its degrees of freedom) of lists of losses, one a cell; (0, 0) where no cell has two seeds."""
    df = sum(len(g) - 1 for g in groups)
    return (sum(np.var(g) * len(g) for g in groups) / df if df else 0.0), df


def estimate(values, variance, df_seed, share, confidence=0.95):
    """
    (mean, half of its confidence interval, p-value of a mean of 0) of values (n windows, in text order), each a mean over seeds, or a
    difference of two, to which seeds of that variance contribute share * variance: 1/S, or 1/S_a + 1/S_b. Without degrees of freedom for the
    seeds the interval is that of the text alone, and p is None: nobody knows what another seed would give.
    """
    from scipy import stats
    mean, error, df = mean_and_error(values)
    text, seeds = error ** 2, share * variance
    if not text + seeds > 0:  # the same losses, window for window
        return mean, 0.0, 1.0 if df_seed else None
    total_df = (text + seeds) ** 2 / (text ** 2 / df + (seeds ** 2 / df_seed if df_seed else 0.0))
    scale = math.sqrt(text + seeds)
    return mean, stats.t.ppf((1 + confidence) / 2, total_df) * scale, 2 * stats.t.sf(abs(mean) / scale, total_df) if df_seed else None


def losses_at(run, axis, budget):
    """Losses (n windows) of a run when it had spent budget on axis, from the evaluations around; None where these are more than a quarter of it apart."""
    x = [e[AXES[axis]] for e in run['evals']]
    i = int(np.searchsorted(x, budget))
    if i == 0 or i == len(x):
        return run['evals'][-1]['losses'] if budget >= x[-1] else None
    before, after = run['evals'][i - 1], run['evals'][i]
    part = (budget - x[i - 1]) / (x[i] - x[i - 1])
    if part > 0.999:
        return after['losses']
    return None if x[i] - x[i - 1] > budget / 4 else (1 - part) * before['losses'] + part * after['losses']


def compare(groups, baseline, confidence=0.95):
    """
    A row (dict) a cell of {name: runs}: what it costs, its loss, its difference from the baseline at the end and at equal FLOPs and
    seconds, those of the cheapest run. ValueError where runs were not evaluated on the same windows.
    """
    runs = [run for group in groups.values() for run in group]
    for run in runs:
        if run['windows'] != runs[0]['windows']:
            raise ValueError(f"'{runs[0]['folder']}' and '{run['folder']}' were not evaluated on the same windows, {runs[0]['windows']} and "
                             f"{run['windows']}: they need the same dataset, block_size and eval_iters * batch_size")
    if runs[0]['windows']['n'] < 4:
        raise ValueError(f"{runs[0]['windows']['n']} windows of val are too few to tell anything: a higher --eval_iters")
    at = {'end': {name: [run['evals'][-1]['losses'] for run in group] for name, group in groups.items()}}
    for axis in ('FLOPs', 'seconds'):
        budget = min(run['evals'][-1][AXES[axis]] for run in runs)
        found = {name: [losses_at(run, axis, budget) for run in group] for name, group in groups.items()}
        at[axis] = {name: losses if all(x is not None for x in losses) else None for name, losses in found.items()}
    variance, df = {}, {}
    for axis, cells in at.items():
        variance[axis], df[axis] = seed_variance([[x.mean() for x in losses] for losses in cells.values() if losses is not None])
    rows, peak = [], max(run['startup_info']['hardware_peak_tflops'] for run in runs)  # one for all, where each has measured its own
    for name, group in groups.items():
        iterations = [e for run in group for e in run['iterations'][2:] or run['iterations']]
        end = at['end'][name]
        mean, half, _ = estimate(np.mean(end, axis=0), variance['end'], df['end'], 1 / len(end), confidence)
        row = dict(cell=name, seeds=[run['config']['seed'] for run in group], folders=[run['folder'] for run in group],
                   iterations=max(run['iter_num'] for run in group), params=group[0]['startup_info']['total_params'],
                   flops_per_token=group[0]['startup_info']['flops_per_token'],
                   tokens_per_sec=float(np.median([e['mfu']['tokens_per_sec'] for e in iterations])),
                   mfu_percent=float(np.median([e['mfu']['achieved_tflops'] / peak * 100 for e in iterations])),
                   peak_bytes=max(max(e['memory'].values()) for e in iterations),
                   seconds=float(np.mean([run['evals'][-1]['train_seconds'] for run in group])),
                   val_loss=mean, interval=half, loss_by_seed=[float(x.mean()) for x in end],
                   seed_deviation=float(np.std([x.mean() for x in end], ddof=1)) if len(end) > 1 else None)
        for axis, cells in at.items():
            mine, base = cells[name], cells[baseline]
            if name != baseline and mine is not None and base is not None:
                d, half, p = estimate(np.mean(mine, axis=0) - np.mean(base, axis=0), variance[axis], df[axis], 1 / len(mine) + 1 / len(base), confidence)
                row[f'difference at {axis}'] = dict(difference=d, interval=half, p=p)
        rows.append(row)
    return rows, dict(seed_deviation=math.sqrt(variance['end']) if df['end'] else None, seed_df=df['end'], windows=runs[0]['windows'], baseline=baseline,
                      confidence=confidence)


def group_runs(runs):
    """{name: runs} of finished runs: those that differ in nothing but seed are one cell, and a cell is named by what is not the same in all."""
    ignored = '''seed out_dir init_from overwrite wandb_log wandb_project wandb_run_name wandb_artifacts tensorboard_log sample_interval log_interval
                 eval_interval save_interval always_save_checkpoint gradient_log_interval device peak_tflops'''.split()
    shown = [k for k in dict.fromkeys(k for run in runs for k in run['config']) if k not in ignored and len({str(run['config'].get(k)) for run in runs}) > 1]
    groups = {}
    for run in runs:
        name = ', '.join(f"{k}={run['config'].get(k)}" for k in shown) or 'as configured'
        groups.setdefault(name, []).append(run)
        seeds = [run['config']['seed'] for run in groups[name]]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"'{run['folder']}' has the config and the seed of another of these runs, so it says nothing new: leave it out")
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# table and picture

def plus_minus(value, half, sign=''):
    return f'{value:{sign}.4f} ± {half:.4f}' if math.isfinite(half) else f'{value:{sign}.4f}'


def verdict(row, rows, confidence):
    d, base = row.get('difference at end'), next(row for row in rows if 'difference at end' not in row)
    if d is None or d['p'] is None or row['iterations'] != base['iterations']:
        return 'baseline' if d is None else 'other length' if row['iterations'] != base['iterations'] else 'one seed'
    return 'no difference' if d['p'] >= 1 - confidence else 'better' if d['difference'] < 0 else 'worse'


def table(rows, facts):
    """The rows in Markdown, with what one has to know to read them below."""
    from scipy import stats
    baseline, confidence = facts['baseline'], facts['confidence']
    columns = ['choice', 'seeds', 'iterations', 'parameters', 'MFLOP/token', 'tokens/s', 'MFU', 'peak memory', 'val loss', 'difference', 'p', 'verdict',
               'at equal FLOPs', 'at equal time']
    lines = []
    for row in rows:
        ends = [row.get(f'difference at {axis}') for axis in ('end', 'FLOPs', 'seconds')]
        differences = [plus_minus(d['difference'], d['interval'], '+') if d else '' if row['cell'] == baseline else '-' for d in ends]
        p = ends[0]['p'] if ends[0] else None
        lines.append([row['cell'].replace('|', '\\|'), str(len(row['seeds'])), str(row['iterations']), f"{row['params']:,}",
                      f"{row['flops_per_token'] / 1e6:,.4g}", f"{row['tokens_per_sec']:,.0f}", f"{row['mfu_percent']:.1f}%",
                      f"{row['peak_bytes'] / 2**30:.2f} GiB", plus_minus(row['val_loss'], row['interval']), differences[0], '' if p is None else '<0.001' if p < 0.001 else f'{p:.3f}',
                      verdict(row, rows, confidence), *differences[1:]])
    widths = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]
    form = lambda line: '| ' + ' | '.join(text.ljust(w) for text, w in zip(line, widths)) + ' |'
    text = [form(columns), '| ' + ' | '.join('-' * w for w in widths) + ' |', *map(form, lines), '']
    windows, percent = facts['windows'], f'{100 * confidence:g} %'
    text.append(f"Val loss in nats a token on {windows['n']:,} windows of {windows['tokens_each']} tokens, the same for all; ± is a {percent} interval. "
                f"Differences are from '{baseline}', window by window.")
    if facts['seed_df']:
        text.append(f"They hold for other text and other seeds: seeds of one cell differ by {facts['seed_deviation']:.4f} (standard deviation, pooled, "
                    f"{facts['seed_df']} degrees of freedom).")
    else:
        text.append('Each cell has one seed, so intervals are for other text only, and there are no p-values: --seed=1,2,3 tells what another seed would give.')
    if len(rows) == 1 and len(rows[0]['seeds']) > 1:
        text.append('No difference: these runs differ in nothing but their seed. Their losses: ' + ', '.join(f'{x:.4f}' for x in rows[0]['loss_by_seed']) + '.')
    text.append('At equal FLOPs and time: at what the cheapest run had spent at its end, the others between two evaluations, where their learning rate had '
                'not yet come down as far; -: evaluations more than a quarter of it apart (--eval_interval). The noise of clocks is not in these intervals.')
    groups = [row['loss_by_seed'] for row in rows if len(row['loss_by_seed']) > 1]
    if len(groups) > 1 and all(np.ptp(g) for g in groups) and stats.bartlett(*groups).pvalue < 0.01:
        text.append("NOTE: some cells' seeds differ more than others' (seed_deviation in compare.json, Bartlett's test), so for these, intervals are too short "
                    'and p-values too low.')
    if len({row['iterations'] for row in rows}) > 1:
        text.append("NOTE: not all have as many iterations, so 'difference' is not at equal steps.")
    text += [f'NOT IN THE TABLE, failed: {name}' for name in facts['failed']]
    return '\n'.join(text) + '\n'


def picture(groups, path, title):
    """Val loss against steps, tokens, FLOPs and seconds: a line a cell, the mean over seeds, and a band from the lowest to the highest."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), sharey=True, layout='constrained')
    shades = plt.get_cmap('viridis')(np.linspace(0, 0.85, len(groups)))  # which grows lighter evenly, so that it can be told in grey
    late = [[e['loss'] for e in run['evals'] if e['iter'] >= run['iter_num'] / 5] for group in groups.values() for run in group]
    low, high = min(map(min, late)), np.median([max(losses) for losses in late])  # so that one that diverged does not flatten the others
    for ax, (label, key) in zip(axes.flat, AXES.items()):
        for (name, group), shade, dash, marker in zip(groups.items(), shades, itertools.cycle(('-', '--', ':')), itertools.cycle('os^Dvx*P')):
            common = sorted(set.intersection(*({e['iter'] for e in run['evals']} for run in group)))
            of = lambda what: np.array([[e[what] for e in run['evals'] if e['iter'] in common] for run in group])
            x, losses = of(key).mean(0), of('loss')
            ax.plot(x, losses.mean(0), linestyle=dash, marker=marker, markersize=4, color=shade, label=name)
            ax.fill_between(x, losses.min(0), losses.max(0), color=shade, alpha=0.2, linewidth=0)
        ax.set_xlabel(label)
        ax.set_ylabel('val loss, nats a token')
        ax.grid(alpha=0.3)
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if len(groups) <= 16:
        figure.legend(handles, labels, loc='outside lower center', ncols=max(1, min(6, 120 // max(map(len, labels)))))
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def pyplot():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    return plt


# ---------------------------------------------------------------------------------------------------------------------
# scaling

def ladder(config, given):
    """The runs of a ladder of widths: heads of the same size, d_ff in proportion, and as many iterations as tokens_per_param asks for."""
    from model import meta_model
    base = configure(__file__, TRAIN, argv=[config['scaling']], convert=several)[0]
    head_dim = base['n_embd'] // base['n_head']
    if wrong := [k for k, v in config.items() if isinstance(v, (list, Range)) and k not in ('n_embd', 'seed')] + [k for k in ('cells', 'search') if config[k]]:
        raise ValueError(f'scaling varies n_embd, and takes several values of no key but seed besides: not {wrong[0]}')
    if given.get('n_embd') == 'on the command line' and not isinstance(config['n_embd'], list):
        raise ValueError(f"scaling needs several widths, as in --n_embd=64,96,128, not {config['n_embd']}")
    widths = config['n_embd'] if isinstance(config['n_embd'], list) else sorted({head_dim * max(1, round(f * base['n_head'])) for f in (0.5, 0.75, 1, 1.5, 2)})
    if bad := [w for w in widths if w % head_dim]:
        raise ValueError(f"n_embd={bad[0]} is no multiple of {head_dim}, the size of a head in '{config['scaling']}'")
    if len(widths) < 3:
        raise ValueError(f'a power law needs 3 widths or more, not {len(widths)}: --n_embd=64,96,128')
    folder = find_datasets(config['dataset'])[0][2]
    script = folder / 'prepare.py'
    vocab_size = config['vocab_size'] or read_meta(folder).get('vocab_size') or (prepare_facts(script)['vocab_size'] if script.exists() else None)
    if vocab_size is None:
        raise ValueError(f"the vocabulary of data set '{config['dataset']}' is not known before it is prepared, and sizes depend on it: "
                         'prepare it, or give --vocab_size')
    cells, tokens_per_iter = {}, config['batch_size'] * config['block_size'] * config['gradient_accumulation_steps']
    for width in widths:
        own = dict(n_embd=width, n_head=width // head_dim) | ({'d_ff': round(base['d_ff'] * width / base['n_embd'])} if base['d_ff'] else {})
        n = meta_model(config | own | dict(vocab_size=vocab_size)).get_num_params(False)
        steps = math.ceil(config['tokens_per_param'] * n / tokens_per_iter)
        cells[f'width {width}'] = own | dict(max_iters=steps, lr_decay_iters=steps, warmup_iters=min(config['warmup_iters'], steps // 10))
        print(f'width {width}: {n:,} parameters, {steps:,} iterations, {steps * tokens_per_iter:,} tokens', flush=True)
    runs = make_runs(config, given, cells)
    for run in runs:
        run['cost'] = float(run['max_iters'] * run['settings']['n_embd'])
    return runs


def fit_power_law(n, losses, confidence=0.95):
    """
    Fit L(N) = E + A N^-alpha (https://arxiv.org/abs/2203.15556) to sizes n and losses by least squares, or L(N) = A N^-alpha where the sizes do not tell E
    from 0. Returns dict: E, A, alpha, the interval of each (half, Student's t), and predict(N) -> (loss, half). ValueError for fewer than 3 sizes.
    """
    from scipy import optimize, stats
    n, losses = np.asarray(n, float), np.asarray(losses, float)
    if len(set(n)) < 3:
        raise ValueError('a power law needs at least 3 sizes')
    middle = np.exp(np.log(n).mean())  # so that A and alpha are hardly correlated
    forms = {'L = E + A N^-alpha': (lambda x, a, alpha, e: e + a * (x / middle) ** -alpha, [losses.mean() / 2, 0.2, losses.mean() / 2]),
             'L = A N^-alpha': (lambda x, a, alpha: a * (x / middle) ** -alpha, [losses.mean(), 0.1])}
    for name, (form, p0) in forms.items():
        df = len(n) - len(p0)
        try:
            best, covariance = optimize.curve_fit(form, n, losses, p0=p0, maxfev=20000)
        except (RuntimeError, TypeError) as e:  # it does not converge, or there are fewer sizes than unknowns
            if name == 'L = A N^-alpha':
                raise ValueError(f'no power law fits these losses: {e}') from None
            continue
        t = stats.t.ppf((1 + confidence) / 2, df)  # nan without a degree of freedom
        half = t * np.sqrt(np.diag(covariance))
        if name.startswith('L = A') or np.isfinite(half).all() and best[2] > half[2] and best[1] > 0:
            break

    def predict(x):
        x = np.asarray(x, float)
        step = 1e-6 * np.maximum(1e-6, abs(best))
        slopes = np.stack([(form(x, *(best + step * (np.arange(len(best)) == i))) - form(x, *best)) / step[i] for i in range(len(best))])
        return form(x, *best), t * np.sqrt(np.einsum('i...,ij,j...->...', slopes, covariance, slopes))
    alpha, spread = best[1], half[1]
    return dict(form=name, alpha=alpha, alpha_interval=spread, A=best[0] * middle ** alpha, df=df, E=best[2] if len(best) == 3 else 0.0,
                E_interval=half[2] if len(best) == 3 else None, predict=predict)


def scaling_report(groups, config, out_dir):
    """Print the fit of loss against parameters, and write its picture."""
    n = [run['startup_info']['total_params'] for group in groups.values() for run in group]
    losses = [run['evals'][-1]['loss'] for group in groups.values() for run in group]
    fit = fit_power_law(n, losses, config['confidence'])
    x = np.geomspace(min(n) / 1.5, max(n) * 10, 100)
    y, half = fit['predict'](x)
    at_ten = fit['predict'](10 * max(n))
    text = f"{fit['form']}: alpha {fit['alpha']:.4f} ± {fit['alpha_interval']:.4f}, A {fit['A']:.4g}" + \
        (f", E {fit['E']:.4f} ± {fit['E_interval']:.4f}" if fit['E'] else '') + \
        f" ({fit['df']} degrees of freedom; N: all parameters, {config['tokens_per_param']:g} tokens each); {10 * max(n):,} of them would come to " \
        f'{at_ten[0]:.4f} ± {at_ten[1]:.4f}'
    if not fit['E']:
        text += '\nThese sizes do not tell E, what is left at any size, from 0: beyond them the line is too low.'
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(8, 6))
    ax.plot(n, losses, 'o', color='black', label='runs')
    ax.plot(x, y, '-', color='black', label=fit['form'])
    ax.fill_between(x, y - half, y + half, color='grey', alpha=0.3, linewidth=0, label=f"{100 * config['confidence']:g} %")
    ax.set(xscale='log', yscale='log', xlabel='parameters', ylabel='val loss, nats a token', title=f"{config['tokens_per_param']} tokens a parameter")
    ax.grid(alpha=0.3, which='both')
    ax.legend()
    figure.tight_layout()
    figure.savefig(os.path.join(out_dir, 'scaling.png'), dpi=100)
    return text, {k: v if isinstance(v, str) or math.isfinite(v or 0) else None for k, v in fit.items() if k != 'predict'}


# ---------------------------------------------------------------------------------------------------------------------

def main():
    out_dir = 'out-compare'  # a folder for each run in it, and compare.md, compare.json and compare.png
    cells = {}  # in a config file, {name: {key: value}}: cells that are no full grid; times the keys that have several values
    baseline = ''  # the cell that the others are compared with; '': the first
    sort: Literal['', 'val_loss', 'params', 'flops_per_token', 'tokens_per_sec', 'peak_bytes', 'seconds'] = ''  # rows by this figure; '': as they were given
    jobs: int | Literal['auto'] = 'auto'  # runs at a time; auto: one a GPU, and one on a CPU
    search = 0  # cells drawn at random from keys with several values or a range, as in 1e-4..1e-2; half of them go on at 1/16, 1/8, 1/4 and 1/2 of max_iters
    scaling = ''  # a config file: its model in several widths (--n_embd=64,96,128), and a power law through their losses
    tokens_per_param = 20.0  # of scaling: training tokens for each parameter
    confidence = 0.95  # of the intervals
    keep_checkpoints = True  # False: remove a run's checkpoints when all are finished
    config, given = configure(__file__, TRAIN, argv=settings_in(sys.argv[1:]), convert=several)
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
        signal.signal(getattr(signal, name), stop)
    try:
        raise SystemExit(run_study(config, given, [arg for arg in sys.argv[1:] if os.path.isdir(arg)]))
    except (ValueError, OSError) as e:
        fail(str(e))


def settings_in(argv):
    """The arguments that are no run's folder, after the config file that scaling names."""
    for arg in argv:
        if not (arg.startswith('-') or '=' in arg and '/' not in arg or arg.endswith('.py') or os.path.isdir(arg)):
            fail(f"'{arg}' is neither a config file nor a run's folder")
    return [arg.removeprefix('--scaling=') for arg in argv if arg.startswith('--scaling=')] + [arg for arg in argv if not os.path.isdir(arg)]


def stop(number, frame):
    """The runs at work save and end, in run_all's finally; a second signal meanwhile changes nothing."""
    for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    print('\nthe runs at work save and end; the same command goes on from there', flush=True)
    raise SystemExit(128 + number)


def run_study(config, given, folders):
    for library in ('scipy', 'matplotlib'):  # now, and not after a night of runs
        try:
            __import__(library)
        except ImportError:
            raise ValueError(f'the table and the picture need {library}: pip install {library}') from None
    out_dir, failed, confidence = config['out_dir'], [], config['confidence']
    if not 0 < confidence < 1:
        raise ValueError(f'confidence must be between 0 and 1, not {confidence}')
    if folders:
        folders = list({os.path.realpath(folder): folder for folder in folders}.values())
        if useless := [k for k in given if k not in ('out_dir', 'baseline', 'sort', 'confidence')]:
            raise ValueError(f'finished runs are compared as they are: {useless[0]} does nothing here')
        if len(folders) < 2:
            raise ValueError(f"nothing to compare '{folders[0]}' with: name another run's folder")
        found = [read_run(folder) for folder in folders]
        for folder, run in zip(folders, found):
            if run is None or not run['evals'] or not run['iterations']:
                raise ValueError(f"'{folder}' holds no run log with window losses (run_*.json): it is no run's out_dir, or it ended before "
                                 'its first evaluation')
        groups, planned = group_runs(found), []
    else:
        jobs, gpus = how_many_jobs(config)
        if config['scaling']:
            planned = ladder(config, given)
        else:
            if config['search'] < 0 or config['search'] == 1:
                raise ValueError(f"search draws 2 cells or more, not {config['search']}")
            seed = config['seed'][0] if isinstance(config['seed'], list) else config['seed']
            planned = make_runs(config, given, make_cells(config, given, np.random.default_rng(seed) if config['search'] else None))
            if len(planned) == 1:
                raise ValueError('nothing to compare: give a key several values, as in --normalization=layernorm,rmsnorm --seed=1,2,3, or finished runs, '
                                 'as in out-a out-b')
    os.makedirs(out_dir, exist_ok=True)
    lock = open(os.path.join(out_dir, 'lock'), 'a')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"out_dir '{out_dir}' is in use by another run; --out_dir=... gives this one another") from None

    if planned:
        groups = {run['cell']: [] for run in planned}
        if config['baseline'] and config['baseline'] not in groups:
            raise ValueError(f"baseline '{config['baseline']}' is none of the cells: {'; '.join(groups)}")
        if config['search']:
            for run in planned:
                run['settings']['always_save_checkpoint'] = True
            failed = halving(planned, jobs, gpus)
        else:
            failed = run_all(planned, jobs, gpus)
        for run in planned:
            if run not in failed:
                groups[run['cell']].append(read_run(run['folder']))
        if not next(iter(groups.values())) and not config['baseline'] and not config['search']:
            print('NOTE: the first cell has failed, so another one is the baseline')
        groups = {cell: group for cell, group in groups.items() if group}
    if not groups:
        raise ValueError('no run has come to its end, see above')
    if config['search']:
        groups = dict(sorted(groups.items(), key=lambda cell: (-cell[1][0]['iter_num'], np.mean([run['evals'][-1]['loss'] for run in cell[1]]))))
    baseline = config['baseline'] or next(iter(groups))
    if baseline not in groups:
        raise ValueError(f"baseline '{baseline}' is none of the cells: {'; '.join(groups)}")
    rows, facts = compare(groups, baseline, confidence)
    if config['sort']:
        rows.sort(key=lambda row: row[config['sort']] or 0, reverse=config['sort'] == 'tokens_per_sec')
    devices = {run['startup_info']['device'].split(',')[0] for group in groups.values() for run in group}
    facts |= dict(command=sys.argv, failed=[f"{run['cell']}, seed {run['seed']}" for run in failed])
    text = table(rows, facts)
    if config['search']:
        text += 'NOTE: the best of a search is the best by these very figures, so it looks better than it is: run the first few again with other seeds.\n'
    if len(devices) > 1:
        text += f"NOTE: these runs had different devices, so speed and equal time mean little: {'; '.join(sorted(devices))}\n"
    if config['scaling']:
        try:
            fitted, facts['fit'] = scaling_report(groups, config, out_dir)
        except ValueError as e:
            fitted = f'NOTE: no fit: {e}'
        text += '\n' + fitted + '\n'
    print('\n' + text)
    for name, contents in (('compare.md', text), ('compare.json', json.dumps(facts | dict(rows=rows), indent=1))):
        with open(os.path.join(out_dir, name + '.tmp'), 'w', encoding='utf-8') as f:
            f.write(contents)
        os.replace(os.path.join(out_dir, name + '.tmp'), os.path.join(out_dir, name))
    picture(groups, os.path.join(out_dir, 'compare.png'), f"{facts['windows']['n']:,} windows of val; a band goes from the best seed to the worst")
    print(f"{os.path.join(out_dir, 'compare.png')}, compare.md and compare.json" + (' and scaling.png' if config['scaling'] else ''))
    for run in planned if not config['keep_checkpoints'] and not failed else ():
        for path in glob.glob(os.path.join(glob.escape(run['folder']), 'ckpt*')):
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    return 1 if failed else 0


def how_many_jobs(config):
    """(runs at a time, the GPUs that they take in turn)"""
    gpus = []
    if config['device'] in ('auto', 'cuda'):
        import torch
        visible = os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(map(str, range(torch.cuda.device_count()))))
        gpus = visible.split(',')[:torch.cuda.device_count()]
    jobs = max(1, len(gpus)) if config['jobs'] == 'auto' else config['jobs']
    if jobs < 1:
        raise ValueError(f'jobs must be positive, not {jobs}')
    if jobs > max(1, len(gpus)):
        print('NOTE: runs that share a device slow each other down, so speed and equal time mean less')
    return jobs, gpus


if __name__ == '__main__':
    main()
