"""Evaluation: its losses and errors on fixed windows, and --eval_only."""
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import (
    MODES,
    ROOT,
    checkpoint,
    command,
    copy_run,
    losses,
    one_line,
    refused,
    rewrite,
    run_logs,
    succeeded,
    train,
)
from data.loader import fingerprint
from data.tokenizer import get_tokenizer
from engine.common import UserError
from engine.evaluate import sample_prompt
from engine.statistics import mean_and_error
from model import GPT

EVALUATE = '--init_from=resume --device=cpu --dtype=float32 --peak_tflops=1 --sample_interval=0'.split()


def evaluate(out_dir, *flags, **kwargs):
    """Evaluate the run in out_dir by train.py, with its own data set and batch size."""
    return command('train.py', '--eval_only=True', *EVALUATE, f'--out_dir={out_dir}', *flags, **kwargs)


def val_ids(text_set):
    return torch.from_numpy(np.fromfile(text_set / 'val.bin', np.uint16).astype(np.int64))


@pytest.fixture(scope='module')
def val_losses(text_set, finished):
    """(windows, positions) losses of the finished run on all of val, from its logits, by torch."""
    model, ids = GPT.from_checkpoint(finished[0]), val_ids(text_set)
    n = (len(ids) - 1) // 16
    with torch.no_grad():
        logits = model(ids[:n * 16].view(n, 16), all_logits=True)[0].double()
    targets = ids[1:n * 16 + 1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction='none').view(n, 16).numpy()


