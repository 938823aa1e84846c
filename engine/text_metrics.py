"""
Measure diversity, repetition and perplexity of texts. All but perplexity count words, split at
white space, so that models with different tokenizers can be compared.
"""
import math
from collections import Counter

import numpy as np
import torch
from torch.nn import functional as F

from data.folder import find_trained_on, read_meta
from data.loader import Loader, Mixture
from data.tokenizer import get_tokenizer
from engine.common import UserError
from engine.statistics import t_quantile

NOTES = {
    'distinct-1': 'share of distinct words',
    'distinct-2': 'share of distinct word pairs',
    'repetition': 'share of 4-grams that occurred earlier in the text',
    'self-BLEU': 'BLEU-4 against the other texts',
    'perplexity': 'of the tokens, under the model',
}


def ngrams(words, n):
    return Counter(zip(*(words[i:] for i in range(n))))


def distinct(words, n):
    """
    Return the share of distinct n-grams in a text, or nan if it has none. This is distinct-n
    (https://arxiv.org/abs/1510.03055), per text.
    """
    grams = ngrams(words, n)
    return len(grams) / grams.total() if grams else math.nan


def repetition(words):
    """
    Return the share of 4-grams that occurred earlier in the text (seq-rep-4,
    https://arxiv.org/abs/1908.04319).
    """
    return 1 - distinct(words, 4)


def bleu(words, others):
    """
    Return the BLEU-4 (Papineni et al. 2002) of a text against others. Zero matches count as 0.1, as
    in Texygen's self-BLEU (https://arxiv.org/abs/1802.01886).
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
    Return the perplexity of the last n ids. Each is predicted from all ids before it or, past
    block_size, from at least the last block_size / 2.
    """
    ids = torch.tensor(ids, device=next(model.parameters()).device)
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
    Return {metric: one value per text} for texts given as ids. The first prompt_length ids of each
    text are context only and are not measured.
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
    Format the mean over texts as 'mean +- half of its 95 % interval' (Student's t), or the mean
    alone below 4 texts. NaN, from texts too short for the metric, is left out.
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
    Return texts of those lengths, in tokens, from val of the data set that the checkpoint was
    trained on. Raise UserError if there is none, or if it has another tokenizer.
    """
    loaders, shares = [], []
    for name, share, folder in find_trained_on(ckpt.get('config')):
        meta = read_meta(folder)
        if 'tokenizer' in meta or not meta:  # without meta.json it has GPT-2's ids, as in nanoGPT
            spec = get_tokenizer(meta.get('tokenizer', 'gpt2')).spec
            if spec != tokenizer.spec:
                raise UserError(f"data set '{name}' has another tokenizer than the model")
        vocab_size = model.config.vocab_size
        loader = Loader(folder, 'val', max(lengths) - 1, seed=seed, vocab_size=vocab_size)
        if loader.packed:
            raise UserError(f"data set '{name}' has conversations, not texts")
        loaders.append(loader)
        shares.append(share)
    loader = loaders[0] if len(loaders) == 1 else Mixture(loaders, shares)
    n_texts = min(len(lengths), loader.n_windows)  # no text twice
    x, y = loader.batch(np.arange(n_texts))
    windows = torch.cat((x, y[:, -1:]), dim=1).tolist()
    return [ids[:length] for ids, length in zip(windows, lengths)]


def compare_with_real_text(ckpt, model, tokenizer, samples, prompt_length, seed):
    """
    Return (table, note): metrics of the samples, given as ids, and of as many real texts of as many
    tokens. The note is empty, or says why there is no real text.
    """
    texts, note = {f'{len(samples)} samples': samples}, ''
    try:
        real = real_texts(ckpt, model, tokenizer, [len(ids) for ids in samples], seed)
        texts[f'{len(real)} of real text'] = real
    except UserError as e:
        note = f'no real text to compare the samples with: {e}'
    columns = [measure(model, tokenizer, rows, prompt_length) for rows in texts.values()]
    headings = ''.join(f'{heading:<22}' for heading in texts)
    lines = [f"{'':<14}{headings}mean and 95 % interval over texts; words"]
    for metric, meaning in NOTES.items():
        cells = ''.join(f'{interval(values[metric]):<22}' for values in columns)
        lines.append(f'{metric:<14}{cells}{meaning}')
    return '\n'.join(lines), note
