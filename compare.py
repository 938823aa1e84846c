"""
Find out which choice is better: run a grid of settings through train.py, or read finished runs, and
report them in a table with error bars and a picture.

    # a grid: every combination of these values, each with three seeds
    python compare.py config/preset_quick_test.py --normalization=layernorm,rmsnorm --seed=1,2,3

    # a study, whose file names its cells
    python compare.py config/ablate_gpt2_to_llama.py

    # finished runs
    python compare.py out-a out-b out-c

    # one run: a table, its cost, its last samples, and report.md with loss.png in its folder
    python compare.py out-a

    # random search, by successive halving
    python compare.py config/preset_quick_test.py --search=32 --learning_rate=1e-4..1e-2

    # the loss at the end, from the first part of a run
    python compare.py --forecast=out-a

    # loss against size
    python compare.py --scaling=config/preset_quick_test.py --n_embd=64,96,128,192

    # judge a change of the code, or of a flag: better or not, with a known error rate
    python compare.py --against=HEAD config/judge_quick.py
    python compare.py --try="--token_shift=True" config/judge_quick.py
    python compare.py --ledger

    # how often would a judgement find a gain? Two cells that do the same show the noise
    python compare.py config/judge_quick.py --norm_eps=1e-5,1.1e-5 --seed=1,2,3,4,5,6,7,8,9,10,11 \\
        --out_dir=out-nulls
    python compare.py --power=out-nulls

Every cell is a run of train.py in its own folder under out_dir. After a kill, the same command
resumes the study. It writes out_dir/compare.md, compare.json and compare.png.

Cells are compared window by window, and seed by seed; docs/compare.md says how. Each p-value is for
a single comparison: one in twenty is below 0.05 by chance.
"""
import itertools
import json
import os
import re
import signal
import sys
from typing import Literal

import numpy as np

from configurator import (
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    coerce,
    configure,
    read_block,
)
from engine.common import Locked, UserError, optional, printable, replacing, show_error, try_lock
from engine.compare_report import picture, scaling_report, table
from engine.comparison import compare, costs_of, group_by_config
from engine.forecast_report import forecast_report
from engine.grid import ladder, make_cells, make_runs, seeds_of, several
from engine.hints import suggest_file
from engine.job import Launcher
from engine.results import read_run
from engine.run_report import draw_loss, run_report
from engine.study import devices_to_use, halving, remove_checkpoints, run_all

TRAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py')


def settings(argv):
    """Return (config, given) as configure() does. A key of train.py may have several values."""
    out_dir = 'out-compare'  # compare.md, compare.json, compare.png and one folder per run
    cells = {}  # {name: {key: value}} in a config file: times every combination of listed values
    baseline = ''  # the cell that all others are compared with; '': the first
    sort: Literal['', 'val_loss', 'params', 'flops_per_token', 'tokens_per_sec', 'peak_bytes',
                  'seconds'] = ''  # sort rows by this figure; '': as given
    jobs: PositiveInt | Literal['auto'] = 'auto'  # runs at a time; auto: one per GPU, or 1 on a CPU
    search: NonNegativeInt = 0  # cells to draw from lists and ranges (1e-4..1e-2) and to halve
    scaling = ''  # a config file: train it in several widths (--n_embd=64,96,128), fit a power law
    tokens_per_param: PositiveFloat = 20.0  # training tokens per parameter, for scaling
    forecast = ''  # a run, or a folder of runs: forecast the val loss at the end, and check that
    confidence: OpenFraction = 0.95  # of the intervals
    keep_checkpoints = True  # False: remove all checkpoints once every run has finished
    # judge
    against = ''  # judge the working tree against this commit, or another folder with a train.py
    try_flags = ''  # or --try: flags of train.py that only the candidate has, '--qk_norm=True ...'
    alpha: OpenFraction = 0.05  # chance that a change without any effect is found better
    margin: PositiveFloat = 0.01  # a gain that is smaller need not be found
    unit: Literal['bits_per_byte', 'nats'] = 'bits_per_byte'  # of margin and differences
    max_pairs: PositiveInt = 8  # pairs of runs, candidate and baseline with the same seed
    at: Literal['steps', 'seconds', 'flops'] = 'steps'  # of these, a pair's runs have as many
    ledger = False  # print all verdicts so far
    power = ''  # out_dir of a study, two cells that do the same: how often would a gain show?
    config, given = configure(__file__, TRAIN, argv=arguments(argv), convert=convert)
    return config, given


def convert(name, value, setting):
    """Keys of this script, dataset and out_dir have one value, and may contain a comma."""
    if name in read_block(__file__) or name in ('dataset', 'out_dir'):
        return coerce(value, setting)
    return several(name, value, setting)


