"""Where a run starts: resuming, fine-tuning, pretrained weights; and settings that are refused."""
import shutil

import numpy as np
import pytest
import torch

from configurator import configure
from conftest import (
    PYTHON,
    ROOT,
    TINY,
    assert_equal_states,
    checkpoint,
    command,
    contents,
    copy_run,
    flip_bit,
    losses,
    losses_from,
    refused,
    rewrite,
    succeeded,
    train,
)
from data.folder import write_dataset
from engine.start import fit_model
from model import GPT, GPTConfig

# resuming

def test_another_tokenizer_is_noticed(finished, tmp_path):
    """A model of bytes is trained on ids of characters."""
    meta = {'vocab_size': 3, 'tokenizer': {'name': 'char', 'chars': 'abc'}}
    write_dataset(tmp_path / 'chars', {'train': np.arange(99) % 3, 'val': np.arange(50) % 3}, meta)
    out_dir = copy_run(finished[0], tmp_path / 'out')
    refused(train(tmp_path / 'chars', out_dir, '--init_from=resume', '--max_iters=21'), 'byte', 'char')
    succeeded(train(tmp_path / 'chars', tmp_path / 'tuned', f'--init_from={out_dir}', '--max_iters=1'), 'WARNING')


def test_equal_settings_written_differently_resume(text_set, finished, tmp_path):
    """n_kv_head=2 is refused where the checkpoint says None and means 2."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    resume = '--init_from=resume', '--max_iters=21'
    refused(train(text_set, out_dir, *resume, '--n_kv_head=1'), 'n_kv_head=1')
    succeeded(train(text_set, out_dir, *resume, '--n_kv_head=2', '--d_ff=128'))


def test_resume_takes_new_optimizer_settings(text_set, finished, tmp_path):
    """load_state_dict brings back the old betas and weight decay."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    flags = '--weight_decay=0.3', '--beta2=0.9', '--lr_schedule=constant', '--learning_rate=7e-4'
    succeeded(train(text_set, out_dir, '--init_from=resume', '--max_iters=21', *flags))
    groups = checkpoint(out_dir)['optimizer']['param_groups']
    assert [group['weight_decay'] for group in groups] == [0.3, 0.0]
    assert all(group['betas'] == (0.9, 0.9) and group['lr'] == 7e-4 for group in groups)


@pytest.mark.parametrize('stored', ['silu', 'gelu'])
def test_an_ffn_resumes_with_its_stored_gate_by_the_flags_that_began_it(stored):
    """arch_preset says GELU, which a new swiglu does not have and one from before geglu had a name has."""
    sizes = dict(n_layer=1, n_head=1, n_embd=8, block_size=8)
    flags = ['--arch_preset=custom', '--ffn_type=swiglu', *(f'--{key}={n}' for key, n in sizes.items())]
    config, given = configure(str(ROOT / 'train.py'), argv=flags)
    model = GPT(GPTConfig.from_settings(config | dict(activation=stored, vocab_size=8)))
    ckpt = dict(model=model.state_dict(), model_args=vars(model.config), iter_num=1, path='ckpt.pt')
    assert fit_model(ckpt, config, given, resuming=True).config.activation == stored


