"""
Measure what a config costs on this machine: step time, tokens/s, TFLOP/s, MFU and memory.

    python bench.py config/full_llama_124m.py --batch_size=2 --block_size=512
    python bench.py config/full_gpt2_124m.py --archs=gpt2,llama,hybrid    # presets or files
    python bench.py config/full_gpt2_124m.py --versus=../nanoGPT/model.py # another checkout
    python bench.py config/full_gpt2_124m.py --what=generate              # see --what below
    python bench.py config/full_gpt2_124m.py --find_batch_size=True       # largest that fits
    python bench.py config/full_gpt2_124m.py --profile=True               # slowest operations
    python bench.py --report=out-report --minutes=10                      # the whole machine

--what=train times a training step, forward the loss without gradients, generate the continuation of
a prompt, and data a training step with batches from the loader; memory compares the estimated with
the measured memory of a step.

Every side of a comparison runs in its own process, so its memory is measured separately. The sides
take alternating steps, so other load on the machine affects them alike. Figures are medians, with
the middle half in parentheses. Weights and ids are random. FLOPs count matmuls only, with attention
in full; MFU is their share of the peak for the side's dtype.
"""
import ast
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Literal

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # before torch is imported, as in train.py
import numpy as np
import torch

from configurator import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, configure
from data.folder import find_datasets, write_dataset
from engine import optim
from engine.bench_report import add_ratios, figures, print_table
from engine.common import GIB, UserError, optional, printable
from engine.cost import check_weights_fit
from engine.describe import TRAIN, meta_model
from engine.fast_linear import can_compile
from engine.machine import device_name, peak_bandwidth, peak_flops, pick_device
from engine.machine_report import machine_report
from engine.plan import memory_figure, plan_ranks
from engine.run_report import save_picture
from engine.side import Side, SideError
from model import PRESETS


def settings():
    """
    Return the settings. They are in a function because the process of each side imports this file
    again.
    """
    what: Literal['train', 'forward', 'generate', 'data', 'memory'] = 'train'  # what to measure
    archs = ''  # comma-separated presets or config files, side by side
    versus = ''  # another checkout, or its model.py with nanoGPT's GPT and GPTConfig; same shapes
    versus_dtype: Literal['same', 'float32', 'bfloat16', 'float16'] = 'same'  # its dtype
    versus_compile: Literal['same', True, False] = 'same'  # torch.compile for it
    versus_fused = True  # its AdamW fused, as ours is
    accumulation: PositiveInt = 1  # micro-batches per timed step
    warmup: NonNegativeInt = 2  # rounds that are not counted, after the first step
    repeats: PositiveInt = 10  # rounds that are counted
    max_seconds: NonNegativeFloat = 300.0  # stop before `repeats` rounds, but after 3, beyond this
    prompt_tokens: PositiveInt = 256  # for what=generate
    new_tokens: PositiveInt = 64  # for what=generate; at least 2
    num_samples: PositiveInt = 1  # for what=generate: prompts that are continued together
    quantize: Literal['', 'int8'] = ''  # for what=generate: add an int8 side, as sample.py's
    find_batch_size = False  # find the largest micro-batch that fits, and the accumulation to match
    plan = ''  # numbers of ranks, as in 8,64,512: memory, traffic and step time on paper
    interconnect_gbps: PositiveFloat = 400.0  # for plan: gigabits per second that a rank can send
    node_gbps: NonNegativeFloat = 0.0  # for plan: inside a group of fsdp_shard_size; 0: the same
    plan_tflops: NonNegativeFloat = 0.0  # for plan: TFLOP/s of a device in training; 0: measure it
    plan_picture = ''  # for plan: draw the memory per rank into this file, such as memory.png
    profile = False  # print the ten most expensive operations; trace.json for ui.perfetto.dev
    json = ''  # write every figure to this file
    report = ''  # measure the machine, and write report.md and pictures into this folder
    minutes: PositiveFloat = 10.0  # for report: leave out what would take longer than this in all
    sections = ''  # for report: comma-separated ones, such as ceilings,training; '': all
    config, given = configure(__file__, TRAIN)
    return config


# ------------------------------------------------------------------------------------------------
# plan: the sides and their settings

