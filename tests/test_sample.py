"""Text out of a trained model: python -m pytest tests/test_sample.py"""
import codecs
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT, checkpoint, command, copy_run, missing, one_line, refused
from data.chat import CHATML, with_separator
from data.folder import write_dataset
from data.tokenizer import get_tokenizer
from engine.beam import beam_search
from engine.checkpoint import load_checkpoint
from engine.continuation import Continuation
from engine.text_metrics import (
    bleu,
    distinct,
    interval,
    measure,
    perplexity,
    real_texts,
    repetition,
)
from model import GPT, GPTConfig, penalize_repetition, sample_token
from tests.warm import HANGS

SAMPLE = '--device=cpu --dtype=float32 --stop=False --max_new_tokens=50'.split()


@pytest.fixture(scope='module')
def trained(finished):
    """The finished run's checkpoint, its model as sample.py loads it, and its tokenizer."""
    ckpt = load_checkpoint(str(finished[0]))
    model = GPT.from_dict(ckpt)
    model.config.unpadded_vocab_size = 256
    return SimpleNamespace(ckpt=ckpt, model=model, tokenizer=get_tokenizer('byte'))


def test_samples_are_repeatable_and_start_with_the_prompt(finished, tmp_path):
    """A seed that is ignored, a prompt file that is not read, the samples of a batch all alike."""
    (tmp_path / 'prompt.txt').write_text('line 7 says')

    def sample(*flags):
        done = command('sample.py', f'--out_dir={finished[0]}', *SAMPLE, '--num_samples=3', *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout
    a = sample('--start=line 7 says')
    assert a == sample(f'--start=FILE:{tmp_path / "prompt.txt"}')
    assert a != sample('--start=line 7 says', '--seed=2')
    texts = a.split('---------------\n')
    assert len(set(texts)) == 3 and all(text.startswith('line 7 says') for text in texts)


def test_compile_is_for_one_sample_and_needs_a_compiler(finished, tmp_path):
    """A batch that is compiled again and again, or a traceback of the compiler's."""
    env = {'CXX': str(tmp_path / 'no-such-compiler'), 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache'),
           'PATH': str(tmp_path)}

    def sample(*flags):
        return command('sample.py', f'--out_dir={finished[0]}', *SAMPLE, *flags, env=env)
    several = sample('--num_samples=2', '--compile=True')
    assert several.stdout == sample('--num_samples=2').stdout and 'compile=True is ignored' in several.stderr
    one = sample('--num_samples=1', '--compile=True')
    note, error = one.stderr.splitlines()
    assert one.returncode == 2 and not one.stdout and note.startswith('compiling')
    one_line(error, 'torch.compile failed', 'leave out --compile')


def test_streamed_text_is_the_generated_text(finished, trained):
    """Characters cut apart or lost between tokens: against generate() and decode()."""
    done = command('sample.py', f'--out_dir={finished[0]}', *SAMPLE, '--num_samples=1', '--start=über ', '--raw=True',
                   text=False)
    prompt = torch.tensor([trained.tokenizer.encode('über ')])
    ids = trained.model.generate(prompt, 50, temperature=0.8, top_k=200, seed=1337)[0].tolist()
    assert done.stdout.decode() == trained.tokenizer.decode(ids) + '\n'


def test_each_line_of_a_prompt_file_is_continued_as_it_is_alone(finished, trained, tmp_path):
    """There was no way to continue several prompts; a blank line must not be one, nor padding be seen."""
    prompts = ['line 7 says', 'x', 'über allen Gipfeln ist Ruh']  # the last exceeds block_size
    (tmp_path / 'prompts.txt').write_text('\n\n'.join(prompts) + '\n', encoding='utf-8')
    done = command('sample.py', f'--out_dir={finished[0]}', *SAMPLE, f'--prompts={tmp_path / "prompts.txt"}',
                   '--temperature=0', '--num_samples=2', '--raw=True', text=False)
    assert done.returncode == 0, done.stderr
    texts = []
    for prompt in prompts:
        ids = torch.tensor([trained.tokenizer.encode(prompt)])
        text = trained.tokenizer.decode(trained.model.generate(ids, 50, temperature=0)[0].tolist())
        texts += [text.rstrip('\ufffd')] * 2  # a character that is cut off at the end is left out
    assert [text.rstrip('\ufffd\n') for text in done.stdout.decode().split('---------------\n')] == texts


@pytest.fixture(scope='module')
def nameless(tmp_path_factory):
    """A checkpoint as nanoGPT writes it, of 65 ids, beside a data set that has their characters."""
    folder = tmp_path_factory.mktemp('nameless')
    sizes = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, bias=False, vocab_size=65, dropout=0.0)
    torch.save({'model': GPT(GPTConfig(**sizes)).state_dict(), 'model_args': sizes}, folder / 'ckpt.pt')
    chars = ''.join(map(chr, range(58, 123)))
    meta = {'vocab_size': 65, 'tokenizer': {'name': 'char', 'chars': chars}}
    write_dataset(folder / 'chars', {'train': bytes(65), 'val': bytes(65)}, meta)
    return folder


