"""LoRA: adapters beside frozen weights, their checkpoints, merging, PEFT: python -m pytest tests/test_lora.py"""
import json
import shutil
from pathlib import Path

import pytest
import torch

from conftest import (
    assert_equal_states,
    checkpoint,
    command,
    copy_run,
    losses,
    losses_from,
    refused,
    run_logs,
    succeeded,
    train,
    train_mode,
)
from engine.checkpoint import load_checkpoint
from engine.common import UserError
from engine.cost import gathered_bytes, memory_estimate
from engine.describe import describe, meta_model
from engine.lora import add_adapters, base_weights, own_weights, save_peft
from model import GPT, GPTConfig, linear_cross_entropy

TINY = dict(block_size=16, vocab_size=64, n_layer=2, n_head=4, n_embd=32)
ADAPTERS = dict(lora_rank=4, lora_alpha=16.0, lora_targets='attn,mlp')
LORA = '--lora_rank=4', '--dropout=0'
CPU = torch.device('cpu')


def adapted(targets='attn,mlp', **settings):
    """(base, a model with adapters that are not 0)."""
    torch.manual_seed(0)
    base, model = GPT(GPTConfig(**TINY | settings)).eval(), GPT(GPTConfig(**TINY | settings)).eval()
    model.load_state_dict(base.state_dict())
    add_adapters(model, ADAPTERS | dict(lora_targets=targets))
    idx = torch.randint(64, (2, 16))
    assert torch.equal(base(idx, all_logits=True)[0], model(idx, all_logits=True)[0])  # B begins as 0
    for name, p in model.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(p, std=0.2)
    return base, model


@pytest.fixture(scope='module')
def lora(finished, text_set, tmp_path_factory):
    """(out_dir, console) of a run of 20 iterations with adapters beside the run `finished`."""
    out_dir = tmp_path_factory.mktemp('lora') / 'out'
    done = train(text_set, out_dir, f'--init_from={finished[0]}', *LORA, '--save_interval=10', '--learning_rate=1e-2',
                 '--verbose=True')
    succeeded(done)
    return out_dir, done.stdout


@pytest.mark.parametrize('targets, n', [
    ('attn,mlp', 8), ('attn', 4), ('c_attn', 2), ('mlp.c_fc,mlp.c_proj', 4), ('attn,attn.c_attn', 4)])
def test_only_adapters_have_gradients_and_moments(targets, n):
    """Frozen weights take memory for gradients and moments, or move; a Linear gets two adapters."""
    model, idx = adapted(targets)[1], torch.zeros(1, 16, dtype=torch.long)
    model(idx, idx)[1].backward()
    state, about = own_weights(model)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == state.keys()
    assert len(state) == 2 * n and about == {'lora': model.lora}
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert frozen == GPT(GPTConfig(**TINY)).get_num_params(False)


def test_the_estimate_and_the_flops_leave_out_frozen_weights():
    """A run that fits is said to run out of memory; MFU counts matmuls that are never made."""
    config, model = GPTConfig(**TINY), adapted()[1]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    estimate = memory_estimate(config, 2, 'float32', CPU, lora=ADAPTERS)
    assert estimate['weights'] == 4 * model.get_num_params(False)
    assert estimate['gradients'] == 4 * trained and estimate['moments'] == 8 * trained
    full = GPT(config)
    whole = memory_estimate(config, 2, 'float32', CPU)
    assert whole['gradients'] == whole['weights'] and estimate['peak'] < whole['peak']
    assert gathered_bytes(model, 'float32') < gathered_bytes(full, 'float32')
    linears = 2 * sum(m.weight.numel() for m in full.modules() if isinstance(m, torch.nn.Linear))
    own = 3 * sum(model.flops_by_part().values()) - 3 * sum(full.flops_by_part().values())
    assert own == 6 * trained and model.flops_per_token() == full.flops_per_token() - linears + own
    settings = dict(TINY, dataset='none', **ADAPTERS)
    assert f'{trained:,}\n' in describe(meta_model(settings), settings, CPU, 'float32')


def test_a_frozen_head_has_no_gradient_and_passes_the_same_on():
    """The gradient of the head's weight is computed for nothing: (V, C) floats and a third of the head's time."""
    x, weight, targets = torch.randn(8, 32, requires_grad=True), torch.randn(64, 32), torch.randint(64, (8,))
    gradients = []
    for head_is_trained in (True, False):
        loss = linear_cross_entropy(x, weight.requires_grad_(head_is_trained), targets)
        assert (loss.grad_fn.saved_tensors[1] is not None) == head_is_trained
        gradients.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*gradients)