def arguments(argv):
    """
    Return the arguments for configure(): no folders of runs, and the file of --scaling=... first.
    """
    files = [arg.removeprefix('--scaling=') for arg in argv if arg.startswith('--scaling=')]
    for i, arg in enumerate(argv):
        argv[i] = '--ledger=True' if arg == '--ledger' else re.sub('^--try=', '--try_flags=', arg)
    for arg in argv:
        is_flag = arg.startswith('-') or '=' in arg and '/' not in arg
        if not is_flag and not arg.endswith('.py') and not os.path.isdir(arg):
            raise UserError(f"'{arg}' is neither a config file nor the folder of a run"
                            f'{suggest_file(arg)}')
    return files + [arg for arg in argv if not os.path.isdir(arg)]


# plan

def check_baseline(config, cells):
    if config['baseline'] and config['baseline'] not in cells:
        raise UserError(f"baseline '{config['baseline']}' is not one of the cells: "
                        f"{'; '.join(cells)}")


def plan(config, given):
    """Return the list of Runs that the settings ask for."""
    if config['search'] == 1:
        raise UserError('search draws 2 cells or more, not 1')
    block = read_block(TRAIN)
    if config['scaling']:
        return ladder(config, given, block)
    usual_iters = given.without_flags()['max_iters']
    if isinstance(usual_iters, (list, tuple)):
        usual_iters = max(usual_iters)
    rng = np.random.default_rng(seeds_of(config)[0]) if config['search'] else None
    cells = make_cells(config, given, block, rng)
    runs = make_runs(config, given, block, cells, usual_iters)
    if len(runs) == 1:
        raise UserError('nothing to compare: give a key several values, as in '
                        '--normalization=layernorm,rmsnorm --seed=1,2,3, or finished runs, as in '
                        'out-a out-b')
    if config['search']:
        for run in runs:
            run.settings['always_save_checkpoint'] = True  # the better half resumes
    return runs


# finished runs

def refuse_others(given, usable, why):
    """Raise UserError if a key is given that has no effect."""
    for key in given:
        if key not in usable:
            raise UserError(f'{why}: {key} has no effect here')


def read_finished_run(folder):
    result = read_run(folder)
    if result is None or not result.evals or not result.iterations:
        raise UserError(f"'{folder}' holds no run log with window losses (run_*.json): it is not "
                        'the out_dir of a run, or the run ended before its first evaluation')
    return result


# run

def run_study(config, runs):
    """Run what has not finished. Return {cell: Results} and the list of runs that failed."""
    defaults = {key: setting.default for key, setting in read_block(TRAIN).items()}
    launcher = Launcher(TRAIN, defaults, *devices_to_use(config))
    failed = (halving if config['search'] else run_all)(runs, launcher)
    groups = {run.cell: [] for run in runs}
    for run in runs:
        if run not in failed:
            groups[run.cell].append(read_run(run.folder))
    finished = {cell: group for cell, group in groups.items() if group}
    if not finished:
        raise UserError('no run has finished, see above')
    if config['search']:
        finished = dict(sorted(finished.items(), key=longest_and_best))
    elif not groups[runs[0].cell] and not config['baseline']:
        print('NOTE: the first cell has failed, so another one is the baseline')
    return finished, failed


def longest_and_best(item):
    """Return the sort key of a cell of a search: by iterations, then by loss."""
    _, group = item
    return -group[0].iter_num, np.mean([result.evals[-1].loss for result in group])


# report

def report(groups, failed, config):
    """Print the table, and write it with its figures and pictures into out_dir."""
    out_dir, sort = config['out_dir'], config['sort']
    baseline = config['baseline'] or next(iter(groups))
    rows, facts = compare(groups, baseline, config['confidence'])
    if sort:
        rows.sort(key=lambda row: row[sort] or 0, reverse=sort == 'tokens_per_sec')
    facts |= dict(command=sys.argv, failed=[f'{run.cell}, seed {run.seed}' for run in failed])
    text = table(rows, facts)
    if config['search']:
        text += ('NOTE: the best cell of a search was selected by these figures, so it looks '
                 'better than it is: run the first few again with other seeds.\n')
    results = itertools.chain(*groups.values())
    devices = {result.startup_info['device'].split(',')[0] for result in results}
    if len(devices) > 1:
        text += ('NOTE: these runs used different devices, so speed and equal time mean little: '
                 f"{'; '.join(sorted(devices))}\n")
    if config['scaling']:
        more, fit = scaling_report(groups, config)
        text += '\n' + more
        facts |= fit
    text = printable(text)  # logs may hold anything
    print('\n' + text)
    contents = {'compare.md': text, 'compare.json': json.dumps(facts | dict(rows=rows), indent=1)}
    for name, content in contents.items():
        with replacing(os.path.join(out_dir, name), 'w', encoding='utf-8') as f:
            f.write(content)
    path = os.path.join(out_dir, 'compare.png')
    picture(groups, path)
    also = ' and scaling.png' if config['scaling'] else ''
    print(f'{path}, compare.md and compare.json{also}')


