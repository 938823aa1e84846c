"""Find out about the machine: device, dtype, peak speed, memory."""
import contextlib
import ctypes
import gc
import inspect
import os
import platform
import re
import resource
import sys
import time

import torch

from engine.common import GIB, UserError, first_line, out_of_memory


def pick_device(device='auto', dtype='auto'):
    """Return (torch.device, dtype name). 'auto' picks the fastest that this machine has."""
    if device == 'auto':
        device = fastest_device()
    remedy = '--device=auto chooses the fastest available'
    if not re.fullmatch(r'(cuda|mps|cpu)(:\d+)?', str(device)):
        raise UserError(f"device '{device}' is none of cuda, mps and cpu; {remedy}")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
        if device.type == 'cuda':
            device = torch.device('cuda', device.index or 0)  # torch.cuda.set_device needs it
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f"device '{device}' is not available here: {first_line(e)[:120]}; "
                        f'{remedy}') from e
    if dtype == 'auto':
        dtype = fastest_dtype(device)
    return device, dtype


def fastest_device():
    if torch.cuda.is_available():
        return 'cuda'
    return 'mps' if torch.backends.mps.is_available() else 'cpu'


def fastest_dtype(device):
    """
    Return 'bfloat16' if the hardware supports it, otherwise 'float16' on CUDA and 'float32'
    elsewhere.
    """
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


def processor():
    """Return the name of the CPU and its number of cores."""
    name = platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            found = re.search(r'model name\s*: (.+)', f.read())
        name = found[1] if found else name
    return f'{name}, {os.cpu_count()} cores'


def kernels(device):
    """Return the names of units and kernels that training can use."""
    if device.type == 'cuda':
        backends = torch.backends.cuda
        has = dict(flash=backends.flash_sdp_enabled(), cudnn=backends.cudnn_sdp_enabled(),
                   bfloat16=torch.cuda.is_bf16_supported(including_emulation=False))
    else:
        has = dict(AMX=torch.cpu._is_amx_tile_supported(),
                   avx512_bf16=torch.cpu._is_avx512_bf16_supported(),
                   oneDNN=torch.backends.mkldnn.is_available())
    return [name for name, present in has.items() if present]


def machine_facts(device, dtype, peak, source):
    """Return what is known about the machine, {name: text}."""
    return {
        'device': f'{device} ({device_name(device)})',
        'processor': processor(),
        'memory': f'{total_memory(device) / GIB:.0f} GiB, {free_memory(device) / GIB:.0f} free',
        'torch': f'{torch.__version__}, Python {platform.python_version()}',
        'training in': dtype,
        'peak': f'{peak / 1e12:.4g} TFLOP/s ({source})',
        'kernels': ', '.join(kernels(device)) or 'none beyond the standard ones',
        'measured': time.strftime('%Y-%m-%d %H:%M'),
        'other work': f'a load average of {os.getloadavg()[0]:.1f} before',
    }


def synchronize(device):
    """Wait until the device has finished its work."""
    if device.type != 'cpu':
        getattr(torch, device.type).synchronize()


# {GPU: (dense TFLOP/s in bfloat16 or, without units for it, in float16; GiB of memory)} from the
# vendors' datasheets, which write GB and mean GiB. Figures twice as high assume 2:4 sparsity. The
# first name that occurs as whole words in the device's name is used.
DATASHEETS = {
    'B200': (2250, 180), 'H200': (989, 141), 'H100 PCIe': (756, 80), 'H100 NVL': (835, 94),
    'H100': (989, 80), 'A100 80GB': (312, 80), 'A100': (312, 40), 'L40S': (362, 48),
    'A10': (125, 24), 'RTX 4090': (165, 24), 'RTX 3090': (71, 24), 'RTX A6000': (155, 48),
    'V100 32GB': (125, 32), 'V100': (125, 16), 'T4': (65, 16),
}
FLOAT16_ONLY = 'V100 32GB', 'V100', 'T4'
USABLE_MEMORY = 0.9  # the rest is for the driver, its libraries and gaps between tensors


def find_gpu(name):
    """
    Return the key of DATASHEETS that a user means by `name`, such as h100 or RTX4090, or '' if it
    is a device of this computer. Raise UserError if it is neither.
    """
    if re.fullmatch(r'auto|(cpu|cuda|mps)(:\d+)?', name):
        return ''
    short = {re.sub(r'\W', '', gpu).lower(): gpu for gpu in DATASHEETS}
    asked = re.sub(r'[\W_]', '', name).lower()
    ends = [known for known in short if asked and known.endswith(asked)]  # 4090
    if asked in short or len(ends) == 1:
        return short.get(asked) or short[ends[0]]
    raise UserError(f"unknown device '{name}'; choose auto, cpu, cuda or mps for this computer, or "
                    f"a GPU that is known by its datasheet: {', '.join(DATASHEETS)}")


