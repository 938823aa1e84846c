"""
Compare cells, each a choice of settings whose runs differ only in their seed.

All runs are evaluated on the same windows of val, so two cells are compared window by window, and
seed by seed. Runs with the same seed always read training windows in the same order (with another
batch_size, more or fewer of them per step), and begin with the same weights in all layers whose
names and shapes agree. The residual variance is assumed to be the same in all cells. The errors are
those of engine/statistics.py; docs/compare.md explains them.
"""
import numpy as np

from engine.common import UserError, printable
from engine.results import AXES
from engine.statistics import difference, estimate, seed_variances

NOT_A_CHOICE = set('''seed out_dir init_from overwrite wandb_log wandb_project wandb_run_name
    wandb_artifacts tensorboard_log sample_interval sample_start verbose log_interval eval_interval
    save_interval keep_interval ckpt always_save_checkpoint gradient_log_interval device
    peak_tflops'''.split())


def group_by_config(results):
    """
    Return {cell: Results}. Runs that differ only in their seed are one cell. Its name consists of
    the keys in which cells differ. If two runs have the same config and seed, perhaps because the
    code was edited between them, every folder is a cell, which a NOTE says.
    """
    keys = dict.fromkeys(key for result in results for key in result.config)
    shown = []
    for key in keys:
        values = {str(result.config.get(key)) for result in results}
        if key not in NOT_A_CHOICE and len(values) > 1:
            shown.append(key)
    groups = {}
    for result in results:
        words = [f'{key}={result.config.get(key)}' for key in shown]
        cell = printable(' '.join(', '.join(words).split())) or 'as configured'  # one line
        groups.setdefault(cell, []).append(result)
    for group in groups.values():
        by_seed = {}
        for result in group:
            other = by_seed.setdefault(result.config['seed'], result)
            if other is not result:
                print(printable(f"NOTE: '{other.folder}' and '{result.folder}' have the same "
                                'settings and seed, so every folder is a cell of its own, and no '
                                'seeds are averaged'))
                return {printable(result.folder): [result] for result in results}
    return groups


def check_same_windows(results):
    first = results[0]
    for other in results:
        if other.windows != first.windows:
            raise UserError(
                f"'{first.folder}' and '{other.folder}' were not evaluated on the same windows, "
                f'{first.windows} and {other.windows}: they need the same dataset, block_size and '
                'eval_iters * batch_size')
    if first.windows['n'] < 4:
        raise UserError(f"{first.windows['n']} windows of val are too few for a comparison: "
                        'choose a higher --eval_iters')


def losses_to_compare(groups, results):
    """
    Return {'end' or axis: {cell: {seed: window losses}}}: at the end, and at the FLOPs and seconds
    of the cheapest run. The inner dict is None for a cell without evaluations near enough.
    """
    losses = {'end': {cell: {result.config['seed']: result.evals[-1].losses for result in group}
                      for cell, group in groups.items()}}
    for axis in ('FLOPs', 'seconds'):
        budget = min(getattr(result.evals[-1], AXES[axis]) for result in results)
        losses[axis] = {}
        for cell, group in groups.items():
            found = {r.config['seed']: losses_at(r.evals, axis, budget) for r in group}
            complete = all(x is not None for x in found.values())
            losses[axis][cell] = found if complete else None
    return losses


def losses_at(evals, axis, budget):
    """
    Return the window losses of a run when it had spent its budget on an axis, interpolated between
    two evaluations. Return None if these are further apart than a quarter of the budget.
    """
    x = [getattr(e, AXES[axis]) for e in evals]
    i = int(np.searchsorted(x, budget))
    if budget >= x[-1]:
        return evals[-1].losses
    if i == 0:
        return None
    part = (budget - x[i - 1]) / (x[i] - x[i - 1])
    if part > 0.999:
        return evals[i].losses
    if x[i] - x[i - 1] > budget / 4:
        return None
    return (1 - part) * evals[i - 1].losses + part * evals[i].losses


def costs_of(cell, group, peak):
    """
    Return the settings and costs of a cell. `peak` is in TFLOP/s, one figure for all runs of a
    comparison.
    """
    first = group[0].startup_info
    steps = []
    for result in group:
        steps += result.iterations[2:] or result.iterations  # the first iterations are slow
    return dict(
        cell=cell,
        seeds=[result.config['seed'] for result in group],
        folders=[result.folder for result in group],
        iterations=max(result.iter_num for result in group),
        params=first['total_params'],
        flops_per_token=first['flops_per_token'],
        tokens_per_sec=float(np.median([e['mfu']['tokens_per_sec'] for e in steps])),
        mfu_percent=float(np.median([e['mfu']['achieved_tflops'] / peak * 100 for e in steps])),
        peak_source=first.get('peak_source', ''),
        peak_bytes=max(max(e['memory'].values()) for e in steps),
        seconds=float(np.mean([result.evals[-1].train_seconds for result in group])))


def loss_of(losses, seeds, confidence):
    """
    Return the val loss of a cell. `losses` holds an array of window losses for each of its runs.
    """
    found = estimate(np.mean(losses, axis=0), seeds, 1 / len(losses), confidence)
    by_seed = [float(x.mean()) for x in losses]
    deviation = float(np.std(by_seed, ddof=1)) if len(losses) > 1 else None
    return dict(val_loss=found.mean, interval=found.interval, loss_by_seed=by_seed,
                seed_deviation=deviation)


def compare(groups, baseline, confidence=0.95):
    """
    Return (rows, facts). rows has a dict per cell of {cell: Results} with its costs, its loss, and
    its difference from the baseline at the end and at equal FLOPs and seconds; facts holds for all
    of them.
    """
    results = [result for group in groups.values() for result in group]
    check_same_windows(results)
    losses = losses_to_compare(groups, results)
    seeds = {}
    for axis, cells in losses.items():
        known = [by_seed for by_seed in cells.values() if by_seed]
        means = [{seed: x.mean() for seed, x in by_seed.items()} for by_seed in known]
        if means:
            seeds[axis] = seed_variances(means)
    peak = max(result.startup_info['hardware_peak_tflops'] for result in results)
    rows = []
    for cell, group in groups.items():
        row = costs_of(cell, group, peak)
        row |= loss_of([*losses['end'][cell].values()], seeds['end'].within, confidence)
        for axis, cells in losses.items():
            a, b = cells[cell], cells[baseline]
            if cell != baseline and a and b:
                found = difference(a, b, seeds[axis], confidence)
                row[f'difference at {axis}'] = dict(
                    difference=found.mean, interval=found.interval, p=found.p,
                    by_seed=found.by_seed, paired=found.paired)
        rows.append(row)
    within, residual, differ = seeds['end']
    return rows, dict(seed_deviation=within.deviation, seed_df=within.df,
                      residual_deviation=residual.deviation, residual_df=residual.df,
                      variances_differ=differ, windows=results[0].windows, baseline=baseline,
                      confidence=confidence)
