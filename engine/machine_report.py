"""
Measure a machine (bench.py --report): one function per section, which yields its rows. A row is a
command that a user can repeat; most of them are bench.py itself.
"""
import functools
import itertools
import os
import statistics

import torch

from engine.common import GIB, ROOT, UserError, printable
from engine.describe import meta_model
from engine.gpu_checks import failed_checks, gpu_checks
from engine.hints import stem
from engine.machine import copy_times, linear_times, machine_facts, matmul_times, peak_flops
from engine.machine_commands import (
    FEW,
    SHARE,
    START,
    STEPS,
    bench_row,
    fitted,
    fitted_row,
    settings_of,
    step_figures,
    step_seconds,
    step_time,
    train_row,
)
from engine.machine_pictures import draw_pictures
from engine.machine_rows import Report, Row, command_line, measure_rows, spread, write

QUICK, LARGE = 'config/preset_quick_test.py', 'config/full_gpt2_124m.py'
PRESETS = (QUICK, 'config/preset_small.py', LARGE, 'config/preset_350m.py',
           'config/full_llama_1.36b.py')
COMPILING = 60  # seconds that it usually takes
# {setting: its values as multiples of the config's}
GROWTH = dict(n_embd=(1, 2, 4, 8), n_layer=(1, 2, 4, 8), block_size=(2, 8, 32, 64))
GROWTH_GPU = dict(n_embd=(0.5, 1, 2, 4), n_layer=(0.5, 1, 2, 4), block_size=(0.25, 1, 4, 8))


def machine_report(config, argv, device, dtype):
    """
    Measure the sections asked for until the deadline, and write report.md, report.json and pictures
    into a folder. `argv` is the command line: its other flags hold for every row.
    """
    names = sections_asked(config, device)
    flags = user_flags(argv)
    os.makedirs(config['report'], exist_ok=True)
    peak, source = peak_flops(device, dtype, config['peak_tflops'])
    report = Report(
        folder=config['report'], device=device, dtype=dtype, flags=flags, versus=config['versus'],
        peak=peak, peak_is_measured=source.startswith('measured'),
        seconds=58 * config['minutes'],  # the rest is for the start, the peak and the pictures
        machine=machine_facts(device, dtype, peak, source),
        sections={name: ' '.join(SECTIONS[name].__doc__.split()) for name in names})
    try:
        for name in names:
            measure_rows(report, SECTIONS[name](report))
        missing = sum(bool(row['note']) for row in report.rows)
        left_out = f'{missing} row' + 's' * (missing > 1)
        report.ended = f'complete but for {left_out}' if missing else 'complete'
    except KeyboardInterrupt:
        report.ended = 'cut short by Ctrl-C'
        raise
    finally:
        draw_pictures(report)
        write(report)
        path = os.path.join(report.folder, 'report.md')
        print(printable(f'wrote {path}, which is {report.ended}'))
    if failed := failed_checks(report.rows_of('correctness')):
        raise UserError(f"{len(failed)} checks of correctness failed: {'; '.join(failed)}")


def sections_asked(config, device):
    """Return the names of the sections to measure, in their order."""
    asked = [name for name in config['sections'].split(',') if name]
    if unknown := set(asked) - set(SECTIONS):
        raise UserError(f"--sections: there is no '{min(unknown)}'; choose from "
                        f"{', '.join(SECTIONS)}")
    if 'versus' in asked and not config['versus']:
        raise UserError('--sections=versus needs --versus=FOLDER, with the other checkout')
    if asked:
        return [name for name in SECTIONS if name in asked]
    # a CPU is what a GPU is compared with
    applies = dict(correctness=device.type == 'cuda', versus=bool(config['versus']))
    return [name for name in SECTIONS if applies.get(name, True)]


