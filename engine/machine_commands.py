"""
The commands of `bench.py --report`: rows that run bench.py or train.py and read what it wrote.
"""
import json
import os
import shutil
import statistics

import torch

from configurator import configure, read_block
from engine.common import GIB, ROOT
from engine.cost import add_process, memory_estimate
from engine.describe import TRAIN, meta_model
from engine.hints import stem
from engine.machine import free_memory
from engine.machine_rows import Row, command_line, run, spread
from engine.results import files_of
from model import GPTConfig

BENCH = os.path.join(ROOT, 'bench.py')
START = 10  # seconds that a command usually takes before it works
SHARE = 0.25  # of the peak, to guess the time of a step
FEW = '--warmup=1', '--repeats=3'  # the first step, one more, and three whole and three in parts
STEPS = 8


# ------------------------------------------------------------------------------------------------
# a row of bench.py

def bench_row(report, section, name, config, flags, read, seconds=0.0):
    """
    Return a row of bench.py, whose work is expected to take so many seconds beside the start.
    read(report, sides) makes (cells, numbers) of the sides that --json has.
    """
    words = ['python', 'bench.py', config, *report.flags]
    if report.peak_is_measured:  # the same for all rows
        words += [f'--peak_tflops={report.peak / 1e12:.3g}']
    words += flags

    def measure(left):
        path = os.path.join(os.path.abspath(report.folder), 'row.json')
        run([*words, f'--json={path}'], left)
        with open(path, encoding='utf-8') as f:
            sides = list(json.load(f)['sides'].values())
        os.remove(path)
        cells, numbers = read(report, sides)
        return cells, numbers | dict(sides=[side | dict(settings=None) for side in sides])

    return Row(section, name, command_line(words), START + seconds, measure)


def settings_of(report, config, *flags):
    """Return the settings of a row of bench.py."""
    argv = [os.path.join(ROOT, config), *report.flags, *flags]
    return configure(BENCH, TRAIN, argv=argv)[0]


def fitted(report, config, *flags):
    """
    Return (settings, why). Their batch is halved until memory and an eighth of the report's time
    suffice. `why` says why not even one sequence fits.
    """
    settings = settings_of(report, config, *flags)
    model, free = meta_model(settings), free_memory(report.device)
    states = 16 * model.get_num_params(False)  # weights, gradients and two moments in float32
    if states > free:
        return settings, (f'needs {states / GIB:.1f} GiB without activations, and '
                          f'{free / GIB:.1f} GiB are free')

    def too_large():
        slow = STEPS * step_seconds(report, settings) > report.seconds / 8
        return slow or report.left() > 0 and estimate(report, settings, model.config) > 0.8 * free
    while settings['batch_size'] > 1 and too_large():
        settings['batch_size'] //= 2
    return settings, ''


def fitted_row(report, section, config, flags, read, seconds=0.0):
    """Return a row of bench.py for the steps of a config, at the batch that fits."""
    settings, why = fitted(report, config, *flags)
    if why:
        return Row(section, stem(config), '', 0, unfit=why)
    flags = [f"--batch_size={settings['batch_size']}", *flags, *FEW]
    seconds += STEPS * step_seconds(report, settings)
    return bench_row(report, section, stem(config), config, flags, read, seconds)


def step_seconds(report, settings):
    """Guess the time of a training step."""
    tokens = settings['batch_size'] * settings['block_size']
    return meta_model(settings).flops_per_token() * tokens / (SHARE * report.peak)


def estimate(report, settings, model_config):
    """Return the bytes that a step takes, by estimate, beyond those of a process without one."""
    sizes = memory_estimate(model_config, settings['batch_size'], report.dtype, report.device,
                            optimizer=settings['optimizer'])
    if report.device.type == 'cpu':
        add_process(sizes, 0)
    return sizes['peak']


def step_figures(report, sides):
    """Return the cells and numbers of a training step, with memory beyond that of its process."""
    side, settings = sides[0], sides[0]['settings']
    model_config = GPTConfig(**settings['model'])
    used = side['peak_bytes'] - side['base_bytes']
    expected = estimate(report, settings, model_config)
    cells = {
        'parameters': f"{side['parameters']:,}",
        'tokens': f"{settings['batch_size']} x {model_config.block_size}",
        'step': spread(side['times']['whole']),
        'tokens/s': f"{side['tokens_per_sec']:,.0f}",
        'TFLOP/s': f"{side['tflops']:.3g}",
        'MFU': f"{100 * side['mfu']:.1f}%",
        'memory': f'{used / GIB:.2f} GiB',
        'estimated': f'{expected / GIB:.2f} GiB'}
    if side['compile']:
        cells['compiling'] = f"{side['compile']:.0f} s"
    tokens = settings['batch_size'] * model_config.block_size
    return cells, dict(seconds=side['whole'], bytes=used, estimate=expected,
                       flops=side['flops_per_token'] * tokens)


# ------------------------------------------------------------------------------------------------
# a row of train.py

SHORT = ('--eval_interval=1000', '--eval_iters=1', '--log_interval=1', '--sample_interval=0',
         '--overwrite=True')


def train_flags(report):
    """Return the user's flags that train.py has."""
    known = read_block(TRAIN)
    return [flag for flag in report.flags if flag.removeprefix('--').partition('=')[0] in known]


def train_row(report, section, name, config, flags, read, seconds, processes=1, unfit=''):
    """
    Return a row of train.py, in several processes. read(report, log) makes (cells, numbers) of its
    run log.
    """
    out_dir = os.path.join(report.folder, 'run')
    words, env = ['python'], {}
    if processes > 1:
        words += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    if report.device.type == 'cpu':
        env = dict(OMP_NUM_THREADS=str(max(1, torch.get_num_threads() // processes)))
    words += ['train.py', config, *train_flags(report), *SHORT, *flags,
              f'--out_dir={os.path.relpath(out_dir, ROOT)}']

    def measure(left):
        try:
            run(words, left, env)
            return read(report, run_log(out_dir))
        finally:
            shutil.rmtree(out_dir, ignore_errors=True)

    return Row(section, name, command_line(words, env), seconds, measure, unfit)


def run_log(out_dir):
    """Return the newest run log in a folder."""
    with open(files_of(out_dir, 'run_*.json')[-1], encoding='utf-8') as f:
        return json.load(f)


def step_time(log):
    """Return the median time of an iteration in seconds, without the first one."""
    times = [entry['time_ms'] for entry in log['training_iterations'][1:]]
    return statistics.median(times) / 1000
