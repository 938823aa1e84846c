"""bench.py: python -m pytest tests/test_bench.py"""
import json
import sys

import pytest

from bench import largest_that_fits
from bench import main as bench_main
from conftest import PYTHON, ROOT, TINY, checkpoint, command, limit_data, losses, one_line, train
from engine.common import UserError
from engine.plan import memory_figure
from engine.side import PARTS
from model import GPT, GPTConfig

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
    """Return the console text of bench.py for a tiny model, and the content of --json."""
    path = tmp_path / 'bench.json'
    ours = '--dataset=pystdlib', '--vocab_size=256', '--warmup=0', '--repeats=3', f'--json={path}'
    done = command('bench.py', *TINY, *ours, *flags, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def median(side, part):
    times = sorted(side['times'][part])
    assert len(times) == 3
    return times[1]


def test_bench_figures_follow_from_the_times_it_took(tmp_path):
    """A rate from another number of tokens, or a share of another device's peak."""
    out, result = bench(tmp_path, '--accumulation=3', '--gradient_log_interval=10')
    (side,) = result['sides'].values()
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=256, bias=False))
    rate = 3 * 4 * 16 / median(side, 'whole')
    for part in ('forward', 'backward', 'optimizer', 'gradient statistics'):
        assert 0 < side[part] == median(side, part)
    assert side['parameters'] == model.get_num_params(False)
    assert side['flops_per_token'] == model.flops_per_token()
    assert side['tokens_per_sec'] == pytest.approx(rate)
    assert side['mfu'] == pytest.approx(model.flops_per_token() * rate / 1e12)  # --peak_tflops=1
    assert 'too low' not in out
    assert side['peak_bytes'] > 10**7 and side['first_step'] > 0 and side['compile'] == 0
    rows = ('parameters', 'forward', 'backward', 'optimizer', 'whole step', 'tokens/s', 'TFLOP/s', 'MFU',
            'tokens/s, accumulation 2', 'peak memory', 'to the first step', 'of a step')
    assert all(row in out for row in rows)


@pytest.mark.parametrize('what, parts', [
    ('forward', {'whole'}),
    ('generate', {'whole', 'prefill'}),
    ('data', {'whole', 'waiting', 'reading'}),
    ('memory', {'whole'}),
])
def test_bench_times_each_kind_of_work(tmp_path, what, parts):
    """A choice that --help offers and nobody has run."""
    out, result = bench(tmp_path, f'--what={what}', '--prompt_tokens=8', '--new_tokens=4')
    (side,) = result['sides'].values()
    assert set(side['times']) == parts
    if what == 'data':
        assert 0 < side['waiting_share'] < 1
    if what == 'generate':
        assert side['tokens_per_sec'] == pytest.approx(4 / median(side, 'whole'))
        assert 'share of the limit' in out
    if what == 'memory':
        sizes = side['memory_estimate']
        assert sizes['peak'] == sum(size for part, size in sizes.items() if part != 'peak')
        assert 'estimated: activations' in out


def test_bench_puts_archs_side_by_side(tmp_path):
    """Columns that are all the same model, because a file's parts won over the arch that the column names."""
    archs = '--archs=gpt2,llama,config/speedrun_shakespeare_char.py'
    out, result = bench(tmp_path, 'config/full_custom.py', archs, '--what=forward', '--n_kv_head=2',
                        '--peak_tflops=1e-9')
    assert out.count('the peak is too low') == 1  # below the table, which it would widen
    models = {name: side['settings']['model'] for name, side in result['sides'].items()}
    assert {name: model['activation'] for name, model in models.items()} == {
        'gpt2': 'gelu_tanh', 'llama': 'silu', 'speedrun_shakespeare_char.py': 'relu_squared'}
    assert models['gpt2']['d_ff'] is None
    assert len({side['parameters'] for side in result['sides'].values()}) == 3


def test_bench_compares_int8_with_the_weights_as_they_are(tmp_path):
    """Two columns of the same weights."""
    _, result = bench(tmp_path, '--what=generate', '--quantize=int8', '--prompt_tokens=8', '--new_tokens=4')
    int8, ours = result['sides'].values()
    assert (int8['settings']['quantize'], ours['settings']['quantize']) == ('int8', '')
    assert int8['bytes_per_token'] < ours['bytes_per_token']


def test_bench_generates_several_samples_together(tmp_path):
    """Only one prompt could be timed."""
    flags = '--what=generate', '--prompt_tokens=8', '--new_tokens=4'
    (one,), (three,) = (bench(tmp_path, *flags, f'--num_samples={n}')[1]['sides'].values() for n in (1, 3))
    assert three['tokens_per_sec'] == pytest.approx(3 * 4 / median(three, 'whole'))
    cache = 2 * 2 * 32 * (8 + 4 / 2) * 4  # keys and values, layers, width, average length, float32
    assert three['bytes_per_token'] - one['bytes_per_token'] == pytest.approx(2 * cache)