def datasheet_peak(gpu, dtype):
    """Return the dense FLOP/s of a GPU in DATASHEETS, or None if there is none for the dtype."""
    if dtype == 'float32' or dtype == 'bfloat16' and gpu in FLOAT16_ONLY:
        return None
    return DATASHEETS[gpu][0] * 1e12


def peak_flops(device, dtype, given_tflops=0.0):
    """
    Return (FLOP/s, source): given_tflops if it is not 0, or the datasheet's dense peak, or, for an
    unknown device, the measured speed of a large matmul: 8192 x 8192 on CUDA, 2048 x 2048
    elsewhere, or smaller where that would take more than half a second. Other programs make a
    measured one lower, so it serves to estimate times, and a share of it says little.
    """
    if given_tflops:
        return given_tflops * 1e12, 'as given'
    name = device_name(device) if device.type == 'cuda' else ''
    gpu = next((known for known in DATASHEETS if re.search(rf'\b{known}\b', name)), '')
    if gpu and not re.search('Laptop|MIG', name):
        if peak := datasheet_peak(gpu, dtype):
            return peak, f'dense {dtype} peak of {gpu}'
    n, largest = 64, 8192 if device.type == 'cuda' else 2048
    while n < largest and 8 * matmul_time(n, device, dtype, 0.0) < 0.5:  # twice as large
        n *= 2
    seconds = matmul_time(n, device, dtype, 0.3)
    return 2 * n ** 3 / seconds, f'measured, {n} x {n} {dtype} matmul'


def matmul_time(n, device, dtype, seconds):
    """Return the shortest time of an n x n matmul, repeated for at least `seconds`."""
    return min(matmul_times(n, device, dtype, seconds))


def matmul_times(n, device, dtype, seconds):
    """Return the times of n x n matmuls, repeated for at least `seconds`."""
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    a @ b  # the first one loads libraries
    return times_of(lambda: a @ b, seconds)


def linear_times(tokens, n_in, n_out, device, dtype, seconds):
    """
    Return {product: times} of the three matmuls that train a Linear on so many tokens, each
    repeated for at least `seconds`.
    """
    def random(*shape):
        return torch.randn(shape, device=device).to(getattr(torch, dtype))
    x, weight, grad = random(tokens, n_in), random(n_out, n_in), random(tokens, n_out)
    products = {'forward': lambda: x @ weight.T, 'gradient of x': lambda: grad @ weight,
                'gradient of the weight': lambda: grad.T @ x}
    return {name: times_of(product, seconds) for name, product in products.items()}


def peak_bandwidth(device):
    """
    Measure the bytes/s at which the device reads memory, which limits generation: the best of one
    second of sums over 1 GiB of float32.
    """
    x = torch.ones(2 ** 28, device=device)
    return x.nbytes / min(times_of(x.sum, 1.0))