def check(config):
    """Raise UserError for settings that exclude each other or name files that cannot be used."""
    what = config['what']
    optim.check_name(config['optimizer'])
    if config['new_tokens'] < 2:
        raise UserError(f"new_tokens must be at least 2, not {config['new_tokens']}")
    alone = config['find_batch_size'] or config['plan']
    if alone and (config['archs'] or config['versus']):
        raise UserError('--find_batch_size and --plan take one config: no --archs and no --versus')
    if config['quantize'] and what != 'generate':
        raise UserError('--quantize is for --what=generate')
    if config['versus'] and what == 'data':
        raise UserError('--what=data times our loader and takes no --versus')
    if config['plan'] and not re.fullmatch('[1-9][0-9]*(,[1-9][0-9]*)*', config['plan']):
        raise UserError(f"--plan takes numbers of ranks, such as 8,64,512, not '{config['plan']}'")
    if config['plan_picture'] and not (config['plan'] and config['plan_picture'].endswith('.png')):
        raise UserError('--plan_picture is the name of a .png file, and needs --plan')
    if config['plan_picture']:
        optional('matplotlib', '--plan_picture')
    if config['versus']:
        check_versus(config['versus'])
    folder = os.path.dirname(os.path.abspath(config['json']))
    if config['json'] and (os.path.isdir(config['json']) or not os.access(folder, os.W_OK)):
        raise UserError(f"--json: there is no writable folder for '{config['json']}'")


def check_versus(path):
    """
    Raise UserError unless a file defines GPT and GPTConfig. It is only read; its side executes it.
    """
    try:
        with open(path, encoding='utf-8') as f:
            statements = ast.parse(f.read()).body
    except (OSError, ValueError, SyntaxError) as e:
        raise UserError(f"--versus: '{path}' cannot be read as Python ({type(e).__name__}); "
                        'name the model.py of another checkout') from None
    classes = {s.name for s in statements if isinstance(s, ast.ClassDef)}
    if not {'GPT', 'GPTConfig'} <= classes:
        raise UserError(f"--versus: '{path}' is not a model: it has no classes GPT and GPTConfig, "
                        "as nanoGPT's model.py has")


def configs_asked(config):
    """
    Return [(name, settings)] of the presets and files in config['archs'], or of the config itself.
    """
    if not config['archs']:
        return [('ours', config)]
    names = config['archs'].split(',')
    if len({os.path.basename(name) for name in names}) < len(names):
        raise UserError(f"--archs={config['archs']} names one of them twice")
    flags = [arg for arg in sys.argv[1:] if arg.startswith('--')]
    files = [arg for arg in sys.argv[1:] if not arg.startswith('--')]
    asked = []
    for name in names:
        if name in PRESETS:
            # Parts that a file sets belong to its own preset and to no other.
            keys = () if name == config['arch_preset'] else (*PRESETS[name], 'd_ff')
            unset = [f'--{key}=None' for key in keys]
            argv = [*files, *unset, *flags, f'--arch_preset={name}']
        elif os.path.isfile(name):
            argv = [name, *flags]
        else:
            raise UserError(f"unknown arch '{name}' in --archs: it is neither a preset "
                            f"({', '.join(PRESETS)}) nor a config file")
        asked.append((os.path.basename(name), configure(__file__, TRAIN, argv=argv)[0]))
    return asked


def plan_sides(config, device, dtype, scratch):
    """Return [(name, settings of the side, its model on the meta device)]."""
    sides = []
    compiled = device.type == 'cuda' if config['compile'] == 'auto' else config['compile']
    if config['what'] == 'generate':  # as sample.py does
        compiled = config['compile'] is True and can_compile(device, config['num_samples'])
    for name, asked in configs_asked(config):
        if asked['batch_size'] == 'auto':
            raise UserError("batch_size='auto' is for train.py; use --find_batch_size=True here")
        model = meta_model(asked)
        model.config.unpadded_vocab_size = None  # both sides sample from the whole vocabulary
        check_length(config, model.config)
        side = asked | dict(
            versus='', quantize='', fused=True, device=str(device), dtype=dtype,
            asked_dtype=config['dtype'], compile=compiled, model=asdict(model.config),
            data_dir=find_data(asked['dataset'], config['what'], model, f'{scratch}/{name}'))
        sides.append((name, side, model))
    name, first, model = sides[0]
    if config['quantize']:
        sides.insert(0, (f'{name}, int8', first | dict(quantize=config['quantize']), model))
    if config['versus']:
        sides.append((*versus_side(config, first), model))
    return sides