@pytest.mark.parametrize('flag, words', [
    ('--n_embd=64', ['n_embd=64', 'n_embd=32']),
    ('--arch_preset=llama', ['rmsnorm', 'layernorm']),
])
def test_resume_refuses_another_architecture(text_set, finished, tmp_path, flag, words):
    """A model of other parts is silently the checkpoint's, or the other way round."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    refused(train(text_set, out_dir, '--init_from=resume', '--max_iters=21', flag), *words)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(text_set, finished, tmp_path):
    """A flipped bit goes into training unnoticed, since torch.load does not check CRCs."""
    out_dir = copy_run(finished[0], tmp_path / 'damaged')
    shutil.copy(finished[0] / 'ckpt_prev.pt', out_dir)
    rewrite(out_dir / 'ckpt.pt', lambda data: flip_bit(data, len(data) // 2))
    damaged = (out_dir / 'ckpt.pt').read_bytes()
    sampled = command('sample.py', f'--out_dir={out_dir}')
    refused(sampled, 'ckpt.pt')
    assert sampled.stdout == '' and (out_dir / 'ckpt.pt').read_bytes() == damaged
    done = train(text_set, out_dir, '--init_from=resume')
    succeeded(done)
    assert done.stdout.count('WARNING') == 1
    assert_equal_states(checkpoint(finished[0]), checkpoint(out_dir))


def test_a_run_resumes_from_a_checkpoint_that_was_kept(text_set, finished, tmp_path):
    """A checkpoint in the middle was gone, or could be fine-tuned only, with another optimizer state and data order."""
    whole, out_dir = tmp_path / 'whole', tmp_path / 'out'
    succeeded(train(text_set, whole, '--keep_interval=5'), 'ckpt.pt and ckpt_000005.pt')
    assert [name for name in sorted(contents(whole)) if '0' in name] == [f'ckpt_{i:06d}.pt' for i in (5, 10, 15, 20)]
    flags = '--init_from=resume', f'--ckpt={whole / "ckpt_000005.pt"}'
    done = train(text_set, out_dir, *flags)
    succeeded(done, f"resuming from '{whole}/ckpt_000005.pt'; new checkpoints go to '{out_dir}'")
    assert losses(out_dir) == losses_from(whole, 5) == losses_from(finished[0], 5)
    assert_equal_states(checkpoint(whole), checkpoint(out_dir))
    assert checkpoint(whole, 'ckpt_000010.pt')['iter_num'] == 10
    before = contents(out_dir)
    refused(train(text_set, out_dir, *flags), 'holds a run', '--overwrite=True')
    succeeded(train(text_set, out_dir, *flags, '--init_from=auto'), 'nothing to do')  # its own checkpoint comes first
    assert contents(out_dir) == before
    back = '--init_from=resume', f'--ckpt={whole / "ckpt_000010.pt"}', '--overwrite=True'
    succeeded(train(text_set, whole, *back))  # the run goes back in its own folder
    assert sorted(contents(whole)) == ['ckpt.pt', 'ckpt_000010.pt', 'ckpt_best.pt']
    assert_equal_states(checkpoint(whole), checkpoint(out_dir))


def test_a_schedule_that_changes_on_resume_is_said(text_set, finished, tmp_path):
    """The learning rate jumps because a finished run was given more iterations, and nobody says so."""
    flags = '--init_from=resume', '--max_iters=30'
    done = train(text_set, copy_run(finished[0], tmp_path / 'same'), *flags)
    succeeded(done)
    assert 'resumed with' not in done.stdout
    done = train(text_set, copy_run(finished[0], tmp_path / 'longer'), *flags, '--lr_decay_iters=30')
    succeeded(done, 'NOTE: resumed with lr_decay_iters=30 instead of 20: the learning rate may jump')


def test_weights_alone_cannot_be_resumed(text_set, finished, tmp_path):
    """Training starts again with fresh moments, and the loss jumps."""
    ckpt = checkpoint(finished[0])
    del ckpt['optimizer'], ckpt['checksums']
    torch.save(ckpt, tmp_path / 'weights.pt')
    done = train(text_set, tmp_path / 'out', '--init_from=resume', f'--ckpt={tmp_path}/weights.pt')
    refused(done, f"'{tmp_path}/weights.pt' has weights only", f'--init_from={tmp_path}/weights.pt')


# fine-tuning

def test_fine_tuning_takes_weights_only(text_set, finished, tmp_path):
    """The other run's optimizer, iteration or best loss is carried along."""
    flags = '--max_iters=1', '--learning_rate=1e-12', '--min_lr=0', '--block_size=8'
    succeeded(train(text_set, tmp_path / 'tuned', f'--init_from={finished[0]}', *flags))
    before, after = checkpoint(finished[0]), checkpoint(tmp_path / 'tuned')
    assert after['iter_num'] == 1 and after['model_args']['block_size'] == 8
    assert torch.allclose(before['model']['lm_head.weight'], after['model']['lm_head.weight'], atol=1e-6)
    assert {int(state['step']) for state in after['optimizer']['state'].values()} == {1}


