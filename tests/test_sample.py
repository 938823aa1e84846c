"""What must stay true: python -m pytest tests/test_sample.py"""
import math
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, checkpoint, command, copy_run, one_line, refused
from data.loader import write_dataset
from data.tokenizer import get_tokenizer
from model import GPT


def test_samples_are_repeatable_and_start_with_the_prompt(finished, tmp_path):
    """A seed that is ignored, a prompt file that is not read, the samples of a batch all alike."""
    (tmp_path / 'prompt.txt').write_text('line 7 says')
    flags = [f'--out_dir={finished[0]}', '--num_samples=3', '--max_new_tokens=30', '--device=cpu', '--dtype=float32', '--stop=False']
    a = command('sample.py', *flags, '--start=line 7 says')
    assert a.returncode == 0, a.stderr
    assert a.stdout == command('sample.py', *flags, f'--start=FILE:{tmp_path / "prompt.txt"}').stdout
    assert a.stdout != command('sample.py', *flags, '--start=line 7 says', '--seed=2').stdout
    texts = a.stdout.split('---------------\n')
    assert len(set(texts)) == 3 and all(t.startswith('line 7 says') for t in texts)


def test_streamed_text_is_the_generated_text(finished):
    """Characters cut apart or lost between tokens: against generate() and decode()."""
    out = command('sample.py', f'--out_dir={finished[0]}', '--num_samples=1', '--max_new_tokens=60', '--device=cpu', '--dtype=float32', '--stop=False', '--start=über ', text=False).stdout.decode()
    tokenizer, model = get_tokenizer('byte'), GPT.from_checkpoint(finished[0])
    model.config.unpadded_vocab_size = 256
    ids = model.generate(torch.tensor([tokenizer.encode('über ')]), 60, temperature=0.8, top_k=200, seed=1337)[0].tolist()
    assert out == tokenizer.decode(ids) + '\n'


