"""
What a config costs on this machine: time a step, tokens/s, TFLOP/s, MFU and memory, alone or side by side.

    python bench.py config/full_llama_124m.py --batch_size=2 --block_size=512
    python bench.py config/full_gpt2_124m.py --archs=gpt2,llama,hybrid          # presets or config files, in one table
    python bench.py config/full_gpt2_124m.py --versus=../nanoGPT/model.py       # another checkout's GPT, turn about with ours
    python bench.py config/full_gpt2_124m.py --what=generate                    # also forward, data, memory
    python bench.py config/full_gpt2_124m.py --find_batch_size=True             # the largest micro-batch that fits
    python bench.py config/full_gpt2_124m.py --profile=True                     # the ten dearest operations, and a trace

Every side runs in a process of its own, so that its memory is its own, and the sides take turns, a step each, so that what
else the machine does meets all of them alike. Figures are medians; the spread beside them is the middle half. Ids are random, as
is the model. FLOPs are those of matmuls, attention in full; MFU is their share of the peak for the side's dtype.
"""
import ast
import contextlib
import glob
import importlib.util
import inspect
import io
import json as jsonlib
import math
import multiprocessing
import os
import re
import resource
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, fields, replace
from typing import Literal

import numpy as np
import torch

from configurator import configure, fail
from data.loader import Loader, find_datasets, write_dataset
from engine.common import first_line, out_of_memory
from engine.cost import memory_estimate, meta_model
from engine.machine import keep_freed_memory, memory, peak_flops, pick_device
from engine.report import gradient_statistics
from model import GPT, PRESETS, GPTConfig

HERE = os.path.dirname(os.path.abspath(__file__))
GIB = 2 ** 30


# ---------------------------------------------------------------------------------------------------------------------
# one side, in its own process

def synchronize(device):
    """Wait until the device has done what it was given."""
    if device.type != 'cpu':
        getattr(torch, device.type).synchronize()


def build(s):
    """The model of a side, on its device, from its own module; how its GPTConfig differs from what was asked is in the note."""
    device, module = torch.device(s['device']), sys.modules[GPT.__module__]
    if s['versus']:
        spec = importlib.util.spec_from_file_location('versus', s['versus'])
        module = importlib.util.module_from_spec(spec)
        sys.modules['versus'] = module  # dataclasses look themselves up here
        sys.path.insert(0, os.path.dirname(os.path.abspath(s['versus'])))
        spec.loader.exec_module(module)
    if device.type == 'cpu' and (not s['versus'] or hasattr(module, 'keep_freed_memory')):  # nanoGPT's side keeps the malloc that nanoGPT has
        keep_freed_memory()
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')
    torch.manual_seed(s['seed'])
    known = {f.name for f in fields(module.GPTConfig)}
    with contextlib.redirect_stdout(io.StringIO()):  # nanoGPT's prints
        model = module.GPT(module.GPTConfig(**{k: v for k, v in s['model'].items() if k in known}))
    lost = [k for k, v in s['model'].items() if k not in known and v not in (getattr(GPTConfig(), k), None) and k != 'unpadded_vocab_size']
    notes = [f"it does not know {', '.join(lost)}: not the same model"] * bool(lost)
    notes += ['it has no Muon: AdamW there'] * (s['optimizer'] == 'muon' and not has_muon(model))
    return model.to(device), '; '.join(notes)


def has_muon(model):
    return 'muon' in inspect.signature(model.configure_optimizers).parameters


def train_side(model, s):
    """A training step as train.py takes it: a function of whether to time its parts, which waits for the device between them."""
    device, dtype = torch.device(s['device']), getattr(torch, s['dtype'])
    with contextlib.redirect_stdout(io.StringIO()):
        # nanoGPT fuses AdamW where it is told 'cuda'
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), 'cuda' if s['fused'] and s['versus'] else device.type,
                                               *[dict(lr=0.02, momentum=0.95)] * (s['optimizer'] == 'muon' and has_muon(model)))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    x, y = torch.randint(s['model']['vocab_size'], (2, s['batch_size'], s['model']['block_size']), device=device)
    raw_model, model = model, torch.compile(model) if s['compile'] else model

    def step(parts):
        times, t0 = dict(forward=0.0, backward=0.0, optimizer=0.0), time.perf_counter()

        def lap(part):
            nonlocal t0
            if parts:
                synchronize(device)
                t0, t = time.perf_counter(), t0
                times[part] = times.get(part, 0.0) + t0 - t
        for _ in range(s['accumulation']):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(x, y)[1] / s['accumulation']
            lap('forward')
            scaler.scale(loss).backward()
            lap('backward')
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0).item()  # train.py looks at it before it takes the step
        scaler.step(optimizer)
        scaler.update()
        lap('optimizer')
        if parts and not s['versus']:
            gradient_statistics(raw_model)
            lap('gradient statistics')
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        return times if parts else dict(whole=time.perf_counter() - t0)
    return step