def user_flags(argv):
    """Return the flags that hold for every row. A row has its own config file and its own work."""
    own = 'report', 'minutes', 'sections', 'versus'
    never = 'what', 'archs', 'plan', 'find_batch_size', 'profile', 'quantize', 'json'
    flags = []
    for arg in argv:
        key = arg.removeprefix('--').partition('=')[0]
        if not arg.startswith('--') or key in never:
            raise UserError(f"--report chooses what it measures: leave out '{arg}'")
        flags += [arg] if key not in own else []
    return flags


# ------------------------------------------------------------------------------------------------
# sections: each yields its rows, and its docstring stands above its table

def correctness(report):
    """Losses of ten steps beside those of a reference, from which they differ by a tolerance."""
    return gpu_checks(report)


def ceilings(report):
    """Square matmuls of each size and dtype, and a copy of memory, which is read and written."""
    on_gpu = report.device.type == 'cuda'
    for dtype in dict.fromkeys([report.dtype, 'float32', 'bfloat16', 'float16']):
        for n in (1024, 2048, 4096, 8192) if on_gpu else (256, 512, 1024, 2048):
            before = report.rows[-1]['numbers'] if report.rows else {}
            if before.get('dtype') == dtype and 8 * before['seconds'] > 2:
                break  # it would take more than two seconds
            yield matmul_row(report, n, dtype)
    nbytes = 2 ** (30 if on_gpu else 28)

    def measure(left):
        rates = [2 * nbytes / t for t in copy_times(nbytes, report.device, 1.0)]
        return {'rate': spread(rates, 'GB/s', 1e-9)}, dict(rates=rates)
    command = machine_command(f'copy_times({nbytes}, torch.device("{report.device}"), 1.0)')
    yield Row('ceilings', f'copy of {nbytes // 2 ** 20} MiB', command, 2, measure)


def matmul_row(report, n, dtype):
    def measure(left):
        times = matmul_times(n, report.device, dtype, 0.5)
        rates = [2 * n ** 3 / t for t in times]
        if dtype == report.dtype and report.peak_is_measured and max(rates) > report.peak:
            report.peak = max(rates)
            report.machine['peak'] = f'{report.peak / 1e12:.4g} TFLOP/s (measured, {n} x {n})'
        quartiles = [rate / 1e12 for rate in statistics.quantiles(rates * 2)]
        cells = {'rate': spread(rates, 'TFLOP/s', 1e-12), 'best': f'{max(rates) / 1e12:.3g}'}
        return cells, dict(x=n, dtype=dtype, seconds=min(times), tflops=quartiles)
    call = f'matmul_times({n}, torch.device("{report.device}"), "{dtype}", 0.5)'
    return Row('ceilings', f'{dtype}, {n} x {n}', machine_command(call), 3, measure)


def matmuls(report):
    """
    The three matmuls that train each Linear of GPT-2 124M, on the tokens of a micro-batch that fits
    and on twice as many, as rates and as shares of the fastest square matmul.
    """
    settings, why = fitted(report, LARGE)
    if why:
        yield Row('matmuls', stem(LARGE), '', 0, unfit=why)
        return
    linears = [m for m in meta_model(settings).modules() if isinstance(m, torch.nn.Linear)]
    shapes = dict.fromkeys((linear.in_features, linear.out_features) for linear in linears)
    tokens = settings['batch_size'] * settings['block_size']
    for n, (n_in, n_out) in itertools.product((tokens, 2 * tokens), shapes):
        yield linear_row(report, n, n_in, n_out)


def linear_row(report, tokens, n_in, n_out):
    flops = 2 * tokens * n_in * n_out

    def measure(left):
        times = linear_times(tokens, n_in, n_out, report.device, report.dtype, 0.3)
        rates = {name: flops / statistics.median(values) for name, values in times.items()}
        cells = {name: f'{rate / 1e12:.3g} TFLOP/s, {100 * rate / report.peak:.0f}%'
                 for name, rate in rates.items()}
        return cells, dict(flops=flops, rates=rates)
    call = (f'linear_times({tokens}, {n_in}, {n_out}, torch.device("{report.device}"), '
            f'"{report.dtype}", 0.3)')
    seconds = 3 * (0.3 + 2 * flops / (SHARE * report.peak))
    name = f'{tokens:,} tokens, {n_in} to {n_out}'
    return Row('matmuls', name, machine_command(call), seconds, measure)


