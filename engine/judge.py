"""
Judge a change: train a candidate and a baseline with the same seeds, one pair of runs at a time,
and stop as soon as the answer is clear. compare.py --against and --try call judge().

The difference of a pair, candidate minus baseline, comes from runs with the same data order, the
same initial weights wherever names and shapes agree, and the same windows of val.

A change is better if a one-sided t-test of the differences says so. The test is made after every
pair from the second on. All tests of a judgement use the same nominal level, which is below alpha
and makes the chance that any of them errs alpha: Pocock's group sequential design in its version
for an unknown variance (Jennison and Turnbull 2000, Group Sequential Methods, chapter 4). It
assumes that the differences of pairs are independent and normal. Nothing else below can make a
change better, so alpha holds whatever the rest assumes.

A judgement stops for futility when a gain of the margin is unlikely. This uses the noise of the
baseline, too: the differences of three pairs in which only norm_eps changes, by a tenth, which does
nothing but round differently. With it, the first pair can be enough. If the candidate's pairs are
noisier than that, more real gains are missed than UNLIKELY says.
"""
import functools
import math
import os
import re
import shlex
import shutil
import time

import numpy as np

from engine.common import ROOT, UserError, optional
from engine.grid import Range
from engine.job import Launcher, Run
from engine.judge_cost import (
    at_equal_cost,
    cost_ratios,
    time_limit,
    time_trials,
    too_high,
    train_or_refuse,
)
from engine.judge_report import Decision, git, report, shown, unit_of
from engine.judge_sides import copy_code, diff_of, make_side, prepare
from engine.results import read_run
from engine.study import remove_checkpoints, run_all

UNLIKELY = 0.05  # chance of missing a gain of the margin, after each pair
NOISE_PAIRS = 3
# the noise is taken to be at least this share of the margin: the gain of a real change differs more
# from seed to seed than rounding does
LEAST_NOISE = 0.35
# the code that draws windows, measures and judges: a candidate that edits it cannot be better
MEASURES = (r'data/\w+\.py|compare\.py|'
            r'engine/(datasets|evaluate|run_log|results|job|study|judge\w*)\.py')


# the decision

def nominal_level(alpha, max_pairs):
    """
    Return the level of t-tests after 2, 3, ... max_pairs pairs at which the chance that any of them
    errs is alpha. It is found by simulation.
    """
    stats = optional('scipy.stats', 'a judgement')
    d = np.random.default_rng(0).standard_normal((200_000, max_pairs))
    n = np.arange(2, max_pairs + 1)
    mean = (d.cumsum(1)[:, 1:]) / n
    variance = (np.square(d).cumsum(1)[:, 1:] - n * mean ** 2) / (n - 1)
    p = stats.t.sf(mean / np.sqrt(variance / n), n - 1)
    return float(np.quantile(p.min(1), alpha))


def decide(differences, noise, margin, level, max_pairs):
    """
    Decide after the `differences` of some pairs. `noise` holds those of pairs without a change, and
    `level` is nominal_level()'s.
    """
    stats = optional('scipy.stats', 'a judgement')
    d, n = np.array(differences), len(differences)
    mean = float(d.mean())
    squares = float(np.square(d - mean).sum())
    if n > 1:
        interval = stats.t.isf(level, n - 1) * math.sqrt(squares / (n - 1) / n)
        if mean + interval < 0:
            return Decision('better', mean, float(interval))
    df = len(noise) + n - 1
    deviation = math.sqrt((np.square(noise).sum() + squares) / df)
    deviation = max(deviation, LEAST_NOISE * margin)
    interval = float(stats.t.isf(UNLIKELY, df) * deviation / math.sqrt(n))
    verdict = 'undecided' if n == max_pairs else None
    if mean - interval > -margin:
        verdict = 'no gain'
        if mean + interval < margin:
            verdict = 'no difference'
        if mean - interval > 0:
            verdict = 'worse'
    return Decision(verdict, mean, interval)