def forward_side(model, s):
    """Loss without gradients, as an evaluation does it."""
    device, dtype = torch.device(s['device']), getattr(torch, s['dtype'])
    x, y = torch.randint(s['model']['vocab_size'], (2, s['batch_size'], s['model']['block_size']), device=device)
    model = torch.compile(model.eval()) if s['compile'] else model.eval()

    @torch.no_grad()
    def step(parts):
        t0 = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            model(x, y)
        synchronize(device)
        return dict(whole=time.perf_counter() - t0)
    return step


def generate_side(model, s):
    """Tokens out of one prompt, as sample.py makes them: weights in dtype. The part 'prefill' is the first token, which reads the prompt."""
    device = torch.device(s['device'])
    model = (model.quantize_int8() if s['quantize'] else model).to(dtype=getattr(torch, s['dtype'])).eval()
    idx = torch.randint(s['model']['vocab_size'], (1, s['prompt_tokens']), device=device)

    @torch.no_grad()
    def step(parts):
        t0 = time.perf_counter()
        model.generate(idx, 1 if parts else s['new_tokens'], top_k=200)
        synchronize(device)
        return {'prefill' if parts else 'whole': time.perf_counter() - t0}
    return step


def data_side(model, s):
    """The training step fed by the loader; the part 'waiting' is the time until the next batch is there, 'reading' a batch without a thread."""
    step, b = train_side(model, s), s['batch_size']
    loader = Loader(s['data_dir'], 'train', s['model']['block_size'], vocab_size=s['model']['vocab_size'], device=s['device'])
    batches, at = loader.stream(np.arange(b) + i * b for i in range(10 ** 9)), 0

    def fed(parts):
        nonlocal at
        t0 = time.perf_counter()
        if parts:
            at += b
            loader.batch(np.arange(b) + at)
            return dict(reading=time.perf_counter() - t0)
        for _ in range(s['accumulation']):
            next(batches)
        waiting = time.perf_counter() - t0
        step(False)
        return dict(whole=time.perf_counter() - t0, waiting=waiting)
    return fed


def leave_room(device):
    """
    Let this process run out of memory at nine tenths of what there is, shared with the node's other ranks on a CPU: as an error of its own
    instead of drawing in the kernel's killer. On CPUs other than Linux's nothing limits it.
    """
    if device.type == 'cuda':
        torch.cuda.set_per_process_memory_fraction(0.9, device)
    elif sys.platform == 'linux':
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limits = [int(0.9 * free_memory() / int(os.environ.get('LOCAL_WORLD_SIZE', 1)))] + [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))


def fits_side(model, s):
    """One micro-batch with all states in place: weights, moments, and the gradients of a micro-batch before it if steps accumulate."""
    step = train_side(model, s | dict(accumulation=min(2, s['accumulation'])))

    def twice(parts):
        step(False)  # moments exist from here on
        return step(False)
    return twice


SIDES = dict(train=train_side, forward=forward_side, generate=generate_side, data=data_side, memory=train_side, fits=fits_side)


def serve(pipe, s, t_spawn):
    """The process of one side: set up, say what it is, then take a step whenever asked. Whatever goes wrong is sent, not raised."""
    try:
        if s['what'] == 'fits':
            leave_room(torch.device(s['device']))
        base = memory(torch.device(s['device']))
        model, note = build(s)
        n_params, step = sum(p.numel() for p in model.parameters()), SIDES[s['what']](model, s)
        setup = time.time() - t_spawn
        pipe.send(dict(parameters=n_params, note=note, setup=setup))
        while (request := pipe.recv()) is not None:
            if request == 'profile':
                with torch.profiler.profile(record_shapes=True) as p:  # every kind of device that is here
                    step(False)
                p.export_chrome_trace(s['trace'])
                key = 'self_cpu_time_total' if s['device'] == 'cpu' else 'self_device_time_total'
                pipe.send(p.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=60))
            else:
                result = step(request == 'parts')
                pipe.send(result | dict(memory=memory(torch.device(s['device'])), base=base))
    except EOFError:
        pass
    except (Exception, SystemExit) as e:
        what = f"'{s['versus']}' cannot be timed: {type(e).__name__}: " if s['versus'] else ''
        pipe.send(dict(error=what + first_line(e), out_of_memory=out_of_memory(e)))


