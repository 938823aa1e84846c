"""The start of a run: data sets that are files, folders or not prepared yet; flags without effect."""
import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import compare
from configurator import configure
from conftest import (
    ROOT,
    command,
    ids_of,
    refused,
    run_logs,
    succeeded,
    train,
)
from data.folder import find_datasets, read_meta
from engine import machine
from engine.batch_size import check_accumulation
from engine.checks import check_settings
from engine.common import UserError
from engine.parallel import Parallel
from engine.schedule import epochs_notes, fit_schedule


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_process_without_a_gpu_says_so(text_set, tmp_path):
    """CUDA's 'invalid device ordinal' comes from deep inside."""
    env = {'RANK': '0', 'WORLD_SIZE': '100', 'LOCAL_WORLD_SIZE': '100', 'LOCAL_RANK': '99'}
    done = train(text_set, tmp_path, '--device=auto', env=env)
    refused(done, f'--nproc_per_node={torch.cuda.device_count()}')


def test_a_folder_of_text_is_answered_with_the_command_that_prepares_it(tmp_path, text_file):
    """A data set that is not prepared is 'no such file'."""
    done = train(tmp_path, tmp_path / 'out', '--wandb_artifacts=True')
    refused(done, f'python data/prepare.py --input={tmp_path} --out=NAME')
    assert 'NOTE: --wandb_artifacts' in done.stdout