def test_an_unknown_tokenizer_shows_ids(nameless):
    """It was taken as GPT-2's: plausible nonsense out of a model of 65 ids. A data set's folder names the right one."""
    flags = [f'--out_dir={nameless}', *SAMPLE, '--num_samples=1']
    as_ids = command('sample.py', *flags, '--start=7 8')
    assert as_ids.returncode == 0 and '--tokenizer' in as_ids.stderr, as_ids.stderr
    ids = list(map(int, as_ids.stdout.split()))
    assert len(ids) == 52 and ids[:2] == [7, 8] and max(ids) < 65
    as_text = command('sample.py', *flags, '--start=AB', f'--tokenizer={nameless}/chars')
    assert as_text.stdout == ''.join(chr(58 + i) for i in ids) + '\n', as_text.stderr
    assert command('sample.py', *flags).returncode == 0, 'without a prompt'


@pytest.mark.parametrize('flag, words', [
    ('--start=!', ["'!'", '0..64', '--tokenizer']),
    ('--start=65', ["'65'", '0..64']),
    ('--start=' + '9' * 5000, ['0..64']),
    ('--tokenizer=char', ["'chars'", 'folder']),
    ('--tokenizer=nowhere.json', ['nowhere.json', 'no such file']),
    ('--tokenizer=tests', ['tests', 'tokenizer.json', 'meta.json']),
])
def test_mistakes_with_an_unknown_tokenizer_are_one_line(nameless, flag, words):
    """Text cannot become ids without a tokenizer; nor can a long number become an int."""
    done = command('sample.py', f'--out_dir={nameless}', *SAMPLE, flag)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    one_line(done.stderr.splitlines()[-1], 'sample.py: ', *words)