def is_hopeless(result, baseline, margin):
    """
    Return whether a run is to be given up: before its end, it trails the baseline, after the same
    share of its iterations, by more than the margin and what the baseline still gained from there
    on. The margin is in nats.
    """
    iters, baseline_iters = result.config['max_iters'], baseline.config['max_iters']
    for e in result.evals:
        known = [x.loss for x in baseline.evals if 0 < x.iter * iters <= e.iter * baseline_iters]
        if known and e.iter < iters:
            still_gained = max(0.0, known[-1] - baseline.evals[-1].loss)
            if e.loss - known[-1] > still_gained + margin:
                return True
    return False


def difference(result, baseline, unit):
    return unit_of(baseline, unit) * (result.evals[-1].loss - baseline.evals[-1].loss)


# the judgement

def check_settings(config, given, flags, folders):
    """Raise UserError for what a judgement cannot do."""
    if folders or config['search'] or config['scaling'] or config['cells']:
        raise UserError('--against and --try judge one config file and its flags: no folders of '
                        'runs, cells, search or scaling')
    if config['epochs']:
        raise UserError('the runs of a judgement end at --max_iters, not after --epochs')
    for key in ('jobs', 'baseline', 'sort', 'confidence', 'keep_checkpoints', 'tokens_per_param'):
        if key in given:
            raise UserError(f'{key} has no effect on a judgement')
    for key, value in flags.items():
        if isinstance(value, (list, tuple, Range)):
            raise UserError(f'{key} has several values, but a judgement has one for each key; its '
                            'pairs have seeds of their own')
    if not 2 <= config['max_pairs'] <= 100:
        raise UserError('max_pairs must be 2 to 100: one pair does not tell how much pairs differ, '
                        'and the bounds for more than 100 would need gigabytes')


def judge(config, files, flags, gpus):
    """
    Judge the working tree with --try_flags against a commit or folder, or against the tree without
    them. `config` has the settings of compare.py, `files` and `flags` are for both sides. Print the
    verdict, add it to the ledger, and return the exit status.
    """
    started, trees = time.time(), os.path.join(config['out_dir'], 'trees')
    # now, because they may be others when the verdict is clear
    judged = git('describe', '--always', '--dirty', '--abbrev=12')
    against = git('rev-parse', '--short=12', '--verify', '--quiet', config['against'] + '^0')
    tried = flags_in(config['try_flags'])
    try:
        for dataset in {config['dataset'], tried.get('dataset', config['dataset'])}:
            prepare(dataset)
        copy_code(ROOT, trees + '/candidate')
        copy_code(config['against'] or ROOT, trees + '/baseline')
        baseline = make_side(trees + '/baseline', files, flags)
        candidate = make_side(trees + '/candidate', files, flags | tried)
        if candidate.key == baseline.key:
            raise UserError('nothing to judge: both sides have the same code and settings')
        names, diff = diff_of(baseline, candidate)
        edited = [name for name in names if re.fullmatch(MEASURES, name)]
        if edited:
            print(f"NOTE: the sides differ in {', '.join(edited)}, which measures or judges, so "
                  'the candidate cannot be found better', flush=True)
        found = compare_pairs(baseline, candidate, config, gpus)
    finally:
        shutil.rmtree(trees, ignore_errors=True)
    if edited and found['verdict'] == 'better':
        found['verdict'] = 'measured otherwise'
    found |= dict(commit=judged, against_commit=against, flags=flags, tried=tried, files=files,
                  diff=diff, edited=edited, seconds=round(time.time() - started, 1))
    return report(found, config)


def flags_in(text):
    """Return {key: value} of the flags in a text."""
    try:
        words = shlex.split(text)
    except ValueError as e:
        raise UserError(f'--try={text}: {e}') from None
    for word in words:
        if not word.startswith('--') or '=' not in word:
            raise UserError(f"--try=... holds flags of train.py, --key=value, not '{word}'")
    return dict(word.removeprefix('--').split('=', 1) for word in words)