def test_bench_times_another_checkout(tmp_path):
    """nanoGPT prints while it is built, has none of our parts and no Muon, and alternates with us."""
    other = tmp_path / 'nanoGPT'
    other.mkdir()
    (other / 'model.py').write_text(NANOGPT_LIKE)  # a folder stands for its model.py
    flags = '--versus_dtype=bfloat16', '--normalization=rmsnorm', '--optimizer=muon'
    out, result = bench(tmp_path, f'--versus={other}', *flags)
    ours, theirs = result['sides'].values()
    assert theirs['parameters'] == 256 * 256
    assert (ours['settings']['dtype'], theirs['settings']['dtype']) == ('float32', 'bfloat16')
    ratios = sorted(b / a for a, b in zip(ours['times']['whole'], theirs['times']['whole'], strict=True))
    assert theirs['first_is_faster_by'] == pytest.approx(ratios[1])
    assert 'does not know normalization' in out and 'it has no muon: AdamW there' in out
    assert 'number of parameters' not in out and 'mfu' not in theirs


def test_an_unchanged_copy_of_our_own_is_the_same_model(tmp_path):
    """A checkout of ours that is built otherwise than we are."""
    _, result = bench(tmp_path, '--versus=model.py', '--optimizer=muon')
    ours, theirs = result['sides'].values()
    assert ours['parameters'] == theirs['parameters'] and 'note' not in theirs


ANOTHER_OPTIM = """
import torch
OPTIMIZER = {'adamw': None}
def build(name, model, settings, device_type):
    assert name == 'adamw' and settings['learning_rate'] > 0
    return torch.optim.SGD(model.parameters(), lr=0.1)
"""


def test_the_other_checkouts_engine_wins(tmp_path):
    """A model of another checkout that is timed with the engine, data and optimizers of this one."""
    imports = 'import engine.marked, data.marked, configurator\nassert configurator.MARKED\n'
    (tmp_path / 'engine').mkdir()
    (tmp_path / 'data').mkdir()
    for name in ('model.py', 'configurator.py', 'engine/marked.py', 'data/marked.py', 'engine/optim.py'):
        (tmp_path / name).write_text('MARKED = True\n')
    (tmp_path / 'model.py').write_text(imports + NANOGPT_LIKE)
    (tmp_path / 'engine/optim.py').write_text('import engine.marked\n' + ANOTHER_OPTIM)
    out, result = bench(tmp_path, f'--versus={tmp_path}/model.py', '--optimizer=muon')
    assert list(result['sides'])[1] == f'{tmp_path.name}/model.py' and 'it has no muon: AdamW there' in out


def test_a_checkout_that_fails_is_one_line(tmp_path):
    """A traceback from another process."""
    (tmp_path / 'other.py').write_text(NANOGPT_LIKE + 'raise KeyError("broken")\n')
    flags = *TINY, '--dataset=pystdlib', '--vocab_size=256', f'--versus={tmp_path}/other.py'
    done = command('bench.py', *flags)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    one_line(done.stderr.splitlines()[-1], 'other.py', 'cannot be timed', 'KeyError', 'broken')


@pytest.mark.parametrize('flags, words', [
    (['--archs=gpt2,gpt7'], ['gpt7', 'hybrid']),
    (['--archs=gpt2,gpt2'], ['gpt2', 'twice']),
    (['--versus=nowhere.py'], ['nowhere.py']),
    (['--versus=configurator.py'], ['configurator.py', 'GPT']),
    (['--versus=README.md'], ['README.md']),
    (['--what=sing'], ['what', 'generate']),
    (['--what=generate', '--block_size=100'], ['block_size', '320']),
    (['--new_tokens=1'], ['new_tokens', '2']),
    (['--batch_size=0'], ['batch_size']),
    (['--batch_size=auto'], ['find_batch_size']),
    (['--repeats=0'], ['repeats']),
    (['--what=data', '--versus=model.py'], ['versus']),
    (['--plan=8', '--archs=gpt2'], ['plan', 'archs']),
    (['--plan=0'], ['plan', '8,64,512']),
    (['--plan=8', '--plan_tflops=-3'], ['plan_tflops']),
    (['--plan_picture=memory.png'], ['plan_picture', '--plan']),
    (['--plan=8', '--plan_picture=memory.txt'], ['plan_picture', '.png']),
    (['--quantize=int8'], ['quantize', 'generate']),
    (['--json=nowhere/at/all.json'], ['nowhere']),
    (['--n_head=5'], ['n_head']),
], ids=str)
def test_a_wrong_use_of_bench_is_one_line(flags, words, monkeypatch, capsys):
    """A traceback, or a mistake that is found after the first side has been timed."""
    sizes = '--dataset=pystdlib', '--device=cpu', '--n_layer=1', '--n_embd=64', '--n_head=4', '--peak_tflops=1'
    monkeypatch.setattr(sys, 'argv', ['bench.py', *sizes, *flags])
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        bench_main()
    one_line(error.value, *words)


