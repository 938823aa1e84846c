"""
Linears for generation on a CPU. A step multiplies every matrix by one row or a few, so it takes as
long as reading the matrices takes. How close torch's kernels come to the memory's bandwidth depends
on the CPU, so a short trial chooses among them.
"""
import copy
import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn

from engine.common import UserError, first_line
from engine.int8 import Int8Linear
from engine.machine import fastest_dtype

TRIED_WEIGHTS = 2 ** 24  # in a trial, about
FEWEST_WEIGHTS = 2 ** 23  # of a model that is worth a trial
MOST_ROWS = 64  # in a trial


class OneDNNLinear(nn.Module):
    """A bfloat16 Linear whose weight is stored in the blocked layout of oneDNN."""
    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().bfloat16()
        self.nbytes = weight.nbytes
        self.bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')


class Float16Linear(nn.Module):
    """A Linear with float16 weights and float32 activations and sums, multiplied by FBGEMM."""
    def __init__(self, linear):
        super().__init__()
        self.nbytes = 2 * linear.weight.numel()
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach().float(), bias)

    def forward(self, x):
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class LoopLinear(nn.Module):
    """
    A Linear with weights in a dtype and float32 activations. For one row, torch.compile makes a
    loop of it that converts the weights while it reads them.
    """
    def __init__(self, linear, dtype):
        super().__init__()
        self.packed = linear.weight.detach().to(getattr(torch, dtype))
        self.nbytes = self.packed.nbytes
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x):
        if x.numel() > x.size(-1):
            return nn.functional.linear(x, self.packed.float(), self.bias)
        y = (x.unsqueeze(-2) * self.packed).sum(-1)
        return y if self.bias is None else y + self.bias


class Kernel(NamedTuple):
    """One way to store and multiply the matrices of a model."""
    name: str
    weights: str  # dtype of the matrices
    dtype: str  # of activations and of everything that is not a matrix
    make: Callable | None = None  # what replaces a Linear; None: nothing does


def kernels_here(dtype):
    """Return the kernels of this CPU for weights in a dtype, or in any if it is 'auto'."""
    found = [Kernel('float32', 'float32', 'float32')]
    if fastest_dtype(torch.device('cpu')) == 'bfloat16':
        found.append(Kernel('bfloat16', 'bfloat16', 'bfloat16'))
        if torch.backends.mkldnn.is_available():
            found.append(Kernel('bfloat16 by oneDNN', 'bfloat16', 'bfloat16', OneDNNLinear))
    if 'fbgemm' in torch.backends.quantized.supported_engines:
        found.append(Kernel('float16 by FBGEMM', 'float16', 'float32', Float16Linear))
    if dtype == 'float16':  # not with 'auto', because activations may overflow
        found.append(Kernel('float16', 'float16', 'float16'))
    return [kernel for kernel in found if dtype in ('auto', kernel.weights)]


def use_kernel(module, kernel):
    """Store the matrices of a module as the kernel needs them, and the rest in its dtype."""
    if kernel.make:
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, kernel.make(child))
    return module.to(getattr(torch, kernel.dtype))


@torch.no_grad()
def time_kernel(kernel, blocks, x):
    """Return the seconds that x (rows, 1, C), a token of each row, takes in copies of Blocks."""
    blocks = use_kernel(copy.deepcopy(blocks), kernel).eval()
    x, times = x.to(getattr(torch, kernel.dtype)), []
    for _ in range(8):  # the first one also sets the kernel up
        t0 = time.perf_counter()
        for block in blocks:
            block(x)
        times.append(time.perf_counter() - t0)
    return min(times)


def choose_kernel(model, dtype, rows):
    """
    Return (kernel, text) for the fastest kernel for `rows` prompts at a time, by a trial on some of
    the model's Blocks. The text says what the trial found. Return (None, '') if the model is small
    or there is no choice.
    """
    total, kernels = count_weights(model), kernels_here(dtype)
    if total < FEWEST_WEIGHTS or len(kernels) < 2:
        return None, ''
    blocks = model.transformer.h
    blocks = blocks[:math.ceil(TRIED_WEIGHTS / count_weights(blocks[0]))]
    rows, share = min(rows, MOST_ROWS), count_weights(blocks) / total
    x = torch.randn(rows, 1, model.config.n_embd)
    seconds = {kernel: time_kernel(kernel, blocks, x) / share for kernel in kernels}
    ordered = sorted(kernels, key=seconds.get)
    times = (f'{kernel.name} {1000 * seconds[kernel]:.1f} ms' for kernel in ordered)
    return ordered[0], f"weights: {', '.join(times)} per step of {rows}; the first is used"