@pytest.mark.parametrize('init_from, message', [
    ('out-typo', "no checkpoint at 'out-typo', and it is neither a Hugging Face folder"),
    ('notes', "no checkpoint at 'notes/ckpt.pt', and none in the folders here"),
])
def test_missing_weights_are_said_before_the_data_is_prepared(tmp_path, monkeypatch, init_from, message):
    """A misspelt --init_from was noticed after a data set had been prepared for minutes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'notes').mkdir()
    config, given = configure(str(ROOT / 'train.py'), argv=[f'--init_from={init_from}'])
    with pytest.raises(UserError, match=message):
        check_settings(config, given, Parallel())


@pytest.mark.parametrize('steps, batch_size, n, remedy', [
    (1, 16, 2, '--batch_size=8 --gradient_accumulation_steps=2, which keep'),
    (40, 12, 16, '--batch_size=10 --gradient_accumulation_steps=48, which keep'),
    (3, 5, 2, '--gradient_accumulation_steps=4'),
    (1, 'auto', 2, '--gradient_accumulation_steps=2'),
])
def test_accumulation_that_processes_cannot_share(steps, batch_size, n, remedy):
    """The rule is named, but not the flags that keep the tokens per iteration."""
    config = dict(gradient_accumulation_steps=steps, batch_size=batch_size, init_from='scratch')
    with pytest.raises(UserError, match=f'multiple of the {n} processes.* try {remedy}'):
        check_accumulation(config, n)
    check_accumulation(config | dict(gradient_accumulation_steps=2 * n), n)


@pytest.mark.parametrize('flags, named', [
    ([], 'fsdp_min_num_params backend attention_chunk_size muon_momentum cooldown_frac restart_iters min_lr'),
    (['--optimizer=muon', '--lr_schedule=sgdr', '--learning_rate=1', '--attention_backend=chunked'],
     'fsdp_min_num_params backend cooldown_frac learning_rate'),
    (['--optimizer=muon', '--lr_schedule=sgdr', '--learning_rate=1', '--attention_backend=chunked',
      '--muon_learning_rate=1'],
     'fsdp_min_num_params backend cooldown_frac'),
])
def test_flags_that_do_nothing_are_named(tmp_path, flags, named):
    """A flag of another mode, optimizer or schedule has no effect, or not on Muon, and nobody says so."""
    idle = ('--fsdp_min_num_params=5 --backend=gloo --muon_momentum=0.9 --cooldown_frac=0.5 --restart_iters=5 '
            '--min_lr=1 --attention_chunk_size=8').split()
    done = train(tmp_path, tmp_path / 'out', *idle, *flags)
    assert re.findall(r'NOTE: (?:--)?(\w+) ', done.stdout) == named.split()


LONG = dict(max_iters=600, lr_decay_iters=None, warmup_iters=50)


@pytest.mark.parametrize('config, flags, decay, warmup', [
    (LONG, [], 600, 50),
    (LONG | dict(max_iters=100), ['max_iters'], 100, 10),
    (LONG | dict(max_iters=5), ['max_iters'], 5, 0),
    (LONG | dict(max_iters=100, warmup_iters=3), ['max_iters'], 100, 3),
    (LONG | dict(max_iters=700), ['max_iters'], 700, 50),
    (LONG | dict(max_iters=700, warmup_iters=100), ['max_iters'], 700, 100),  # longer, so it keeps its warmup
    (LONG | dict(max_iters=100), ['max_iters', 'warmup_iters'], 100, 50),
    (LONG | dict(max_iters=100, lr_decay_iters=600), ['max_iters', 'warmup_iters'], 100, 50),
    (LONG | dict(max_iters=100, lr_decay_iters=600), ['max_iters', 'lr_decay_iters'], 600, 10),
    (LONG | dict(lr_decay_iters=6000), [], 6000, 50),  # nanoGPT's way to decay beyond the end
    (LONG | dict(lr_decay_iters=300), ['lr_decay_iters'], 300, 50),
])
def test_the_schedule_follows_max_iters_unless_it_is_a_flag_too(config, flags, decay, warmup):
    """--max_iters=100 on a config with warmup 2000 and decay 600000 ended at a twentieth of its learning rate."""
    assert fit_schedule(config, set(flags), 600) == dict(lr_decay_iters=decay, warmup_iters=warmup)


SMALL = '''
dataset = {dataset!r}
n_layer, n_head, n_embd, block_size, batch_size, gradient_accumulation_steps = 1, 1, 16, 16, 4, 2
max_iters, lr_decay_iters, warmup_iters, learning_rate, min_lr = 600, 600, 200, 1e-3, 1e-4
eval_interval, eval_iters, sample_interval, log_interval = 100, 1, 0, 1
device, dtype, compile, peak_tflops = 'cpu', 'float32', False, 1.0
'''


@pytest.mark.parametrize('flag, iters, warmup', [
    ('--max_iters=40', 40, 4),
    ('--epochs=0.3', 29, 2),  # 3,600 tokens in iterations of 128
])
def test_a_run_that_is_shortened_by_a_flag_anneals_and_says_so(text_set, tmp_path, flag, iters, warmup):
    """A short run of a long config never left its warmup; the schedule executed the file again."""
    executed = tmp_path / 'executed'
    text = SMALL.format(dataset=str(text_set)) + f'open({str(executed)!r}, "a").write("once")\n'
    (tmp_path / 'small.py').write_text(text)
    done = command('train.py', tmp_path / 'small.py', f'--out_dir={tmp_path / "out"}', flag)
    succeeded(done, f'NOTE: the learning rate schedule follows max_iters={iters}: lr_decay_iters={iters} instead of '
              f'600, warmup_iters={warmup} instead of 200', '--lr_decay_iters=600 --warmup_iters=200')
    rates = [entry['lr'] for entry in run_logs(tmp_path / 'out')[0]['training_iterations']]
    assert len(rates) == iters and rates[warmup] == 1e-3 and rates[-1] < 1.1e-4
    assert executed.read_text() == 'once'


def test_a_study_gives_its_runs_the_schedule_that_train_py_would(tmp_path):
    """compare.py passes the keys of a file as flags, which would beat the rule; it executed the file twice."""
    executed = tmp_path / 'executed'
    text = SMALL.format(dataset='pystdlib') + f'open({str(executed)!r}, "a").write("once ")\n'
    (tmp_path / 'small.py').write_text(text)

    def schedules(*flags):
        argv = [str(tmp_path / 'small.py'), '--seed=1,2', *flags]
        runs = compare.plan(*compare.settings(argv))
        return {tuple(run.settings[key] for key in ('lr_decay_iters', 'warmup_iters')) for run in runs}
    assert schedules() == schedules('--search=4', '--learning_rate=1e-4..1e-2') == {(600, 200)}
    assert schedules('--max_iters=40,80') == {(40, 4), (80, 8)}
    assert schedules('--max_iters=40', '--lr_decay_iters=600') == {(600, 4)}
    with pytest.raises(UserError, match='--max_iters, not after --epochs'):
        schedules('--epochs=2')
    assert executed.read_text() == 5 * 'once '


def test_many_epochs_are_a_note():
    """A config for billions of tokens trained 25,468 epochs of a small text without a word."""
    few, many = SimpleNamespace(n_tokens=1000), SimpleNamespace(n_tokens=10)
    mixture = SimpleNamespace(loaders=[few, many])
    assert epochs_notes([('few', 1.0, '')], few, 20000) == []
    note, = epochs_notes([('few', 0.9, ''), ('many', 0.1, '')], mixture, 5000)
    assert "10 tokens of 'many' 50 times" in note


def test_a_large_download_is_never_started_unasked(tmp_path):
    """A first run fills somebody's disk."""
    (tmp_path / 'prepare.py').write_text('"""Big."""\ndownload_mb = 54000\nopen("started", "w")\n')
    refused(train(tmp_path, tmp_path / 'out'), '54 GB', 'prepare.py', '--dataset=pystdlib')
    assert not (tmp_path / 'started').exists() and not (ROOT / 'started').exists()