PRETRAINED = '--dropout=0.1 --batch_size=4 --gradient_accumulation_steps=2 --sample_interval=0 --eval_iters=2'.split()
PRETRAINED += '--block_size=16 --device=cpu --dtype=float32 --compile=False --peak_tflops=1'.split()
ONE_STEP = '--max_iters=1 --learning_rate=1e-12 --min_lr=0 --warmup_iters=0'.split()


@pytest.fixture
def gpt2(tmp_path):
    """(environment, model): a tiny bfloat16 model that huggingface_hub's cache knows as gpt2."""
    pytest.importorskip('safetensors')
    torch.manual_seed(1)
    shape = dict(arch_preset='gpt2', block_size=64, vocab_size=256, n_layer=1, n_head=2, n_embd=16)
    model = GPT(GPTConfig.from_settings(shape)).bfloat16()
    repository = tmp_path / 'home' / 'hub' / 'models--gpt2'
    (repository / 'refs').mkdir(parents=True)
    (repository / 'refs' / 'main').write_text('0' * 40)
    model.save_pretrained(repository / 'snapshots' / ('0' * 40))
    return {'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_OFFLINE': '1'}, model


def test_fine_tuning_starts_at_a_pretrained_model(text_set, gpt2, tmp_path):
    """
    nanoGPT's --init_from=gpt2: weights stay in 16 bits, the context stays long, or dropout stays the
    checkpoint's.
    """
    env, model = gpt2
    flags = *PRETRAINED, f'--dataset={text_set}', f'--out_dir={tmp_path}/out'
    succeeded(command('train.py', *flags, '--init_from=gpt2', *ONE_STEP, env=env))
    saved, pretrained = checkpoint(tmp_path / 'out'), model.state_dict()
    assert saved['model_args']['block_size'] == 16 and saved['model_args']['dropout'] == 0.1
    assert saved['config']['n_layer'] == 1
    for name, tensor in saved['model'].items():
        expected = pretrained[name].float()
        expected = expected[:16] if 'wpe' in name else expected
        assert tensor.dtype == torch.float32 and torch.allclose(tensor, expected, atol=1e-6), name
    succeeded(command('train.py', *flags, '--init_from=resume', '--max_iters=2'))  # without the hub


def test_a_pretrained_model_is_evaluated_and_keeps_its_shape(text_set, gpt2, tmp_path):
    """Evaluating pretrained weights needs a step of training; n_layer=3 is silently ignored."""
    env, _ = gpt2
    flags = *PRETRAINED, f'--dataset={text_set}', f'--out_dir={tmp_path}/out', '--init_from=gpt2'
    refused(command('train.py', *flags, *ONE_STEP, '--n_layer=3', env=env), 'n_layer=3', 'n_layer=1')
    succeeded(command('train.py', *flags, '--eval_only=True', env=env), 'step 0: train loss 5.')


def test_sampling_from_the_hub_needs_a_tokenizer_that_fits(gpt2):
    """A model of 256 ids without a tokenizer is sampled with GPT-2's; a model that is not there is a traceback."""
    env, _ = gpt2
    flags = '--num_samples=1', '--max_new_tokens=5', '--start=abc'
    sampled = command('sample.py', '--init_from=gpt2', *flags, env=env)
    assert sampled.returncode == 2 and 'names no tokenizer' in sampled.stderr and '0..255' in sampled.stderr
    refused(command('sample.py', '--init_from=gpt2-xl', env=env), 'gpt2-xl')