def machine_command(call):
    """Return a command that prints what a function of engine/machine.py returns."""
    name = call.partition('(')[0]
    code = f'import torch; from engine.machine import {name}; print({call})'
    return command_line(['python', '-c', code])


def training(report):
    """A training step of presets of growing size, at the batch that fits."""
    for config in PRESETS:
        yield fitted_row(report, 'training', config, [], step_figures)


def parts(report):
    """Where the time of a step goes, by torch's profiler, without compile."""
    for config in QUICK, LARGE:
        flags = ['--what=data', '--profile=True', '--compile=False']
        yield fitted_row(report, 'parts', config, flags, part_figures)


def part_figures(report, sides):
    seconds, waiting = sides[0]['profile'], sides[0]['waiting_share']
    shares = {part: (1 - waiting) * t / sum(seconds.values()) for part, t in seconds.items()}
    rest = shares.pop('the rest')
    shares |= {'waiting for data': waiting, 'the rest': rest}
    name = f"trace_{sides[0]['parameters']}.json"
    os.replace(os.path.join(ROOT, 'trace.json'), os.path.join(report.folder, name))
    return {part: f'{100 * share:.1f}%' for part, share in shares.items()}, dict(shares=shares)


def compiling(report):
    """The same step with torch.compile and without."""
    config = LARGE if report.device.type == 'cuda' else QUICK
    for compiled in False, True:
        row = fitted_row(report, 'compiling', config, [f'--compile={compiled}'], step_figures,
                         COMPILING if compiled else 0)
        yield row._replace(name=f'{row.name}, compile {compiled}')


def generation(report):
    """
    GPT-2 124M continues prompts; the limit is what the memory's bandwidth allows for the weights
    and caches that each step reads.
    """
    kinds = {'1 at a time': ['--num_samples=1'], '16 at a time': ['--num_samples=16']}
    if report.device.type == 'cpu':
        kinds['1 at a time, compiled'] = ['--num_samples=1', '--compile=True']
    for name, flags in kinds.items():
        flags = ['--what=generate', *flags, *FEW]
        yield bench_row(report, 'generation', name, LARGE, flags, generate_figures, 30)


def generate_figures(report, sides):
    side = sides[0]
    share = side['decode_tokens_per_sec'] / side['bandwidth_limit_tokens_per_sec']
    cells = {'all tokens': spread(side['times']['whole'], 's', 1.0),
             'tokens/s after the first': f"{side['decode_tokens_per_sec']:,.1f}",
             'limit': f"{side['bandwidth_limit_tokens_per_sec']:,.1f}",
             'share of the limit': f'{100 * share:.0f}%'}
    return cells, dict(share=share)


def loader(report):
    """Batches from the loader: reading one, and how long steps wait for the next one."""
    yield fitted_row(report, 'loader', QUICK, ['--what=data'], loader_figures)


def loader_figures(report, sides):
    share = sides[0]['waiting_share']
    times = sides[0]['times']
    return {'reading': spread(times['reading']), 'step': spread(times['whole']),
            'waiting': f'{100 * share:.2f}% of the steps'}, dict(waiting_share=share)


def checkpoint(report):
    """A checkpoint of train.py, beside a step and beside a thousand of them."""
    for config in QUICK, LARGE:
        settings, why = fitted(report, config)
        flags = ['--dataset=pystdlib', f"--batch_size={settings['batch_size']}",
                 '--gradient_accumulation_steps=1', '--max_iters=6', '--save_interval=2']
        seconds = 2 * START + 8 * step_seconds(report, settings)
        yield train_row(report, 'checkpoint', stem(config), config, flags, checkpoint_figures,
                        seconds, unfit=why)