PREPARE = '''"""A small set of numbers."""
download_mb = 0
import sys
sys.path.insert(0, {root!r})
from data.folder import write_dataset
splits = {{'train': bytes(range(200)), 'val': bytes(range(100))}}
write_dataset({folder!r}, splits, {{'vocab_size': 256, 'tokenizer': {{'name': 'byte'}}}})
'''


@pytest.fixture
def recipe():
    """A folder in data/ with a prepare.py that has not been run."""
    cache = ROOT / 'data' / '.cache'
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        (Path(folder) / 'prepare.py').write_text(PREPARE.format(root=str(ROOT), folder=folder))
        yield Path(folder)


def test_a_missing_data_set_prepares_itself(recipe, tmp_path):
    """'No such file' where a prepare.py lies in the same folder."""
    done = train(f'.cache/{recipe.name}', tmp_path / 'out', '--max_iters=1')
    succeeded(done, 'A small set of numbers', 'no download')


@pytest.mark.parametrize('way', ['flag', 'config', 'dots'])
def test_a_prepare_script_from_elsewhere_is_never_run(tmp_path, way):
    """--dataset=/any/folder ran whatever lay there, and so did a config that names it."""
    folder = tmp_path / 'a set'
    folder.mkdir()
    (folder / 'prepare.py').write_text(PREPARE.format(root=str(ROOT), folder=str(folder)))
    name = f'../../../../../../..{folder}' if way == 'dots' else str(folder)
    (tmp_path / 'config.py').write_text(f'dataset = {name!r}\n')
    flags = [str(tmp_path / 'config.py')] if way == 'config' else [f'--dataset={name}']
    done = command('train.py', *flags, f'--out_dir={tmp_path / "out"}', '--device=cpu')
    refused(done, 'to run this one: python', shlex.quote(os.path.relpath(folder / 'prepare.py', ROOT)))
    assert [path.name for path in folder.iterdir()] == ['prepare.py']


def test_a_file_of_text_is_a_data_set(tmp_path):
    """Preparing a book is the first lesson; or it is prepared again for every run, or not again when it has changed."""
    book, out_dir, caches = tmp_path / 'my book.txt', tmp_path / 'out', []
    book.write_bytes(''.join(f'line {i} says {i * i % 97}\n' for i in range(900)).encode())

    def run():
        done = train('my book.txt', out_dir, '--overwrite=True', '--max_iters=2', cwd=tmp_path)
        succeeded(done)
        caches.append(find_datasets(str(book))[0][2])
        return 'with tokenizer byte; another choice: python data/prepare.py' in done.stdout
    try:
        assert run() and not run()
        book.write_bytes(book.read_bytes() + 'the end ☺\n'.encode() * 9)
        assert run()
        assert caches[0] == caches[1] != caches[2] and read_meta(caches[2])['tokenizer'] == {'name': 'byte'}
        text = ids_of(caches[2], 'train')[:-1] + ids_of(caches[2], 'val')[:-1]  # without the ends of text
        assert bytes(text) == book.read_bytes()
        succeeded(command('sample.py', f'--out_dir={out_dir}', '--num_samples=1', '--max_new_tokens=5'))
    finally:
        for folder in caches:
            shutil.rmtree(folder, ignore_errors=True)


def test_an_empty_file_of_text_is_refused(tmp_path):
    """A traceback for an empty file."""
    (tmp_path / 'empty.txt').touch()
    refused(train(tmp_path / 'empty.txt', tmp_path / 'out'), 'data/prepare.py', tmp_path / 'empty.txt', 'is empty')


@pytest.mark.parametrize('flops, size', [(1e12, 2048), (1e9, 512), (1e6, 64), (1e3, 64)])
def test_a_slow_machine_measures_its_peak_with_a_smaller_matmul(monkeypatch, flops, size):
    """A CPU without float16 units spends minutes on one matmul."""
    monkeypatch.setattr(machine, 'matmul_time', lambda n, *_: 2 * n ** 3 / flops)
    measured, source = machine.peak_flops(torch.device('cpu'), 'float16')
    assert measured == pytest.approx(flops) and f' {size} x {size} ' in source


@pytest.mark.parametrize('device, words', [
    ('gpu', "device 'gpu' is none of cuda, mps and cpu; --device=auto"),
    ('cuda:99', "device 'cuda:99' is not available here: .*; --device=auto"),
])
def test_a_device_that_cannot_be_used(device, words):
    """A misspelt device was 'not available here', like a GPU that is missing."""
    with pytest.raises(UserError, match=words):
        machine.pick_device(device)


def test_a_low_peak_is_not_shown_as_zero(text_set, tmp_path):
    """The peak of a slow machine is shown as 0.00 TFLOP/s."""
    done = train(text_set, tmp_path, '--max_iters=1', '--peak_tflops=0.0003', '--verbose=True')
    succeeded(done, ' 0.0003 TFLOP/s per device')