def test_a_run_learns_and_its_checkpoint_has_adapters_alone(lora, finished):
    out_dir, console = lora
    first, *_, last = losses(out_dir).values()
    assert last < first - 0.01
    ckpt = checkpoint(out_dir)
    assert all('.lora_' in name for name in ckpt['model']) and len(ckpt['model']) == 16
    assert len(ckpt['optimizer']['state']) == 16
    assert ckpt['lora'].keys() == {*ADAPTERS, 'base', 'crc32'}
    assert ckpt['lora']['base'] == str(finished[0] / 'ckpt.pt')
    assert (out_dir / 'ckpt.pt').stat().st_size < (finished[0] / 'ckpt.pt').stat().st_size
    trained = sum(t.numel() for t in ckpt['model'].values())
    assert f'{trained:,} of them trained' in console
    assert run_logs(out_dir)[0]['startup_info']['memory_estimate']['gradients'] == 4 * trained


def test_merged_logits_are_those_of_the_adapters(lora, tmp_path):
    """The scale is lost, A and B change places, or a checkpoint is merged with the wrong base."""
    succeeded(command('model.py', f'--ckpt={lora[0]}', f'--merge={tmp_path}/merged.pt'))
    ckpt = load_checkpoint(lora[0], merge=False)
    apart = GPT.from_dict(ckpt | {'model': base_weights(ckpt)})
    add_adapters(apart, ckpt['lora'])
    apart.load_state_dict(ckpt['model'], strict=False)
    idx = torch.randint(256, (4, 16))
    expected = apart(idx, all_logits=True)[0]
    ordinary = checkpoint(tmp_path, 'merged.pt')
    assert not ordinary.keys() & {'lora', 'optimizer'}
    for model in GPT.from_dict(ordinary), GPT.from_checkpoint(lora[0]):
        torch.testing.assert_close(model(idx, all_logits=True)[0], expected, atol=1e-5, rtol=1e-5)
    texts = [command('sample.py', f'--out_dir={path}', '--num_samples=1', '--max_new_tokens=20', '--dtype=float32')
             for path in (lora[0], f'{tmp_path}/merged.pt')]
    assert texts[0].stdout == texts[1].stdout and not texts[0].returncode


@pytest.mark.parametrize('flags', [[], ['--async_checkpoint=True'], ['--compile=True']], ids=' '.join)
def test_resuming_gives_the_same_run(lora, text_set, tmp_path, flags):
    """Adapters are drawn anew, or the base is taken for the run's own weights."""
    again = copy_run(lora[0], tmp_path / 'again', 'ckpt_prev.pt')
    done = train(text_set, again, '--init_from=resume', '--dropout=0', '--learning_rate=1e-2', '--save_interval=10',
                 *flags)
    succeeded(done)
    if flags == ['--compile=True']:
        assert losses(again) == pytest.approx(losses_from(lora[0], 10), abs=1e-3)
        return
    assert losses(again) == losses_from(lora[0], 10)
    assert_equal_states(checkpoint(again), checkpoint(lora[0]))
    assert run_logs(again)[0]['config']['lora_rank'] == 4 and checkpoint(again)['lora'] == checkpoint(lora[0])['lora']


@pytest.mark.parametrize('mode, sharded', [('ddp', True), ('zero1', False), ('fsdp', False), ('fsdp', True)])
def test_every_mode_trains_the_same_adapters(lora, finished, text_set, mode, sharded, tmp_path):
    """FSDP divides frozen weights too, and resumes without reading them from this checkpoint."""
    flags = f'--sharded_checkpoint={sharded}', '--learning_rate=1e-2'
    begin = f'--init_from={finished[0]}', *LORA, '--max_iters=10', *flags
    succeeded(train_mode(mode, text_set, tmp_path, *begin))
    succeeded(train_mode(mode, text_set, tmp_path, '--init_from=resume', *flags))
    found = load_checkpoint(tmp_path, merge=False)['model']
    for name, tensor in checkpoint(lora[0])['model'].items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3)


def test_muon_trains_the_adapters(finished, text_set, tmp_path):
    """AdamW's groups are empty then."""
    flags = f'--init_from={finished[0]}', *LORA, '--optimizer=muon', '--muon_learning_rate=0.003'
    succeeded(train(text_set, tmp_path / 'out', *flags))
    first, *_, last = losses(tmp_path / 'out').values()
    assert last < first - 0.01
    assert len(checkpoint(tmp_path / 'out')['optimizer']['state']) == 16


def test_adapters_on_adapters(lora, text_set, tmp_path):
    """Their base would be a sum that another CPU rounds in another way, so its checksum would differ."""
    out, merged = tmp_path / 'out', tmp_path / 'merged.pt'
    refused(train(text_set, out, f'--init_from={lora[0]}', *LORA, '--max_iters=2'), '--merge=FILE')
    command('model.py', f'--ckpt={lora[0]}', f'--merge={merged}')
    succeeded(train(text_set, out, f'--init_from={merged}', *LORA, '--max_iters=2'))
    succeeded(train(text_set, out, '--init_from=resume', '--dropout=0', '--max_iters=4'))
    assert GPT.from_checkpoint(out).get_num_params() == GPT.from_checkpoint(lora[0]).get_num_params()


