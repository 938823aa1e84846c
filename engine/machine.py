"""The machine: device, dtype, peak speeds, memory."""
import contextlib
import ctypes
import gc
import inspect
import math
import os
import re
import resource
import sys
import time

import torch

from engine.common import UserError, first_line, out_of_memory


def pick_device(device='auto', dtype='auto'):
    """(torch.device, name of the dtype); 'auto' takes the fastest that this machine has."""
    if device == 'auto':
        device = fastest_device()
    try:
        device = torch.device(device)
        if device.type not in ('cuda', 'mps', 'cpu'):
            raise RuntimeError('it is none of cuda, mps and cpu')
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f"device '{device}' is not available here: {first_line(e)[:120]}; "
                        '--device=auto takes the best that is') from e
    if dtype == 'auto':
        dtype = fastest_dtype(device)
    return device, dtype


def fastest_device():
    if torch.cuda.is_available():
        return 'cuda'
    return 'mps' if torch.backends.mps.is_available() else 'cpu'


def fastest_dtype(device):
    """bfloat16 where the hardware has units for it; otherwise float16 on CUDA, else float32."""
    if device.type == 'cuda':
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
        return 'bfloat16' if has_units else 'float16'
    if device.type == 'cpu':
        if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
            return 'bfloat16'
    return 'float32'


