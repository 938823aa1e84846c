"""The machine: device, dtype, peak FLOP/s, memory."""
import ctypes
import gc
import inspect
import math
import re
import resource
import sys
import time

import torch

from engine.common import first_line


def pick_device(device='auto', dtype='auto'):
    """(torch.device, dtype name): the fastest there is where they say 'auto'. ValueError if the device asked for is not there."""
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(device)
        if device.type not in ('cuda', 'mps', 'cpu'):
            raise RuntimeError('it is none of cuda, mps and cpu')
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"device '{device}' is not available here: {first_line(e)[:120]}; --device=auto takes what there is") from e
    if dtype == 'auto':
        if device.type == 'cuda':
            dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
        else:
            cpu_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
            dtype = 'bfloat16' if device.type == 'cpu' and cpu_bf16 else 'float32'
    return device, dtype


# Dense bfloat16 TFLOP/s by device name, from the vendors' datasheets (float16 on V100 and T4, which have no bfloat16 units).
# The doubled figures in circulation are with 2:4 sparsity. The first name found as whole words in the device's name counts.
DENSE_PEAKS = {'B200': 2250, 'H200': 989, 'H100 PCIe': 756, 'H100 NVL': 835, 'H100': 989, 'A100': 312, 'L40S': 362, 'A10': 125,
               'RTX 4090': 165, 'RTX 3090': 71, 'RTX A6000': 155, 'V100': 125, 'T4': 65}


def peak_flops(device, dtype):
    """(FLOP/s, how it is known): the datasheet's dense peak, or else a large matmul measured here for a third of a second."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
    for known, tflops in DENSE_PEAKS.items():
        has_units = dtype == 'float16' or dtype == 'bfloat16' and known not in ('V100', 'T4')
        if has_units and re.search(rf'\b{known}\b', name) and not re.search('Laptop|MIG', name):
            return tflops * 1e12, f'dense {dtype} peak of {known}'
    n, best, spent = (8192 if device.type == 'cuda' else 2048), math.inf, 0.0
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    while spent < 0.3:
        t0 = time.perf_counter()
        (a @ b)[0, 0].item()  # reading a value waits for the device
        dt = time.perf_counter() - t0
        best, spent = min(best, dt), spent + dt
    return 2 * n ** 3 / best, f'measured, {n} x {n} {dtype} matmul'


def keep_freed_memory():
    """Stop glibc's malloc from giving a freed tensor back to the kernel, to fault in its pages again for the next; a no-op elsewhere."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):
        for option, value in ((-4, 0), (-1, -1), (-2, 2 ** 28)):  # M_MMAP_MAX: none; M_TRIM_THRESHOLD: never; M_TOP_PAD: 256 MiB at a time
            libc.mallopt(option, value)


def release_freed_memory(device):
    """After an out-of-memory error: give back what torch or malloc keeps for tensors of other sizes, and have malloc keep no more large ones."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if device.type == 'cuda':
        torch.cuda.empty_cache()
    elif hasattr(libc, 'malloc_trim'):
        libc.mallopt(-4, 65536)  # M_MMAP_MAX, its default
        libc.malloc_trim(0)


def memory(device):
    """
    Bytes now and at their highest. CUDA: what tensors hold (allocated, peak) and what torch's allocator has taken for them (reserved).
    MPS: the same without a peak, which it does not count. CPU: what of this process is in memory, anything else it holds included.
    """
    if device.type == 'cuda':
        return dict(allocated=torch.cuda.memory_allocated(device), peak=torch.cuda.max_memory_allocated(device), reserved=torch.cuda.memory_reserved(device))
    if device.type == 'mps':  # its pool does not shrink within a run unless asked to, so reserved is the nearest there is to a peak
        return dict(allocated=torch.mps.current_allocated_memory(), reserved=torch.mps.driver_allocated_memory())
    try:
        with open('/proc/self/status') as f:
            sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in f if line.startswith(('VmRSS', 'VmHWM'))}
        return dict(resident=sizes['VmRSS:'], peak=sizes['VmHWM:'])  # getrusage's peak would be at least that of the process that started this one
    except OSError:
        return dict(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))


def keep_dynamo_out(*functions):
    """
    Functions of torch that are never compiled import all of torch.compile's front end at their first call, a second on a CPU, only to learn how not to
    be: tell them (torch._disable_dynamo looks for this mark).
    """
    for function in map(inspect.unwrap, functions):
        setattr(function, '__dynamo_disable', function)