def copy_times(nbytes, device, seconds):
    """Return the times of copies of so many bytes, which are read once and written once."""
    x = torch.ones(nbytes, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return times_of(lambda: y.copy_(x), seconds)


def times_of(work, seconds):
    """
    Return the times of work(), called once and for at least `seconds`. work() returns a tensor.
    """
    times = []
    while not times or sum(times) < seconds:
        t0 = time.perf_counter()
        work().flatten()[0].item()  # reading a value waits for the device
        times.append(time.perf_counter() - t0)
    return times


def memory(device):
    """
    Return the bytes in use and at their peak. CUDA: tensors (allocated, peak) and what torch's
    allocator holds (reserved). MPS: the same without a peak. CPU: the whole process (resident,
    peak), or only its peak without /proc.
    """
    if device.type == 'cuda':
        return dict(allocated=torch.cuda.memory_allocated(device),
                    peak=torch.cuda.max_memory_allocated(device),
                    reserved=torch.cuda.memory_reserved(device))
    if device.type == 'mps':  # its pool only shrinks on request, so reserved is close to a peak
        return dict(allocated=torch.mps.current_allocated_memory(),
                    reserved=torch.mps.driver_allocated_memory())
    try:  # not getrusage, whose peak starts at the parent process's peak
        sizes = read_sizes('/proc/self/status')
        return dict(resident=sizes['VmRSS'], peak=sizes['VmHWM'])
    except OSError:
        unit = 1 if sys.platform == 'darwin' else 1024
        return dict(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def read_sizes(path):
    """Parse the lines 'name: n kB' of a file in /proc into {name: bytes}."""
    with open(path) as f:
        found = re.findall(r'^(\w+):\s+(\d+) kB$', f.read(), re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in found}


def total_memory(device):
    """
    Return the bytes of memory of a GPU or, for other devices, of this computer or container.
    """
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    with contextlib.suppress(OSError, ValueError):  # no such file, or the limit is 'max'
        with open('/sys/fs/cgroup/memory.max') as f:
            total = min(total, int(f.read()))
    return total


def check_memory(needed, device, what, keys):
    """Raise UserError if `what` needs more bytes than a device has; `keys` make it smaller."""
    total = total_memory(device)
    if needed > total:
        where = 'GPU' if device.type == 'cuda' else 'computer'
        raise UserError(f'{what} would take {needed / GIB:,.1f} GiB, and this {where} has '
                        f'{total / GIB:,.1f} GiB of memory: lower {keys}')


def free_memory(device):
    """
    Return the bytes still free on the device, within a container's limit. If the system does not
    say, return all of its memory.
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
            used = int(f.read())
        with open('/sys/fs/cgroup/memory.stat') as f:  # cached files, which are freed on demand
            used -= sum(map(int, re.findall(r'^(?:in)?active_file (\d+)', f.read(), re.MULTILINE)))
        free = min(free, limit - used)
    return free


def limit_memory(device):
    """
    Limit this process to nine tenths of the free memory, so that it gets an error instead of being
    killed by the kernel. Ranks on one node share its CPU memory. Only CUDA and Linux have such
    limits.
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
    Stop glibc's malloc from returning freed memory to the kernel, because faulting it in again for
    the next tensors is slow. Do nothing on other systems.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):
        libc.mallopt(M_MMAP_MAX, 0)  # do not mmap large blocks separately
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never give memory back
        libc.mallopt(M_TOP_PAD, 2 ** 28)  # grow by 256 MiB at a time


def release_freed_memory(device):
    """Release cached memory after an out-of-memory error, and cache less from then on."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if device.type == 'cuda':
        torch.cuda.empty_cache()
    elif hasattr(libc, 'malloc_trim'):
        libc.mallopt(M_MMAP_MAX, 65536)  # the default
        libc.malloc_trim(0)


def never_compiled(function):
    """
    Mark a function that torch wraps in its private _disable_dynamo. Without the mark, its first
    call imports torch.compile's front end for nothing.
    """
    original = inspect.unwrap(function)
    original.__dynamo_disable = original
    return function


def prepare_to_train(device):
    """Set up this process for training on a device."""
    skip_dynamo_imports()
    if device.type == 'cpu':
        keep_freed_memory()
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32, as in nanoGPT


def autocast(device, dtype):
    """Return the context of forward passes: torch.autocast to dtype, or nothing for float32."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype))


def skip_dynamo_imports():
    """
    Avoid the import of torch.compile's front end, about a second, in runs that never compile. This
    is harmless in runs that do.
    """
    adamw = torch.optim.AdamW
    for method in (adamw.add_param_group, adamw.zero_grad, adamw.state_dict, adamw.load_state_dict):
        never_compiled(method)
    if adamw.step is torch.optim.Adam.step:  # not replaced yet
        # Adam's step is wrapped in a function that imports it, too.
        adamw.step = torch.no_grad()(inspect.unwrap(adamw.step))


def check_out_of_memory(error, smaller, distributed):
    """
    Decide what follows an error in a step. Return if memory ran out and a single process can use a
    smaller micro-batch. Raise UserError with the flags to use if memory ran out otherwise, and any
    other error unchanged. `smaller` is (batch_size, gradient_accumulation_steps) of that
    micro-batch, or None.
    """
    if not out_of_memory(error):
        raise error
    if smaller and not distributed:
        return
    remedy = '--activation_checkpointing=True, a smaller --block_size or a smaller model'
    if smaller:
        remedy = (f'--batch_size={smaller[0]} --gradient_accumulation_steps={smaller[1]}, which '
                  'keep the tokens per iteration')
    raise UserError(f'out of memory; try {remedy} ({first_line(error)[:200]})')
