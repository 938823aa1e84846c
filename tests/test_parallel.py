"""What must stay true: python -m pytest tests/test_parallel.py"""
import json

import pytest
import torch

from conftest import (
    MODES,
    MUON,
    ROOT,
    TINY,
    TORCHRUN,
    assert_equal_states,
    checkpoint,
    command,
    copy_run,
    losses,
    run_logs,
    train_mode,
)
from engine.checkpoint import load_checkpoint


@pytest.mark.parametrize('mode', [mode for mode in MODES if mode != 'one'])
def test_every_mode_trains_as_one_process(modes, mode):
    """Ranks that read the same data; losses, gradients or their norms that are not averaged over micro-steps and ranks, or are of one shard."""
    (one, _), (two, console) = modes['one'], modes[mode]
    assert len(losses(two)) == 20 and list(losses(two).values()) == pytest.approx(list(losses(one).values()), rel=1e-5)
    (a,), (b,) = run_logs(one), run_logs(two)
    assert b['eval_steps'][1]['val']['loss'] == pytest.approx(a['eval_steps'][1]['val']['loss'], rel=0.1)  # eval_iters are over all processes
    for x, y in zip(a['training_iterations'], b['training_iterations']):
        assert y['gradients']['norm'] == pytest.approx(x['gradients']['norm'], rel=1e-4)
        assert y['gradients'].get('layers') == (pytest.approx(x['gradients']['layers'], rel=1e-3) if 'layers' in x['gradients'] else None)
        assert y['gradients'].get('std', 0) == pytest.approx(x['gradients'].get('std', 0), rel=1e-3)
    assert console.count('iter 3 ') == 1 and {'ddp': 'DDP', 'zero1': 'ZeRO-1', 'fsdp': 'FSDP'}[mode] in console  # only rank 0 speaks


