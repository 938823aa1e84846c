"""
Choose between the two kernels for attention on a GPU, flash and cuDNN. Which one is faster depends
on the GPU, on the versions of torch and cuDNN, and on the model, so a short trial decides.
"""
import atexit
import contextlib
import math
import warnings

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.machine import autocast, times_of
from model import POSITION_ENCODING, CausalSelfAttention

KERNELS = {'flash': SDPBackend.FLASH_ATTENTION, 'cuDNN': SDPBackend.CUDNN_ATTENTION}
OTHERS = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH

preference = contextlib.ExitStack()  # what prefer() has set
atexit.register(preference.close)  # its contexts restore settings while torch is still whole


def choose_attention(config, batch_size, dtype, parallel):
    """
    Let F.scaled_dot_product_attention use the faster kernel for training a GPTConfig, the same one
    on all ranks. Return a line about it, or '' if there is no choice. This must come before
    torch.compile, which keeps the kernel that it finds.
    """
    # other kernels are for masks and float32, and cuDNN rounds dropout to sixteenths
    plain = config.doc_mask_token is None and not config.dropout and dtype != 'float32'
    if parallel.device.type != 'cuda' or config.attention_backend != 'sdpa' or not plain:
        return ''
    seconds = {name: parallel.mean(time_kernel(name, config, batch_size, dtype, parallel.device))
               for name in KERNELS}
    best, other = sorted(KERNELS, key=seconds.get)
    if math.isinf(seconds[best]):
        return ''
    prefer(best)
    line = f'{best}, {1000 * seconds[best]:.2f} ms per layer, forward and backward'
    if math.isinf(seconds[other]):
        return f'{line}; {other} cannot run it'
    return f'{line}; {other} {1000 * seconds[other]:.2f} ms'


def time_kernel(name, config, batch_size, dtype, device):
    """Return the seconds that an attention layer takes by a kernel, or inf if it cannot run it."""
    layer = CausalSelfAttention(config).to(device)
    position = POSITION_ENCODING[config.position_encoding](config).to(device)
    x = torch.randn(batch_size, config.block_size, config.n_embd, device=device, requires_grad=True)
    _, rotate = position(x, torch.arange(config.block_size, device=device))

    def step():
        with autocast(device, dtype):
            y = layer(x, rotate)
        return torch.autograd.grad(y, x, y)[0]
    try:
        with sdpa_kernel(KERNELS[name]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch says at length why a kernel is not for this
            step()  # the first one loads libraries
            return min(times_of(step, 0.1))
    except RuntimeError:  # also for a lack of memory, which the first step meets again
        return math.inf


def prefer(name):
    """Let F.scaled_dot_product_attention try a kernel before the others, in the whole process."""
    preference.close()
    order = [KERNELS[name], *KERNELS.values(), *OTHERS]
    preference.enter_context(sdpa_kernel(order, set_priority=True))
    # torch.compile's cache would give one kernel's code to a process that has chosen the other
    tag = f'{torch.compiler.config.cache_key_tag} attention by {name}'
    preference.enter_context(torch.compiler.config.patch(cache_key_tag=tag))


def without_cudnn():
    """
    Return a context for generation: cuDNN's kernel takes tenths of a second to prepare for a new
    length, and every token makes one.
    """
    return sdpa_kernel([KERNELS['flash'], *OTHERS])
