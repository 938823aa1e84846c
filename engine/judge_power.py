"""How often judgements would be right, by the noise of pairs of runs without a change."""
import collections
import os

import numpy as np

from engine.common import UserError
from engine.judge import NOISE_PAIRS, decide, difference, nominal_level
from engine.judge_report import VERDICTS
from engine.results import files_of, read_run
from engine.run_report import markdown_table


def verdict_of(pairs, noise, margin, level):
    """Return (verdict, number of pairs needed) of a judgement that would see these differences."""
    for n in range(1, len(pairs) + 1):
        verdict = decide(pairs[:n], noise, margin, level, len(pairs)).verdict
        if verdict:
            return verdict, n


def power(differences, margin, alpha, max_pairs, draws=2000):
    """
    Return what judgements would find, as rows (gain, {verdict: share}, mean number of pairs), if a
    change gained 0, half, once and twice the margin. `differences` of pairs without a change are
    the noise: each judgement draws its own from them, without replacement. Their signs are drawn,
    too, because which run of such a pair is the baseline is arbitrary.
    """
    rng, level = np.random.default_rng(0), nominal_level(alpha, max_pairs)
    rows, needed = [], NOISE_PAIRS + max_pairs
    for gain in (0.0, margin / 2, margin, 2 * margin):
        verdicts, spent = collections.Counter(), 0
        for _ in range(draws):
            drawn = rng.permutation(differences)[:needed] * rng.choice((-1, 1), needed)
            noise, pairs = drawn[:NOISE_PAIRS], drawn[NOISE_PAIRS:] - gain
            verdict, n = verdict_of(pairs, noise, margin, level)
            verdicts[verdict] += 1
            spent += n
        rows.append((gain, {v: count / draws for v, count in verdicts.items()}, spent / draws))
    return rows


def show_power(config):
    """Print the power of judgements by the runs of a study with two cells that do the same."""
    cells, folder, needed = {}, config['power'], NOISE_PAIRS + config['max_pairs']
    for path in files_of(folder, '*,seed=*'):
        result = read_run(path)
        if result and result.evals:
            name = os.path.basename(path).rpartition(',seed=')[0]
            cells.setdefault(name, {})[result.config['seed']] = result
    seeds = set.intersection(*map(set, cells.values())) if len(cells) == 2 else ()
    if len(seeds) < needed:
        raise UserError(f"'{folder}' must be the out_dir of a study with two cells that do the "
                        f'same, and {needed} seeds or more, as in config/judge_quick.py '
                        '--norm_eps=1e-5,1.1e-5')
    a, b = cells.values()
    differences = [difference(b[seed], a[seed], config['unit']) for seed in seeds]
    rows = power(differences, config['margin'], config['alpha'], config['max_pairs'])
    print_power(rows, differences, config['unit'])


def print_power(rows, differences, unit):
    unit = unit.replace('_', ' ')
    print(f'{len(differences)} pairs without a change: their differences have mean '
          f'{np.mean(differences):+.4f} and standard deviation {np.std(differences, ddof=1):.4f} '
          f'{unit}')
    lines = [['gain', *VERDICTS, 'pairs on average']]
    for gain, shares, pairs in rows:
        lines.append([f'{gain:.4g}', *(f'{100 * shares.get(v, 0):.1f} %' for v in VERDICTS),
                      f'{pairs:.2f}'])
    shown = [i for i in range(len(lines[0])) if any(line[i] != '0.0 %' for line in lines[1:])]
    print(markdown_table([[line[i] for i in shown] for line in lines]))