@pytest.mark.parametrize('mode', [mode for mode in MODES if mode != 'one'])
def test_a_checkpoint_does_not_tell_the_mode_that_wrote_it(modes, mode):
    """Optimizer state keyed by name, on one rank's parameters only, or in DTensors; a tied matrix saved twice."""
    a, b = checkpoint(modes['one'][0]), checkpoint(modes[mode][0])
    assert list(a) == list(b) and list(a['model']) == list(b['model']) and a['optimizer']['param_groups'] == b['optimizer']['param_groups']
    assert list(a['optimizer']['state']) == list(b['optimizer']['state'])
    assert b['model']['lm_head.weight'].data_ptr() == b['model']['transformer.wte.weight'].data_ptr()
    for name, tensor in a['model'].items():
        assert type(b['model'][name]) is torch.Tensor and torch.allclose(tensor, b['model'][name], atol=1e-5), name
    for i, state in a['optimizer']['state'].items():
        for key, value in state.items():
            other = b['optimizer']['state'][i][key]
            assert type(other) is torch.Tensor and other.dtype == value.dtype and torch.allclose(value, other, rtol=1e-3, atol=1e-6), (i, key)
    sizes = [(modes[m][0] / 'ckpt.pt').stat().st_size for m in ('one', mode)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


@pytest.mark.parametrize('writer, reader', [('one', 'fsdp'), ('fsdp', 'zero1'), ('zero1', 'ddp'), ('ddp', 'one'), ('fsdp', 'fsdp')])
def test_every_mode_resumes_every_others_checkpoint(text_set, modes, tmp_path, writer, reader):
    """Moments lost or given to another tensor: losses of the first steps would tell. A ring, because the checkpoints are all alike."""
    out_dir = copy_run(modes[writer][0], tmp_path / 'out', 'ckpt_prev.pt')
    done = train_mode(reader, text_set, out_dir, '--init_from=resume')
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {i: loss for i, loss in losses(modes['one'][0]).items() if i >= 10}
    assert losses(out_dir) == pytest.approx(expected, rel=1e-5)
    if writer == reader or {writer, reader} == {'zero1', 'ddp'}:  # the same arithmetic on the same ranks
        assert_equal_states(checkpoint(modes[writer][0]), checkpoint(out_dir))


def test_sampling_reads_what_fsdp_wrote(modes):
    """A checkpoint that only torchrun can read."""
    texts = [command('sample.py', f'--out_dir={modes[mode][0]}', '--num_samples=1', '--max_new_tokens=20', '--device=cpu', '--dtype=float32', '--temperature=0')
             for mode in ('one', 'fsdp')]
    assert texts[0].returncode == texts[1].returncode == 0 and texts[0].stdout == texts[1].stdout


COUNT_BYTES = """
import json, os, sys
import torch
import torch.optim.optimizer as optim
out, script, sys.argv = sys.argv[1], sys.argv[2], sys.argv[2:]
names, most = {'__name__': '__main__', '__file__': script}, {}
def storages(tensors):
    local = [t.to_local() if hasattr(t, 'to_local') else t for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in local)}.values())
def count(optimizer, *_):
    params = list(names['raw_model'].parameters())
    moments = [v for state in getattr(optimizer, 'optim', optimizer).state.values() for v in state.values() if v.dim()]
    most.update(weights=storages(params), gradients=storages([p.grad for p in params]), moments=storages(moments), parameters=sum(p.numel() for p in params))
    with open(f"{out}/{os.environ['RANK']}.json", 'w') as f:
        json.dump(most, f)
optim.register_optimizer_step_post_hook(count)
exec(compile(open(script).read(), script, 'exec'), names)
"""


@pytest.mark.parametrize('mode, per_parameter', [('ddp', 16), ('zero1', 8 + 8 / 2), ('fsdp', 16 / 2)])
def test_bytes_of_model_states_a_rank_are_those_of_the_formulas(text_set, tmp_path, mode, per_parameter):
    """Sharding that is switched on and saves nothing: every parameter, gradient and moment that each of two ranks holds after a step."""
    (tmp_path / 'count.py').write_text(COUNT_BYTES)
    done = command(tmp_path / 'count.py', tmp_path, ROOT / 'train.py', *TINY, f'--dataset={text_set}', f'--out_dir={tmp_path / "out"}', '--max_iters=2', *MODES[mode][1],
                   launcher=TORCHRUN, env={'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f'{rank}.json').read_text()) for rank in (0, 1)]
    for held in ranks:  # ZeRO-1 gives whole tensors to ranks, here 1 % off the half
        assert held['weights'] + held['gradients'] + held['moments'] == pytest.approx(per_parameter * held['parameters'], rel=0.005 if mode == 'zero1' else 1e-9)
    assert sum(held['moments'] for held in ranks) == 8 * ranks[0]['parameters'] * (2 if mode == 'ddp' else 1)


COMBINATIONS = {
    'fsdp, llama, checkpointing, accumulation': ('fsdp', '--arch_preset=llama', '--activation_checkpointing=True', '--gradient_accumulation_steps=6', '--grad_clip=0.1'),
    'fsdp, gathered until backward': ('fsdp', '--fsdp_reshard_after_forward=False', '--gradient_accumulation_steps=6', '--logit_softcap=5', '--qk_norm=True'),
    'fsdp, blocks with the root': ('fsdp', '--fsdp_min_num_params=1000000', '--arch_preset=gpt2', '--attention_backend=chunked', '--activation_checkpointing=True'),
    'fsdp, compile, checkpointing': ('fsdp', '--compile=True', '--activation_checkpointing=True', '--arch_preset=hybrid', '--gradient_accumulation_steps=4'),
    'zero1, llama, checkpointing, accumulation': ('zero1', '--arch_preset=llama', '--activation_checkpointing=True', '--gradient_accumulation_steps=6', '--grad_clip=0.1'),
    'zero1, compile': ('zero1', '--compile=True', '--gradient_accumulation_steps=4'),
    'ddp, muon': ('ddp', *MUON), 'zero1, muon': ('zero1', *MUON), 'fsdp, muon': ('fsdp', *MUON, '--gradient_accumulation_steps=4'),
}


@pytest.mark.parametrize('name', COMBINATIONS)
def test_modes_compose(text_set, tmp_path, name):
    """A combination that hangs, fails or trains something else: against one process without checkpointing and compiler."""
    mode, *flags = COMBINATIONS[name]
    flags += ['--max_iters=5', '--eval_interval=3', '--sample_interval=1', '--gradient_log_interval=2']
    plain = [flag for flag in flags if 'compile' not in flag and 'checkpointing' not in flag and 'fsdp' not in flag]
    one, two = (train_mode(m, text_set, tmp_path / m, *f) for m, f in (('one', plain), (mode, flags)))
    assert one.returncode == two.returncode == 0, (one.stderr + two.stderr)[-3000:]
    assert 'WARNING' not in two.stdout and ('compiled in' in two.stdout) == ('compile' in name)
    assert losses(tmp_path / mode) == pytest.approx(losses(tmp_path / 'one'), rel=1e-4 if name == 'fsdp, muon' else 1e-5)  # whose bfloat16 sums are in parts
    sample = lambda out_dir: run_logs(tmp_path / out_dir)[0]['eval_steps'][0]['sample']
    assert sample(mode) == sample('one')  # of the untrained model


@pytest.mark.parametrize('mode, dtype, flags', [('fsdp', 'bfloat16', ()), ('fsdp', 'float16', ()), ('zero1', 'float16', ()), ('zero1', 'float16', MUON)],
                         ids=str)
def test_modes_train_in_mixed_precision(text_set, tmp_path, mode, dtype, flags):
    """A residual stream in 16 bits, a loss scale that differs between ranks: against one process in float32."""
    done = train_mode(mode, text_set, tmp_path, f'--dtype={dtype}', '--sample_interval=1', *flags)
    reference = train_mode('one', text_set, tmp_path / 'one', *flags)
    assert done.returncode == reference.returncode == 0, done.stderr[-3000:]
    assert list(losses(tmp_path).values()) == pytest.approx(list(losses(tmp_path / 'one').values()), rel=3e-3)


HUGE_STEP = '--learning_rate=1e39', '--min_lr=1e39', '--warmup_iters=0', '--grad_clip=0', '--save_interval=1'  # not a finite weight after it


@pytest.mark.parametrize('mode, flags', [('ddp', []), ('zero1', []), ('fsdp', []), ('fsdp', ['--sharded_checkpoint=True'])])
def test_ranks_stop_together(text_set, tmp_path, mode, flags):
    """Rank 0 fails to write, or a loss is not finite, and the other ranks wait for it for half an hour."""
    (tmp_path / 'full' / 'ckpt.pt.tmp').mkdir(parents=True)  # a file that cannot be opened, for root too
    (tmp_path / 'full' / 'ckpt_sharded.tmp').touch()
    done = train_mode(mode, text_set, tmp_path / 'full', '--save_interval=2', *flags)
    assert done.returncode != 0 and done.stderr.count('could not be written') == 1 and 'iter 1 ' in done.stdout and 'iter 2 ' not in done.stdout
    done = train_mode(mode, text_set, tmp_path / 'nan', '--learning_rate=1e30', '--grad_clip=0', '--warmup_iters=0', '--save_interval=1', *flags)
    assert done.returncode != 0 and done.stdout.count('nothing saved') == 1 and 'Traceback' not in done.stderr.split('torch/distributed/elastic')[0]
    for path in (tmp_path / 'nan').glob('ckpt*'):
        assert all(torch.isfinite(t).all() for t in load_checkpoint(path)['model'].values()), path
    done = train_mode(mode, text_set, tmp_path / 'inf', *HUGE_STEP, *flags)
    assert done.returncode != 0 and 'a weight is not finite' in done.stderr and not list((tmp_path / 'inf').glob('ckpt*'))


