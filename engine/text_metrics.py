"""
Diversity, repetition and perplexity of texts. The units are words, which stand between white
space, so that models with different tokenizers can be compared.
"""
import math
from collections import Counter

import numpy as np
import torch
from torch.nn import functional as F

from data.loader import Loader, Mixture, find_trained_on, read_meta
from data.tokenizer import get_tokenizer
from engine.common import UserError
from engine.statistics import t_quantile

NOTES = {
    'distinct-1': 'different words of all',
    'distinct-2': 'different pairs of all',
    'repetition': '4-grams that came before in the text',
    'self-BLEU': 'BLEU-4 against the other texts',
    'perplexity': 'of the tokens, under the model',
}


def ngrams(words, n):
    return Counter(zip(*(words[i:] for i in range(n))))


def distinct(words, n):
    """
    Share of different n-grams among all of a text; nan without any. This is distinct-n
    (https://arxiv.org/abs/1510.03055), but per text.
    """
    grams = ngrams(words, n)
    return len(grams) / grams.total() if grams else math.nan


def repetition(words):
    """Share of 4-grams that the text had before: seq-rep-4, https://arxiv.org/abs/1908.04319."""
    return 1 - distinct(words, 4)


def bleu(words, others):
    """
    BLEU-4 (Papineni et al. 2002) of a text against others. No match at all counts as 0.1 matches,
    as in Texygen's self-BLEU (https://arxiv.org/abs/1802.01886).
    """
    if len(words) < 4 or not others:
        return math.nan
    log_precision = 0.0
    for n in range(1, 5):
        grams, known = ngrams(words, n), Counter()
        for other in others:
            known |= ngrams(other, n)  # the maximum over the others
        matches = max(0.1, (grams & known).total())
        log_precision += math.log(matches / grams.total()) / 4
    lengths = [len(other) for other in others]
    nearest = min(lengths, key=lambda length: (abs(length - len(words)), length))
    brevity_penalty = min(0.0, 1 - nearest / len(words))
    return math.exp(brevity_penalty + log_precision)


@torch.no_grad()
def perplexity(model, ids, n):
    """
    Perplexity of the last n of ids. Each is predicted from all ids before it; past block_size,
    from at least the last half of block_size.
    """
    ids = torch.tensor(ids, device=model.lm_head.weight.device)
    x, y = ids[:-1], ids[1:]
    T, losses, done = model.config.block_size, [], 0
    while done < len(y):
        first = max(0, done - T // 2)
        logits = model(x[None, first:first + T], all_logits=True)[0][0].float()
        loss = F.cross_entropy(logits[done - first:], y[done:first + T], reduction='none')
        losses.append(loss.double())
        done = first + len(logits)
    mean = torch.cat(losses)[-n:].mean().item()
    return math.exp(min(700, mean))  # exp(710) overflows


def measure(model, tokenizer, texts, prompt_length):
    """
    {metric: one value per text} of texts as ids. The first prompt_length ids of each are context
    for its perplexity and nothing else.
    """
    words = []
    for ids in texts:
        kept = [i for i in ids[prompt_length:] if i not in tokenizer.special]
        words.append(tokenizer.decode(kept).split())
    others = [words[:i] + words[i + 1:] for i in range(len(words))]
    return {
        'distinct-1': [distinct(w, 1) for w in words],
        'distinct-2': [distinct(w, 2) for w in words],
        'repetition': [repetition(w) for w in words],
        'self-BLEU': [bleu(w, o) for w, o in zip(words, others)],
        'perplexity': [perplexity(model, ids, len(ids) - prompt_length) for ids in texts],
    }


def interval(values):
    """
    'mean +- half of its 95 % interval' over texts, by Student's t. Below 4 texts it is the mean
    alone. nan, from a text too short for the metric, is left out.
    """
    values = np.array([value for value in values if not math.isnan(value)])
    if not len(values):
        return '-'
    if len(values) < 4:
        return f'{values.mean():.3f}'
    error = values.std(ddof=1) / math.sqrt(len(values))
    return f'{values.mean():.3f} +- {t_quantile(0.95, len(values) - 1) * error:.3f}'


def real_texts(ckpt, model, tokenizer, lengths, seed):
    """
    Stretches of those lengths, in tokens, from val of the data set that the checkpoint was
    trained on. UserError if there is none, or it has another tokenizer.
    """
    loaders, shares = [], []
    for name, share, folder in find_trained_on(ckpt.get('config')):
        meta = read_meta(folder)
        if 'tokenizer' in meta or not meta:  # without meta.json, it is nanoGPT's, in GPT-2's ids
            spec = get_tokenizer(meta.get('tokenizer', 'gpt2')).spec
            if spec != tokenizer.spec:
                raise UserError(f"data set '{name}' has another tokenizer than the model")
        vocab_size = model.config.vocab_size
        loader = Loader(folder, 'val', max(lengths) - 1, seed=seed, vocab_size=vocab_size)
        loaders.append(loader)
        shares.append(share)
    loader = loaders[0] if len(loaders) == 1 else Mixture(loaders, shares)
    n_texts = min(len(lengths), loader.n_windows)  # no text twice
    x, y = loader.batch(np.arange(n_texts))
    windows = torch.cat((x, y[:, -1:]), dim=1).tolist()
    return [ids[:length] for ids, length in zip(windows, lengths)]


def metrics_table(columns):
    """The text of a table of {heading: what measure() returns}."""
    headings = ''.join(f'{heading:<22}' for heading in columns)
    lines = [f"{'':<14}{headings}mean and 95 % interval over texts; words"]
    for metric, note in NOTES.items():
        cells = ''.join(f'{interval(values[metric]):<22}' for values in columns.values())
        lines.append(f'{metric:<14}{cells}{note}')
    return '\n'.join(lines)