class Side:
    """The parent's end of a side: ask() it for one thing after another. ValueError says what went wrong over there."""
    def __init__(self, name, settings):
        self.name, self.settings, self.times, self.memory = name, settings, {}, {}
        context = multiprocessing.get_context('spawn')  # a fresh interpreter, as a new run is
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, settings, time.time()), daemon=True)
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
        self.process.start()
        signal.signal(signal.SIGINT, interrupt)
        there.close()
        self.info = self.answer()

    def answer(self):
        try:
            reply = self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            reply = dict(error=f'its process ended with status {code}', out_of_memory=code == -signal.SIGKILL)  # the kernel's way when memory runs out
        if isinstance(reply, dict) and 'error' in reply:
            self.process.join()  # its memory is free when it is gone
            error = ValueError(f"{self.name}: {reply['error']}")
            error.out_of_memory = reply['out_of_memory']
            raise error
        return reply

    def ask(self, request):
        self.pipe.send(request)
        reply = self.answer()
        if isinstance(reply, dict):
            self.memory, self.base = reply.pop('memory'), reply.pop('base')
        return reply

    def close(self):
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join()


# ---------------------------------------------------------------------------------------------------------------------
# the parent: who takes part, taking turns, what came of it

def peak_bandwidth(device):
    """Bytes/s at which the device reads memory, the limit of generation: the sum of 1 GiB of float32, best of a second."""
    x, best, spent = torch.ones(2 ** 28, device=device), math.inf, 0.0
    while spent < 1.0:
        t0 = time.perf_counter()
        x.sum().item()
        dt = time.perf_counter() - t0
        best, spent = min(best, dt), spent + dt
    return 4 * x.numel() / best


def free_memory():
    """Bytes that this machine can still give out: what the kernel says, or what the container's limit leaves of it. All memory, where neither says."""
    if not os.path.exists('/proc/meminfo'):
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    with open('/proc/meminfo') as f:
        free = next(int(line.split()[1]) * 1024 for line in f if line.startswith('MemAvailable'))
    with contextlib.suppress(OSError, ValueError):
        with open('/sys/fs/cgroup/memory.max') as limit, open('/sys/fs/cgroup/memory.current') as used:
            free = min(free, int(limit.read()) - int(used.read()))
    return free


def find_batch_size(settings, limit):
    """The largest micro-batch of at most `limit` sequences whose training step fits, each tried in a process of its own; 0 if none."""
    def fits(batch_size):
        t0, error = time.time(), None
        try:
            side = Side('trial', settings | dict(what='fits', batch_size=batch_size))
            side.ask('whole')
            used = max(side.memory.values()) / GIB
            side.close()
        except ValueError as e:
            if not e.out_of_memory:
                raise
            error = e
        print(f"  batch_size {batch_size:>5}: {'does not fit' if error else f'fits, {used:.2f} GiB'} ({time.time() - t0:.0f} s)", flush=True)
        return error is None
    low, high = 0, 1
    while high <= limit and fits(high):  # doubling
        low, high = high, min(2 * high, limit) if high < limit else limit + 1
    while high - low > 1:  # bisection
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def spread(values, unit='ms', scale=1000.0):
    """Median and middle half of a list of seconds, or of what else there is, as text."""
    low, middle, high = (np.quantile(values, q) * scale for q in (0.25, 0.5, 0.75))
    digits = 0 if middle >= 1000 else 1 if middle >= 10 else 3
    return f'{middle:,.{digits}f}{unit and " " + unit} ({low:,.{digits}f}-{high:,.{digits}f})'


