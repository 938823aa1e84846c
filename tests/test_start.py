"""What must stay true: python -m pytest tests/test_start.py"""
import re
import shutil
import sys

import pytest
import torch

from conftest import ROOT, command, ids_of, losses, one_line, refused, train
from data.loader import find_datasets, read_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_process_without_a_gpu_says_so(text_set, tmp_path):
    """CUDA's 'invalid device ordinal' from deep inside."""
    done = train(text_set, tmp_path, '--device=auto', env={'RANK': '0', 'WORLD_SIZE': '2', 'LOCAL_RANK': '99'})
    assert done.returncode == 2
    one_line(done.stderr, 'local rank 99', f'--nproc_per_node={torch.cuda.device_count()}')


def test_a_folder_of_text_is_answered_with_the_command_that_prepares_it(tmp_path, text_file):
    done = train(tmp_path, tmp_path / 'out', '--wandb_artifacts=True')
    refused(done, f'python data/prepare.py --input={tmp_path} --out=NAME')
    assert 'NOTE: --wandb_artifacts=True does nothing' in done.stdout


def test_flags_that_do_nothing_are_named(tmp_path):
    flags = '--fsdp_min_num_params=5', '--backend=gloo', '--muon_momentum=0.9', '--cooldown_frac=0.5', '--restart_iters=5', '--min_lr=1'
    notes = lambda *more: re.findall(r'NOTE: (?:--)?(\w+) ', train(tmp_path, tmp_path / 'out', *flags, *more).stdout)
    assert notes() == ['fsdp_min_num_params', 'backend', 'muon_momentum', 'cooldown_frac', 'restart_iters', 'min_lr']
    assert notes('--optimizer=muon', '--lr_schedule=sgdr', '--learning_rate=1') == ['fsdp_min_num_params', 'backend', 'cooldown_frac']


def test_a_large_download_is_never_started_unasked(tmp_path):
    """A first run that fills somebody's disk."""
    (tmp_path / 'prepare.py').write_text('"""Big."""\ndownload_mb = 54000\nopen("started", "w")\n')
    done = train(tmp_path, tmp_path / 'out')
    assert done.returncode == 2 and '54,000 MB' in done.stderr and 'prepare.py' in done.stderr and not (tmp_path / 'started').exists()


def test_a_missing_data_set_prepares_itself(tmp_path):
    """'No such file' where a prepare.py lies beside."""
    (tmp_path / 'prepare.py').write_text('"""A small set of numbers."""\ndownload_mb = 0\nimport sys\nsys.path.insert(0, %r)\nfrom data.loader import write_dataset\n'
                                         'write_dataset(%r, {"train": bytes(range(200)), "val": bytes(range(100))}, {"vocab_size": 256, "tokenizer": {"name": "byte"}})\n' % (str(ROOT), str(tmp_path)))
    done = train(tmp_path, tmp_path / 'out', '--max_iters=1')
    assert done.returncode == 0 and 'A small set of numbers' in done.stdout and 'no download' in done.stdout


def test_a_file_of_text_is_a_data_set(finished, tmp_path):
    """Preparing a book should not be the first lesson; once is enough, until the book changes."""
    book = tmp_path / 'my book.txt'
    book.write_bytes(''.join(f'line {i} says {i * i % 97}\n' for i in range(900)).encode())
    caches = []
    try:
        for n, prepared in enumerate((True, False, True)):
            if n == 2:
                book.write_bytes(book.read_bytes() + 'the end ☺\n'.encode() * 9)
            done = train('my book.txt', tmp_path / 'out', '--overwrite=True', '--max_iters=2', cwd=tmp_path, launcher=(sys.executable, '-c', INSIDE))
            assert done.returncode == 0, done.stderr
            assert ('with tokenizer byte; another choice: python data/prepare.py' in done.stdout) == prepared
            caches.append(find_datasets(str(book))[0][2])
        assert caches[0] == caches[1] != caches[2] and read_meta(caches[2])['tokenizer'] == {'name': 'byte'}
        assert bytes(ids_of(caches[2], 'train')[:-1] + ids_of(caches[2], 'val')[:-1]) == book.read_bytes()
        assert command('sample.py', f'--out_dir={tmp_path / "out"}', '--num_samples=1', '--max_new_tokens=5').returncode == 0
        book.write_bytes(b'')
        refused(train(book, tmp_path / 'other'), 'data/prepare.py', book, 'is empty')
    finally:
        for folder in caches:
            shutil.rmtree(folder, ignore_errors=True)


# train.py from another working directory
INSIDE = f"import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"


def test_the_readme_example_runs_as_printed(tmp_path):
    """Documentation that nobody has run since."""
    readme = (ROOT / 'README.md').read_text()
    part = readme.split('```python\n')[1].split('```')[0]
    line = next(line for line in readme.splitlines() if '--ffn_type=maxout' in line and line.startswith('python train.py'))
    ignore = shutil.ignore_patterns('.git', '.venv', 'out*', '__pycache__', 'wandb')
    shutil.copytree(ROOT, tmp_path / 'copy', ignore=ignore)
    source = (tmp_path / 'copy' / 'model.py').read_text()
    at = source.index('\n\n# ' + '-' * 100, source.index('class SwiGLU'))
    (tmp_path / 'copy' / 'model.py').write_text(source[:at] + '\n\n' + part + source[at:])
    done = command(*line.split()[1:], '--out_dir=out', cwd=tmp_path / 'copy')
    assert done.returncode == 0, done.stderr
    first, *_, last = losses(tmp_path / 'copy' / 'out').values()
    assert 'maxout' in done.stdout and last < first - 1