def test_interactive_answers_prompt_after_prompt(finished):
    """One prompt, then the end."""
    done = subprocess.run([sys.executable, 'sample.py', f'--out_dir={finished[0]}', '--interactive=True', '--num_samples=1', '--max_new_tokens=5', '--device=cpu'],
                          cwd=ROOT, input='first\nsecond\n', capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and 'first' in done.stdout and 'second' in done.stdout


SAMPLE = '--device=cpu --dtype=float32 --stop=False --max_new_tokens=50'.split()


@pytest.fixture(scope='module')
def sampler(finished):
    """The functions of sample.py, with the finished run's model loaded."""
    argv, sys.argv = sys.argv, ['sample.py', f'--out_dir={finished[0]}', *SAMPLE, '--num_samples=1']
    try:
        yield runpy.run_path(str(ROOT / 'sample.py'))
    finally:
        sys.argv = argv


def test_metrics_of_words_are_those_counted_by_hand(sampler):
    """n-grams across the end, matches that are not clipped, a brevity penalty by the wrong text."""
    distinct, repetition, bleu = (sampler[name] for name in ('distinct', 'repetition', 'bleu'))
    assert distinct('a b a b c'.split(), 1) == 3 / 5 and distinct('a b a b c'.split(), 2) == 3 / 4  # ab ba ab bc
    assert repetition('a b c d a b c d e'.split()) == pytest.approx(1 / 6)  # abcd bcda cdab dabc abcd bcde
    assert all(map(math.isnan, (distinct([], 1), repetition('a b c'.split()), bleu('a b c'.split(), ['a b c'.split()]), bleu('a b c d'.split(), []))))
    words = 'a b c d e'.split()
    assert bleu(words, [words, ['x']]) == 1
    assert bleu(words, ['a b c d x y'.split()]) == pytest.approx(math.exp(-0.2) * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    clipped = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25
    assert bleu('a a a a'.split(), ['a a b c d e f'.split()]) == pytest.approx(math.exp(1 - 7 / 4) * clipped)
    assert bleu('a a a a'.split(), ['a a b'.split(), 'c c c c c'.split()]) == pytest.approx(clipped)  # as near, and shorter


@pytest.mark.parametrize('n, t', [(4, 3.182), (10, 2.262), (31, 2.042)])
def test_the_interval_of_metrics_is_students(sampler, n, t):
    values = np.random.default_rng(n).standard_normal(n)
    mean, half = map(float, sampler['interval']([*values, math.nan]).split(' +- '))
    assert mean == pytest.approx(values.mean(), abs=5e-4) and half == pytest.approx(t * values.std(ddof=1) / math.sqrt(n), rel=0.01, abs=5e-4)
    assert sampler['interval']([1.0, 2.0]) == '1.500' and sampler['interval']([math.nan]) == '-'


@pytest.mark.parametrize('length, n', [(5, 3), (17, 16), (60, 50)])
def test_perplexity_of_a_sample_is_that_of_its_tokens_one_by_one(sampler, length, n):
    """Tokens of the prompt counted in, the first of each window predicted from nothing."""
    model, ids, losses = sampler['model'], np.random.default_rng(0).integers(0, 256, length).tolist(), []
    for j in range(length - n, length):  # token j from those before it: all, or past 16 of them the window that moves by 8
        first = 0 if j <= 16 else ((j - 1) // 8 - 1) * 8
        losses.append(-model(torch.tensor([ids[first:j]]))[0][0, -1].double().log_softmax(-1)[ids[j]].item())
    assert sampler['perplexity'](ids, n) == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_real_text_beside_samples_is_of_val_and_as_long(sampler, text_set):
    """Text that the model was trained on; the same stretch twice; longer texts, which repeat more."""
    val, lengths = np.fromfile(text_set / 'val.bin', np.uint16).astype(np.uint8).tobytes(), [70, 61, 70, 5]
    texts = [bytes(ids) for ids in sampler['real_texts'](lengths)]
    assert [len(text) for text in texts] == lengths and all(text in val for text in texts) and len({text[:5] for text in texts}) == 4
    assert [bytes(ids) for ids in sampler['real_texts'](lengths)] == texts


def test_metrics_are_those_of_the_samples(finished, sampler):
    """A table of other texts than those above it: against generate() with the same seed."""
    done = command('sample.py', f'--out_dir={finished[0]}', *SAMPLE, '--num_samples=5', '--start=line 7', '--metrics=True')
    assert done.returncode == 0, done.stderr
    table = {line[:14].strip(): (line[14:36].strip(), line[36:58].strip()) for line in done.stdout.split('---------------\n')[-1].splitlines()}
    assert table.pop('') == ('5 samples', '5 of real text')
    prompt = list(b'line 7')
    rows = sampler['model'].generate(torch.tensor([prompt] * 5), 50, temperature=0.8, top_k=200, seed=1337).tolist()
    for column, texts in enumerate((rows, sampler['real_texts']([56] * 5))):
        expected = sampler['measure'](6, texts)
        words = [get_tokenizer('byte').decode([t for t in ids[6:] if t]).split() for ids in texts]
        assert expected['distinct-1'] == [len(set(w)) / len(w) for w in words]
        assert {metric: columns[column] for metric, columns in table.items()} == {metric: sampler['interval'](values) for metric, values in expected.items()}


def test_metrics_without_the_data_set_are_of_samples_alone(finished, tmp_path):
    """A checkpoint that came without its data, or whose data set is now of another tokenizer."""
    write_dataset(tmp_path / 'other', {'train': b'\1' * 500, 'val': b'\1' * 500}, {'vocab_size': 256, 'tokenizer': {'name': 'char', 'chars': 'ab'}})
    for i, (dataset, says) in enumerate({'nowhere': 'not here', str(tmp_path / 'other'): 'another tokenizer'}.items()):
        out_dir = copy_run(finished[0], tmp_path / str(i))
        torch.save(checkpoint(out_dir) | {'config': {'dataset': dataset}}, out_dir / 'ckpt.pt')
        done = command('sample.py', f'--out_dir={out_dir}', *SAMPLE, '--num_samples=2', '--metrics=True')
        assert done.returncode == 0 and says in done.stderr and '2 samples' in done.stdout and 'of real text' not in done.stdout, done.stderr


@pytest.mark.parametrize('prompt, few', [('line $x$ 7 says', True), ('line 7 says 8 ' * 6, False)])
def test_attention_is_drawn_for_each_head(finished, tmp_path, prompt, few):
    """A picture that fails on a dollar sign, which is mathematics to matplotlib, or on a long prompt."""
    image = pytest.importorskip('matplotlib.image')
    out_dir = copy_run(finished[0], tmp_path / 'out')
    ckpt = checkpoint(out_dir)
    ckpt['model_args'].update(block_size=100, position_encoding='none')
    ckpt['model'] = {k: v for k, v in ckpt['model'].items() if 'wpe' not in k}
    torch.save(ckpt, out_dir / 'ckpt.pt')
    done = command('sample.py', f'--out_dir={out_dir}', f'--attention={tmp_path / "map.png"}', f'--start={prompt}')
    assert done.returncode == 0 and f'2 layers x 2 heads over {len(prompt)} tokens' in done.stdout and done.stdout.count('\n') == 1, done.stderr
    pixels = image.imread(tmp_path / 'map.png')[..., :3]
    height, width = pixels.shape[:2]
    size = max(1.2, 0.13 * (len(prompt) + 1) if few else len(prompt) / 60)  # inches a head
    assert (width, height) == (pytest.approx(120 * (2 * size + 2.1), abs=1), pytest.approx(120 * (2 * size + 1.3), abs=1))
    for layer in range(2):
        for head in range(2):
            x, y = 120 * (0.8 + head * size), 120 * (0.5 + layer * size)
            seen, unseen = (pixels[round(y + down * 120 * size), round(x + right * 120 * size)] for down, right in ((0.8, 0.2), (0.2, 0.8)))
            assert unseen.min() == 1 and seen.min() < 0.9  # white above the diagonal, a colour below it


def test_attention_without_matplotlib_is_one_line(finished, tmp_path):
    (tmp_path / 'matplotlib.py').write_text('raise ImportError("not here")')
    refused(command('sample.py', f'--out_dir={finished[0]}', f'--attention={tmp_path / "map.png"}', env={'PYTHONPATH': str(tmp_path)}), 'pip install matplotlib')


@pytest.mark.parametrize('flags, words', [
    (['--attention=map.nonsense', '--start=a'], ['nonsense']), (['--attention=nowhere/map.png', '--start=a'], ['nowhere']), (['--attention=map.png', '--start=' + 'a' * 17], ['block_size']),
    (['--temperature=-1.0'], ['temperature']), (['--top_p=1.5'], ['top_p']), (['--num_samples=0'], ['num_samples']), (['--start=FILE:nowhere.txt'], ['nowhere.txt']),
    (['--out_dir=nowhere'], ['nowhere']), (['--device=cuda'], ['cuda'])])
def test_sampling_mistakes_are_one_line(finished, flags, words):
    """A traceback for a typing mistake."""
    done = command('sample.py', f'--out_dir={finished[0]}', *flags)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    one_line(done.stderr.splitlines()[-1], 'sample.py: ', *words)  # what was loaded may stand before it


