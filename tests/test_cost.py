"""Memory estimates, descriptions and gradient statistics: python -m pytest tests/test_cost.py"""
import json
import math
import re
import sys
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import command, run_logs, succeeded, train
from engine import cost
from engine.common import GIB, UserError
from engine.cost import memory_estimate
from engine.describe import describe, fit, meta_model, params_by_part
from engine.machine import DATASHEETS, datasheet_peak, find_gpu, peak_flops
from engine.parallel import Parallel
from engine.report import GradientStatistics
from model import GPTConfig
from test_model import TINY, B, T, every_combination, gradients, ids, on_meta, shaken

CPU = torch.device('cpu')

# ----------------------------------------------------------------------------------------------------------------------
# memory to train

MEASURED_STEPS = """
import itertools, json
import torch
from engine.cost import memory_estimate
from engine.machine import memory, pick_device
from model import GPT, GPTConfig

torch.set_num_threads(1)
cpu = torch.device('cpu')


def steps(preset='gpt2', dtype='float32', checkpointing=False, batch_size=8, n_layer=2, block_size=128):
    config = GPTConfig.from_settings(dict(
        arch_preset=preset, n_head=4, n_embd=256, vocab_size=4096, n_layer=n_layer, block_size=block_size,
        activation_checkpointing=checkpointing))
    estimate = memory_estimate(config, batch_size, dtype, cpu)
    open('/proc/self/clear_refs', 'w').write('5')  # the peak counts from here
    before = memory(cpu)['resident']
    model = GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), 'cpu')
    idx = torch.randint(4096, (batch_size, config.block_size))
    for _ in range(2):
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
            loss = model(idx, idx)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return estimate['peak'], memory(cpu)['peak'] - before


dtypes = dict.fromkeys(['float32', pick_device('cpu')[1]])  # not bfloat16 on a CPU without units for it
for dtype in dtypes:
    steps(dtype=dtype, batch_size=1, n_layer=1, block_size=16)  # loads kernels and modules, which are no tensors
cases = itertools.product(['gpt2', 'llama'], dtypes, [False, True])
print(json.dumps([(case, *steps(*case)) for case in cases]))
"""


@pytest.mark.skipif(sys.platform != 'linux', reason="needs glibc's malloc and /proc")
def test_memory_estimate_is_what_a_step_takes():
    """
    An estimate more than 15 % away from what two real steps add to the resident memory of a process. malloc maps each
    tensor by itself here, because what it loses between tensors is not theirs.
    """
    done = command('-c', MEASURED_STEPS, env={'MALLOC_MMAP_THRESHOLD_': '65536'})
    succeeded(done)
    for case, estimated, measured in json.loads(done.stdout):
        assert estimated == pytest.approx(measured, rel=0.15), case


@pytest.mark.parametrize('mode, bytes_per_parameter', [
    ('none', 16),
    ('ddp', 16),
    ('zero1', 8 + 8 / 4),
    ('fsdp', 16 / 4),
])
def test_memory_estimate_divides_states_by_mode(mode, bytes_per_parameter):
    """The table in PARAMETER_FORMULAS.md: 16 bytes per parameter, ZeRO-1 8 + 8/n, FSDP 16/n."""
    n = on_meta(**TINY).get_num_params(False)
    sizes = memory_estimate(GPTConfig(**TINY), B, 'float32', CPU, 1, mode, 4)
    assert sizes['weights'] + sizes['gradients'] + sizes['moments'] == bytes_per_parameter * n
    assert sizes['peak'] == sum(size for part, size in sizes.items() if part != 'peak')
    assert (sizes['gathered'] > 0) == (mode == 'fsdp')


@pytest.mark.parametrize('mode, share', [('none', 1), ('zero1', 1 / 4), ('fsdp', 1 / 4)])
def test_memory_estimate_knows_the_moments_of_muon(mode, share):
    """Muon keeps one moment per matrix of the blocks, AdamW two per parameter."""
    n = on_meta(**TINY).get_num_params(False)
    hidden = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128)  # 2 blocks of width 32
    sizes = memory_estimate(GPTConfig(**TINY), B, 'float32', CPU, 1, mode, 4, 'muon')
    assert sizes['moments'] == (8 * n - 4 * hidden) * share


def test_memory_estimate_counts_gradients_that_accumulate():
    """From the second micro-batch on, gradients are alive during the forward pass."""
    once, twice, thrice = (
        memory_estimate(GPTConfig(**TINY), 32, 'float32', CPU, accumulation)['activations']
        for accumulation in (1, 2, 3))
    assert once < twice == thrice


