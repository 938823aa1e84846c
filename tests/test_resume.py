"""What must stay true: python -m pytest tests/test_resume.py"""
import sys

import numpy as np
import pytest
import torch

from conftest import (
    TINY,
    assert_equal_states,
    checkpoint,
    command,
    copy_run,
    refused,
    train,
)
from data.loader import write_dataset
from model import GPT, GPTConfig

T = 8  # block_size of the loader tests


def test_another_tokenizer_is_noticed(finished, tmp_path):
    """A byte model that goes on with ids of characters."""
    write_dataset(tmp_path / 'chars', {'train': np.arange(99) % 3, 'val': np.arange(50) % 3}, {'vocab_size': 3, 'tokenizer': {'name': 'char', 'chars': 'abc'}})
    out_dir = copy_run(finished[0], tmp_path / 'out')
    refused = train(tmp_path / 'chars', out_dir, '--init_from=resume', '--max_iters=21')
    assert refused.returncode == 2 and 'byte' in refused.stderr and 'char' in refused.stderr
    tuned = train(tmp_path / 'chars', tmp_path / 'tuned', f'--init_from={out_dir}', '--max_iters=1')
    assert tuned.returncode == 0 and 'WARNING' in tuned.stdout


def test_equal_settings_written_differently_resume(text_set, finished, tmp_path):
    """n_kv_head=2 refused where the checkpoint says None and means 2."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    assert train(text_set, out_dir, '--init_from=resume', '--max_iters=21', '--n_kv_head=2', '--d_ff=128').returncode == 0
    assert 'n_kv_head=1' in train(text_set, out_dir, '--init_from=resume', '--max_iters=22', '--n_kv_head=1').stderr


def test_fine_tuning_takes_weights_only(text_set, finished, tmp_path):
    """The other run's optimizer, iteration or best loss carried along."""
    done = train(text_set, tmp_path / 'tuned', f'--init_from={finished[0]}', '--max_iters=1', '--learning_rate=1e-12', '--min_lr=0', '--block_size=8')
    assert done.returncode == 0, done.stderr
    before, after = checkpoint(finished[0]), checkpoint(tmp_path / 'tuned')
    assert after['iter_num'] == 1 and after['model_args']['block_size'] == 8
    assert torch.allclose(before['model']['lm_head.weight'], after['model']['lm_head.weight'], atol=1e-6)
    assert {int(s['step']) for s in after['optimizer']['state'].values()} == {1}


def hub_cache(home, name, model):
    """Environment in which a hub id has been downloaded already, as huggingface_hub keeps it."""
    repository = home / 'hub' / f"models--{name.replace('/', '--')}"
    (repository / 'refs').mkdir(parents=True)
    (repository / 'refs/main').write_text('0' * 40)
    model.save_pretrained(repository / 'snapshots' / ('0' * 40))
    return {'HF_HOME': str(home), 'HF_HUB_OFFLINE': '1'}


