"""
Time one side of bench.py: a model in its own process.

`s` holds the settings of train.py and bench.py, with these resolved or added: device, dtype,
asked_dtype, compile, what, versus, quantize, fused, model (a dict for GPTConfig), data_dir.
"""
import contextlib
import importlib
import importlib.util
import io
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
import traceback
from dataclasses import asdict, fields

import numpy as np
import torch

import model as our_model
from data.loader import Loader
from engine.attention_kernel import choose_attention
from engine.common import ROOT, UserError, end_with_parent, first_line, out_of_memory
from engine.fast_linear import matrix_bytes, prepare_to_generate
from engine.lora import add_adapters
from engine.machine import limit_memory, memory, synchronize
from engine.parallel import Parallel
from engine.report import GradientStatistics


def load_other_model(path):
    """
    Import another checkout's model.py as `model`. Its imports must come from its own folder, so our
    modules are removed from sys.modules and our folder from sys.path.
    """
    for name in list(sys.modules):
        if name.split('.')[0] in ('model', 'configurator', 'engine', 'data'):
            del sys.modules[name]
    ours = os.path.realpath(ROOT)
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder) != ours]
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location('model', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules['model'] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def checkout_module(s, name):
    """
    Return a module of the side's checkout, or None if it has no such file (nanoGPT has no engine).
    """
    folder = os.path.dirname(os.path.abspath(s['versus'])) if s['versus'] else ROOT
    exists = os.path.exists(os.path.join(folder, *name.split('.')) + '.py')
    return importlib.import_module(name) if exists else None


def prepare_process(s):
    """Set up the process as the train.py of its checkout does."""
    machine = checkout_module(s, 'engine.machine')
    device = torch.device(s['device'])
    if machine is not None:
        machine.prepare_to_train(device)
    elif device.type == 'cuda':  # nanoGPT
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')


def build_model(s):
    """
    Return (model, note). The note says how the model differs from the requested one, if it does.
    """
    module = load_other_model(s['versus']) if s['versus'] else our_model
    prepare_process(s)
    torch.manual_seed(s['seed'])
    known = {f.name for f in fields(module.GPTConfig)}
    with contextlib.redirect_stdout(io.StringIO()):  # nanoGPT prints
        config = module.GPTConfig(**{k: v for k, v in s['model'].items() if k in known})
        model = module.GPT(config).to(torch.device(s['device']))
    if s['lora_rank'] and not s['versus']:
        add_adapters(model, s)
    defaults = asdict(our_model.GPTConfig())
    lost = [k for k, v in s['model'].items() if k not in known and v not in (defaults[k], None)]
    return model, f"it does not know {', '.join(lost)}: not the same model" if lost else ''


def has_optimizer(s):
    """Return whether the side's checkout has the requested optimizer."""
    optim = checkout_module(s, 'engine.optim')
    return s['optimizer'] in (optim.OPTIMIZER if optim else ['adamw'])


def build_optimizer(model, s):
    """Build the optimizer s['optimizer'] with the side's own checkout."""
    device_type = torch.device(s['device']).type
    optim = checkout_module(s, 'engine.optim')
    if optim is not None:
        return optim.build(s['optimizer'], model, s, device_type)
    if s['fused']:
        device_type = 'cuda'  # nanoGPT fuses AdamW only for 'cuda'
    with contextlib.redirect_stdout(io.StringIO()):  # nanoGPT prints
        return model.configure_optimizers(
            s['weight_decay'], s['learning_rate'], (s['beta1'], s['beta2']), device_type)


def random_batch(s):
    """Return random ids and targets, (B, T) each."""
    shape = (2, s['batch_size'], s['model']['block_size'])
    return torch.randint(s['model']['vocab_size'], shape, device=s['device'])


def autocast(s):
    device_type, dtype = torch.device(s['device']).type, getattr(torch, s['dtype'])
    return torch.autocast(device_type, dtype, enabled=dtype != torch.float32)


class Stopwatch:
    """Measure seconds per part. Every lap waits for the device."""
    def __init__(self, s):
        self.device, self.times = torch.device(s['device']), {}
        self.last = time.perf_counter()

    def lap(self, part):
        synchronize(self.device)
        now = time.perf_counter()
        self.times[part] = self.times.get(part, 0.0) + now - self.last
        self.last = now


# Each of these returns a function that takes one step and returns {part: seconds}. That is the time
# of the 'whole', or, with parts=True, of its parts, which takes a wait for the device after each.

def training_step(model, s):
    """Return a function that takes a training step as train.py does."""
    optimizer = build_optimizer(model, s)
    scaler = torch.amp.GradScaler(torch.device(s['device']).type, enabled=s['dtype'] == 'float16')
    x, y = random_batch(s)
    raw_model, parallel = model, Parallel()
    parallel.connect(torch.device(s['device']))
    if not s['versus']:
        choose_attention(raw_model.config, s['batch_size'], s['dtype'], parallel)
    model = torch.compile(model) if s['compile'] else model

    def step(parts=False):
        watch = Stopwatch(s)
        for _ in range(s['accumulation']):
            with autocast(s):
                loss = model(x, y)[1] / s['accumulation']
            if parts:
                watch.lap('forward')
            scaler.scale(loss).backward()
            if parts:
                watch.lap('backward')
        with torch.profiler.record_function('optimizer'):
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        if parts:
            watch.lap('optimizer')
        if parts and not s['versus']:
            GradientStatistics(raw_model, 0, parallel).read()
            watch.lap('gradient statistics')
        optimizer.zero_grad(set_to_none=True)
        if not parts:
            watch.lap('whole')
        return watch.times
    return step


def forward_step(model, s):
    """Return a function that computes the loss without gradients, as in an evaluation."""
    x, y = random_batch(s)
    model = torch.compile(model.eval()) if s['compile'] else model.eval()

    @torch.no_grad()
    def step(parts=False):
        watch = Stopwatch(s)
        with autocast(s):
            model(x, y)
        watch.lap('whole')
        return watch.times
    return step


def generate_step(model, s):
    """
    Return a function that continues prompts as sample.py does, with weights in dtype. Its part
    'prefill' is the time to the first token.
    """
    weights, cache_dtype, t0 = s['dtype'], getattr(torch, s['dtype']), time.time()
    if s['versus']:
        model.to(cache_dtype)
    else:
        weights, _, _ = prepare_to_generate(
            model, torch.device(s['device']), s['asked_dtype'], s['quantize'], s['num_samples'],
            s['compile'])
        cache_dtype = model.cache_dtype()
    prepared = time.time() - t0
    model.eval()
    shape = (s['num_samples'], s['prompt_tokens'])
    idx = torch.randint(s['model']['vocab_size'], shape, device=s['device'])

    @torch.no_grad()
    def step(parts=False):
        watch = Stopwatch(s)
        model.generate(idx, 1 if parts else s['new_tokens'], top_k=200)
        watch.lap('prefill' if parts else 'whole')
        return watch.times
    step.info = dict(weights=weights, cache_itemsize=cache_dtype.itemsize,
                     matrix_bytes=matrix_bytes(model), prepared=prepared)
    return step


def data_step(model, s):
    """
    Return a function that takes a training step with batches from the loader. 'waiting' is the time
    until the next batch is there; the part 'reading' is a batch read without the loader's thread.
    """
    train = training_step(model, s)
    loader = Loader(s['data_dir'], 'train', s['model']['block_size'],
                    vocab_size=s['model']['vocab_size'], device=s['device'])
    indices = np.arange(s['batch_size'])
    batches = loader.stream(indices + i * s['batch_size'] for i in range(10 ** 9))

    def step(parts=False):
        t0 = time.perf_counter()
        if parts:
            indices[:] += s['batch_size']
            loader.batch(indices)
            return dict(reading=time.perf_counter() - t0)
        for _ in range(s['accumulation']):
            next(batches)
        waiting = time.perf_counter() - t0
        train()
        return dict(whole=time.perf_counter() - t0, waiting=waiting)
    return step


def fitting_step(model, s):
    """
    Return a function that takes a step with weights, moments and, if steps accumulate, an earlier
    micro-batch's gradients in memory.
    """
    train = training_step(model, s | dict(accumulation=min(2, s['accumulation'])))

    def step(parts=False):
        train()  # creates the moments
        return train()
    return step


STEPS = dict(train=training_step, forward=forward_step, generate=generate_step, data=data_step,
             memory=training_step, fits=fitting_step)


def serve(pipe, s, t_spawn):
    """
    Run one side: set up, describe it to the parent, then take a step per request. Errors are sent
    to the parent; a bug in our code also prints its traceback.
    """
    end_with_parent()
    device = torch.device(s['device'])
    try:
        if s['what'] == 'fits':
            limit_memory(device)
        base = memory(device)
        model, note = build_model(s)
        if not has_optimizer(s):
            note = '; '.join(filter(None, (note, f"it has no {s['optimizer']}: AdamW there")))
            s = s | dict(optimizer='adamw')
        parameters = sum(p.numel() for p in model.parameters())
        step = STEPS[s['what']](model, s)
        pipe.send(dict(parameters=parameters, note=note, setup=time.time() - t_spawn, base=base)
                  | getattr(step, 'info', {}))
        while (request := pipe.recv()) is not None:
            if request == 'profile':
                pipe.send(profile(step, s))
            else:
                times = step(parts=request == 'parts')
                pipe.send(dict(times=times, memory=memory(device)))
    except (EOFError, BrokenPipeError):
        pass  # the parent has died
    except (Exception, SystemExit) as e:
        expected = s['versus'] or out_of_memory(e) or isinstance(e, (ValueError, OSError))
        if not expected:
            traceback.print_exc()
        whose = f"'{s['versus']}' cannot be timed: {type(e).__name__}: " if s['versus'] else ''
        pipe.send(dict(error=whose + first_line(e), out_of_memory=out_of_memory(e)))


# {part of a step: its operations, and those that call them, match this}; the first match wins
PARTS = {
    'optimizer': r'^optimizer$',
    'head and loss': r'LinearCrossEntropy',
    'attention': r'scaled_dot_product|attention|bmm|_softmax',
    'matmuls': r'^aten::(mm|addmm)$',
}


def profile(step, s):
    """
    Return a table of the most expensive operations of a step, and {part: seconds}, in which
    every operation counts without those that it calls. Write the step's trace to trace.json.
    """
    with torch.profiler.profile(record_shapes=True) as profiler:
        step()
    profiler.export_chrome_trace('trace.json')
    key = 'self_cpu_time_total' if s['device'] == 'cpu' else 'self_device_time_total'
    parts = dict.fromkeys([*PARTS, 'the rest'], 0.0)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CPU:  # a kernel's time is its caller's
            parts[part_of(event)] += getattr(event, key) / 1e6
    averages = profiler.key_averages()
    table = averages.table(sort_by=key, row_limit=10, max_name_column_width=60)
    return dict(table=table, parts=parts)


def part_of(event):
    """Return the part of a step to which an operation of the profiler belongs."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    matching = (part for part, pattern in PARTS.items()
                if any(re.search(pattern, name) for name in names))
    return next(matching, 'the rest')


# ------------------------------------------------------------------------------------------------
# the other end, in bench.py's process

class SideError(UserError):
    """
    Raised for a side that cannot be timed. `out_of_memory` says whether memory was the reason.
    """
    def __init__(self, message, out_of_memory):
        super().__init__(message)
        self.out_of_memory = out_of_memory


class Side:
    """A process that times one model."""
    def __init__(self, name, s):
        self.name, self.s, self.times, self.memory = name, s, {}, {}
        context = multiprocessing.get_context('spawn')  # a fresh interpreter, like a new run
        self.pipe, other_end = context.Pipe()
        arguments = (other_end, s, time.time())
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
        self.process.start()
        signal.signal(signal.SIGINT, interrupt)
        other_end.close()
        self.info = self.answer()

    def answer(self):
        try:
            reply = self.pipe.recv()
        except EOFError:
            self.process.join()
            status = self.process.exitcode
            killed = status == -signal.SIGKILL  # by the kernel, because memory ran out
            message = f'{self.name}: its process ended with status {status}'
            raise SideError(message, killed) from None
        if 'error' in reply:
            self.process.join()  # its memory is freed when it ends
            raise SideError(f"{self.name}: {reply['error']}", reply['out_of_memory'])
        return reply

    def ask(self, request):
        self.pipe.send(request)
        return self.answer()

    def step(self, request='whole'):
        """
        Take one step and return {part: seconds}. Record the memory that the side has afterwards.
        """
        reply = self.ask(request)
        self.memory = reply['memory']
        return reply['times']

    def median(self, part):
        return statistics.median(self.times[part])

    def close(self):
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join()