def take_turns(sides, what, warmup, repeats, max_seconds):
    """Fill side.times: {part: [seconds]}, one a round; side.first is its first step."""
    for side in sides:
        side.first = side.ask('whole')['whole']
        print(f'  {side.name}: set up in {side.info["setup"]:.1f} s, first step after another {side.first:.1f} s', file=sys.stderr, flush=True)
    t0 = time.time()
    for i in range(warmup + repeats):
        if i == warmup:
            t0 = time.time()
        for request in ('whole', 'parts') if what in ('train', 'generate', 'data') and i >= warmup else ('whole',):
            for side in sides:
                reply = side.ask(request)
                if i >= warmup:
                    for part, seconds in reply.items():
                        side.times.setdefault(part, []).append(seconds)
        done, spent = i + 1 - warmup, time.time() - t0
        if done > 0 and sys.stderr.isatty():
            print(f'\r  round {done}/{repeats}, {spent / done * (repeats - done):.0f} s left ', end='', file=sys.stderr, flush=True)
        if done >= 3 and spent > max_seconds and done < repeats:
            print(f'  stopped after {done} of {repeats} rounds: --max_seconds={max_seconds:g}', file=sys.stderr)
            break
    if sys.stderr.isatty():
        print('\r' + ' ' * 40 + '\r', end='', file=sys.stderr)


def figures(side, model, peak, source, bandwidth):
    """{row: text} of one side, and the same as numbers for JSON."""
    s, c, median = side.settings, model.config, {part: statistics.median(v) for part, v in side.times.items()}
    training = s['what'] in ('train', 'data', 'memory')
    tokens = s['new_tokens'] if s['what'] == 'generate' else s['batch_size'] * c.block_size * (s['accumulation'] if training else 1)
    rate, flops = tokens / median['whole'], model.flops_per_token() / (1 if training else 3)
    rows = {'parameters': f"{side.info['parameters']:,}", 'dtype, compile': f"{s['dtype']}, {s['compile']}"}
    numbers = dict(median, parameters=side.info['parameters'], tokens_per_sec=rate, peak_bytes=max(side.memory.values()), first_step=side.first,
                   setup=side.info['setup'], compile=max(0.0, side.first - median['whole']) if s['compile'] else 0.0)
    rows['batch'] = f"{s['prompt_tokens']} tokens of prompt" if s['what'] == 'generate' else f"{s['batch_size']} x {c.block_size} tokens" + \
        (f" x {s['accumulation']}" if training and s['accumulation'] > 1 else '')
    counted = s['what'] != 'generate' and not side.info['note']  # FLOPs are those of our model, so of the same model only
    if side.info['note']:
        numbers['note'] = side.info['note']
    if counted:
        numbers |= dict(flops_per_token=flops, tflops=flops * rate / 1e12, mfu=flops * rate / peak, peak_tflops=peak / 1e12)
        rows['FLOPs a token'] = f'{flops / 1e9:.4g} G'
    for part in ('forward', 'backward', 'optimizer', 'prefill', 'reading', 'waiting', 'whole'):
        if part in median:
            rows[{'whole': 'whole step' if s['what'] != 'generate' else f"{s['new_tokens']} tokens"}.get(part, part)] = spread(side.times[part])
    rows['tokens/s'] = spread([tokens / seconds for seconds in side.times['whole']], '', 1)
    if counted:
        rows['TFLOP/s'], rows['MFU'] = f"{numbers['tflops']:.3g}", f"{100 * numbers['mfu']:.1f}%" + (' of measured' if source.startswith('measured') else '')
        if numbers['mfu'] > 1:
            rows['MFU'] += ' (over 100 %: the peak is too low, a bug)'
    if s['what'] == 'generate' and not side.info['note']:
        size = getattr(torch, s['dtype']).itemsize
        kv = 2 * c.n_layer * (c.n_kv_head or c.n_head) * (c.n_embd // c.n_head) * (s['prompt_tokens'] + s['new_tokens'] / 2)
        read = (1 if s['quantize'] else size) * sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)) + size * kv  # and the cache half way
        decode = (s['new_tokens'] - 1) / (median['whole'] - median['prefill'])
        numbers |= dict(decode_tokens_per_sec=decode, bytes_per_token=read, bandwidth_limit_tokens_per_sec=bandwidth / read)
        rows['tokens/s after the first'] = f'{decode:,.1f}'
        rows['bandwidth limit'] = f"{bandwidth / read:,.1f} tokens/s ({read / 1e6:,.0f} MB a token at {bandwidth / 1e9:.1f} GB/s)"
        rows['share of the limit'] = f'{100 * decode * read / bandwidth:.0f}%'
    if s['what'] == 'train' and s['config_accumulation'] != s['accumulation']:
        n = s['config_accumulation']
        seconds = n / s['accumulation'] * (median['forward'] + median['backward']) + median['optimizer']
        rows[f'tokens/s, accumulation {n}'] = f"{tokens / s['accumulation'] * n / seconds:,.0f} (from the parts)"
    if 'gradient statistics' in median:
        numbers['gradient_statistics'], interval = median['gradient statistics'], s['gradient_log_interval']
        rows['gradient statistics'] = spread(side.times['gradient statistics']) + \
            (f": {100 * median['gradient statistics'] / interval / median['whole']:.2f}% of a step at gradient_log_interval={interval}" if interval else '')
    if 'waiting' in median:
        numbers['waiting_share'] = sum(side.times['waiting']) / sum(side.times['whole'])
        rows['waiting for data'] = f"{100 * numbers['waiting_share']:.2f}% of the steps"
    if s['what'] == 'memory' and not s['versus']:
        sizes = memory_estimate(c, s['batch_size'], s['dtype'], torch.device(s['device']), s['accumulation'], optimizer=s['optimizer'])
        if s['device'] == 'cpu':  # as train.py's start-up report has it
            sizes |= dict(holes=round(0.2 * sizes['peak']), process=side.base.get('resident', side.base['peak']))
        sizes['peak'] = sum(size for part, size in sizes.items() if part != 'peak')
        sizes['peak'] = sizes.pop('peak')  # last
        numbers['memory_estimate'] = sizes
        rows |= {f'estimated: {part}': f'{size / GIB:.2f} GiB' for part, size in sizes.items() if size}
    rows['peak memory'] = f"{numbers['peak_bytes'] / GIB:.2f} GiB"
    rows['to the first step'] = f"{side.info['setup'] + side.first:.1f} s" + (f", {numbers['compile']:.1f} of it compiling" if s['compile'] else '')
    return rows, numbers


