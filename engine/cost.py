"""Memory: what cannot fit, and an estimate of what a training step takes."""
import contextlib
import weakref
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.common import UserError
from engine.lora import add_adapters
from engine.machine import autocast, check_memory, never_compiled
from engine.optim import moment_numel
from model import GPT

# ------------------------------------------------------------------------------------------------
# what cannot fit

def check_weights_fit(config, processes=1, shards=1):
    """
    Raise UserError if a model's float32 weights, or one of so many shards of them in each process,
    are larger than this computer's memory, before they are built. They are counted on a model of
    one block without data.
    """
    model = GPT.without_data(replace(config, n_layer=1))
    per_block = sum(p.numel() for p in model.transformer.h.parameters())
    count = model.get_num_params(False) + (config.n_layer - 1) * per_block
    share = f' divided by {shards}' if shards > 1 else ''
    many = f' in each of {processes} processes' if processes > 1 else ''
    check_memory(4 * count * processes // shards, torch.device('cpu'),
                 f'{count:,} float32 weights{share}{many}',
                 'n_layer, n_embd, d_ff, vocab_size or block_size')


def cache_bytes(config, length, itemsize):
    """Return the bytes of the KV cache of one sequence."""
    return 2 * config.n_layer * config.kv_heads * config.head_dim * length * itemsize


def check_sampling_fits(model, n_samples, prompt_tokens, new_tokens, device,
                        keys='num_samples or max_new_tokens'):
    """
    Raise UserError if the ids, the KV cache and the logits of samples exceed the device's memory.
    """
    length = prompt_tokens + new_tokens
    config = model.config
    cache = cache_bytes(config, min(config.block_size, length), model.cache_dtype().itemsize)
    ids = 2 * 8 * length  # twice, because stream() makes room for the new ones in a copy
    needed = n_samples * (cache + ids + 4 * config.vocab_size)
    check_memory(needed, device, f'{n_samples:,} samples of up to {length:,} tokens', keys)


# ------------------------------------------------------------------------------------------------
# memory to train

LARGEST_BATCH = 2 ** 24  # tokens of a micro-batch; no device holds more

class LiveBytes(TorchDispatchMode):
    """
    Inside this context, count the bytes of new tensors that are alive: `now`, and the highest so
    far, `peak`. Views share their base's storage and count once.
    """
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()

    @never_compiled
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.count(t.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def count(self, storage):
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())

    def freed(self, address, nbytes):
        self.alive.discard(address)
        self.now -= nbytes


def fake_tensors(config, batch_size, dtype, device):
    """
    Return a context in which tensors have shapes but no data. For a small step on a CPU it does
    nothing, because running that step is faster than importing fake tensors, except in float16.
    """
    multiplications = 12 * config.n_layer * config.n_embd + config.vocab_size
    work = batch_size * config.block_size * config.n_embd * multiplications
    if work <= 2 ** 32 and device.type == 'cpu' and dtype != 'float16':
        return contextlib.nullcontext()
    from torch._subclasses.fake_tensor import FakeTensorMode
    return FakeTensorMode(allow_non_fake_inputs=True)  # such as a teacher's weights


def models_loss(model, X, Y):
    return model(X, Y)[1]


def trace_step(config, lora, batch_size, dtype, device, accumulation, loss):
    """
    Run the forward and backward passes of a step. Return (model, bytes of its weights, peak bytes).
    """
    fake = fake_tensors(config, batch_size, dtype, device)
    with torch.random.fork_rng([]), fake, torch.device(device), LiveBytes() as live:
        model = GPT(config)
        if lora:
            add_adapters(model, lora)
        weights = live.now
        idx = torch.zeros(batch_size, config.block_size, dtype=torch.long)
        for _ in range(min(accumulation, 2)):  # gradients exist during a second forward pass
            with autocast(device, dtype):
                value = loss(model, idx, idx)
            value.backward()
    return model, weights, live.peak


def memory_estimate(config, batch_size, dtype, device, accumulation=1, mode='none', world_size=1,
                    optimizer='adamw', loss=models_loss, lora=None):
    """
    Return the bytes of tensors per device in a training step of batch_size sequences of block_size,
    without torch.compile, which needs less: {'weights', 'gradients', 'moments', 'gathered',
    'activations', 'peak'}.

    The step really runs, on tensors without data, so the estimate covers any part and any
    loss(model, X, Y). `mode` is none, ddp, zero1 or fsdp (https://arxiv.org/abs/1910.02054). `lora`
    is the model's, if it has adapters. `moments` is the optimizer state. `gathered` is the most
    that FSDP holds unsharded. `activations` is the rest of the peak: tensors saved by autograd,
    autocast's copies of weights, and temporaries.
    """
    tokens = batch_size * config.block_size
    if tokens > LARGEST_BATCH:
        raise UserError(f'batch_size {batch_size} x block_size {config.block_size} = {tokens:,} '
                        f'tokens per micro-batch: lower them to {LARGEST_BATCH:,} in all')
    model, weights, peak = trace_step(config, lora, batch_size, dtype, device, accumulation, loss)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    weights_share = 1 / world_size if mode == 'fsdp' else 1
    moments_share = 1 / world_size if mode in ('zero1', 'fsdp') else 1
    sizes = dict(
        weights=round(weights * weights_share),
        gradients=round(gradients * weights_share),
        moments=round(4 * moment_numel(optimizer, model) * moments_share),
        gathered=gathered_bytes(model, dtype) if mode == 'fsdp' else 0,
        activations=peak - weights - gradients,
    )
    return sizes | {'peak': sum(sizes.values())}


def add_process(sizes, process):
    """
    Add to a memory_estimate() for a CPU, where the memory of the whole process is measured, what it
    takes beyond tensors: `process` bytes, and the fragmentation of malloc, about a fifth of their
    size (PARAMETER_FORMULAS.md).
    """
    tensors = sizes.pop('peak')
    sizes |= dict(fragmentation=round(0.2 * tensors), process=process)
    sizes['peak'] = tensors + sizes['fragmentation'] + process


def gathered_bytes(model, dtype):
    """
    Return the bytes that FSDP holds unsharded: embeddings and head in float32, with their gradients
    and the buffer that reduces them; and of the blocks, the current one and the next one in dtype,
    and one block's gradients in dtype and in float32.
    """
    in_blocks = sum(p.numel() for p in model.transformer.h.parameters())
    outside = model.get_num_params(False) - in_blocks
    itemsize, n_layer = getattr(torch, dtype).itemsize, model.config.n_layer
    if hasattr(model, 'lora'):  # then hardly any weight has a gradient
        return 4 * outside + 2 * itemsize * in_blocks // n_layer
    return 12 * outside + (3 * itemsize + 4) * in_blocks // n_layer