def test_bench_profiles(tmp_path):
    """A trace that no viewer opens."""
    flags = *TINY, '--dataset=pystdlib', '--vocab_size=256', '--warmup=0', '--repeats=1', '--profile=True'
    done = command(ROOT / 'bench.py', *flags, '--json=bench.json', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (side,) = json.loads((tmp_path / 'bench.json').read_text())['sides'].values()
    assert min(side['profile'][part] for part in (*PARTS, 'the rest')) > 0
    assert 'aten::mm' in done.stdout and json.loads((tmp_path / 'trace.json').read_text())['traceEvents']


FSDP_TRAFFIC = '''
import sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from model import GPT, GPTConfig
dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=4)
sizes = tuple(map(int, sys.argv[1:]))  # (4,), or (2, 2) for two groups of two
mesh = dist.init_device_mesh('cpu', sizes, mesh_dim_names=('replicate', 'shard')[-len(sizes):])
model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=64, vocab_size=256, block_size=32, bias=False,
                      normalization='rmsnorm'))
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
for block in model.transformer.h:
    fully_shard(block, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh)
in_group = between = 0
class Count(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        global in_group, between
        if str(func).startswith('c10d'):  # a ring sends (n - 1)/n of the whole, which is the larger of input and output
            whole = max(t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor))
            if 'allreduce' in str(func):
                between += 2 * whole * (sizes[0] - 1) / sizes[0]
            else:
                in_group += whole * (sizes[-1] - 1) / sizes[-1]
        return func(*args, **(kwargs or {}))
idx = torch.zeros(2, 32, dtype=torch.long)
with Count():
    for m in range(3):
        model.set_requires_all_reduce(m == 2)
        with torch.autocast('cpu', torch.bfloat16):
            loss = model(idx, idx)[1]
        loss.backward()
print(between, in_group)
'''


def test_planned_traffic_is_what_torch_sends(tmp_path):
    """A gather too few: counted among 4 ranks of torch's fake process group, 3 micro-batches."""
    sizes = '--n_layer=2 --n_head=4 --n_embd=64 --vocab_size=256 --block_size=32 --normalization=rmsnorm'.split()
    plan = '--plan=4,64 --plan_tflops=0.001 --interconnect_gbps=8 --gradient_accumulation_steps=12'.split()
    hybrid = '--fsdp_shard_size=2', '--node_gbps=80'
    out, result = bench(tmp_path, *sizes, *plan, *hybrid, '--dtype=bfloat16')
    counted = [command('-c', FSDP_TRAFFIC, *groups) for groups in (['4'], ['2', '2'])]
    (_, sent), (between, in_group) = (map(float, done.stdout.split()) for done in counted)
    rows = {(row['ranks'], row['mode']): row for row in result['plan']}
    n = 256 * 64 + 32 * 64 + 2 * 12 * 64 ** 2 + 5 * 64
    assert rows[4, 'fsdp']['micro_batches'] == 3 and rows[4, 'fsdp']['sent'] == sent
    hybrid = rows[4, 'hybrid']
    assert (hybrid['sent'], hybrid['sent_in_group']) == (between, in_group)
    assert hybrid['seconds'][1] - hybrid['seconds'][0] == pytest.approx(between / 1e9 + in_group / 1e10)
    assert rows[64, 'hybrid']['sizes']['weights'] == rows[4, 'hybrid']['sizes']['weights'] == 4 * n / 2
    ddp = rows[4, 'ddp']
    assert ddp['sent'] == 2 * 4 * n * 3 / 4 and rows[64, 'zero1']['sent'] == 3 * 4 * n * 63 / 64
    low, high = ddp['seconds']
    assert high - low == pytest.approx(ddp['sent'] / 1e9)
    assert ddp['tokens'] == 12 * 4 * 32 and '64' in out


def test_a_plan_knows_adapters(tmp_path):
    """Gradients and moments of frozen weights, which --lora_rank does not have."""
    _, result = bench(tmp_path, '--plan=4', '--plan_tflops=0.001', '--lora_rank=2', '--lora_targets=attn,mlp',
                      '--fsdp_shard_size=2')
    rows = {row['mode']: row for row in result['plan']}
    n_adapters = 2 * 2 * (32 + 96 + 32 + 32 + 32 + 128 + 128 + 32)  # 2 layers, rank 2, widths in and out
    for mode, share in dict(ddp=1, zero1=1, fsdp=4, hybrid=2).items():
        assert rows[mode]['sizes']['gradients'] == 4 * n_adapters / share
    assert rows['ddp']['sent'] == 2 * 4 * n_adapters * 3 / 4


def test_a_plan_is_drawn():
    """Bars whose height is not the memory of the plan."""
    pytest.importorskip('matplotlib')
    rows = [dict(mode=mode, ranks=8, sizes=dict(weights=w, gradients=w, moments=2 * w, gathered=g, activations=2 ** 30))
            for mode, w, g in (('ddp', 8 * 2 ** 30, 0), ('fsdp', 2 ** 30, 3 * 2 ** 30))]
    tops = {}
    for bar in memory_figure(rows, 'a plan').axes[0].patches:
        middle = round(bar.get_x() + bar.get_width() / 2)
        tops[middle] = max(tops.get(middle, 0), bar.get_y() + bar.get_height())
    assert tops == pytest.approx({0: 33, 1: 8})


FSDP_MEMORY = """
import ctypes, gc, os
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from engine.cost import memory_estimate
from engine.machine import memory
from model import GPT, GPTConfig
cpu = torch.device('cpu')
dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=64)
mesh = dist.init_device_mesh('cpu', (64,))
config = GPTConfig(n_layer=2, n_head=8, n_embd=512, vocab_size=50304, block_size=32, bias=False,
                   weight_tying=False, position_encoding='rope')
model = GPT(config)
for block in model.transformer.h:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
open('/proc/self/clear_refs', 'w').write('5')  # the peak counts from here
before, idx = memory(cpu)['resident'], torch.zeros(1, 32, dtype=torch.long)
for _ in range(2):
    model(idx, idx)[1].backward()
    optimizer.step()
    optimizer.zero_grad()
estimate = memory_estimate(config, 1, 'float32', cpu, 1, 'fsdp', 64)
print(memory(cpu)['peak'] - before, estimate['peak'] - estimate['weights'], flush=True)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_of_fsdp_counts_what_is_gathered():
    """
    A plan for 64 ranks that forgets the embeddings: on torch's fake process group the rest is next to nothing.
    The tolerance is for what malloc loses.
    """
    done = command('-c', FSDP_MEMORY, launcher=PYTHON)
    assert done.returncode == 0, done.stderr
    measured, estimated = map(int, done.stdout.split())
    assert estimated == pytest.approx(measured, rel=0.5)


@pytest.mark.parametrize('limit', [1, 2, 7, 32])
@pytest.mark.parametrize('fitting', [0, 1, 2, 3, 5, 8, 31, 32, 100])
def test_the_search_finds_the_largest_batch_size(monkeypatch, fitting, limit):
    """A search that stops at a power of two, or tries a size twice or beyond the limit."""
    tried = []

    def fits(s, batch_size):
        tried.append(batch_size)
        return batch_size <= fitting
    monkeypatch.setattr('bench.fits', fits)
    assert largest_that_fits({}, limit) == min(fitting, limit)
    assert len(set(tried)) == len(tried) and 1 <= min(tried) and max(tried) <= limit


@pytest.mark.skipif(sys.platform != 'linux', reason="only Linux limits a process's data")
def test_the_largest_batch_size_is_found(tmp_path):
    """A search that counts on the kernel's killer."""
    large = '--block_size=512', '--attention_backend=manual', '--n_head=8'
    batch = '--batch_size=32', '--gradient_accumulation_steps=3'
    out, result = bench(tmp_path, '--find_batch_size=True', *large, *batch, before=limit_data(600))
    largest, batch_size = result['largest'], result['batch_size']
    assert 1 <= largest < 32 and batch_size <= largest
    assert batch_size * result['gradient_accumulation_steps'] == 96
    assert f'batch_size {largest:>5}: fits' in out and f'batch_size {largest + 1:>5}: does not fit' in out


def test_batch_size_auto_keeps_the_tokens_of_an_iteration(text_set, tmp_path):
    """A run that fits its memory by becoming another run."""
    asked = train(text_set, tmp_path / 'asked', '--max_iters=4', '--dropout=0')
    found = train(text_set, tmp_path / 'auto', '--max_iters=4', '--dropout=0', '--batch_size=auto')
    assert asked.returncode == found.returncode == 0, found.stderr
    config = checkpoint(tmp_path / 'auto')['config']
    assert (config['batch_size'], config['gradient_accumulation_steps']) == (8, 1)
    for it, loss in losses(tmp_path / 'asked').items():
        assert losses(tmp_path / 'auto')[it] == pytest.approx(loss, rel=1e-5)
    resumed = '--max_iters=6', '--dropout=0', '--batch_size=auto', '--init_from=resume'
    again = train(text_set, tmp_path / 'asked', *resumed)  # takes its checkpoint's without a search
    assert again.returncode == 0 and 'looking for' not in again.stdout
    assert checkpoint(tmp_path / 'asked')['config']['batch_size'] == 4
