"""The kernel for attention on a GPU: python -m pytest tests/test_attention_kernel.py"""
import math

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from engine import attention_kernel
from engine.attention_kernel import (
    KERNELS,
    choose_attention,
    prefer,
    preference,
    time_kernel,
    without_cudnn,
)
from engine.parallel import Parallel
from model import GPTConfig

SMALL = dict(block_size=16, vocab_size=64, n_layer=1, n_head=4, n_embd=32)
CPU, GPU = torch.device('cpu'), torch.device('cuda', 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


@pytest.fixture(autouse=True)
def forget():
    yield
    preference.close()


def first_kernel():
    return SDPBackend(torch._C._get_sdp_priority_order()[0])


def rank_with(monkeypatch, own, others=None):
    """A Parallel with a GPU, whose ranks measure these seconds."""
    parallel, others = Parallel(), others or own
    parallel.device = GPU
    monkeypatch.setattr(attention_kernel, 'time_kernel', lambda name, *args: own[name])
    of_other = {own[name]: others[name] for name in own}
    monkeypatch.setattr(parallel, 'mean', lambda seconds: (seconds + of_other[seconds]) / 2)
    return parallel


@pytest.mark.parametrize('flash, cudnn, best, line', [
    (0.002, 0.003, 'flash', 'flash, 2.00 ms per layer, forward and backward; cuDNN 3.00 ms'),
    (0.003, 0.002, 'cuDNN', 'cuDNN, 2.00 ms per layer, forward and backward; flash 3.00 ms'),
    (0.002, math.inf, 'flash', 'flash, 2.00 ms per layer, forward and backward; cuDNN cannot run it'),
    (math.inf, 0.002, 'cuDNN', 'cuDNN, 2.00 ms per layer, forward and backward; flash cannot run it'),
])
def test_the_faster_kernel_is_used_and_said(monkeypatch, flash, cudnn, best, line):
    """The slower kernel for a whole run, or files of torch.compile's cache that have the other one."""
    parallel = rank_with(monkeypatch, dict(flash=flash, cuDNN=cudnn))
    assert choose_attention(GPTConfig(**SMALL), 2, 'bfloat16', parallel) == line
    assert first_kernel() == KERNELS[best] and best in torch.compiler.config.cache_key_tag
    with without_cudnn():
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    preference.close()
    assert first_kernel() == KERNELS['flash'] and not torch.compiler.config.cache_key_tag


def test_ranks_choose_alike(monkeypatch):
    """A rank of DDP with other kernels than the rest rounds otherwise, and makes all wait for the slowest."""
    times = dict(flash=1.0, cuDNN=2.0), dict(flash=4.0, cuDNN=2.5)
    for own, others in (times, times[::-1]):
        assert choose_attention(GPTConfig(**SMALL), 2, 'bfloat16', rank_with(monkeypatch, own, others))
        assert first_kernel() == KERNELS['cuDNN']


@pytest.mark.parametrize('device, dtype, settings', [
    (CPU, 'bfloat16', {}),
    (GPU, 'float32', {}),
    (GPU, 'bfloat16', dict(dropout=0.1)),
    (GPU, 'bfloat16', dict(doc_mask_token=0)),
    (GPU, 'bfloat16', dict(attention_backend='manual')),
])
def test_there_is_no_trial_without_a_choice(monkeypatch, device, dtype, settings):
    """A trial of kernels that the run cannot use, or that change its numbers on a CPU."""
    parallel = rank_with(monkeypatch, {})
    parallel.device = device
    assert choose_attention(GPTConfig(**SMALL, **settings), 2, dtype, parallel) == ''


def test_torch_chooses_where_neither_kernel_works(monkeypatch):
    neither = rank_with(monkeypatch, dict(flash=math.inf, cuDNN=math.inf))
    assert choose_attention(GPTConfig(**SMALL), 2, 'float16', neither) == ''


@pytest.mark.parametrize('settings', [{}, dict(position_encoding='rope', qk_norm=True, n_kv_head=2)], ids=str)
def test_a_kernel_that_cannot_run_takes_for_ever(settings):
    """The run ends at its start with torch's 'No available kernel', or with pages of warnings."""
    config = GPTConfig(**SMALL, **settings)
    assert time_kernel('flash', config, 2, 'float32', CPU) < math.inf  # a CPU's kernel has the same name
    assert time_kernel('cuDNN', config, 2, 'float32', CPU) == math.inf


def operations(function, *args, **kwargs):
    """The names of all operations in a call."""
    function(*args, **kwargs)
    with torch.profiler.profile() as profiler:
        function(*args, **kwargs)
    return ' '.join(event.name for event in profiler.events())


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_trains_with_the_kernel_that_was_chosen():
    """Another kernel than the one that is said, or one that gives another result."""
    config, parallel = GPTConfig(**SMALL | dict(block_size=256, n_embd=256)), Parallel()
    parallel.device = GPU
    assert choose_attention(config, 4, 'bfloat16', parallel).split(',')[0] in KERNELS
    q = torch.randn(4, 4, 256, 64, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    out = {}
    for name in KERNELS:
        if time_kernel(name, config, 4, 'bfloat16', GPU) < math.inf:
            prefer(name)
            torch.compiler.reset()
            for attend in (scaled_dot_product_attention, torch.compile(scaled_dot_product_attention)):
                assert f'product_{name.lower()}_attention' in operations(attend, q, q, q, is_causal=True)
            out[name] = scaled_dot_product_attention(q, q, q, is_causal=True)
    assert 'flash' in out
    for other in out.values():
        torch.testing.assert_close(other, out['flash'], atol=0.02, rtol=0.02)
