"""
Text out of a trained model, as it comes.

    python sample.py --out_dir=out
    python sample.py --out_dir=out --start="def main(" --num_samples=3 --temperature=0.7
    python sample.py --out_dir=out --start=FILE:prompt.txt
    python sample.py --out_dir=out --interactive=True
    python sample.py --init_from=gpt2
    python sample.py --out_dir=out --metrics=True                               # how samples differ from real text
    python sample.py --out_dir=out --attention=map.png --start="def main("      # where each head looks, as a picture
"""
import codecs
import itertools
import math
import os
import sys
from collections import Counter
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from configurator import configure, fail
from data.loader import Loader, Mixture, find_trained_on, read_meta
from data.tokenizer import find_tokenizer, get_tokenizer
from engine.checkpoint import load_checkpoint, model_of
from engine.common import optional
from engine.huggingface import load_weights
from engine.machine import pick_device

# ---------------------------------------------------------------------------------------------------------------------
out_dir = 'out'  # a run's folder (its ckpt.pt), or a checkpoint file such as out/ckpt_best.pt
init_from = 'resume'  # from out_dir; or another run's out_dir, a folder that Hugging Face's save_pretrained wrote, or a hub id such as gpt2
start = '\n'  # the prompt, or FILE:prompt.txt; <|endoftext|> means that token; empty: from the end-of-text token
num_samples = 10  # samples, drawn together in one batch
max_new_tokens = 500  # tokens a sample
temperature = 0.8  # 1.0: the model's own probabilities, lower: safer, 0: always the likeliest token
top_k = 200  # draw from this many likeliest tokens; 0: from all
top_p = 1.0  # draw from the fewest likeliest tokens that together reach this probability; 1.0: from all
stop = True  # end a sample where the model says end of text
slide = 1  # past block_size, tokens the window moves at once: 1 as nanoGPT (slow, each token a whole forward), block_size // 2 fast
seed = 1337  # the same seed, the same text
interactive = False  # ask for prompt after prompt, until Ctrl-D
metrics = False  # after the samples: diversity, repetition and perplexity, beside those of as much text from val of the data set the model was trained on
attention = ''  # instead of samples: a file for a picture of each head's attention over the prompt, such as map.png (needs matplotlib)
device = 'auto'  # cuda, mps or cpu
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of the weights
quantize: Literal['', 'int8'] = ''  # int8: weights of Linears in one byte each, the rest in dtype; half the memory, and slower for more than 4 samples at once
compile = False  # nanoGPT's key; generation has a KV cache instead and is not compiled
config, given = configure(__file__)
globals().update(config)
# ---------------------------------------------------------------------------------------------------------------------


def prompt_ids(prompt):
    """The ids of a prompt, at least one. ValueError for an id that the model lacks."""
    ids = tokenizer.encode(prompt) if prompt else [tokenizer.eot] if tokenizer.eot is not None else []
    if not ids:
        raise ValueError('an empty --start needs a tokenizer with an end-of-text token; give it some text')
    bad = max(ids)
    if bad >= model.config.vocab_size:
        raise ValueError(f'the prompt has token {bad}, the model knows {model.config.vocab_size}')
    return ids


def generate(prompt):
    """Print num_samples continuations: the first as its tokens come, the others after it. A character cut off at the end is left out."""
    ids = prompt_ids(prompt)
    idx = torch.tensor([ids] * num_samples, device=device)
    eot, decoder = tokenizer.eot if stop else None, codecs.getincrementaldecoder('utf-8')
    rows, shown = [[] for _ in range(num_samples)], decoder('replace')
    steps = model.stream(idx, max_new_tokens, temperature, top_k or None, top_p, seed, eot, slide=slide)
    first = next(steps, None)  # arguments out of range show before anything is printed
    print(prompt, end='', flush=True)
    for step in itertools.chain([first] if first is not None else [], steps):
        for row, token in zip(rows, step.tolist()):
            if not (row and row[-1] == eot):
                row.append(token)
        if rows[0][-1] != eot:
            print(shown.decode(tokenizer.decode_bytes(rows[0][-1:])), end='', flush=True)
    print()
    for row in rows[1:]:
        print('---------------')
        print(prompt + decoder('replace').decode(tokenizer.decode_bytes([t for t in row if t != eot])))
    if metrics:
        show_metrics(ids, rows)


# metrics, of a text in words, which are what stands between white space: so they compare models whatever their tokenizers

def ngrams(words, n):
    return Counter(zip(*(words[i:] for i in range(n))))


def distinct(words, n):
    """Share of different n-grams among all of a text (distinct-n, https://arxiv.org/abs/1510.03055, but a text at a time); nan without any."""
    grams = ngrams(words, n)
    return len(grams) / grams.total() if grams else math.nan