def report_single_run(folder, given):
    """Print the report on one run, and write it with a picture of the losses into its folder."""
    refuse_others(given, (), 'a single run is reported as it is, in its own folder')
    result = read_finished_run(folder)
    costs = costs_of('', [result], result.startup_info['hardware_peak_tflops'])
    text = printable(run_report(result, costs))  # logs may hold anything
    print(text)
    picture_path = draw_loss(result)
    if picture_path:
        text = f'![Loss](loss.png)\n\n{text}'
    else:
        print('no loss.png, because it needs matplotlib: pip install matplotlib')
    path = os.path.join(folder, 'report.md')
    with replacing(path, 'w', encoding='utf-8') as f:
        f.write(text)
    print(path + (' and loss.png' if picture_path else ''))


# lock and signals

def lock_out_dir(out_dir):
    os.makedirs(out_dir, exist_ok=True)
    try:
        return try_lock(os.path.join(out_dir, 'lock'), f'compare.py, process {os.getpid()}')
    except Locked as e:
        raise UserError(f"out_dir '{out_dir}' is in use by {e.holder}; --out_dir=... gives this "
                        'run another') from None


def on_signal(action):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, action)


def stop(number, frame):
    """Let the active runs save after a signal; see run_all. Further signals change nothing."""
    on_signal(signal.SIG_IGN)
    print('\nthe active runs save and end; the same command resumes them', flush=True)
    raise SystemExit(128 + number)


# judge

def judge_change(config, given, argv, folders):
    """Judge a change, or print the ledger. Return the exit status."""
    # torch is imported with them, which takes seconds
    from engine import judge, judge_power, judge_report
    if 'out_dir' not in given.flags():
        config['out_dir'] = 'out-judge'
    if config['ledger']:
        judge_report.show_ledger(config['out_dir'])
        return 0
    if config['power']:
        judge_power.show_power(config)
        return 0
    own = read_block(__file__)
    flags = {key: config[key] for key in given if key in given.flags() and key not in own}
    judge.check_settings(config, given, flags, folders)
    optional('matplotlib', 'a judgement')  # before the runs, not after them
    files = [arg for arg in argv if arg.endswith('.py') and not arg.startswith('-')]
    with lock_out_dir(config['out_dir']):
        on_signal(stop)
        return judge.judge(config, files, flags, devices_to_use(config)[1])


# the comparison, and the choice of what to do

def compare_cells(config, given, folders):
    """
    Compare finished runs or, if there are no folders of them, the runs that the settings ask for.
    Return the exit status.
    """
    for library in ('scipy', 'matplotlib'):  # before hours of runs, not after them
        optional(library, 'a comparison')
    runs, failed = [], []
    if folders:
        usable = 'out_dir', 'baseline', 'sort', 'confidence'
        refuse_others(given, usable, 'finished runs are compared as they are')
        groups = group_by_config([read_finished_run(folder) for folder in folders])
    else:
        runs = plan(config, given)
        check_baseline(config, dict.fromkeys(run.cell for run in runs))
    with lock_out_dir(config['out_dir']):
        if runs:
            on_signal(stop)
            groups, failed = run_study(config, runs)
        check_baseline(config, groups)
        report(groups, failed, config)
        if not config['keep_checkpoints'] and not failed:
            remove_checkpoints(runs)
    return 1 if failed else 0


def main(argv):
    sys.excepthook = show_error  # before configure(), which gets the arguments from arguments()
    sys.stdout.reconfigure(errors='replace')  # samples may not fit its encoding
    config, given = settings(argv)
    folders = [*{os.path.realpath(arg): arg for arg in argv if os.path.isdir(arg)}.values()]
    if any(config[key] for key in ('against', 'try_flags', 'ledger', 'power')):
        return judge_change(config, given, argv, folders)
    if config['forecast']:
        refuse_others(given, ('forecast', 'confidence'), 'a forecast reads runs as they are')
        print(printable(forecast_report(config['forecast'], folders, config['confidence'])))
        return 0
    if len(folders) == 1:
        report_single_run(folders[0], given)
        return 0
    return compare_cells(config, given, folders)


if __name__ == '__main__':
    raise SystemExit(main(sys.argv[1:]))
