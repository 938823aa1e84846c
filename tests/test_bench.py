"""What must stay true: python -m pytest tests/test_bench.py"""
import json
import sys

import pytest

from conftest import ROOT, TINY, checkpoint, command, losses, one_line, train
from model import GPT, GPTConfig

# bench.py

NANOGPT_LIKE = '''
from dataclasses import dataclass
import torch
@dataclass
class GPTConfig:
    block_size: int = 8
    vocab_size: int = 8
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8
    dropout: float = 0.0
    bias: bool = True
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print('number of parameters: some')
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, idx, targets=None):
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, fused=device_type == 'cuda')
'''


def bench(tmp_path, *flags, **kwargs):
    """What bench.py printed, and what it wrote to --json, of a tiny model."""
    path = tmp_path / 'bench.json'
    done = command('bench.py', *TINY, '--dataset=pystdlib', '--vocab_size=256', '--warmup=0', '--repeats=3', f'--json={path}', *flags, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def test_bench_figures_follow_from_the_times_it_took(tmp_path):
    """A rate from another number of tokens, or a share of another device's peak."""
    out, result = bench(tmp_path, '--accumulation=3', '--gradient_log_interval=10')
    (side,) = result['sides'].values()
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=256, bias=False))
    median = lambda part: sorted(side['times'][part])[1]
    assert all(len(side['times'][part]) == 3 for part in ('forward', 'backward', 'optimizer', 'gradient statistics', 'whole'))
    assert side['parameters'] == model.get_num_params(False) and side['flops_per_token'] == model.flops_per_token()
    assert side['tokens_per_sec'] == pytest.approx(3 * 4 * 16 / median('whole'))
    assert side['mfu'] == pytest.approx(model.flops_per_token() * 3 * 4 * 16 / median('whole') / 1e12)  # --peak_tflops=1
    assert side['peak_bytes'] > 10**7 and side['first_step'] > 0 and side['compile'] == 0
    for row in ('parameters', 'forward', 'backward', 'optimizer', 'whole step', 'tokens/s', 'TFLOP/s', 'MFU', 'peak memory', 'to the first step', 'of a step'):
        assert row in out


@pytest.mark.parametrize('what, parts', [('forward', {'whole'}), ('generate', {'whole', 'prefill'}), ('data', {'whole', 'waiting', 'reading'}), ('memory', {'whole'})])
def test_bench_times_each_kind_of_work(tmp_path, what, parts):
    """A choice that --help offers and nobody has run."""
    out, result = bench(tmp_path, f'--what={what}', '--prompt_tokens=8', '--new_tokens=4')
    (side,) = result['sides'].values()
    assert set(side['times']) == parts
    if what == 'data':
        assert 0 < side['waiting_share'] < 1
    if what == 'generate':
        assert side['tokens_per_sec'] == pytest.approx(4 / sorted(side['times']['whole'])[1]) and 'share of the limit' in out
    if what == 'memory':
        sizes = side['memory_estimate']
        assert sizes['peak'] == sum(size for part, size in sizes.items() if part != 'peak') and 'estimated: activations' in out


def test_bench_puts_archs_side_by_side(tmp_path):
    """Columns that are all the same model, because a file's parts won over the arch that the column names."""
    _, result = bench(tmp_path, 'config/full_custom.py', '--archs=gpt2,llama,config/speedrun_shakespeare_char.py', '--what=forward', '--n_kv_head=2')
    kinds = {name: side['settings']['model']['activation'] for name, side in result['sides'].items()}
    assert kinds == {'gpt2': 'gelu_tanh', 'llama': 'silu', 'speedrun_shakespeare_char.py': 'relu_squared'}
    assert result['sides']['gpt2']['settings']['model']['d_ff'] is None and len({side['parameters'] for side in result['sides'].values()}) == 3