def check_length(config, model_config):
    length = config['prompt_tokens'] + config['new_tokens']
    if config['what'] == 'generate' and length > model_config.block_size:
        raise UserError(f'prompt_tokens + new_tokens = {length} exceeds '
                        f'block_size={model_config.block_size}')


def find_data(dataset, what, model, scratch):
    """
    Return the folder of the data set, or of the first one of several. If it is not prepared, make
    one of random ids.
    """
    folder = find_datasets(dataset)[0][2]
    if what != 'data' or any(folder.glob('train*.bin')):
        return str(folder)
    print(printable(f"data set '{dataset}' is not prepared: using 10 million random ids instead"))
    vocab_size = model.config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocab_size, 10 ** 7)
    meta = dict(vocab_size=vocab_size, tokenizer={'name': 'gpt2'})
    write_dataset(scratch, {'train': ids}, meta)
    return scratch


def versus_side(config, ours):
    """Return (name, settings) of the other checkout's side."""
    folders = os.path.abspath(config['versus']).split(os.sep)
    theirs = ours | dict(versus=config['versus'], fused=config['versus_fused'])
    for key in ('dtype', 'compile'):
        if config[f'versus_{key}'] != 'same':
            theirs[key] = config[f'versus_{key}']
    if config['what'] == 'generate':  # their generate() is never compiled
        theirs['compile'] = False
    return os.path.join(*folders[-2:]), theirs


# ------------------------------------------------------------------------------------------------
# run: the sides alternate

def take_turns(sides, what, warmup, repeats, max_seconds):
    """Fill side.times, {part: [seconds per round]}, and side.first, the time of its first step."""
    for side in sides:
        side.first = side.step()['whole']
        tell(f"  {printable(side.name)}: set up in {side.info['setup']:.1f} s, "
             f'first step after another {side.first:.1f} s\n')
    for _ in range(warmup):
        for side in sides:
            side.step()
    requests = ['whole', 'parts'] if what in ('train', 'generate', 'data') else ['whole']
    t0 = time.time()
    for done in range(1, repeats + 1):
        for request in requests:
            for side in sides:
                for part, seconds in side.step(request).items():
                    side.times.setdefault(part, []).append(seconds)
        spent = time.time() - t0
        if sys.stderr.isatty():
            tell(f'\r  round {done}/{repeats}, {spent / done * (repeats - done):.0f} s left ')
        if 3 <= done < repeats and spent > max_seconds:
            tell(f'  stopped after {done} of {repeats} rounds: --max_seconds={max_seconds:g}\n')
            break
    if sys.stderr.isatty():
        tell('\r' + ' ' * 40 + '\r')


def tell(text):
    print(text, end='', file=sys.stderr, flush=True)


def time_sides(config, sides, device):
    """Time the sides and print their table. Return the results for --json."""
    peaks, bandwidth = {}, None
    if config['what'] == 'generate':
        bandwidth = peak_bandwidth(device)
    else:
        dtypes = dict.fromkeys(s['dtype'] for _, s, _ in sides)
        peaks = {dtype: find_peak(config, dtype, device) for dtype in dtypes}
    running = [Side(name, s) for name, s, _ in sides]
    for side in running:
        if side.info['note']:
            print(printable(f"NOTE: {side.name}: {side.info['note']}"))
    repeats = 1 if config['what'] == 'memory' else config['repeats']
    take_turns(running, config['what'], config['warmup'], repeats, config['max_seconds'])

    columns = []
    for side, (_, s, model) in zip(running, sides):
        rows, numbers = figures(side, model, peaks.get(s['dtype']), bandwidth)
        if side is not running[0]:
            add_ratios(rows, numbers, side, running[0])
        columns.append((side.name, rows, numbers))
    print_table(columns)
    if any(numbers.get('mfu', 0) > 1 for _, _, numbers in columns):
        print('NOTE: an MFU over 100 % means that the peak is too low. If it was measured, other '
              'programs may have slowed that: run this again, or set --peak_tflops')
    if config['profile']:
        profiled = running[0].ask('profile')
        print(profiled['table'] + '\ntrace: trace.json')
        columns[0][2]['profile'] = profiled['parts']
    for side in running:
        side.close()
    results = {side.name: numbers | dict(settings=side.s, times=side.times)
               for side, (_, _, numbers) in zip(running, columns)}
    return dict(sides=results)