def test_the_base_is_found_from_another_folder(lora, tmp_path):
    """Its path is relative to the folder in which train.py ran."""
    (tmp_path / 'runs' / 'lora').mkdir(parents=True)
    ckpt = torch.load(lora[0] / 'ckpt.pt', weights_only=True)
    base = Path(ckpt['lora']['base'])
    shutil.copytree(base.parent, tmp_path / 'runs' / 'base')
    ckpt['lora']['base'] = f'base/{base.name}'
    torch.save(ckpt, tmp_path / 'runs' / 'lora' / 'ckpt.pt')
    found = GPT.from_checkpoint(tmp_path / 'runs' / 'lora')
    assert found.get_num_params() == GPT.from_checkpoint(lora[0]).get_num_params()


def test_a_shorter_context_and_a_hugging_face_base(finished, text_set, tmp_path):
    """The base has more positions than the run that is resumed, or other names for its weights."""
    succeeded(command('model.py', f'--ckpt={finished[0]}', f'--export={tmp_path}/hf', '--dtype=bfloat16'))
    flags = f'--init_from={tmp_path}/hf', *LORA, '--block_size=8', '--max_iters=2'
    succeeded(train(text_set, tmp_path / 'out', *flags))
    succeeded(train(text_set, tmp_path / 'out', '--init_from=resume', '--dropout=0', '--block_size=8', '--max_iters=4'))
    model = GPT.from_checkpoint(tmp_path / 'out')
    assert model.config.block_size == 8 and model.lm_head.weight.dtype == torch.float32


def test_what_cannot_be_is_one_line(lora, finished, text_set, tmp_path):
    """The adapters of one model are added to another, without a word."""
    base = copy_run(finished[0], tmp_path / 'base')
    out = tmp_path / 'out'
    refused(train(text_set, out, *LORA), 'lora_rank=4', '--init_from')
    refused(train(text_set, out, *LORA, f'--init_from={base}', '--lora_targets=attn,head'), "'head'", 'attn.c_attn')
    refused(train(text_set, lora[0], '--init_from=resume', '--lora_rank=8'), 'lora_rank=8', 'lora_rank=4')
    refused(train(text_set, base, '--init_from=resume', '--lora_rank=8'), 'lora_rank=8', 'lora_rank=0')
    refused(command('model.py', f'--ckpt={base}', f'--peft={tmp_path}/new'), 'no adapters')
    refused(train(text_set, base, f'--init_from={base}', *LORA, '--overwrite=True'), 'as it is', 'out_dir')
    succeeded(train(text_set, out, f'--init_from={base}', *LORA, '--max_iters=1'))
    ckpt = checkpoint(base)
    ckpt['model']['lm_head.weight'][0, 0] += 1
    del ckpt['checksums']
    torch.save(ckpt, base / 'ckpt.pt')
    refused(command('sample.py', f'--out_dir={out}'), 'have changed', str(base))
    (base / 'ckpt.pt').unlink()
    refused(train(text_set, out, '--init_from=resume'), 'cannot be read', str(base))


@pytest.mark.parametrize('change', [
    {'model': {'transformer.h.0.attn.c_attn.lora_A.weight': torch.zeros(4, 32)}},
    {'model': {'transformer.h.9.attn.c_attn.lora_A.weight': torch.zeros(4, 32),
               'transformer.h.9.attn.c_attn.lora_B.weight': torch.zeros(96, 4)}},
    {'lora': {}},
    {'lora': ADAPTERS | {'base': 7, 'crc32': 0}},
], ids=['half', 'elsewhere', 'nothing', 'no path'])
def test_a_damaged_file_of_adapters_is_one_line(lora, change, tmp_path):
    ckpt = checkpoint(lora[0]) | change
    del ckpt['checksums']
    torch.save(ckpt, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match=str(tmp_path)):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize('settings', [
    dict(bias=True),
    dict(position_encoding='rope', normalization='rmsnorm', ffn_type='swiglu', bias=False, n_kv_head=2),
], ids=['gpt2', 'llama'])
def test_peft_loads_the_adapters(tmp_path, settings):
    """The rows of q, k and v are divided otherwise, or GPT-2's transposed matrices get a transposed adapter."""
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    base, model = adapted(**settings)
    base.save_pretrained(tmp_path / 'base')
    about = ADAPTERS | {'base': str(tmp_path / 'base'), 'crc32': 0}
    state, _ = own_weights(model)
    torch.save({'model': {name: p.detach() for name, p in state.items()}, 'model_args': vars(model.config),
                'lora': about}, tmp_path / 'ckpt.pt')
    save_peft(tmp_path, tmp_path / 'adapters')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base')
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / 'adapters').eval()
    idx = torch.randint(64, (2, 16))
    with torch.no_grad():
        expected = model(idx, all_logits=True)[0]
        torch.testing.assert_close(theirs(idx).logits, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(base(idx, all_logits=True)[0], expected, atol=1e-2)
    written = json.loads((tmp_path / 'adapters/adapter_config.json').read_text())
    assert written['r'] == 4 and written['base_model_name_or_path'] == about['base']