def test_bench_times_another_checkout(tmp_path):
    """nanoGPT prints while it is built, knows none of our parts, and takes turns with us."""
    other = tmp_path / 'other.py'
    other.write_text(NANOGPT_LIKE)
    out, result = bench(tmp_path, f'--versus={other}', '--versus_dtype=bfloat16', '--normalization=rmsnorm')
    ours, theirs = result['sides'].values()
    assert theirs['parameters'] == 256 * 256 and theirs['settings']['dtype'] == 'bfloat16' and ours['settings']['dtype'] == 'float32'
    ratios = sorted(b / a for a, b in zip(ours['times']['whole'], theirs['times']['whole']))
    assert theirs['first_is_faster_by'] == pytest.approx(ratios[1])
    assert 'does not know normalization' in out and 'some' not in out
    _, result = bench(tmp_path, '--versus=model.py')  # an unchanged copy of our own
    ours, theirs = result['sides'].values()
    assert ours['parameters'] == theirs['parameters']


@pytest.mark.parametrize('flags, words', [
    (['--archs=gpt2,gpt7'], ['gpt7', 'hybrid']), (['--versus=nowhere.py'], ['nowhere.py']), (['--versus=configurator.py'], ['configurator.py', 'GPT']),
    (['--versus=README.md'], ['README.md']), (['--what=sing'], ['what', 'generate']), (['--what=generate', '--block_size=100'], ['block_size', '320']),
    (['--batch_size=0'], ['batch_size']), (['--batch_size=auto'], ['find_batch_size']), (['--what=data', '--versus=model.py'], ['versus']),
    (['--plan=8', '--plan_tflops=-3'], ['plan_tflops']), (['--json=nowhere/at/all.json'], ['nowhere']), (['--n_head=5'], ['n_head'])])
def test_a_wrong_use_of_bench_is_one_line(flags, words):
    """A traceback from another process."""
    done = command('bench.py', '--dataset=pystdlib', '--device=cpu', '--n_layer=1', '--n_embd=64', '--n_head=4', '--peak_tflops=1', *flags)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    one_line(done.stderr, *words)


