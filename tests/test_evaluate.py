"""What must stay true: python -m pytest tests/test_evaluate.py"""
import math
import shutil

import numpy as np
import pytest
import torch

from conftest import (
    MODES,
    checkpoint,
    command,
    copy_run,
    refused,
    rewrite,
    run_logs,
    train,
)
from engine.statistics import mean_and_error
from model import GPT

EVALUATE = '--eval_only=True --init_from=resume --device=cpu --dtype=float32 --peak_tflops=1 --sample_interval=0'.split()


@pytest.fixture(scope='module')
def val_losses(text_set, finished):
    """(windows, positions) losses of the finished run on all of val, from its logits, by torch."""
    model, ids = GPT.from_checkpoint(finished[0]), torch.from_numpy(np.fromfile(text_set / 'val.bin', np.uint16).astype(np.int64))
    n = (len(ids) - 1) // 16
    with torch.no_grad():
        logits = model(ids[:n * 16].view(n, 16), all_logits=True)[0].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:n * 16 + 1], reduction='none').view(n, 16).numpy()


@pytest.mark.parametrize('batch_size, backend, launcher', [(1, 'sdpa', 'one'), (3, 'manual', 'one'), (8, 'chunked', 'one'), (None, 'sdpa', 'ddp'), (3, 'chunked', 'fsdp')])
def test_an_evaluation_is_the_same_for_any_batches_ranks_and_backend(finished, val_losses, tmp_path, batch_size, backend, launcher):
    """A last batch that counts as a whole one, windows that two ranks both count, sums in float32 that depend on the order; data or batch of another run."""
    out_dir = copy_run(finished[0], tmp_path / 'eval')
    launcher, more = MODES[launcher]
    more = [*more, f'--attention_backend={backend}'] + [f'--batch_size={batch_size}'] * (batch_size is not None)
    done = command('train.py', *EVALUATE, f'--out_dir={out_dir}', *more, launcher=launcher)
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = run_logs(out_dir)
    (entry,), n = run['eval_steps'], len(val_losses)
    val, by_window = entry['val'], val_losses.mean(1)
    assert run['eval_windows']['n'] == n and entry['tokens'] == 20 * 16 * 2 * (batch_size or 4)
    assert val['loss'] == pytest.approx(val_losses.mean(), abs=1e-5) and val['perplexity'] == pytest.approx(math.exp(val_losses.mean()), rel=1e-5)
    assert val['standard_error'] == pytest.approx(mean_and_error(by_window)[1], abs=1e-5) and val['window_losses'] == pytest.approx(by_window.tolist(), abs=2e-5)
    places = [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    assert [(part['first'], part['last']) for part in val['by_position']] == places
    for part, (first, last) in zip(val['by_position'], places):
        mean, error, _ = mean_and_error(val_losses[:, first:last + 1].mean(1))
        assert part['loss'] == pytest.approx(mean, abs=1e-5) and part['standard_error'] == pytest.approx(error, abs=1e-5)
    assert f"all {n} windows of 16 tokens: loss {val['loss']:.4f}, standard error {val['standard_error']:.4f}, perplexity" in done.stdout
    assert f"position 8-15        loss {val['by_position'][-1]['loss']:.4f}" in done.stdout


def test_an_evaluation_takes_as_many_windows_as_asked(text_set, finished, val_losses, tmp_path):
    """A config file's eval_iters, meant for training, that cut the final evaluation short; one for evaluation that did not count."""
    (tmp_path / 'training.py').write_text('eval_iters = 2\n')
    (tmp_path / 'evaluation.py').write_text('eval_iters = 2\neval_only = True\n')
    cases = [(['--eval_iters=2'], 8), ([tmp_path / 'training.py'], len(val_losses)), ([tmp_path / 'evaluation.py'], 8)]
    for i, (flags, n) in enumerate(cases):
        out_dir = copy_run(finished[0], tmp_path / str(i))
        done = command('train.py', *flags, *EVALUATE[1:], *EVALUATE[:1] * (i < 2), f'--out_dir={out_dir}')
        assert done.returncode == 0 and run_logs(out_dir)[0]['eval_windows']['n'] == n, done.stderr
        assert (f'8 of {len(val_losses)} windows' in done.stdout) == (n == 8)


def test_an_evaluation_reads_nanogpts_and_other_runs_checkpoints(text_set, finished, val_losses, tmp_path):
    """nanoGPT's has fewer keys and neither tokenizer nor our parts; --init_from=FOLDER has a data set of its own, too."""
    ours, names = checkpoint(finished[0]), 'n_layer n_head n_embd block_size bias vocab_size dropout'.split()
    (tmp_path / 'nanogpt').mkdir()
    torch.save(dict(model={'_orig_mod.' + k: v for k, v in ours['model'].items()}, optimizer=ours['optimizer'], model_args={k: ours['model_args'][k] for k in names},
                    iter_num=20, best_val_loss=torch.tensor(4.0), config=dict(dataset=str(text_set), batch_size=5, gradient_accumulation_steps=1)), tmp_path / 'nanogpt/ckpt.pt')
    for out_dir, init_from in (('nanogpt', 'resume'), ('a', tmp_path / 'nanogpt'), ('b', finished[0] / 'ckpt.pt')):
        done = command('train.py', *EVALUATE, f'--out_dir={tmp_path / out_dir}', f'--init_from={init_from}')
        assert done.returncode == 0, done.stderr
        assert run_logs(tmp_path / out_dir)[0]['eval_steps'][0]['val']['loss'] == pytest.approx(val_losses.mean(), abs=1e-5)


def test_an_evaluation_never_prepares_what_a_checkpoint_names(finished, tmp_path):
    """A prepare.py in a folder that a stranger's checkpoint points to would be run."""
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/prepare.py').write_text(f'"""Bad."""\nopen({str(tmp_path / "ran")!r}, "w")\n')
    (tmp_path / 'val').mkdir()
    shutil.copy(tmp_path / 'data/prepare.py', tmp_path / 'val')
    (tmp_path / 'val/val.bin').write_bytes(bytes(2000))
    for i, dataset in enumerate((str(tmp_path / 'data'), str(tmp_path / 'val'), 'nowhere', 7)):
        out_dir = copy_run(finished[0], tmp_path / str(i))
        torch.save(checkpoint(out_dir) | {'config': {'dataset': dataset}}, out_dir / 'ckpt.pt')
        refused(command('train.py', *EVALUATE, f'--out_dir={out_dir}'), out_dir / 'ckpt.pt', repr(dataset), '--dataset=')
    assert not (tmp_path / 'ran').exists()


def test_an_evaluation_needs_no_moments_and_finds_no_best(text_set, tmp_path):
    """A run of Muon's that cannot be evaluated without saying so; (best) for other windows; a damaged ckpt.pt that resumes and is not evaluated."""
    assert train(text_set, tmp_path, '--optimizer=muon', '--save_interval=10').returncode == 0
    done = command('train.py', *EVALUATE, f'--out_dir={tmp_path}', '--eval_iters=1')
    assert done.returncode == 0 and '(best)' not in done.stdout and 'standard error' in done.stdout, done.stderr
    rewrite(tmp_path / 'ckpt.pt', lambda b: b[:20000])
    done = command('train.py', *EVALUATE, f'--out_dir={tmp_path}')
    assert done.returncode == 0 and 'going back' in done.stdout and 'step 10' in done.stdout, done.stderr


def test_the_error_of_a_mixture_is_not_what_its_sets_differ_by():
    """Blocks across the sets of a mixture, whose shares are fixed, take the difference between the sets for chance: 17 times too much here."""
    rng, means, errors = np.random.default_rng(0), [], []
    sets = np.repeat([0, 1], [140, 60])
    for _ in range(400):
        mean, error, df = mean_and_error(np.where(sets, 1.0, 3.0) + 0.2 * rng.normal(size=200), sets)
        means.append(mean)
        errors.append(error)
    assert df == 10 + 6 and np.mean(np.square(errors)) == pytest.approx(np.var(means), rel=0.15)