@pytest.mark.parametrize('field, change, flags', [
    ('config.seed', lambda ckpt: ckpt['config'].pop('seed'), []),
    ('scaler', lambda ckpt: ckpt.update(scaler=[1]), ['--dtype=float16']),
    ('scaler.scale', lambda ckpt: ckpt.update(scaler={'scale': 'x'}), ['--dtype=float16']),
])
def test_a_checkpoint_that_lacks_what_a_resume_reads_is_one_line(text_set, finished, tmp_path, field, change, flags):
    """A KeyError or TypeError, and its traceback."""
    ckpt, out_dir = checkpoint(finished[0]), copy_run(finished[0], tmp_path / 'out')
    change(ckpt)
    torch.save(ckpt, out_dir / 'ckpt.pt')
    refused(train(text_set, out_dir, '--init_from=resume', '--max_iters=21', *flags), field.split('.')[-1])


# refused settings

@pytest.mark.parametrize('flags, words', [
    (['--device=cuda'], ['cuda', 'not available']),
    (['--device=tpu9'], ['tpu9']),
    (['--n_head=3'], ['n_embd', 'n_head']),
    (['--optimizer=mion'], ['muon']),
    (['--muon_momentum=1.0'], ['muon_momentum']),
    (['--muon_learning_rate=0'], ['muon_learning_rate']),
    (['--normalization=rmsnrm'], ['rmsnrm', 'rmsnorm']),
    (['--arch_preset=gpt3'], ['gpt3', 'llama']),
    (['--batch_size=0'], ['batch_size']),
    (['--max_iters=-5'], ['max_iters']),
    (['--max_iters=0'], ['max_iters']),
    (['--max_iters=1.5'], ['max_iters', 'int']),
    (['--max_itres=5'], ['max_itres', 'max_iters']),
    (['--init_from=resume'], ['no checkpoint']),
    (['--init_from=nowhere'], ['nowhere', 'hub id']),
    (['--dataset=shakspeare'], ['shakspeare', 'pystdlib']),
    (['--vocab_size=100'], ['vocab_size', '256']),
    (['--block_size=99999'], ['train.bin', 'block_size']),
    (['--epochs=2'], ['epochs', 'max_iters']),
    (['--ckpt=a.pt'], ['a.pt', '--init_from=resume']),
    (['--ckpt=a.pt', '--init_from=resume'], ["no checkpoint at 'a.pt'"]),
    (['--use_fsdp=True'], ['use_fsdp', 'torchrun']),
    (['--sharded_checkpoint=True'], ['sharded_checkpoint', 'torchrun']),
    (['--use_zero1=True', '--use_fsdp=True'], ['use_zero1', 'use_fsdp']),
    (['--backend=foo'], ['backend', 'gloo']),
    (['--beta2=1.5'], ['beta2']),
    (['--compile', 'False'], ['--compile=False']),
    (['--dropout=1.0'], ['dropout']),
], ids=' '.join)
def test_a_wrong_setting_is_one_line_and_nothing_is_written(text_set, tmp_path, flags, words):
    """A typing mistake leads to a traceback, or leaves a folder half made."""
    refused(train(text_set, tmp_path / 'out', *flags), *words)
    assert not (tmp_path / 'out').exists()


TRY_EACH = """
import runpy, sys
*argv, flags = sys.argv[1:]
for flag in flags.split():
    sys.argv = [*argv, flag]
    try:
        runpy.run_path(argv[0], run_name='__main__')
    except ValueError as e:
        print(e)
"""


def test_a_wrong_setting_is_refused_without_asserts(text_set, tmp_path):
    """A check is an assert, which python -O leaves out."""
    argv = 'train.py', *TINY, f'--dataset={text_set}', f'--out_dir={tmp_path / "out"}', '--n_head=3 --batch_size=0'
    done = command('-c', TRY_EACH, *argv, launcher=(*PYTHON, '-O'), env={'PYTHONPATH': str(ROOT)})
    succeeded(done, 'n_head', 'batch_size')
    assert len(done.stdout.splitlines()) == 2 and not (tmp_path / 'out').exists()


def test_accumulation_must_divide_among_processes(text_set, tmp_path):
    """An iteration silently has fewer tokens than asked for."""
    env = {'RANK': '0', 'WORLD_SIZE': '2', 'LOCAL_RANK': '0'}
    done = train(text_set, tmp_path, '--gradient_accumulation_steps=3', env=env)
    refused(done, 'gradient_accumulation_steps=3', '2 processes')