def repetition(words):
    """Share of 4-grams that the text had before (seq-rep-4, https://arxiv.org/abs/1908.04319)."""
    return 1 - distinct(words, 4)


def bleu(words, others):
    """BLEU-4 (Papineni et al. 2002) of a text against others: 0.1 for no match at all, as in Texygen's self-BLEU (https://arxiv.org/abs/1802.01886)."""
    if len(words) < 4 or not others:
        return math.nan
    log_precision = 0.0
    for n in range(1, 5):
        grams, known = ngrams(words, n), Counter()
        for other in others:
            known |= ngrams(other, n)  # the most that any of them has
        log_precision += math.log(max(0.1, (grams & known).total()) / grams.total()) / 4
    nearest = min((len(other) for other in others), key=lambda n: (abs(n - len(words)), n))
    return math.exp(min(0.0, 1 - nearest / len(words)) + log_precision)


@torch.no_grad()
def perplexity(ids, n):
    """Of the last n of ids, each given what is before it: all that block_size holds, or past it half of that or more."""
    x, y = torch.tensor(ids[:-1], device=device), torch.tensor(ids[1:], device=device)
    T, losses, done = model.config.block_size, [], 0
    while done < len(y):
        first = max(0, done - T // 2)
        logits = model(x[None, first:first + T], all_logits=True)[0][0].float()
        losses.append(F.cross_entropy(logits[done - first:], y[done:first + T], reduction='none').double())
        done = first + len(logits)
    return math.exp(min(700, torch.cat(losses)[-n:].mean().item()))


def measure(prompt_length, texts):
    """{metric: a value a text} of texts as ids, each after a prompt that only perplexity sees."""
    words = [tokenizer.decode([t for t in ids[prompt_length:] if t not in tokenizer.special]).split() for ids in texts]
    others = [words[:i] + words[i + 1:] for i in range(len(words))]
    return {'distinct-1': [distinct(w, 1) for w in words], 'distinct-2': [distinct(w, 2) for w in words], 'repetition': [repetition(w) for w in words],
            'self-BLEU': [bleu(w, o) for w, o in zip(words, others)], 'perplexity': [perplexity(ids, len(ids) - prompt_length) for ids in texts]}


def interval(values):
    """
    'mean +- half of its 95 % interval' over texts, by Student's t (its quantile to 1 % as in Abramowitz and Stegun 26.7.5), from 4 texts on. Those
    too short for a metric are left out.
    """
    values = np.array([v for v in values if not math.isnan(v)])
    if len(values) < 4:
        return f'{values.mean():.3f}' if len(values) else '-'
    z, df = 1.959964, len(values) - 1
    t = z + (z ** 3 + z) / 4 / df + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / 96 / df ** 2 + (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / 384 / df ** 3
    return f'{values.mean():.3f} +- {t * values.std(ddof=1) / math.sqrt(len(values)):.3f}'


def real_texts(lengths):
    """Stretches of val of those lengths in tokens, of the data set that the checkpoint was trained on. ValueError where it cannot be had."""
    loaders, shares = [], []
    for name, share, folder in find_trained_on(ckpt.get('config')):
        meta = read_meta(folder)
        if ('tokenizer' in meta or not meta) and get_tokenizer(meta.get('tokenizer', 'gpt2')).spec != tokenizer.spec:
            raise ValueError(f"data set '{name}' has another tokenizer than the model")
        loaders.append(Loader(folder, 'val', max(lengths) - 1, seed=seed, vocab_size=model.config.vocab_size))
        shares.append(share)
    loader = loaders[0] if len(loaders) == 1 else Mixture(loaders, shares)
    x, y = loader.batch(np.arange(min(len(lengths), loader.n_windows)))  # no text twice
    return [ids[:n] for ids, n in zip(torch.cat((x, y[:, -1:]), dim=1).tolist(), lengths)]


def show_metrics(prompt, rows):
    """A table of what samples, ids after those of the prompt, and real text of as many tokens are like."""
    texts = [prompt + row for row in rows if row]
    columns = {f'{len(texts)} samples': measure(len(prompt), texts)}
    try:
        texts = real_texts([len(ids) for ids in texts])
        columns[f'{len(texts)} of real text'] = measure(len(prompt), texts)
    except ValueError as e:
        print(f'no real text to compare with, of as many tokens as the samples: {e}', file=sys.stderr)
    print('---------------\n' + ' ' * 14 + ''.join(f'{name:<22}' for name in columns) + 'mean and 95 % interval over texts; words')
    for metric, note in {'distinct-1': 'different words of all', 'distinct-2': 'different pairs of all', 'repetition': '4-grams that came before in the text',
                         'self-BLEU': 'BLEU-4 against the other texts', 'perplexity': 'of the tokens, under the model'}.items():
        print(f'{metric:<14}' + ''.join(f'{interval(values[metric]):<22}' for values in columns.values()) + note)


def draw_attention(ids):
    """Each head's attention over the prompt as a heat map in one picture, a row a layer and a column a head, into the file `attention`."""
    weights = torch.cat(model.attention_weights(torch.tensor([ids], device=device))).cpu().numpy()  # (layers, heads, T, T)
    layers, heads, T, _ = weights.shape
    step = T + 1
    maps = np.full((layers, step, heads, step), np.nan, np.float32)  # nan, which stays white, between the maps and after the token that looks
    maps[:, :T, :, :T] = np.where(np.tri(T, dtype=bool), weights, np.nan).swapaxes(1, 2)
    few = T <= 40 and T * max(layers, heads) <= 600  # tokens that can be read at the axes
    size = max(1.2, 0.13 * step if few else T / 60)  # inches a head
    width, height = size * heads + 2.1, size * layers + 1.3
    figure = Figure(figsize=(width, height), dpi=min(120, 10000 / max(width, height)))
    ax = figure.add_axes((0.8 / width, 0.8 / height, 1 - 2.1 / width, 1 - 1.3 / height))
    image = ax.imshow(maps.reshape(layers * step, heads * step), norm=PowerNorm(1 / 3, 0, 1), aspect='auto')  # a root, or small weights look alike
    at = lambda n: [i * step + t for i in range(n) for t in range(T)] if few else []
    tokens = [repr(tokenizer.decode([i]))[1:-1].replace(' ', '\u2423') for i in ids] if few else []
    ax.set_xticks(at(heads), tokens * heads, rotation=90, fontsize=6, parse_math=False)
    ax.set_yticks(at(layers), tokens * layers, fontsize=6, parse_math=False)
    ax.set(xlabel='token looked at', ylabel='token that looks')
    for head in range(heads):
        ax.text(head * step + T / 2, -1, f'head {head}', ha='center', va='bottom', fontsize=8)
    for layer in range(layers):
        ax.text(heads * step, layer * step + T / 2, f'layer {layer}', va='center', fontsize=8, rotation=90)
    figure.colorbar(image, cax=figure.add_axes((1 - 0.8 / width, 0.8 / height, 0.15 / width, min(4, size * layers) / height)), label='attention weight')
    figure.savefig(attention)
    print(f'{attention}: {layers} layers x {heads} heads over {T} tokens')


sys.stdout.reconfigure(errors='replace')  # a sample may hold what this terminal cannot show
try:
    if num_samples < 1:
        raise ValueError(f'num_samples must be positive, not {num_samples}')
    if metrics and max_new_tokens < 1:
        raise ValueError(f'--metrics needs samples: --max_new_tokens of 1 or more, not {max_new_tokens}')
    if attention and not attention.endswith(('.png', '.jpg', '.pdf', '.svg')):
        raise ValueError(f"--attention='{attention}' must end in .png, .jpg, .pdf or .svg")
    if attention and (metrics or interactive):
        raise ValueError('--attention draws instead of sampling: leave out --metrics and --interactive')
    if attention:
        Figure, PowerNorm = optional('matplotlib.figure', '--attention').Figure, optional('matplotlib.colors', '--attention').PowerNorm
    device, dtype = pick_device(device, dtype)
    ckpt = load_checkpoint(out_dir) if init_from == 'resume' else load_weights(init_from)
    tokenizer = find_tokenizer(ckpt)
    model = model_of(ckpt)
    known = min(tokenizer.vocab_size, model.config.vocab_size)  # nanoGPT's checkpoints do not say how much of the vocabulary is padding
    model.config.unpadded_vocab_size = min(model.config.unpadded_vocab_size or known, known)
    n_params = model.get_num_params(False)
    model = (model.quantize_int8() if quantize else model).to(device, getattr(torch, dtype))
    megabytes = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()}) / 1e6
    if start.startswith('FILE:'):
        with open(start[5:], encoding='utf-8') as f:
            start = f.read()
    at = f", iteration {ckpt['iter_num']}" if 'iter_num' in ckpt else ''
    print(f"{ckpt['path']}: {n_params:,} parameters, {megabytes:,.1f} MB as {quantize or dtype}{at}, {device} {dtype}, seed {seed}" +
          ('; compile=True is ignored, see --help' if compile else ''), file=sys.stderr)
    if attention:
        draw_attention(prompt_ids(start))
    elif not interactive:
        generate(start)
    while interactive:
        try:
            generate(input('\n> '))
        except (EOFError, KeyboardInterrupt):
            break
        except ValueError as e:
            print(e, file=sys.stderr)
except BrokenPipeError:  # the reader, head say, has had enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
except (ValueError, OSError) as e:
    fail(str(e))
except KeyboardInterrupt:
    raise SystemExit(130)