def compare_pairs(baseline, candidate, config, gpus):
    """Train pairs until the verdict is clear. Return what was found, for the ledger."""
    keys, unit, seed = [baseline.key, candidate.key], config['unit'], baseline.settings['seed']
    spent = dict(baseline=0.0, candidate=0.0, noise=0.0, trial=0.0)
    train = functools.partial(train_side, config['out_dir'], gpus, spent)
    noise = functools.cache(lambda: noise_of(train, baseline, seed, unit))  # once it is needed
    if config['at'] != 'steps':
        result = train_or_refuse(train, baseline, seed)
        candidate = at_equal_cost(candidate, baseline, result, config['at'], train)
    level = nominal_level(config['alpha'], config['max_pairs'])
    pairs, decision = {}, Decision(None, math.nan, math.nan)
    while decision.verdict is None:
        a = train_or_refuse(train, baseline, seed)
        margin = config['margin'] / unit_of(a, unit)
        give_up = functools.partial(is_hopeless, baseline=a, margin=margin)
        b = None
        if candidate:  # None: its trial failed
            b = train('candidate', candidate, seed, give_up, time_limit(a))
        if b is None:
            decision = decision._replace(verdict='failed')
            break
        pairs[seed] = a, b
        decision = decide_pairs([*pairs.values()], give_up, noise, level, config)
        print(f'after pair {len(pairs)}: {shown(decision, unit)}', flush=True)
        seed += 1
    ratios = cost_ratios([*pairs.values()])
    if decision.verdict == 'better':
        trials = time_trials(baseline, candidate, train)
        if trials is None:
            decision = decision._replace(verdict='failed')
        else:
            iters = candidate.settings['max_iters'] / baseline.settings['max_iters']
            ratios['seconds'] = iters * float(np.median(trials))
    more = too_high(ratios, config['at'])
    if decision.verdict == 'better' and more:
        decision = decision._replace(verdict='costs more')
    return decision._asdict() | dict(
        unit=unit, by_seed={str(seed): difference(b, a, unit) for seed, (a, b) in pairs.items()},
        costs=ratios, more=more, runs=spent, level=level, pairs=[*pairs.values()], sides=keys)


def decide_pairs(pairs, give_up, noise, level, config):
    """Return the Decision after some pairs of Results; noise() returns what decide() needs."""
    differences = [difference(b, a, config['unit']) for a, b in pairs]
    baseline, result = pairs[-1]
    mean = float(np.mean(differences))
    if result.windows != baseline.windows:
        return Decision('other evaluation', mean, math.nan)
    if give_up(result):
        return Decision('given up', mean, math.nan)
    if all((a.evals[-1].losses == b.evals[-1].losses).all() for a, b in pairs):
        return Decision('no difference', 0.0, 0.0)  # to the last decimal
    return decide(differences, noise(), config['margin'], level, config['max_pairs'])


def train_side(out_dir, gpus, spent, name, side, seed, give_up=None, limit=math.inf):
    """
    Return the Result of a run, which an earlier judgement may have made, or None if it failed. It
    ends early if give_up(its Result so far) says so, and fails after `limit` seconds.
    """
    folder = os.path.join(out_dir, 'runs', f'{side.key},seed={seed}')
    flags = side.flags | dict(seed=seed)
    if 'max_iters' not in flags:  # every run gets it as a flag, which the decay would follow
        flags['lr_decay_iters'] = side.settings['lr_decay_iters']
    run = Run(name, seed, folder, flags, side.settings['max_iters'])
    launcher = Launcher(side.tree + '/train.py', side.settings, 1, gpus[:1], side.files)
    before = read_run(folder)
    failed = run_all([run], launcher, give_up=give_up, limit=limit)
    result = read_run(folder)
    if result:
        done_before = before.iter_num if before else 0
        spent[name] += (result.iter_num - done_before) / run.max_iters
    if failed:
        return None  # its checkpoints stay: after a full disk, the same command goes on
    remove_checkpoints([run])
    return result


def noise_of(train, baseline, first, unit):
    """Return the differences of pairs that differ in their rounding errors only."""
    if 'norm_eps' not in baseline.settings:
        raise UserError('the baseline has no norm_eps, by which the noise is measured')
    flags = baseline.flags | dict(norm_eps=1.1 * baseline.settings['norm_eps'])
    other = make_side(baseline.tree, baseline.files, flags)
    return [difference(train_or_refuse(train, other, seed, 'noise'),
                       train_or_refuse(train, baseline, seed), unit)
            for seed in range(first, first + NOISE_PAIRS)]