def test_fine_tuning_starts_at_a_pretrained_model(text_set, tmp_path):
    """nanoGPT's --init_from=gpt2: weights from the hub, in float32 whatever they come in, a shorter context, dropout of one's own."""
    pytest.importorskip('safetensors')
    torch.manual_seed(1)
    model = GPT(GPTConfig.from_settings(dict(arch_preset='gpt2', block_size=64, vocab_size=256, n_layer=1, n_head=2, n_embd=16))).bfloat16()
    env = hub_cache(tmp_path / 'home', 'gpt2', model)
    flags = ['--init_from=gpt2', '--max_iters=1', '--learning_rate=1e-12', '--min_lr=0', '--dropout=0.1', '--eval_interval=1', '--eval_iters=1000']
    script = [f for f in TINY if not f.startswith(('--n_', '--arch', '--norm', '--pos', '--act', '--ffn', '--bias'))]
    done = command('train.py', *script, f'--dataset={text_set}', f'--out_dir={tmp_path}/out', *flags, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = checkpoint(tmp_path / 'out')
    T = saved['model_args']['block_size']
    assert T < 64 and saved['model_args']['dropout'] == 0.1 and saved['config']['n_layer'] == 1
    for name, tensor in saved['model'].items():
        assert tensor.dtype == torch.float32
        close = model.state_dict()[name].float()
        assert torch.allclose(tensor, close[:T] if 'wpe' in name else close, atol=1e-6), name
    assert command('train.py', *script, f'--dataset={text_set}', f'--out_dir={tmp_path}/out', '--init_from=resume', '--max_iters=2').returncode == 0
    refused(command('train.py', *script, f'--dataset={text_set}', f'--out_dir={tmp_path}/new', *flags, '--n_layer=3', env=env), 'n_layer=3', 'n_layer=1')
    evaluated = command('train.py', *script, f'--dataset={text_set}', f'--out_dir={tmp_path}/new', '--init_from=gpt2', '--eval_only=True', env=env)
    assert evaluated.returncode == 0 and 'step 0: train loss 5.' in evaluated.stdout
    sampled = command('sample.py', '--init_from=gpt2', '--num_samples=1', '--max_new_tokens=5', '--start=abc', env=env)
    assert sampled.returncode == 2 and "GPT-2's" in sampled.stderr and '256' in sampled.stderr  # the folder names no tokenizer, and this model cannot be GPT-2
    missing = command('sample.py', '--init_from=gpt2-xl', env=env)
    assert missing.returncode == 2 and missing.stderr.count('\n') == 1 and 'gpt2-xl' in missing.stderr


def test_resume_takes_new_optimizer_settings_and_refuses_another_architecture(text_set, finished, tmp_path):
    """load_state_dict brings back the old betas and decay; a model of other parts loaded in silence."""
    out_dir = copy_run(finished[0], tmp_path / 'other')
    refused = train(text_set, out_dir, '--init_from=resume', '--n_embd=64', '--max_iters=21')
    assert refused.returncode == 2 and 'n_embd=64' in refused.stderr and 'n_embd=32' in refused.stderr
    assert 'rmsnorm' in train(text_set, out_dir, '--init_from=resume', '--arch_preset=llama', '--max_iters=21').stderr
    assert train(text_set, out_dir, '--init_from=resume', '--max_iters=21', '--weight_decay=0.3', '--beta2=0.9', '--lr_schedule=constant', '--learning_rate=7e-4').returncode == 0
    groups = checkpoint(out_dir)['optimizer']['param_groups']
    assert [g['weight_decay'] for g in groups] == [0.3, 0.0] and all(g['betas'] == (0.9, 0.9) and g['lr'] == 7e-4 for g in groups)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(text_set, finished, tmp_path):
    """torch.load does not check CRCs: a flipped bit goes into training unnoticed."""
    out_dir = copy_run(finished[0], tmp_path / 'damaged')
    (out_dir / 'ckpt_prev.pt').write_bytes((finished[0] / 'ckpt_prev.pt').read_bytes())
    data = bytearray((out_dir / 'ckpt.pt').read_bytes())
    data[len(data) // 2] ^= 1
    (out_dir / 'ckpt.pt').write_bytes(data)
    done = train(text_set, out_dir, '--init_from=resume')
    assert done.returncode == 0 and done.stdout.count('WARNING') == 1
    assert_equal_states(checkpoint(finished[0]), checkpoint(out_dir))
    (out_dir / 'ckpt.pt').write_bytes(data)
    refused = command('sample.py', f'--out_dir={out_dir}')
    assert refused.returncode == 2 and 'ckpt.pt' in refused.stderr and refused.stdout == ''


@pytest.mark.parametrize('flags, words', [
    (['--device=cuda'], ['cuda', 'not available']), (['--device=tpu9'], ['tpu9']), (['--n_head=3'], ['n_embd', 'n_head']),
    (['--optimizer=mion'], ['muon']), (['--muon_momentum=1.0'], ['muon_momentum']), (['--muon_learning_rate=0'], ['muon_learning_rate']),
    (['--normalization=rmsnrm'], ['rmsnrm', 'rmsnorm']), (['--arch_preset=gpt3'], ['gpt3', 'llama']), (['--batch_size=0'], ['batch_size']),
    (['--max_iters=-5'], ['max_iters']), (['--init_from=resume'], ['no checkpoint']), (['--init_from=nowhere'], ['nowhere', 'resume']),
    (['--dataset=shakspeare'], ['shakspeare', 'pystdlib']), (['--vocab_size=100'], ['vocab_size', '256']), (['--block_size=99999'], ['train.bin', 'block_size']),
    (['--use_fsdp=True'], ['use_fsdp', 'torchrun']), (['--sharded_checkpoint=True'], ['sharded_checkpoint', 'torchrun']), (['--use_zero1=True', '--use_fsdp=True'], ['use_zero1', 'use_fsdp']),
    (['--backend=foo'], ['backend', 'gloo']), (['--beta2=1.5'], ['beta2']), (['--compile', 'False'], ['--compile=False']), (['--max_iters=0'], ['max_iters']), (['--max_iters=1.5'], ['max_iters', 'int']), (['--max_itres=5'], ['max_itres', 'max_iters']), (['--dropout=1.0'], ['dropout'])])
def test_a_wrong_setting_is_one_line_and_nothing_is_written(text_set, tmp_path, flags, words):
    """A traceback, or a folder half made, for a typing mistake."""
    done = train(text_set, tmp_path / 'out', *flags)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / 'out').exists()
    done = train(text_set, tmp_path / 'out', *flags, launcher=(sys.executable, '-O')) if flags[0] in ('--n_head=3', '--batch_size=0') else done
    assert done.returncode == 2  # nothing relies on assert


def test_accumulation_must_divide_among_processes(text_set, tmp_path):
    """Fewer tokens a step than asked for, in silence."""
    done = train(text_set, tmp_path, '--gradient_accumulation_steps=3', env={'RANK': '0', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0'})
    assert done.returncode == 2 and 'gradient_accumulation_steps=3' in done.stderr and '2 processes' in done.stderr