def test_bench_profiles(tmp_path):
    """A trace that no viewer opens."""
    done = command(ROOT / 'bench.py', *TINY, '--dataset=pystdlib', '--vocab_size=256', '--warmup=0', '--repeats=1', '--profile=True', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'aten::mm' in done.stdout and json.loads((tmp_path / 'trace.json').read_text())['traceEvents']


FSDP_TRAFFIC = '''
import torch, torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from model import GPT, GPTConfig
dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=4)
mesh = dist.init_device_mesh('cpu', (4,))
model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=64, vocab_size=256, block_size=32, bias=False, normalization='rmsnorm'))
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
for block in model.transformer.h:
    fully_shard(block, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh)
sent = 0
class Count(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        global sent
        if str(func).startswith('c10d'):  # a ring sends (n - 1)/n of the whole, which is the larger of input and output
            sent += max(t.nbytes for t in args if isinstance(t, torch.Tensor)) * 3 / 4
        return func(*args, **(kwargs or {}))
idx = torch.zeros(2, 32, dtype=torch.long)
with Count():
    for _ in range(3):
        with torch.autocast('cpu', torch.bfloat16):
            loss = model(idx, idx)[1]
        loss.backward()
print(sent)
'''


def test_planned_traffic_is_what_torch_sends(tmp_path):
    """A gather too few: counted among 4 ranks of torch's fake process group, 3 micro-batches."""
    sizes = '--n_layer=2 --n_head=4 --n_embd=64 --vocab_size=256 --block_size=32 --normalization=rmsnorm --dtype=bfloat16'.split()
    out, result = bench(tmp_path, '--plan=4,64', '--plan_tflops=0.001', '--interconnect_gbps=8', '--gradient_accumulation_steps=12', *sizes)
    counted = command('-c', FSDP_TRAFFIC)
    assert counted.returncode == 0, counted.stderr
    rows = {(row['ranks'], row['mode']): row for row in result['plan']}
    n = 256 * 64 + 32 * 64 + 2 * 12 * 64 ** 2 + 5 * 64
    assert rows[4, 'fsdp']['micro_batches'] == 3 and rows[4, 'fsdp']['sent'] == float(counted.stdout)
    assert rows[4, 'ddp']['sent'] == 2 * 4 * n * 3 / 4 and rows[64, 'zero1']['sent'] == 3 * 4 * n * 63 / 64
    low, high = rows[4, 'ddp']['seconds']
    assert high - low == pytest.approx(rows[4, 'ddp']['sent'] / 1e9) and rows[4, 'ddp']['tokens'] == 12 * 4 * 32 and '64' in out


FSDP_MEMORY = """
import ctypes, gc, os
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from model import GPT, GPTConfig, memory_estimate
dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=64)
mesh = dist.init_device_mesh('cpu', (64,))
config = GPTConfig(n_layer=2, n_head=8, n_embd=512, vocab_size=50304, block_size=32, bias=False, weight_tying=False, position_encoding='rope')
model = GPT(config)
for block in model.transformer.h:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
read = lambda: {line.split()[0]: int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(('VmRSS', 'VmHWM'))}
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
open('/proc/self/clear_refs', 'w').write('5')  # the peak counts from here
before, idx = read()['VmRSS:'], torch.zeros(1, 32, dtype=torch.long)
for _ in range(2):
    model(idx, idx)[1].backward()
    optimizer.step()
    optimizer.zero_grad()
estimate = memory_estimate(config, 1, 'float32', torch.device('cpu'), 1, 'fsdp', 64)
print(read()['VmHWM:'] - before, estimate['peak'] - estimate['weights'], flush=True)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_of_fsdp_counts_what_is_gathered():
    """A plan for 64 ranks that forgets the embeddings: on torch's fake process group the rest is next to nothing. malloc's holes make it rough."""
    done = command('-c', FSDP_MEMORY)
    assert done.returncode == 0, done.stderr
    measured, estimated = map(int, done.stdout.split())
    assert estimated == pytest.approx(measured, rel=0.5)


@pytest.mark.skipif(sys.platform != 'linux', reason='limits of data segments are Linux\'s')
def test_the_largest_batch_size_is_found(tmp_path):
    """A search that stops at a power of two, or counts on the kernel's killer."""
    limited = ('bash', '-c', 'ulimit -d 1500000; exec "$0" "$@"', sys.executable)
    flags = ('--find_batch_size=True', '--block_size=1024', '--attention_backend=manual', '--n_head=8', '--batch_size=32', '--gradient_accumulation_steps=3')
    out, result = bench(tmp_path, *flags, launcher=limited)
    largest, batch_size = result['largest'], result['batch_size']
    assert 1 <= largest < 32 and batch_size <= largest and batch_size * result['gradient_accumulation_steps'] == 96
    assert f'batch_size {largest:>5}: fits' in out and f'batch_size {largest + 1:>5}: does not fit' in out


def test_batch_size_auto_keeps_the_tokens_of_an_iteration(text_set, tmp_path):
    """A run that fits its memory by becoming another run."""
    asked = train(text_set, tmp_path / 'asked', '--max_iters=4', '--dropout=0')
    found = train(text_set, tmp_path / 'auto', '--max_iters=4', '--dropout=0', '--batch_size=auto')
    assert asked.returncode == found.returncode == 0, found.stderr
    assert (checkpoint(tmp_path / 'auto')['config']['batch_size'], checkpoint(tmp_path / 'auto')['config']['gradient_accumulation_steps']) == (8, 1)
    for it, loss in losses(tmp_path / 'asked').items():
        assert losses(tmp_path / 'auto')[it] == pytest.approx(loss, rel=1e-5)
    again = train(text_set, tmp_path / 'asked', '--max_iters=6', '--dropout=0', '--batch_size=auto', '--init_from=resume')  # its own, not searched for
    assert again.returncode == 0 and checkpoint(tmp_path / 'asked')['config']['batch_size'] == 4 and 'looking for' not in again.stdout


