"""
What the two sides of a judgement cost, and how many iterations of the candidate cost what the
baseline's do.
"""
import numpy as np

from engine.common import UserError
from engine.judge_sides import make_side

# a better candidate costs at most this many times what the baseline costs
LIMITS = {'tokens': 1.001, 'parameters': 1.01, 'FLOPs per token': 1.01, 'seconds': 1.1}
LIMITS_AT = {'steps': [*LIMITS], 'flops': ['parameters', 'seconds'],
             'seconds': ['parameters', 'seconds']}
CLOCK_ERROR = 0.05  # trials that differ by less may only differ because the machine was busy


def costs_of_run(result):
    return {'tokens': result.evals[-1].tokens,
            'parameters': result.startup_info['total_params'],
            'FLOPs per token': result.startup_info['flops_per_token']}


def cost_ratios(pairs):
    """
    Return {cost: candidate over baseline}, medians over pairs of Results. Seconds are not among
    them: the runs of a pair are made at different times, when the machine may be more or less busy.
    """
    if not pairs:
        return {}
    costs = [(costs_of_run(a), costs_of_run(b)) for a, b in pairs]
    return {name: float(np.median([b[name] / a[name] for a, b in costs])) for name in costs[0][0]}


def too_high(ratios, at):
    """Return the names of the ratios that are above their limits."""
    return [name for name in LIMITS_AT[at] if ratios.get(name, 0) > LIMITS[name]]


def time_limit(baseline):
    """Return the seconds after which a run is ended, from the Result of the baseline's."""
    return 60 + 10 * baseline.evals[-1].train_seconds


def train_or_refuse(train, side, seed, name='baseline'):
    result = train(name, side, seed)
    if result is None:
        raise UserError(f'the {name} failed, so there is nothing to judge by; see above')
    return result


def at_equal_cost(candidate, baseline, result, at, train):
    """
    Return the candidate with as many iterations as cost what the baseline's do, or None if its
    trial failed. `result` is a Result of the baseline.
    """
    if at == 'seconds':
        trials = time_trials(baseline, candidate, train)
    else:
        trials = run_trials(baseline, candidate, train, flops_per_iter, 1)
    if trials is None:
        return None
    ratio = float(np.median(trials))
    if at == 'seconds' and abs(ratio - 1) < CLOCK_ERROR:
        ratio = 1.0
    iters = max(1, round(baseline.settings['max_iters'] / ratio))
    print(f'at equal {at} the candidate has {iters} iterations', flush=True)
    if iters == candidate.settings['max_iters']:
        return candidate
    flags = candidate.flags | dict(max_iters=iters)
    for key in ('warmup_iters', 'lr_decay_iters'):  # or train.py would adapt them to max_iters
        own = candidate.settings[key]
        flags[key] = result.config[key] if own == baseline.settings[key] else own
    if flags['lr_decay_iters'] == result.config['max_iters']:
        flags['lr_decay_iters'] = iters
    return make_side(candidate.tree, candidate.files, flags)


def time_trials(baseline, candidate, train):
    """Return how many times as long an iteration of the candidate takes, in three trials."""
    return run_trials(baseline, candidate, train, seconds_per_iter, 3)


def run_trials(baseline, candidate, train, cost, n):
    """
    Return cost(Result) of the candidate over that of the baseline, in n pairs of short runs, or
    None if one of the candidate's failed. The seeds belong to the candidate, so that a killed
    judgement goes on, and no clock of another one is read.
    """
    first = int(candidate.key[:6], 16)
    baseline, candidate = short(baseline), short(candidate)
    ratios = []
    for seed in range(first, first + n):
        a = train_or_refuse(train, baseline, seed, 'trial')
        b = train('trial', candidate, seed, limit=time_limit(a))
        if b is None:
            return None
        ratios.append(cost(b) / cost(a))
    return ratios


def short(side):
    """Return the Side of a run that is long enough to time its iterations."""
    flags = dict(max_iters=30, eval_iters=1, eval_interval=30, log_interval=1)
    return make_side(side.tree, side.files, side.flags | flags)


def flops_per_iter(result):
    return result.startup_info['tokens_per_iter'] * result.startup_info['flops_per_token']


def seconds_per_iter(result):
    """Return the mean, because some optimizers do most of their work every few iterations."""
    tokens = result.startup_info['tokens_per_iter']
    return float(np.mean([tokens / e['mfu']['tokens_per_sec'] for e in result.iterations[5:]]))