@pytest.mark.parametrize('slide, says', [(1, 'parameters'), (17, 'slide=17')])
def test_interactive_answers_prompt_after_prompt(finished, slide, says):
    """One prompt, then the end; or the end at the first mistake; or ten answers to one prompt."""
    flags = [f'--out_dir={finished[0]}', '--max_new_tokens=5', '--device=cpu', f'--slide={slide}']
    done = subprocess.run([sys.executable, 'sample.py', '--interactive=True', *flags], cwd=ROOT,
                          input='first\nsecond\n', capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0 and done.stdout.count('> ') == 3, done.stderr
    assert done.stderr.count(says) == (1 if slide == 1 else 2) and '-----' not in done.stdout
    assert ('first' in done.stdout and 'second' in done.stdout) == (slide == 1)


def test_a_reader_that_has_had_enough_is_no_error(finished):
    """`sample.py | head -1` printed a traceback."""
    sample = f'{sys.executable} sample.py --out_dir={finished[0]} --device=cpu --max_new_tokens=100'
    done = subprocess.run(['bash', '-c', f'set -o pipefail; {sample} --num_samples=500 | true'], cwd=ROOT,
                          capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    one_line(done.stderr, 'parameters')


@pytest.mark.parametrize('raw, shown', [(False, r'\x1b[2J'), (True, '\x1b[2J')])
def test_a_terminals_escapes_are_shown_and_not_sent(finished, raw, shown):
    """A sample, or the prompt before it, that clears the screen or renames the window."""
    flags = '--num_samples=2', '--start=\x1b[2J', f'--raw={raw}'
    done = command('sample.py', f'--out_dir={finished[0]}', *SAMPLE, *flags)
    assert done.returncode == 0 and done.stdout.startswith(shown), done.stderr
    control = set(map(chr, range(32))) - set('\n\t')
    assert bool(control & set(done.stdout)) == raw


@pytest.mark.parametrize('flags, library', [
    (['--num_samples=2'], 'torch'),
    (['--metrics=True'], 'scipy'),
    (['--attention={out_dir}/map.png'], 'matplotlib'),
    (['--start={esc}' + 'a' * 17, '--attention={out_dir}/map.png'], 'matplotlib'),
    (['--tokenizer={out_dir}/nothing.json'], 'torch'),
], ids=str)
def test_no_output_sends_a_terminals_escapes(finished, tmp_path, flags, library):
    """A folder, a data set or a prompt with ESC in it, in what is printed beside the samples."""
    pytest.importorskip(library)
    out_dir, esc = copy_run(finished[0], tmp_path / 'a\x1b[2Jb'), '\x1b]0;title\x07'
    torch.save(checkpoint(out_dir) | {'config': {'dataset': f'no{esc}where'}}, out_dir / 'ckpt.pt')
    flags = [flag.format(out_dir=out_dir, esc=esc) for flag in flags]
    done = command('sample.py', f'--out_dir={out_dir}', *SAMPLE, f'--start={esc}', *flags)
    control = set(map(chr, [*range(32), *range(127, 160)])) - set('\n\t')
    assert r'\x1b' in done.stdout + done.stderr and not control & set(done.stdout + done.stderr)


# beams, penalties, stop strings, JSON, chat

@pytest.fixture(scope='module')
def beside_transformers(tmp_path_factory):
    """(our model, the same one in transformers), with random weights that are large enough to be decided."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=50, activation='gelu_tanh')
    model = GPT(GPTConfig(**sizes)).eval()
    for p in model.parameters():
        p.data.mul_(8 if p.dim() > 1 else 1)
    folder = tmp_path_factory.mktemp('beams')
    model.save_pretrained(folder)
    return model, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize('num_beams', [2, 5])
@pytest.mark.parametrize('length_penalty', [-1.0, 0.0, 1.0, 2.0])
def test_beams_are_those_of_transformers(beside_transformers, num_beams, length_penalty):
    """A beam that ends too early or too late, hypotheses in another order, a score without its length."""
    model, theirs = beside_transformers
    for seed in range(6):
        prompt = torch.randint(50, (1, 1 + seed), generator=torch.Generator().manual_seed(seed))
        expected = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), num_beams=num_beams, num_return_sequences=num_beams,
            length_penalty=length_penalty, max_new_tokens=20, do_sample=False, eos_token_id=seed, pad_token_id=49,
            return_dict_in_generate=True, output_scores=True)
        found = beam_search(model, prompt[0].tolist(), 20, num_beams, length_penalty, {seed})
        assert len(found) == num_beams
        for (score, ids), row, value in zip(found, expected.sequences.tolist(), expected.sequences_scores.tolist()):
            assert row[1 + seed:][:len(ids)] == ids and set(row[1 + seed + len(ids):]) <= {49}
            assert score == pytest.approx(value, rel=1e-5)


def test_one_beam_is_greedy(trained):
    ids = trained.tokenizer.encode('line 7')
    [(_, found)] = beam_search(trained.model, ids, 10, 1)
    assert found == trained.model.generate(torch.tensor([ids]), 10, temperature=0)[0, 6:].tolist()


def test_min_p_and_the_penalty_are_those_of_transformers():
    """A penalty that makes negative logits likelier, or a threshold on the sum instead of the likeliest token."""
    process = pytest.importorskip('transformers').generation.logits_process
    logits, seen = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)), torch.arange(30).view(3, 10)
    penalized = penalize_repetition(logits, seen, 1.3)
    assert torch.equal(penalized, process.RepetitionPenaltyLogitsProcessor(1.3)(seen, logits.clone()))
    kept = process.MinPLogitsWarper(0.3)(seen, logits.clone()).isfinite()
    drawn = torch.stack([sample_token(logits, min_p=0.3, generator=torch.Generator().manual_seed(i))
                         for i in range(300)])
    assert [set(drawn[:, row].tolist()) for row in range(3)] == [set(row.nonzero()[:, 0].tolist()) for row in kept]


def test_padding_is_not_penalized(trained):
    """The ids of the padding counted as tokens of a shorter prompt."""
    prompts, options = [[9, 8, 7, 6], [0, 0, 5, 4]], dict(temperature=0, repetition_penalty=1e6)
    together = trained.model.generate(torch.tensor(prompts), 8, left_padding=torch.tensor([0, 2]), **options)
    assert together[1, 4:].tolist() == trained.model.generate(torch.tensor([[5, 4]]), 8, **options)[0, 2:].tolist()


@pytest.mark.parametrize('tokens, stops, pieces, finish', [
    ('abc', [], ['a', 'b', 'c'], None),
    ('abcd', [], ['a', 'b', 'c', 'd'], 'length'),
    ('abcd', [''], ['a', 'b', 'c', 'd'], 'length'),
    ('abcdef', ['cd'], ['a', 'b', '', ''], 'stop'),
    ('abca', ['cd'], ['a', 'b', '', 'ca'], 'length'),
    ('aab', ['ab'], ['', 'a', ''], 'stop'),
    ('ab\0d', ['bc'], ['a', '', 'b'], 'stop'),
    ('abab', ['b', 'ab'], ['', ''], 'stop'),
    ('éa', ['x'], ['', 'é', 'a'], None),
], ids=str)
def test_text_ends_before_a_stop_string(tokens, stops, pieces, finish):
    """A piece that shows the beginning of a stop string, or keeps back what was none."""
    sample = Continuation(get_tokenizer('byte'), 4, ends={0}, stop_strings=stops)
    assert [sample.push(token) for token in tokens.encode()][:len(pieces)] == pieces
    assert sample.finish == finish and sample.text == ''.join(pieces)


@pytest.mark.parametrize('said, text', [('ab<|', 'ab'), ('a<|b', 'a<|b'), ('a<|>', 'a')])
def test_a_reply_that_is_cut_does_not_show_half_an_end_of_turn(said, text):
    """'None<|im_end' on the screen and in the history of a chat."""
    sample = Continuation(get_tokenizer('byte'), 4, end_of_turn='<|>')
    assert ''.join(map(sample.push, said.encode())) == sample.text == text


def test_json_is_one_line_per_sample(finished, trained, tmp_path):
    """Text that a program has to cut apart, without the reason why it ends."""
    (tmp_path / 'prompts.txt').write_text('line 7 says\nx\n')
    flags = [f'--out_dir={finished[0]}', *SAMPLE, f'--prompts={tmp_path / "prompts.txt"}', '--max_new_tokens=5']
    done = command('sample.py', *flags, '--json=True', '--temperature=0')
    samples = [json.loads(line) for line in done.stdout.splitlines()]
    assert [sample['prompt'] for sample in samples] == ['line 7 says', 'x'], done.stderr
    for sample in samples:
        ids = torch.tensor([trained.tokenizer.encode(sample['prompt'])])
        new = trained.model.generate(ids, 5, temperature=0)[0, ids.size(1):].tolist()
        assert sample['tokens'] == 5 and sample['finish_reason'] == 'length'
        whole = codecs.getincrementaldecoder('utf-8')('replace').decode(bytes(new))
        assert sample['text'] == whole  # without a character that is cut off at the end
    done = command('sample.py', *flags, '--json=True', '--num_beams=3', '--num_samples=2')
    scores = [json.loads(line)['score'] for line in done.stdout.splitlines()]
    assert len(scores) == 4 and scores[0] >= scores[1] and scores[2] >= scores[3], done.stderr


@pytest.fixture(scope='module')
def talker(tmp_path_factory):
    """A checkpoint with a chat template."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=150, vocab_size=256, bias=False))
    out_dir, tokenizer = tmp_path_factory.mktemp('talker'), get_tokenizer('byte')
    torch.save({'model': model.state_dict(), 'model_args': vars(model.config), 'tokenizer': tokenizer.spec,
                'chat_template': with_separator(CHATML, tokenizer)[0]}, out_dir / 'ckpt.pt')
    return out_dir


def test_a_chat_goes_on_past_block_size(talker):
    """A long history ended the chat or vanished without a word; a message that is too long cost the history."""
    messages = ['a' * 30, 'b' * 200, 'c' * 30, 'd' * 30]
    flags = [f'--out_dir={talker}', '--chat=True', '--device=cpu', '--max_new_tokens=3']
    done = subprocess.run([sys.executable, 'sample.py', *flags], cwd=ROOT, input='\n'.join(messages) + '\n',
                          capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0 and done.stdout.count('> ') == 5, done.stderr
    assert done.stderr.count('shorten it') == 1 and 'no room for a reply in block_size=150' in done.stderr
    assert done.stderr.count('no longer sees the oldest turns') == 2  # neither at first nor at the long message


# metrics

def test_metrics_of_words_are_those_counted_by_hand():
    """n-grams across the end, matches that are not clipped, a brevity penalty by the wrong text."""
    assert distinct('a b a b c'.split(), 1) == 3 / 5
    assert distinct('a b a b c'.split(), 2) == 3 / 4  # ab ba ab bc
    assert repetition('a b c d a b c d e'.split()) == pytest.approx(1 / 6)  # abcd bcda cdab dabc abcd bcde
    three, four, five = 'a b c'.split(), 'a b c d'.split(), 'a b c d e'.split()
    assert all(map(math.isnan, (distinct([], 1), repetition(three), bleu(three, [three]), bleu(four, []))))
    assert bleu(five, [five, ['x']]) == 1
    precision = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert bleu(five, ['a b c d x y'.split()]) == pytest.approx(math.exp(-0.2) * precision)
    same = 'a a a a'.split()
    clipped = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25
    assert bleu(same, ['a a b c d e f'.split()]) == pytest.approx(math.exp(1 - 7 / 4) * clipped)
    assert bleu(same, ['a a b'.split(), 'c c c c c'.split()]) == pytest.approx(clipped)  # as near, and shorter


@pytest.mark.parametrize('n, t', [(4, 3.182446), (10, 2.262157), (31, 2.042272)])
def test_the_interval_of_metrics_is_students(n, t):
    pytest.importorskip('scipy')
    values = np.random.default_rng(n).standard_normal(n)
    mean, half = map(float, interval([*values, math.nan]).split(' +- '))
    assert mean == pytest.approx(values.mean(), abs=5e-4)
    assert half == pytest.approx(t * values.std(ddof=1) / math.sqrt(n), abs=6e-4)
    assert interval([1.0, 2.0]) == '1.500' and interval([math.nan]) == '-'


@pytest.mark.parametrize('length, n', [(5, 3), (17, 16), (60, 50)])
def test_perplexity_of_a_sample_is_that_of_its_tokens_one_by_one(trained, length, n):
    """Tokens of the prompt counted in, the first of each window predicted from nothing."""
    ids, losses = np.random.default_rng(0).integers(0, 256, length).tolist(), []
    for j in range(length - n, length):
        # token j from those before it: all of them, or past 16 those in the window that moves by 8
        first = 0 if j <= 16 else ((j - 1) // 8 - 1) * 8
        log_probs = trained.model(torch.tensor([ids[first:j]]))[0][0, -1].double().log_softmax(-1)
        losses.append(-log_probs[ids[j]].item())
    assert perplexity(trained.model, ids, n) == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def texts_of_val(trained, lengths):
    return real_texts(trained.ckpt, trained.model, trained.tokenizer, lengths, seed=1337)


def test_real_text_beside_samples_is_of_val_and_as_long(trained, text_set):
    """Text that the model was trained on; the same stretch twice; longer texts, which repeat more."""
    val = np.fromfile(text_set / 'val.bin', np.uint16).astype(np.uint8).tobytes()
    lengths = [70, 61, 70, 5]
    texts = [bytes(ids) for ids in texts_of_val(trained, lengths)]
    assert [len(text) for text in texts] == lengths and all(text in val for text in texts)
    assert len({text[:5] for text in texts}) == 4
    assert [bytes(ids) for ids in texts_of_val(trained, lengths)] == texts


def test_metrics_are_those_of_the_samples(finished, trained):
    """A table of other texts than those above it: against generate() with the same seed."""
    pytest.importorskip('scipy')
    flags = [f'--out_dir={finished[0]}', *SAMPLE, '--num_samples=5', '--start=line 7', '--metrics=True']
    done = command('sample.py', *flags)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split('---------------\n')[-1].splitlines()
    table = {line[:14].strip(): (line[14:36].strip(), line[36:58].strip()) for line in lines}
    assert table.pop('') == ('5 samples', '5 of real text')
    prompt = list(b'line 7')
    rows = trained.model.generate(torch.tensor([prompt] * 5), 50, temperature=0.8, top_k=200, seed=1337).tolist()
    for column, texts in enumerate((rows, texts_of_val(trained, [56] * 5))):
        expected = measure(trained.model, trained.tokenizer, texts, len(prompt))
        words = [trained.tokenizer.decode([t for t in ids[6:] if t]).split() for ids in texts]
        assert expected['distinct-1'] == [len(set(w)) / len(w) for w in words]
        assert table.keys() == expected.keys()
        for metric, columns in table.items():
            assert columns[column] == interval(expected[metric])


@pytest.mark.parametrize('which, says', [('nowhere', 'not here'), ('other', 'another tokenizer')])
def test_metrics_without_the_data_set_are_of_samples_alone(finished, tmp_path, which, says):
    """A checkpoint that came without its data, or whose data set now has another tokenizer."""
    pytest.importorskip('scipy')
    meta = {'vocab_size': 256, 'tokenizer': {'name': 'char', 'chars': 'ab'}}
    write_dataset(tmp_path / 'other', {'train': b'\1' * 500, 'val': b'\1' * 500}, meta)
    out_dir = copy_run(finished[0], tmp_path / 'run')
    dataset = str(tmp_path / 'other') if which == 'other' else which
    torch.save(checkpoint(out_dir) | {'config': {'dataset': dataset}}, out_dir / 'ckpt.pt')
    done = command('sample.py', f'--out_dir={out_dir}', *SAMPLE, '--num_samples=2', '--metrics=True')
    assert done.returncode == 0 and says in done.stderr, done.stderr
    assert '2 samples' in done.stdout and 'of real text' not in done.stdout


# attention maps

@pytest.fixture(scope='module')
def long_context(finished, tmp_path_factory):
    """The finished run with room for a long prompt."""
    out_dir = copy_run(finished[0], tmp_path_factory.mktemp('long') / 'out')
    ckpt = checkpoint(out_dir)
    ckpt['model_args'].update(block_size=100, position_encoding='none')
    ckpt['model'] = {name: tensor for name, tensor in ckpt['model'].items() if 'wpe' not in name}
    torch.save(ckpt, out_dir / 'ckpt.pt')
    return out_dir


@pytest.mark.parametrize('prompt, legible', [('line $x$ 7 says', True), ('line 7 says 8 ' * 6, False)])
def test_attention_is_drawn_for_each_head(long_context, tmp_path, prompt, legible):
    """A picture that fails on a dollar sign, which is mathematics to matplotlib, or on a long prompt."""
    image = pytest.importorskip('matplotlib.image')
    path = tmp_path / 'map.png'
    done = command('sample.py', f'--out_dir={long_context}', f'--attention={path}', f'--start={prompt}')
    assert done.returncode == 0, done.stderr
    assert done.stdout == f'{path}: 2 layers x 2 heads over {len(prompt)} tokens\n'
    pixels = image.imread(path)[..., :3]
    height, width = pixels.shape[:2]
    size = max(1.2, 0.13 * (len(prompt) + 1) if legible else len(prompt) / 60)  # inches per head
    assert width == pytest.approx(120 * (2 * size + 2.1), abs=1)
    assert height == pytest.approx(120 * (2 * size + 1.3), abs=1)

    def pixel(layer, head, down, right):
        x, y = 0.8 + (head + right) * size, 0.5 + (layer + down) * size
        return pixels[round(120 * y), round(120 * x)]
    for layer in range(2):
        for head in range(2):
            assert pixel(layer, head, 0.2, 0.8).min() == 1, 'white above the diagonal'
            assert pixel(layer, head, 0.8, 0.2).min() < 0.9, 'a colour below it'


# mistakes

@pytest.mark.parametrize('library, flag', [
    ('matplotlib', '--attention=map.png'),
    ('scipy', '--metrics=True'),
    ('fastapi', '--serve=8000'),
    ('uvicorn', '--serve=8000'),
])
def test_a_missing_library_is_one_line(finished, library, flag):
    refused(command('sample.py', f'--out_dir={finished[0]}', flag, before=missing(library)), f'pip install {library}')


@pytest.mark.parametrize('flags, words', [
    (['--attention=map.nonsense', '--start=a'], ['nonsense']),
    (['--attention=nowhere/map.png', '--start=a'], ['nowhere']),
    (['--attention=map.png', '--start=' + 'a' * 17], ['block_size']),
    (['--attention=map.png', '--metrics=True'], ['--metrics']),
    (['--metrics=True', '--max_new_tokens=0'], ['--max_new_tokens']),
    (['--num_beams=4', '--max_new_tokens=0'], ['--max_new_tokens']),
    (['--temperature=-1.0'], ['temperature']),
    (['--temperature=1e308'], ['temperature']),
    (['--temperature=1e-40'], ['temperature']),
    (['--max_new_tokens=9223372036854775807'], ['max_new_tokens']),
    (['--max_new_tokens=2147483647', '--num_samples=100000'], ['num_samples or max_new_tokens', 'GiB']),
    (['--top_k=-1'], ['top_k']),
    (['--top_p=1.5'], ['top_p']),
    (['--slide=17'], ['slide']),
    (['--num_samples=0'], ['num_samples']),
    (['--start=FILE:nowhere.txt'], ['nowhere.txt']),
    (['--prompts=nowhere.txt'], ['nowhere.txt']),
    (['--prompts=/dev/null'], ['/dev/null', 'one prompt per line']),
    (['--start=FILE:/bin/true'], ['/bin/true', 'UTF-8']),
    (['--prompts=README.md', '--start=a'], ['--start']),
    (['--prompts=README.md', '--interactive=True'], ['--interactive']),
    (['--chat=True', '--json=True'], ['--json']),
    (['--chat=True'], ['chat template', 'data/prepare.py --chat']),
    (['--num_beams=4', '--top_k=5'], ['--top_k']),
    (['--num_beams=4', '--num_samples=5'], ['--num_beams=4', 'not 5']),
    (['--num_beams=4', '--max_new_tokens=17'], ['block_size=16', '--max_new_tokens']),
    (['--length_penalty=-1'], ['length_penalty']),
    (['--length_penalty=2'], ['--num_beams']),
    (['--min_p=1'], ['min_p']),
    (['--repetition_penalty=0'], ['repetition_penalty']),
    (['--serve=65536'], ['65535']),
    (['--serve=8000', '--chat=True'], ['--chat']),
    (['--serve=8000', '--slide=4'], ['--slide']),
    (['--out_dir=nowhere'], ['nowhere']),
    (['--device=tpu'], ['tpu']),
])
def test_sampling_mistakes_are_one_line(finished, flags, words):
    """A traceback for a typing mistake."""
    done = command('sample.py', f'--out_dir={finished[0]}', *flags)
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    one_line(done.stderr.splitlines()[-1], 'sample.py: ', *words)  # the model's line may precede it


def test_weights_that_are_not_finite_are_one_line(finished, tmp_path):
    """A traceback out of torch.multinomial, or greedy text out of NaN."""
    out_dir = copy_run(finished[0], tmp_path / 'nan')
    ckpt = checkpoint(out_dir)
    ckpt['model']['lm_head.weight'][3, 3] = math.nan
    torch.save({key: ckpt[key] for key in ckpt if key != 'checksums'}, out_dir / 'ckpt.pt')
    refused(command('sample.py', f'--out_dir={out_dir}', '--device=cpu'), 'not finite', 'ckpt.pt')