def device_name(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{torch.get_num_threads()} threads' if device.type == 'cpu' else device.type


def synchronize(device):
    """Wait until the device has finished its work."""
    if device.type != 'cpu':
        getattr(torch, device.type).synchronize()


# Dense bfloat16 TFLOP/s from the vendors' datasheets; float16 for V100 and T4, which have no
# bfloat16 units. The doubled figures in circulation assume 2:4 sparsity. The first name that
# occurs as whole words in the device's name counts.
DENSE_PEAKS = {
    'B200': 2250, 'H200': 989, 'H100 PCIe': 756, 'H100 NVL': 835, 'H100': 989, 'A100': 312,
    'L40S': 362, 'A10': 125, 'RTX 4090': 165, 'RTX 3090': 71, 'RTX A6000': 155,
    'V100': 125, 'T4': 65,
}


def peak_flops(device, dtype):
    """
    (FLOP/s, its source): the datasheet's dense peak, or for an unknown device the speed of a
    large matmul, measured for a third of a second.
    """
    name = device_name(device) if device.type == 'cuda' else ''
    for known, tflops in DENSE_PEAKS.items():
        float16_only = known in ('V100', 'T4')
        has_units = dtype == 'float16' or dtype == 'bfloat16' and not float16_only
        full_size = not re.search('Laptop|MIG', name)
        if has_units and full_size and re.search(rf'\b{known}\b', name):
            return tflops * 1e12, f'dense {dtype} peak of {known}'
    n = 8192 if device.type == 'cuda' else 2048
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    seconds = shortest_time(lambda: a @ b, 0.3)
    return 2 * n ** 3 / seconds, f'measured, {n} x {n} {dtype} matmul'


def peak_bandwidth(device):
    """
    Bytes/s at which the device reads memory, which limits generation: the best of a second of
    sums over 1 GiB of float32.
    """
    x = torch.ones(2 ** 28, device=device)
    return x.nbytes / shortest_time(x.sum, 1.0)


def shortest_time(work, seconds):
    """The shortest time of work(), which returns a tensor, over at least that many seconds."""
    best, spent = math.inf, 0.0
    while spent < seconds:
        t0 = time.perf_counter()
        work().flatten()[0].item()  # reading a value waits for the device
        dt = time.perf_counter() - t0
        best, spent = min(best, dt), spent + dt
    return best


def memory(device):
    """
    Bytes in use and at their peak. CUDA: of tensors (allocated, peak), and what torch's allocator
    has taken for them (reserved). MPS: the same without a peak, which it does not count. CPU: the
    whole process (resident, peak), or its peak alone without /proc.
    """
    if device.type == 'cuda':
        return dict(allocated=torch.cuda.memory_allocated(device),
                    peak=torch.cuda.max_memory_allocated(device),
                    reserved=torch.cuda.memory_reserved(device))
    if device.type == 'mps':  # its pool does not shrink unasked, so reserved is close to a peak
        return dict(allocated=torch.mps.current_allocated_memory(),
                    reserved=torch.mps.driver_allocated_memory())
    try:  # not getrusage, whose peak starts at that of the parent process
        sizes = read_sizes('/proc/self/status')
        return dict(resident=sizes['VmRSS'], peak=sizes['VmHWM'])
    except OSError:
        unit = 1 if sys.platform == 'darwin' else 1024
        return dict(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def read_sizes(path):
    """{name: bytes} of the lines 'name: n kB' of a file in /proc."""
    with open(path) as f:
        found = re.findall(r'^(\w+):\s+(\d+) kB$', f.read(), re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in found}


def total_memory(device):
    """Bytes of memory that a GPU has, or for other devices this computer."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def free_memory(device):
    """
    Bytes that the device can still give out, within the limit of a container. All of its memory
    where the system does not say.
    """
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    if not os.path.exists('/proc/meminfo'):
        return total_memory(device)
    free = read_sizes('/proc/meminfo')['MemAvailable']
    with contextlib.suppress(OSError, ValueError):  # no such files, or the limit is 'max'
        with open('/sys/fs/cgroup/memory.max') as f:
            limit = int(f.read())
        with open('/sys/fs/cgroup/memory.current') as f:
            free = min(free, limit - int(f.read()))
    return free


def limit_memory(device):
    """
    Make this process run out of memory, with an error, at nine tenths of what is free; otherwise
    the kernel might kill it, or another process. Ranks on one node share its CPU memory. Only
    CUDA and Linux have such limits.
    """
    if device.type == 'cuda':
        torch.cuda.set_per_process_memory_fraction(0.9, device)
    elif sys.platform == 'linux':
        ranks = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        limit = min([int(0.9 * free_memory(device) / ranks), *known])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


# glibc's options of mallopt()
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory():
    """
    Stop glibc's malloc from returning freed tensors to the kernel, whose pages it would have to
    fault in again for the next ones. Does nothing on other systems.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):
        libc.mallopt(M_MMAP_MAX, 0)  # no block is mapped by itself
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never give memory back
        libc.mallopt(M_TOP_PAD, 2 ** 28)  # grow by 256 MiB at a time


def release_freed_memory(device):
    """After an out-of-memory error, give cached memory back and keep less of it from then on."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if device.type == 'cuda':
        torch.cuda.empty_cache()
    elif hasattr(libc, 'malloc_trim'):
        libc.mallopt(M_MMAP_MAX, 65536)  # its default
        libc.malloc_trim(0)


def never_compiled(function):
    """
    Mark a function that torch wraps in its private _disable_dynamo. Without the mark, its first
    call imports the front end of torch.compile, only to learn how not to be compiled.
    """
    original = inspect.unwrap(function)
    original.__dynamo_disable = original
    return function


def skip_dynamo_imports():
    """Spare a run that never compiles the import of torch.compile's front end, about a second."""
    adamw = torch.optim.AdamW
    for method in (adamw.add_param_group, adamw.zero_grad, adamw.state_dict, adamw.load_state_dict):
        never_compiled(method)
    if adamw.step is torch.optim.Adam.step:  # not replaced yet
        # Adam's step imports it too, in a wrapper around the function that computes.
        adamw.step = torch.no_grad()(inspect.unwrap(adamw.step))


def check_out_of_memory(error, smaller, distributed):
    """
    Return if `error` says that memory ran out and a smaller micro-batch may help; otherwise raise
    it, or a UserError with the flags to use. smaller: (batch_size, gradient_accumulation_steps) of
    that micro-batch, or None. Several processes would have to agree on it, so they end.
    """
    if not out_of_memory(error):
        raise error
    if smaller and not distributed:
        return
    remedy = '--activation_checkpointing=True, a smaller --block_size or a smaller model'
    if smaller:
        remedy = (f'--batch_size={smaller[0]} --gradient_accumulation_steps={smaller[1]}, which '
                  'are as many tokens per iteration')
    raise UserError(f'out of memory; to need less: {remedy} ({first_line(error)[:200]})')