def sides_asked(config):
    """[(name, settings of train.py)] of the sides that config['archs'] names, or of the config itself."""
    if not config['archs']:
        return [('ours', config)]
    flags = [arg for arg in sys.argv[1:] if arg.startswith('--')]
    files, asked = [arg for arg in sys.argv[1:] if not arg.startswith('--')], []
    names = config['archs'].split(',')
    if len({os.path.basename(name) for name in names}) < len(names):
        raise ValueError(f"--archs={config['archs']} names one of them twice")
    for name in names:
        if name in PRESETS:
            parts = [] if name == config['arch_preset'] else [f'--{key}=None' for key in (*PRESETS[name], 'd_ff')]  # a file's parts are not this arch's
            argv = [*files, *parts, *flags, f'--arch_preset={name}']
        elif os.path.isfile(name):
            argv = [name, *flags]
        else:
            raise ValueError(f"unknown arch '{name}' in --archs: neither a preset ({', '.join(PRESETS)}) nor a config file")
        asked.append((os.path.basename(name), configure(__file__, os.path.join(HERE, 'train.py'), argv=argv)[0]))
    return asked


def plan(config, settings, model, device, machine):
    """
    For DDP, ZeRO-1 and FSDP on each number of ranks: memory a rank, bytes that a rank sends in a step, and the step's time between all of
    that hidden behind the computing and none of it. On paper, by the formulas of PARAMETER_FORMULAS.md, from the speed of one device here.
    """
    if not re.fullmatch('[1-9][0-9]*(,[1-9][0-9]*)*', config['plan']):
        raise ValueError(f"--plan takes numbers of ranks, as in --plan=8,64,512, not '{config['plan']}'")
    ranks = [int(n) for n in config['plan'].split(',')]
    if config['interconnect_gbps'] <= 0:
        raise ValueError(f"interconnect_gbps must be positive, not {config['interconnect_gbps']}")
    if config['plan_tflops'] < 0:
        raise ValueError(f"plan_tflops must be positive, or 0 to measure it, not {config['plan_tflops']}")
    c, dtype, n_params = model.config, settings['dtype'], model.get_num_params(False)
    in_blocks, size = sum(p.numel() for p in model.transformer.h.parameters()), getattr(torch, dtype).itemsize
    rate, source = config['plan_tflops'] * 1e12, 'as given'
    if not rate:
        layers = c.n_layer
        while layers > 1 and memory_estimate(replace(c, n_layer=layers), settings['batch_size'], dtype, device)['peak'] > 0.6 * total_memory(device):
            layers = max(1, layers // 2)
        side = Side('one device', settings | dict(what='train', model=asdict(replace(c, n_layer=layers)), accumulation=1))
        side.ask('whole')
        seconds = min(side.ask('whole')['whole'] for _ in range(3))
        side.close()
        with torch.device('meta'):
            rate = GPT(replace(c, n_layer=layers)).flops_per_token() * settings['batch_size'] * c.block_size / seconds
        source = f'measured here, with {layers} of {c.n_layer} layers' if layers < c.n_layer else 'measured here'
    print(f"one device: {rate / 1e12:.3g} TFLOP/s ({source}); interconnect {config['interconnect_gbps']:g} Gbit/s a rank, each way\n"
          f"{'ranks':>6} {'mode':>7} {'micro-batches':>14} {'tokens a step':>14} {'GB a rank':>10} {'GB sent':>9} {'s a step':>17} {'tokens/s':>23}")
    rows = []
    for n in ranks:
        micro_batches = max(1, math.ceil(settings['config_accumulation'] / n))
        tokens, share = micro_batches * n * settings['batch_size'] * c.block_size, (n - 1) / n
        computing = tokens / n * model.flops_per_token() / rate
        sent = {'ddp': 8 * n_params * share, 'zero1': 12 * n_params * share,
                'fsdp': micro_batches * ((2 * size + 4) * in_blocks + 8 * (n_params - in_blocks)) * share}
        for mode, volume in sent.items():
            estimate = memory_estimate(c, settings['batch_size'], dtype, device, micro_batches, mode, n, settings['optimizer'])
            sending = volume / (config['interconnect_gbps'] * 1e9 / 8)
            low, high = max(computing, sending), computing + sending
            rows.append(dict(ranks=n, mode=mode, micro_batches=micro_batches, tokens=tokens, memory=estimate['peak'], sent=volume, seconds=(low, high)))
            print(f"{n:>6} {mode:>7} {micro_batches:>14} {tokens:>14,} {estimate['peak'] / 1e9:>10.2f} {volume / 1e9:>9.2f} "
                  f"{f'{low:,.3f}-{high:,.3f}':>17} {f'{tokens / high:,.0f}-{tokens / low:,.0f}':>23}")
    write_json(config, machine, dict(plan=rows, device_flops=rate, source=source))


def total_memory(device):
    """Bytes: what a GPU has, what this machine can still give out."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == 'cuda' else free_memory()


def check_versus(path):
    """ValueError unless the file at path defines what a side needs, found by reading it: it runs later, in the side's process."""
    try:
        with open(path, encoding='utf-8') as f:
            classes = {node.name for node in ast.parse(f.read()).body if isinstance(node, ast.ClassDef)}
    except (OSError, ValueError, SyntaxError) as e:
        raise ValueError(f"--versus: '{path}' is no Python file that can be read ({type(e).__name__}); name the model.py of another checkout") from None
    if not {'GPT', 'GPTConfig'} <= classes:
        raise ValueError(f"--versus: '{path}' is not a model: it has no classes GPT and GPTConfig, as nanoGPT's model.py has")


def bench(config):
    """All that the command line asks for; ValueError for what cannot be."""
    what, asked = config['what'], sides_asked(config)
    for key, least in dict(accumulation=1, repeats=1, warmup=0, new_tokens=2, prompt_tokens=1, batch_size=1, gradient_accumulation_steps=1, peak_tflops=0).items():
        for name, settings in asked:
            if settings[key] == 'auto':
                raise ValueError("batch_size='auto' is train.py's; here it is --find_batch_size=True")
            if settings[key] < least:
                raise ValueError(f'{key} must be at least {least}, not {settings[key]}')
    if (config['find_batch_size'] or config['plan']) and (config['archs'] or config['versus']):
        raise ValueError('--find_batch_size and --plan are of one config: without --archs and --versus')
    if config['quantize'] and what != 'generate':
        raise ValueError('--quantize is of --what=generate')
    if config['versus'] and what == 'data':
        raise ValueError('--what=data times our loader and has no --versus')
    if config['versus']:
        check_versus(config['versus'])
    if config['json'] and (os.path.isdir(config['json']) or not os.access(os.path.dirname(os.path.abspath(config['json'])), os.W_OK)):
        raise ValueError(f"--json: there is no writable folder for '{config['json']}'")
    device, dtype = pick_device(config['device'], config['dtype'])
    compiled = what != 'generate' and (config['compile'] if config['compile'] != 'auto' else device.type == 'cuda')  # generation is never compiled
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    sides, models, peaks, random_data = [], [], {}, tempfile.TemporaryDirectory()
    for name, asked in asked:
        model = meta_model(asked)
        model.config.unpadded_vocab_size = None  # both sides draw from the whole vocabulary
        if what == 'generate' and config['prompt_tokens'] + config['new_tokens'] > model.config.block_size:
            raise ValueError(f'prompt_tokens + new_tokens = {config["prompt_tokens"] + config["new_tokens"]} is beyond block_size={model.config.block_size}')
        data_dir = str(find_datasets(asked['dataset'])[0][2])  # of several, the first
        if what == 'data' and not glob.glob(os.path.join(glob.escape(data_dir), 'train*.bin')):
            data_dir = os.path.join(random_data.name, name)
            print(f"data set '{asked['dataset']}' is not prepared: 10 million random ids in its place")
            write_dataset(data_dir, {'train': np.random.default_rng(0).integers(0, model.config.vocab_size, 10 ** 7)},
                          dict(vocab_size=model.config.vocab_size, tokenizer={'name': 'gpt2'}))
        settings = {key: asked[key] for key in ('batch_size', 'seed', 'gradient_log_interval', 'optimizer')} | dict(
            what=what, versus='', quantize='', device=str(device), dtype=dtype, compile=compiled, fused=True, model=asdict(model.config), data_dir=data_dir,
            accumulation=config['accumulation'], config_accumulation=asked['gradient_accumulation_steps'], prompt_tokens=config['prompt_tokens'],
            new_tokens=config['new_tokens'], trace='trace.json')
        sides.append((name, settings))
        models.append(model)
    if config['quantize']:
        sides, models = [(f'{sides[0][0]}, int8', sides[0][1] | dict(quantize='int8')), *sides], [models[0], *models]
    if config['versus']:
        same = lambda key, ours: ours if config[key] == 'same' else config[key]
        name = os.path.join(*os.path.abspath(config['versus']).split(os.sep)[-2:])
        sides.append((name, sides[0][1] | dict(versus=config['versus'], fused=config['versus_fused'], dtype=same('versus_dtype', dtype),
                                               compile=same('versus_compile', compiled))))
        models.append(models[0])
    machine = dict(device=str(device), name=torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{torch.get_num_threads()} threads',
                   torch=str(torch.__version__), python=sys.version.split()[0])
    print(f"{machine['device']} ({machine['name']}), torch {machine['torch']}, what={what}")

    if config['find_batch_size']:
        settings, sequences = sides[0][1], config['batch_size'] * config['gradient_accumulation_steps']
        settings = settings | dict(compile=False, accumulation=config['gradient_accumulation_steps'])
        print(f'the largest micro-batch up to the {sequences} sequences of an iteration, without compile, which needs less:', flush=True)
        most = find_batch_size(settings, sequences)
        if not most:
            raise ValueError('not even a micro-batch of one sequence fits; try --activation_checkpointing=True, a smaller model or block_size')
        batch_size = max(b for b in range(1, most + 1) if sequences % b == 0)
        print(f"largest that fits: {most}{', all of an iteration' if most == sequences else ''}; with {sequences} sequences an iteration as before: "
              f'--batch_size={batch_size} --gradient_accumulation_steps={sequences // batch_size}')
        return write_json(config, machine, dict(largest=most, batch_size=batch_size, gradient_accumulation_steps=sequences // batch_size))

    if config['plan']:
        return plan(config, sides[0][1], models[0], device, machine)

    bandwidth = peak_bandwidth(device) if what == 'generate' else None
    for name, settings in sides:
        if settings['dtype'] not in peaks and what != 'generate':
            peaks[settings['dtype']] = (config['peak_tflops'] * 1e12, 'as given') if config['peak_tflops'] else peak_flops(device, settings['dtype'])
            print('peak: {:.2f} TFLOP/s ({})'.format(peaks[settings['dtype']][0] / 1e12, peaks[settings['dtype']][1]), flush=True)
    running = [Side(name, settings) for name, settings in sides]
    for side in running:
        if side.info['note']:
            print(f"NOTE: {side.name}: {side.info['note']}")
    take_turns(running, what, config['warmup'], config['repeats'] if what != 'memory' else 1, config['max_seconds'])
    table = [figures(side, model, *peaks.get(side.settings['dtype'], (0, '')), bandwidth) for side, model in zip(running, models)]
    for side, (rows, numbers) in zip(running[1:], table[1:]):
        scale = numbers['tokens_per_sec'] * numbers['whole'] / (table[0][1]['tokens_per_sec'] * table[0][1]['whole'])  # tokens a step may differ
        ratios = [theirs / ours / scale for ours, theirs in zip(running[0].times['whole'], side.times['whole'])]
        numbers['first_is_faster_by'] = statistics.median(ratios)
        rows[f'{running[0].name}, tokens/s'] = spread(ratios, 'x', 1.0)
        rows[f'{running[0].name}, peak memory'] = f"{table[0][1]['peak_bytes'] / numbers['peak_bytes']:.2f} x"
    names = list(dict.fromkeys(row for rows, _ in table for row in rows))
    widths = [max(len(side.name), *(len(rows.get(name, '')) for name in names)) for side, (rows, _) in zip(running, table)]
    print(' ' * 30 + '  '.join(f'{side.name:>{w}}' for side, w in zip(running, widths)))
    for name in names:
        print(f'{name:<30}' + '  '.join(f"{rows.get(name, ''):>{w}}" for (rows, _), w in zip(table, widths)))
    if config['profile']:
        print(running[0].ask('profile') + '\ntrace: trace.json')
    for side in running:
        side.close()
    write_json(config, machine, dict(sides={side.name: numbers | dict(settings=side.settings, times=side.times)
                                            for side, (_, numbers) in zip(running, table)}))


def write_json(config, machine, results):
    """All of it into the file that --json names."""
    if config['json']:
        with open(config['json'], 'w', encoding='utf-8') as f:
            jsonlib.dump(dict(time=time.strftime('%Y-%m-%d %H:%M:%S'), command=sys.argv, machine=machine, config=config) | results, f, indent=1)


def main():
    what: Literal['train', 'forward', 'generate', 'data', 'memory'] = 'train'  # a training step, a loss without gradients, text, the loader, memory
    archs = ''  # comma-separated presets or config files, side by side
    versus = ''  # another checkout's model.py with nanoGPT's GPT and GPTConfig, turn about with ours on the same shapes
    versus_dtype: Literal['same', 'float32', 'bfloat16', 'float16'] = 'same'  # its dtype
    versus_compile: Literal['same', True, False] = 'same'  # torch.compile for it
    versus_fused = True  # its AdamW fused, as ours is
    accumulation = 1  # micro-batches a timed step
    warmup = 2  # rounds that are not counted, after the first step
    repeats = 10  # rounds that are
    max_seconds = 300.0  # stop before `repeats` rounds, after 3 at least, when they take longer
    prompt_tokens = 256  # of what=generate
    new_tokens = 64  # of what=generate
    quantize: Literal['', 'int8'] = ''  # of what=generate: also with sample.py's --quantize, as the first side
    find_batch_size = False  # find the largest micro-batch that fits, and the accumulation that keeps tokens an iteration
    plan = ''  # numbers of ranks, as in 8,64,512: memory, traffic and step time of DDP, ZeRO-1 and FSDP on paper, from one device's speed
    interconnect_gbps = 400.0  # of plan: gigabits a second that a rank can send
    plan_tflops = 0.0  # of plan: TFLOP/s that one device reaches in training; 0: measured here
    profile = False  # also the ten dearest operations of a step, and a trace in trace.json, for chrome://tracing or ui.perfetto.dev
    json = ''  # write every figure to this file
    config, given = configure(__file__, os.path.join(HERE, 'train.py'))
    try:
        bench(config)
    except (ValueError, OSError) as e:
        fail(str(e))
    except KeyboardInterrupt:
        raise SystemExit(130)


if __name__ == '__main__':
    main()