def can_compile(device, rows):
    """Return whether prepare_to_generate() has a compiled step for so many prompts at a time."""
    return device.type == 'cpu' and rows == 1


def compile_steps(model):
    """
    Compile the step that continues one sample by one token. Longer inputs, such as prompts, are
    processed as before.
    """
    # Without these, the compiler moves a norm or an activation into the loop over the rows of the
    # matrix that follows, which then computes it for each row again.
    options = {'realize_opcount_threshold': 0, 'realize_reads_threshold': 1}
    compile = functools.partial(torch.compile, dynamic=True, options=options)
    for block in model.transformer.h:
        block.forward = functools.partial(continue_cache, block.forward, compile(block.forward))
    head = model.lm_head
    head.forward = functools.partial(last_logits, head.forward, compile(head.forward))
    try:
        model.generate(torch.zeros(1, 2, dtype=torch.long), 3)
    except torch._dynamo.exc.TorchDynamoException as e:
        raise UserError('torch.compile failed on this machine, so leave out --compile; it needs a '
                        f"C++ compiler and Python's headers: {first_line(e)}") from e


def continue_cache(forward, compiled, x, rotate, cache, mask):
    """
    Apply a Block's compiled forward to a single token, but not where the cache is empty or about to
    be full, which would each be compiled separately.
    """
    is_token = x.numel() == x.size(-1)
    if is_token and cache is not None and 0 < cache.length < cache.k.size(2) - 1:
        forward = compiled
        for tensor in (cache.k, cache.v):
            torch._dynamo.maybe_mark_dynamic(tensor, 2)  # samples may differ in length
    return forward(x, rotate, cache, mask)


def last_logits(forward, compiled, x):
    """Apply the head's compiled forward to a single token."""
    return (compiled if x.numel() == x.size(-1) else forward)(x)


def count_weights(module):
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def prepare_to_generate(model, device, dtype, quantize, rows, compile=False):
    """
    Move a model to the device with weights in a dtype or, with 'auto', in the fastest for `rows`
    prompts at a time. With compile=True, if can_compile(device, rows), 'auto' means bfloat16.
    Return (the name of the weights, the dtype of the activations, what a trial found or '').
    """
    kernel, text = None, ''
    if quantize:
        model.quantize_int8()
    if compile:
        dtype = 'bfloat16' if dtype == 'auto' else dtype
        make = functools.partial(LoopLinear, dtype=dtype)
        kernel = Kernel(quantize or dtype, quantize or dtype, 'float32', make)
    elif device.type == 'cpu' and not quantize:
        kernel, text = choose_kernel(model, dtype, rows)
    torch.backends.cuda.enable_cudnn_sdp(False)  # see without_cudnn() in attention_kernel.py
    if kernel is None:
        dtype = fastest_dtype(device) if dtype == 'auto' else dtype
        kernel = Kernel(quantize or dtype, dtype, dtype)
    use_kernel(model, kernel).to(device)
    if compile:
        compile_steps(model)
    return kernel.name, kernel.dtype, text


def matrix_bytes(model):
    """Return the bytes of the matrices, which every step reads."""
    linears = nn.Linear, Int8Linear
    return packed_bytes(model) + sum(
        module.weight.nbytes for module in model.modules() if isinstance(module, linears))


def stored_bytes(model):
    """Return the bytes of all weights."""
    return packed_bytes(model) + sum(t.nbytes for t in {*model.parameters(), *model.buffers()})


def packed_bytes(model):
    packed = OneDNNLinear, Float16Linear, LoopLinear
    return sum(module.nbytes for module in model.modules() if isinstance(module, packed))