def checkpoint_figures(report, log):
    step = step_time(log)
    saving = [entry['seconds'] for entry in log['checkpoints']]
    share = statistics.median(saving) / step
    cells = {'parameters': f"{log['startup_info']['total_params']:,}", 'step': f'{step:.3g} s',
             'checkpoint': spread(saving, 's', 1.0), 'of a step': f'{100 * share:.0f}%',
             'every 1000 steps': f'{share / 10:.2f}%'}
    return cells, dict(seconds=step, saving=saving, share=share)


def growth(report):
    """A training step at several widths, depths and lengths of context, of which one changes."""
    on_gpu = report.device.type == 'cuda'
    config, factors = (LARGE, GROWTH_GPU) if on_gpu else (QUICK, GROWTH)
    base = settings_of(report, config)
    for key in factors:
        for factor in factors[key]:
            value = round(factor * base[key])
            flags = [f'--{key}={value}', '--optimizer=adamw', '--compile=False', *FEW]
            flags += [f"--batch_size={1 if key == 'block_size' else 4}"]
            seconds = STEPS * step_seconds(report, settings_of(report, config, *flags))
            read = functools.partial(growth_figures, key=key, x=value)
            yield bench_row(report, 'growth', f'{key} {value}', config, flags, read, seconds)


def growth_figures(report, sides, key, x):
    cells, numbers = step_figures(report, sides)
    return cells, numbers | dict(key=key, x=x)


def processes(report):
    """The same iteration of train.py divided among processes, by DDP."""
    on_gpu = report.device.type == 'cuda'
    n = torch.cuda.device_count() if on_gpu else min(4, os.cpu_count())
    counts = [count for count in (1, 2, 4, 8) if count <= n]
    for count in counts if len(counts) > 1 else []:
        flags = ['--dataset=pystdlib', f'--gradient_accumulation_steps={counts[-1]}',
                 '--max_iters=20']
        read = functools.partial(process_figures, x=count)
        yield train_row(report, 'processes', str(count), LARGE if on_gpu else QUICK, flags, read,
                        3 * START, processes=count)


def process_figures(report, log, x):
    seconds, startup = step_time(log), log['startup_info']
    flops = startup['flops_per_token'] * startup['tokens_per_iter']
    if report.device.type == 'cuda':
        flops /= x  # processes on a CPU share its cores, so they gain nothing
    memory = log['training_iterations'][-1]['memory']['peak']
    cells = {'iteration': f'{1000 * seconds:.1f} ms',
             'tokens/s': f"{startup['tokens_per_iter'] / seconds:,.0f}",
             'memory of each': f'{memory / GIB:.2f} GiB'}
    return cells, dict(key='processes', x=x, seconds=seconds, flops=flops, bytes=memory,
                       estimate=startup['memory_estimate']['peak'])


def versus(report):
    """The same steps of another checkout, in turn with ours; a ratio above 1: ours is faster."""
    flags = [f'--versus={os.path.relpath(report.versus, ROOT)}', '--activation=gelu']
    if report.device.type == 'cpu':  # as nanoGPT's train.py runs on a CPU
        flags += ['--versus_dtype=float32', '--versus_fused=False', '--versus_compile=False']
    yield fitted_row(report, 'versus', LARGE, flags, versus_figures)
    generate = [*flags, '--what=generate', *FEW]
    yield bench_row(report, 'versus', 'generation', LARGE, generate, versus_figures, 60)


def versus_figures(report, sides):
    ours, theirs = sides
    cells = {'ours': spread(ours['times']['whole']), 'theirs': spread(theirs['times']['whole']),
             'ratio': f"{theirs['first_is_faster_by']:.2f}x",
             'memory, ours and theirs':
                 f"{ours['peak_bytes'] / GIB:.2f}, {theirs['peak_bytes'] / GIB:.2f} GiB"}
    return cells, dict(ratio=theirs['first_is_faster_by'])


SECTIONS = {section.__name__: section for section in (
    correctness, ceilings, training, parts, matmuls, compiling, generation, loader, checkpoint,
    growth, processes, versus)}  # the most important first