@every_combination
def test_memory_estimate_takes_any_part_and_leaves_nothing(parts):
    """A part that needs values from its tensors, or an estimate that draws from the run's random numbers."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    config = GPTConfig(**TINY | parts, dropout=0.1)
    small, large = (memory_estimate(config, n, 'float32', CPU)['activations'] for n in (32, 64))
    assert 1.5 * small < large < 2.5 * small
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize('preset', ['gpt2', 'llama', 'modern'])
def test_tensors_without_data_give_the_same_estimate(monkeypatch, preset):
    """A large step runs on fake tensors, a small one on real ones: the two must count alike."""
    config = GPTConfig.from_settings(TINY | dict(arch_preset=preset))
    real = memory_estimate(config, 8, 'float32', CPU)
    monkeypatch.setattr('engine.cost.fake_tensors', lambda *_: FakeTensorMode())
    assert memory_estimate(config, 8, 'float32', CPU) == pytest.approx(real, rel=0.01)


# ----------------------------------------------------------------------------------------------------------------------
# python model.py

SETTINGS = dict(dataset='pystdlib', vocab_size=None, arch_preset='gpt2', n_layer=2, n_head=4, n_embd=64, block_size=32)


def described(gpu='', dtype='float32', **settings):
    """({label of a line: its first number}, text) of a description."""
    settings = SETTINGS | settings
    text = describe(meta_model(settings), settings, CPU, dtype, gpu)
    found = re.findall(r'^  (\S.*?) {2,}([\d.,]+)(?: |$)', text, re.MULTILINE)
    return {label: float(number.replace(',', '')) for label, number in found}, text


def test_a_description_adds_up():
    """A part that is missing from the table, or a total of something else."""
    rows, text = described()
    model = meta_model(SETTINGS)
    assert rows['non-embedding'] == model.get_num_params()
    assert rows['trainable'] == model.get_num_params(False) == sum(rows[part] for part in params_by_part(model))
    assert rows['training, 3 x forward'] == 3 * rows['forward'] == model.flops_per_token()
    assert rows['KV cache, 32 tokens'] == pytest.approx(2 * 2 * 2 * 64 * 32 / GIB, abs=1e-2)
    assert 'memory to train, adamw, float32 on cpu, batch_size 1, one process, estimated' in text


@pytest.mark.parametrize('settings, vocab_size', [
    (dict(), 256),  # pystdlib has bytes
    (dict(dataset='nothing here'), 50304),
    (dict(vocab_size=100), 100),
])
def test_a_described_vocabulary_is_that_of_the_data_set(settings, vocab_size):
    assert meta_model(SETTINGS | settings).config.vocab_size == vocab_size


def test_what_cannot_be_described_is_a_user_error():
    """A traceback for n_head=5."""
    with pytest.raises(UserError, match='n_head'):
        meta_model(SETTINGS | dict(n_head=5))
    assert 'batch_size 1,' in described(batch_size='auto')[1]


def test_model_and_train_say_the_same_memory(text_set, tmp_path):
    """One said GB of tensors; the other GiB of the process, with what the matmul that measures the peak had left."""
    sizes = '--n_layer=4 --n_head=4 --n_embd=256 --block_size=128 --batch_size=16 --dtype=float32'.split()
    succeeded(train(text_set, tmp_path, *sizes, '--dropout=0', '--max_iters=1', '--peak_tflops=0'))
    estimate = run_logs(tmp_path)[0]['startup_info']['memory_estimate']
    done = command('model.py', *sizes, f'--dataset={text_set}', '--gradient_accumulation_steps=2', '--device=cpu')
    training = done.stdout[done.stdout.index('memory to train'):]
    total = float(re.search(r'total +([\d.]+) GiB', training)[1])
    assert total == pytest.approx(estimate['peak'] / GIB, abs=0.03)


# ----------------------------------------------------------------------------------------------------------------------
# a GPU that is elsewhere

GPU_SETTINGS = dict(gpus=1, mfu=0.5, max_iters=1000, batch_size=4, gradient_accumulation_steps=8)


@pytest.mark.parametrize('gpu', DATASHEETS)
def test_a_gpu_elsewhere_is_described_by_its_datasheet(gpu):
    flops = meta_model(SETTINGS).flops_per_token()
    for dtype in ('bfloat16', 'float16', 'float32'):
        text, peak = described(gpu, dtype, **GPU_SETTINGS)[1], datasheet_peak(gpu, dtype)
        assert f'{dtype} on {gpu}, batch_size 4' in text and 'fragmentation' not in text
        assert f'of its {DATASHEETS[gpu][1]} GiB' in text and ' fits: ' in text
        assert peak is not None or f'no peak for {dtype}' in text
        assert peak is None or f'{0.5 * peak / flops:,.0f} tokens/s if MFU is 50 %' in text
    assert 'per iteration of 1,024 tokens' in described(gpu, 'float16', **GPU_SETTINGS)[1]


def test_several_gpus_are_described_in_each_mode():
    """Somebody with eight GPUs divides days by hand, and cannot see what FSDP would need."""
    one, eight = (described('H100', 'bfloat16', **GPU_SETTINGS | dict(gpus=n))[1] for n in (1, 8))
    speeds = [float(re.search(r'([\d,]+) tokens/s', text)[1].replace(',', '')) for text in (one, eight)]
    assert speeds[1] == pytest.approx(8 * speeds[0], rel=1e-5)
    assert 'memory, one process' in one and 'DDP' not in one
    needed = [float(re.search(rf'memory, {mode} +fits: ([\d.]+) GiB', eight)[1]) for mode in ('DDP', 'ZeRO-1', 'FSDP')]
    assert needed == sorted(needed, reverse=True)


def test_one_gpu_takes_one_trace_of_the_step(monkeypatch):
    """The step of a large model was traced for the table, and again for the line of the GPU."""
    trace, traced = cost.trace_step, []
    monkeypatch.setattr(cost, 'trace_step', lambda *args: traced.append(args) or trace(*args))
    described('H100', 'bfloat16', **GPU_SETTINGS)
    assert len(traced) == 1


@pytest.mark.parametrize('states, activations, words', [
    (1, 1, '  fits: 2.00 GiB, and of its 80 GiB about 72 are'),
    (30, 42, 'fits'),
    (30, 43, 'does not fit: 73.00 GiB.*--batch_size'),
    (73, 0, 'does not fit.*--use_fsdp'),
])
def test_a_tenth_of_a_gpu_is_not_for_tensors(states, activations, words):
    assert re.search(words.strip(), fit(dict(weights=states * GIB, activations=activations * GIB), 80))


@pytest.mark.parametrize('name, gpu', [
    ('H100', 'H100'),
    ('h100-pcie', 'H100 PCIe'),
    ('RTX4090', 'RTX 4090'),
    ('a100_80gb', 'A100 80GB'),
    ('auto', ''),
    ('cpu', ''),
    ('cuda:1', ''),
])
def test_a_gpu_is_found_by_its_name(name, gpu):
    assert find_gpu(name) == gpu


def test_an_unknown_gpu_lists_the_known_ones():
    """'Invalid device string', with --device=auto as the remedy."""
    with pytest.raises(UserError) as e:
        find_gpu('H1000')
    assert all(gpu in str(e.value) for gpu in ("'H1000'", *DATASHEETS))


@pytest.mark.parametrize('name, dtype, tflops', [
    ('NVIDIA H100 80GB HBM3', 'bfloat16', 989),
    ('NVIDIA H100 PCIe', 'bfloat16', 756),
    ('NVIDIA A100-SXM4-80GB', 'float16', 312),
    ('NVIDIA A100 80GB PCIe', 'bfloat16', 312),
    ('Tesla V100-SXM2-32GB', 'float16', 125),
    ('NVIDIA A10G', 'bfloat16', None),
    ('NVIDIA H100 80GB HBM3', 'float32', None),
    ('Tesla V100-SXM2-32GB', 'bfloat16', None),
    ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', 'bfloat16', None),
])
def test_the_peak_of_a_gpu_is_that_of_its_datasheet(monkeypatch, name, dtype, tflops):
    """An A10G is no A10, and a V100 has no bfloat16 units."""
    monkeypatch.setattr('engine.machine.device_name', lambda device: name)
    monkeypatch.setattr('engine.machine.matmul_time', lambda *_: 1.0)
    flops, source = peak_flops(torch.device('cuda'), dtype)
    if tflops is None:
        assert source.startswith('measured')
    else:
        assert flops == tflops * 1e12 and source.startswith(f'dense {dtype} peak of')


# ----------------------------------------------------------------------------------------------------------------------
# gradient statistics

@every_combination
def test_gradient_statistics_are_those_of_the_gradients(parts):
    """A layer left out or counted twice, or a norm that clips differently from clip_grad_norm_'s."""
    model = shaken(**parts)
    grads = gradients(model, ids(B, T), ids(B, T, seed=1))[1]
    flat = torch.cat([g.flatten() for g in grads.values()]).double()
    stats = GradientStatistics(model, 0, Parallel()).read()
    assert torch.tensor(stats['norm']) == torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    for key, value in (('norm', flat.norm()), ('mean', flat.mean()), ('std', flat.std(correction=0))):
        assert stats[key] == pytest.approx(value.item(), rel=1e-4, abs=1e-7)
    squares = Counter()
    for name, g in grads.items():  # transformer.h.0.attn.c_attn.weight, transformer.wte.weight, lm_head.weight
        layer = re.search(r'\.h\.(\d+)\.|(\w+)\.\w+$', name)
        squares[next(filter(None, layer.groups()))] += g.double().square().sum().item()
    assert stats['layers'] == {layer: pytest.approx(math.sqrt(s), rel=1e-5) for layer, s in squares.items()}
    assert math.hypot(*stats['layers'].values()) == pytest.approx(stats['norm'], rel=1e-5)


def test_memory_estimate_counts_what_a_loss_term_adds():
    """A term that needs the logits takes the memory that the model's own loss saves."""
    config, vocab = GPTConfig(**TINY | dict(vocab_size=4096)), 4096
    with_logits = lambda model, X, Y: model(X, Y, all_logits=True)[0].float().logsumexp(-1).mean()
    plain, more = (memory_estimate(config, 4, 'float32', CPU, **loss)['peak'] for loss in ({}, dict(loss=with_logits)))
    assert more - plain > 4 * config.block_size * vocab * 4
