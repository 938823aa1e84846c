"""
Divide the sequences of an iteration into micro-batches: gradient_accumulation_steps that the
processes can share, batch_size='auto', and smaller micro-batches when memory runs out.
"""
import json
import math
import os
import tempfile
from dataclasses import asdict

import torch

from configurator import check_value
from engine import machine
from engine.common import ROOT, UserError, run_script
from engine.lora import LORA_SETTINGS


def check_accumulation(config, n):
    """Raise UserError if n processes cannot share the micro-batches of an iteration evenly."""
    steps, batch_size = config['gradient_accumulation_steps'], config['batch_size']
    from_checkpoint = batch_size == 'auto' and config['init_from'] in ('resume', 'auto')
    if steps % n == 0 or from_checkpoint:  # which auto_batch_size() checks
        return
    remedy = f'--gradient_accumulation_steps={math.ceil(steps / n) * n}'
    if batch_size != 'auto':
        sequences = steps * batch_size
        same = [k for k in range(n, sequences + 1, n) if sequences % k == 0 and k >= steps]
        if same:
            remedy = (f'--batch_size={sequences // same[0]} --gradient_accumulation_steps='
                      f'{same[0]}, which keep the tokens per iteration')
    raise UserError(f'gradient_accumulation_steps={steps} must be a multiple of the {n} processes '
                    f'that share it; try {remedy}')


def auto_batch_size(script, config, given, model_config, ckpt, console, parallel):
    """
    Return (batch_size, gradient_accumulation_steps) for batch_size='auto': the checkpoint's if
    there is one, otherwise the largest micro-batch that bench.py finds, with as many sequences per
    iteration as the settings give without 'auto'. Rank 0 searches and all processes use its answer.
    """
    saved = (ckpt or {}).get('config') or {}
    if 'gradient_accumulation_steps' in saved:
        return saved_batch_size(script, saved, ckpt['path'], parallel.world_size)
    batch_size = [size for size, _ in given.history['batch_size'] if size != 'auto'][-1]
    accumulation_steps = config['gradient_accumulation_steps']
    found = 0
    if parallel.master:
        console.say("batch_size='auto': looking for the largest micro-batch that fits, for the "
                    f'{accumulation_steps * batch_size} sequences per iteration of batch_size '
                    f'{batch_size} x gradient_accumulation_steps {accumulation_steps} ...')
        settings = {key: value for key, value in asdict(model_config).items() if key in config}
        keys = 'dataset', 'device', 'dtype', 'optimizer', *LORA_SETTINGS
        settings |= {key: config[key] for key in keys}
        settings |= dict(batch_size=batch_size,
                         gradient_accumulation_steps=accumulation_steps // parallel.world_size)
        found = largest_that_fits(settings)
    found = parallel.all_max(found)
    if not found:
        raise UserError("batch_size='auto' found no size that fits (see above); set --batch_size")
    return found, accumulation_steps * batch_size // found


def run_within_memory(raw_model, batches, config, run_log, parallel, step):
    """
    Return step(). If a run in one process is out of memory, split its micro-batches, which keeps
    the windows of an iteration, and try again. With several processes, raise UserError.
    """
    while True:
        try:
            return step()
        except (RuntimeError, MemoryError) as e:
            machine.check_out_of_memory(e, batches.smaller(), parallel.distributed)
        # outside the except block, because the traceback keeps the failed step's tensors alive
        raw_model.zero_grad(set_to_none=True)
        batches.shrink(run_log.state.iter_num)
        machine.release_freed_memory(parallel.device)
        if config['compile']:
            torch.compiler.reset()  # or it recompiles for dynamic batch sizes, which is slower
        config.update(batch_size=batches.batch_size,
                      gradient_accumulation_steps=batches.accumulation_steps)
        run_log.add_out_of_memory(batches)


def saved_batch_size(script, saved, path, n):
    """
    Return (batch_size, gradient_accumulation_steps) of the config in a checkpoint, for n processes.
    """
    steps = saved['gradient_accumulation_steps']
    if steps % n:
        raise UserError("batch_size='auto' takes the checkpoint's gradient_accumulation_steps="
                        f'{steps}, which must be a multiple of the {n} processes that share it; '
                        'give both keys for as many tokens per iteration: '
                        f"{saved['batch_size'] * steps} sequences")
    return check_value(script, 'batch_size', saved['batch_size'], f"in '{path}'"), steps


def largest_that_fits(settings):
    """Return the batch size that bench.py finds, or 0 if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'found.json')
        flags = [f'--{key}={value}' for key, value in settings.items()]
        bench = os.path.join(ROOT, 'bench.py')
        if run_script(bench, '--find_batch_size=True', f'--json={path}', *flags):
            return 0
        with open(path, encoding='utf-8') as f:
            return json.load(f)['batch_size']