@pytest.mark.parametrize('batch_size, backend, mode', [
    (1, 'sdpa', 'one'),
    (3, 'manual', 'one'),
    (8, 'chunked', 'one'),
    (None, 'sdpa', 'ddp'),
    (3, 'chunked', 'fsdp'),
])
def test_an_evaluation_is_the_same_for_any_batches_ranks_and_backend(
        finished, val_losses, tmp_path, batch_size, backend, mode):
    """The last batch counts as a whole one, two ranks count the same window, or float32 sums depend on their order."""
    out_dir = copy_run(finished[0], tmp_path / 'eval')
    processes, flags = MODES[mode]
    flags = [*flags, f'--attention_backend={backend}'] + [f'--batch_size={batch_size}'] * (batch_size is not None)
    done = evaluate(out_dir, *flags, processes=processes)
    succeeded(done)
    (run,), n = run_logs(out_dir), len(val_losses)
    (entry,), by_window = run['eval_steps'], val_losses.mean(1)
    val = entry['val']
    assert run['eval_windows']['n'] == n and entry['tokens'] == 20 * 16 * 2 * (batch_size or 4)
    assert val['loss'] == pytest.approx(val_losses.mean(), abs=1e-5)
    assert val['perplexity'] == pytest.approx(math.exp(val_losses.mean()), rel=1e-5)
    assert val['standard_error'] == pytest.approx(mean_and_error(by_window)[1], abs=1e-5)
    assert val['window_losses'] == pytest.approx(by_window.tolist(), abs=2e-5)  # in the order of the text
    places = [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    assert [(part['first'], part['last']) for part in val['by_position']] == places
    for part, (first, last) in zip(val['by_position'], places):
        mean, error, _ = mean_and_error(val_losses[:, first:last + 1].mean(1))
        assert part['loss'] == pytest.approx(mean, abs=1e-5)
        assert part['standard_error'] == pytest.approx(error, abs=1e-5)
    for words in (f"all {n} windows of 16 tokens: loss {val['loss']:.4f}, standard error {val['standard_error']:.4f}",
                  f"position 8-15        loss {val['by_position'][-1]['loss']:.4f}"):
        assert words in done.stdout


def test_eval_only_takes_no_step_and_reads_every_window_once(text_set, finished, tmp_path):
    """An evaluation saves, trains a step, or records other windows than it reads."""
    out_dir = copy_run(finished[0], tmp_path / 'eval')
    before = (out_dir / 'ckpt.pt').read_bytes()
    done = train(text_set, out_dir, '--init_from=resume', '--eval_only=True', '--eval_iters=100000', '--batch_size=50')
    succeeded(done, 'step 20: train loss')
    assert (out_dir / 'ckpt.pt').read_bytes() == before and losses(out_dir) == {}
    ids = val_ids(text_set)
    n = (len(ids) - 1) // 16
    windows = ids[np.arange(n)[:, None] * 16 + np.arange(17)]
    assert run_logs(out_dir)[0]['eval_windows'] == dict(n=n, tokens_each=16, crc=fingerprint(windows))


@pytest.mark.parametrize('flags, limited', [
    (['--eval_only=True', '--eval_iters=2'], True),
    (['--eval_only=True', 'training.py'], False),
    (['evaluation.py'], True),
])
def test_an_evaluation_takes_as_many_windows_as_asked(finished, val_losses, tmp_path, flags, limited):
    """eval_iters in a config file for training cuts the final evaluation short, or one for evaluation has no effect."""
    (tmp_path / 'training.py').write_text('eval_iters = 2\n')
    (tmp_path / 'evaluation.py').write_text('eval_iters = 2\neval_only = True\n')
    out_dir = copy_run(finished[0], tmp_path / 'out')
    done = command(ROOT / 'train.py', *EVALUATE, f'--out_dir={out_dir}', *flags, cwd=tmp_path)
    succeeded(done)
    assert run_logs(out_dir)[0]['eval_windows']['n'] == (8 if limited else len(val_losses))
    assert (f'8 of {len(val_losses)} windows' in done.stdout) == limited


def test_an_evaluation_reads_nanogpts_and_other_runs_checkpoints(text_set, finished, val_losses, tmp_path):
    """nanoGPT's checkpoint has fewer keys; --init_from=FOLDER comes with a data set of its own."""
    ours = checkpoint(finished[0])
    names = 'n_layer n_head n_embd block_size bias vocab_size dropout'.split()
    nanogpt = dict(
        model={'_orig_mod.' + name: tensor for name, tensor in ours['model'].items()}, optimizer=ours['optimizer'],
        model_args={name: ours['model_args'][name] for name in names}, iter_num=20, best_val_loss=torch.tensor(4.0),
        config=dict(dataset=str(text_set), batch_size=5, gradient_accumulation_steps=1))
    (tmp_path / 'nanogpt').mkdir()
    torch.save(nanogpt, tmp_path / 'nanogpt' / 'ckpt.pt')
    sources = {'nanogpt': 'resume', 'a': tmp_path / 'nanogpt', 'b': finished[0] / 'ckpt.pt'}
    for out_dir, init_from in sources.items():
        succeeded(evaluate(tmp_path / out_dir, f'--init_from={init_from}'))
        entry = run_logs(tmp_path / out_dir)[0]['eval_steps'][0]
        assert entry['val']['loss'] == pytest.approx(val_losses.mean(), abs=1e-5)


def test_an_evaluation_never_prepares_what_a_checkpoint_names(finished, tmp_path):
    """A stranger's checkpoint names a folder, and the prepare.py in it is run."""
    for folder in ('data', 'val'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'prepare.py').write_text(f'"""Bad."""\nopen({str(tmp_path / "ran")!r}, "w")\n')
    (tmp_path / 'val' / 'val.bin').write_bytes(bytes(2000))
    for i, dataset in enumerate((str(tmp_path / 'data'), str(tmp_path / 'val'), 'nowhere', 7)):
        out_dir = copy_run(finished[0], tmp_path / str(i))
        torch.save(checkpoint(out_dir) | {'config': {'dataset': dataset}}, out_dir / 'ckpt.pt')
        refused(evaluate(out_dir), out_dir / 'ckpt.pt', repr(dataset), '--dataset=')
    assert not (tmp_path / 'ran').exists()


def test_an_evaluation_needs_no_moments_and_finds_no_best(text_set, tmp_path):
    """
    A run trained with Muon needs --optimizer=muon to be evaluated, or an evaluation of other windows
    counts as the best.
    """
    succeeded(train(text_set, tmp_path, '--optimizer=muon', '--max_iters=2'))
    done = evaluate(tmp_path, '--eval_iters=1')
    succeeded(done, 'standard error')
    assert '(best)' not in done.stdout


def test_a_damaged_checkpoint_is_evaluated_from_the_one_before(finished, tmp_path):
    """A damaged ckpt.pt can be resumed from ckpt_prev.pt but not evaluated."""
    out_dir = copy_run(finished[0], tmp_path / 'out')
    shutil.copy(finished[0] / 'ckpt_prev.pt', out_dir)
    rewrite(out_dir / 'ckpt.pt', lambda data: data[:20000])
    succeeded(evaluate(out_dir), 'WARNING', 'previous checkpoint', 'step 10')


# samples while training

def val_of(ids):
    """A Split of val whose first window begins with these ids."""
    windows = torch.tensor([ids])
    return SimpleNamespace(loader=SimpleNamespace(
        packed=False, batch=lambda indices: (windows[indices], windows[indices])))


@pytest.mark.parametrize('tokenizer, start, ids', [
    ('byte', None, [10]),
    ('byte', 'de', [100, 101]),
    ('byte', '', [0]),
    ({'name': 'char', 'chars': '\nab'}, None, [0]),
    ({'name': 'char', 'chars': 'abc'}, None, [2]),  # without a line end: from val
    ({'name': 'char', 'chars': 'abc'}, 'ba', [1, 0]),
])
def test_samples_begin_with_a_prompt_of_the_data(tokenizer, start, ids):
    """They began with NUL, which no text has, and the quick start showed one line of 200 '#'."""
    assert sample_prompt(start, get_tokenizer(tokenizer), val_of([2, 1]), 256) == ids


@pytest.mark.parametrize('start, words', [
    ('', ['empty prompt', 'end-of-text']),
    ('abd', ["'d'", 'vocabulary']),
    ('abc', ['token 2', '2 ids']),
])
def test_a_prompt_that_cannot_be_encoded_is_one_line(start, words):
    with pytest.raises(UserError) as error:
        sample_prompt(start, get_tokenizer({'name': 'char', 'chars': 'abc'}), val_of([2, 1]), 2)
    one_line(error.value, *words)


def samples_of(out_dir):
    return {e['iter']: e.get('sample') for run in run_logs(out_dir) for e in run['eval_steps']}


def test_samples_differ_and_are_repeatable(text_set, tmp_path):
    """Every evaluation drew with the same seed, and a new model was sampled before its first step."""
    flags = '--max_iters=4', '--eval_interval=2', '--sample_interval=1', '--weight_decay=0'
    flags = *flags, '--learning_rate=1e-30', '--min_lr=0'  # the weights stay as they are
    for out_dir in ('a', 'b'):
        done = train(text_set, tmp_path / out_dir, *flags, '--sample_start=line 7')
        succeeded(done)
        assert not set(map(chr, [*range(32), 127])) - set('\n\t') & set(done.stdout)
        assert done.stdout.count('\n--- sample') == 2 and '\nline 7' in done.stdout
    samples = samples_of(tmp_path / 'a')
    assert samples == samples_of(tmp_path / 'b') and samples[0] is None
    assert samples[2] != samples[4] and all(samples[i].startswith('line 7') for i in (2, 4))


def test_loaded_weights_are_sampled_at_once(text_set, finished, tmp_path):
    """A pretrained model, unlike a new one, has something to say before the first step."""
    flags = f'--init_from={finished[0]}', '--max_iters=2', '--sample_interval=1'
    succeeded(train(text_set, tmp_path, *flags))
    samples = samples_of(tmp_path)
    assert samples.keys() == {0, 2} and all(sample.startswith('\n') for sample in samples.values())


# errors

def test_the_error_of_a_mixture_is_not_what_its_sets_differ_by():
    """Blocks that reach across the sets of a mixture take the fixed difference between the sets for chance."""
    rng, means, errors = np.random.default_rng(0), [], []
    sets = np.repeat([0, 1], [140, 60])
    for _ in range(400):
        losses_by_set = np.where(sets, 1.0, 3.0) + 0.2 * rng.normal(size=200)
        mean, error, df = mean_and_error(losses_by_set, sets)
        means.append(mean)
        errors.append(error)
    assert df == 10 + 6 and np.mean(np.square(errors)) == pytest.approx(np.var(means), rel=0.15)