def find_peak(config, dtype, device):
    """Return (FLOP/s, source), and print them."""
    flops, source = peak_flops(device, dtype, config['peak_tflops'])
    print(f'peak: {flops / 1e12:.4g} TFLOP/s ({source})', flush=True)
    return flops, source


# ------------------------------------------------------------------------------------------------
# --find_batch_size

def fits(s, batch_size):
    """Return whether a training step of that micro-batch fits, tried in its own process."""
    t0 = time.time()
    try:
        side = Side('trial', s | dict(batch_size=batch_size))
        side.step()
        side.close()
        result = f'fits, {max(side.memory.values()) / GIB:.2f} GiB'
    except SideError as e:
        if not e.out_of_memory:
            raise
        result = 'does not fit'
    print(f'  batch_size {batch_size:>5}: {result} ({time.time() - t0:.0f} s)', flush=True)
    return result != 'does not fit'


def largest_that_fits(s, limit):
    """
    Return the largest micro-batch up to `limit` that fits, or 0, by doubling and then bisection.
    """
    largest, too_large = 0, limit + 1
    while too_large - largest > 1:
        trial = min(max(1, 2 * largest), limit)
        if too_large <= limit:
            trial = (largest + too_large) // 2
        if fits(s, trial):
            largest = trial
        else:
            too_large = trial
    return largest


def find_batch_size(config, s):
    """
    Print the largest micro-batch that fits, and the flags that keep the tokens per iteration.
    Return them.
    """
    accumulation = config['gradient_accumulation_steps']
    sequences = config['batch_size'] * accumulation
    s = s | dict(what='fits', compile=False, accumulation=accumulation)
    print(f'the largest micro-batch up to the {sequences} sequences of an iteration, '
          'without compile, which needs less:', flush=True)
    largest = largest_that_fits(s, sequences)
    if not largest:
        raise UserError('not even a micro-batch of one sequence fits; try '
                        '--activation_checkpointing=True, a smaller model or block_size')
    batch_size = max(b for b in range(1, largest + 1) if sequences % b == 0)
    accumulation = sequences // batch_size
    everything = ', all of an iteration' if largest == sequences else ''
    print(f'largest that fits: {largest}{everything}; with {sequences} sequences per iteration '
          f'as before: --batch_size={batch_size} --gradient_accumulation_steps={accumulation}')
    return dict(largest=largest, batch_size=batch_size, gradient_accumulation_steps=accumulation)


# ------------------------------------------------------------------------------------------------
# the whole

def write_json(config, machine, results):
    if config['json']:
        facts = dict(time=time.strftime('%Y-%m-%d %H:%M:%S'), command=sys.argv, machine=machine,
                     config=config)
        with open(config['json'], 'w', encoding='utf-8') as f:
            json.dump(facts | results, f, indent=1)


def main():
    config = settings()
    if os.path.isdir(config['versus']):
        config['versus'] = os.path.join(config['versus'], 'model.py')
    check(config)
    device, dtype = pick_device(config['device'], config['dtype'])
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if config['report']:
        return machine_report(config, sys.argv[1:], device, dtype)
    with tempfile.TemporaryDirectory() as scratch:
        sides = plan_sides(config, device, dtype, scratch)
        machine = dict(device=str(device), name=device_name(device),
                       torch=str(torch.__version__), python=sys.version.split()[0])
        print('{device} ({name}), torch {torch}'.format(**machine) + f", what={config['what']}")
        _, s, model = sides[0]
        if not config['plan']:  # a plan builds no weights
            for _, _, other in sides:
                check_weights_fit(other.config)
        if config['find_batch_size']:
            results = find_batch_size(config, s)
        elif config['plan']:
            results = plan_ranks(config, s, model, device)
            if config['plan_picture']:
                title = (f'{model.get_num_params(False):,} parameters, {s["batch_size"]} sequences '
                         f'of {model.config.block_size:,} tokens per micro-batch')
                save_picture(memory_figure(results['plan'], title), config['plan_picture'])
                print(printable(config['plan_picture']))
        else:
            results = time_sides(config, sides, device)
    write_json(config, machine, results)


if __name__ == '__main__':
    main()
