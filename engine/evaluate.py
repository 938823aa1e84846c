"""
Measure the loss of a model, with its standard error, on fixed windows of text. The order of the
windows depends only on the data set and block_size, so runs are compared on the same text.
"""
import contextlib
import math

import numpy as np
import torch

from configurator import ON_COMMAND_LINE
from data.loader import Mixture, fingerprint
from data.tokenizer import prompt_ids
from engine.attention_kernel import without_cudnn
from engine.common import UserError
from engine.datasets import load_split
from engine.statistics import mean_and_error


class Split:
    """
    The first n windows of a split. The loader has a fixed seed, so they are the same in every run.
    """
    def __init__(self, loader, n, bytes_per_id=None):
        self.loader, self.n, self.bytes_per_id = loader, n, bytes_per_id
        self.facts = None  # {'bytes_per_token', 'crc'} after the first evaluation

    @property
    def total(self):
        """
        The number of windows in the split. A mixture's n_windows is smaller, because it ends before
        a data set repeats.
        """
        return sum(part.n_windows for part in getattr(self.loader, 'loaders', [self.loader]))


def load_eval_splits(data_sets, model_config, config, given, tokenizer, device):
    """
    Return {'train': Split, 'val': Split}, each with the windows of eval_iters batches. With
    eval_only, 'val' has all windows; eval_iters limits it only as a flag, or if the same config
    file sets both keys, as nanoGPT's eval_ configs do.
    """
    id_bytes = bytes_per_id(tokenizer, model_config.vocab_size)
    splits = {}
    for name in ('train', 'val'):
        loader = load_split(name, data_sets, model_config, device, seed=0, shift=False)
        n = min(config['eval_iters'] * config['batch_size'], loader.n_windows)
        splits[name] = Split(loader, n, id_bytes)
    limited = given.get('eval_iters') in (ON_COMMAND_LINE, given.get('eval_only'))
    if config['eval_only'] and not limited:
        splits['val'].n = splits['val'].loader.n_windows
    return splits


def bytes_per_id(tokenizer, vocab_size):
    """Return the UTF-8 bytes of each id, (at least vocab_size,) int64, or None if unknown."""
    if tokenizer is None:
        return None
    out = torch.zeros(max(vocab_size, tokenizer.vocab_size), dtype=torch.long)
    out[:tokenizer.vocab_size] = torch.from_numpy(tokenizer.token_bytes())
    return out  # 0 for padding


@torch.no_grad()
def evaluate(model, splits, batch_size, parallel, autocast, stop, progress):
    """
    Evaluate {split: Split} with all processes sharing the work. Return {split: {'loss',
    'standard_error', 'perplexity', 'bits_per_byte'}} on all of them. Loss is in nats per token.
    Bits per byte do not depend on the tokenizer, and are left out if the bytes per id are unknown.
    'val' also has 'window_losses', in text order, and 'by_position', the loss in ranges of the
    context. Means over windows use float64, so batch size and number of processes do not matter.

    Return None if a batch cannot be read or a signal arrives, which `stop`, a StopSignal, records.
    progress(text) is called after each batch.
    """
    was_training = model.training
    model.eval()
    try:
        out = {}
        for name, split in splits.items():
            losses = window_losses(model, name, split, batch_size, parallel, autocast,
                                   stop, progress)
            if losses is None:
                return None
            out[name] = summary(split, losses, detailed=name == 'val')
        return out
    finally:
        model.train(was_training)
        parallel.release_gathered(model)


def stretches(block_size):
    """Return (first position, length) of the ranges 0, 1, 2-3, 4-7, ... of a context."""
    starts = [0] + [2 ** i for i in range(block_size.bit_length()) if 2 ** i < block_size]
    return list(zip(starts, np.diff([*starts, block_size]).tolist()))


def window_losses(model, name, split, batch_size, parallel, autocast, stop, progress):
    """
    Return the mean losses of a split's windows in ranges of the context, and the shares of targets
    there, (2, n, ranges) float32 on the device, or None if a process has to stop. Ranks take
    batches in turn. The last batch may go beyond n, because all batches keep one shape for the
    compiler.
    """
    loader, n = split.loader, split.n
    sizes = [length for _, length in stretches(loader.block_size)]
    steps = math.ceil(n / (batch_size * parallel.world_size))
    first = [(i * parallel.world_size + parallel.rank) * batch_size for i in range(steps)]
    losses = torch.zeros(2, steps * parallel.world_size * batch_size, len(sizes),
                         device=loader.device)
    batches = loader.stream((at + np.arange(batch_size)) % loader.n_windows for at in first)
    n_bytes = n_targets = crc = 0
    with autocast():  # outside the loop, so that weights are cast once
        for i in range(steps):
            batch = stop.try_reading(lambda: next(batches))
            if parallel.all_max(stop.status):
                return None
            X, Y = batch
            at = slice(first[i], first[i] + batch_size)
            for j, values in enumerate((model(X, Y, reduction='none')[1], (Y >= 0).float())):
                parts = values.split(sizes, dim=1)
                losses[j, at] = torch.stack([part.mean(1) for part in parts], dim=1)
            if split.facts is None:
                x, y = (t[:max(0, n - first[i])].cpu() for t in (X, Y))
                if split.bytes_per_id is not None:
                    n_bytes += split.bytes_per_id[y[y >= 0]].sum().item()
                n_targets += (y >= 0).sum().item()
                crc += fingerprint(torch.cat((x, y[:, -1:]), dim=1))
            progress(f'evaluating {name}: batch {i + 1}/{steps}')
    if split.facts is None:  # the windows are fixed, so these facts are too
        sums = torch.tensor([n_bytes, n_targets, crc], device=loader.device)
        n_bytes, n_targets, crc = parallel.all_reduce(sums).tolist()
        # JSON readers represent integers exactly up to 2^53
        split.facts = dict(bytes_per_token=n_bytes / max(1, n_targets), crc=crc % 2 ** 53)
    return parallel.all_reduce(losses)[:, :n]


def summary(split, losses, detailed):
    """Compute the figures of one split from window_losses(); see evaluate()."""
    loader, sizes = split.loader, [length for _, length in stretches(split.loader.block_size)]
    shard, offset = loader.locate(np.arange(split.n))
    in_text = np.lexsort((offset, shard))
    losses, shares = losses.cpu().double().numpy()[:, in_text]
    if not shares.any():
        folder = loader.shards[0].path.parent
        raise UserError(f'no conversation of {folder} has a reply within block_size: raise it')
    sets = loader.choose(in_text)[0] if isinstance(loader, Mixture) else None
    means, mean_shares = losses @ sizes / loader.block_size, shares @ sizes / loader.block_size
    out = loss_and_error(means, mean_shares, sets)
    out['perplexity'] = math.exp(min(out['loss'], 700))
    if split.facts['bytes_per_token']:
        out['bits_per_byte'] = out['loss'] / math.log(2) / split.facts['bytes_per_token']
    if detailed:
        out['by_position'] = [
            dict(first=at, last=at + length - 1) | loss_and_error(column, share, sets)
            for (at, length), column, share in zip(stretches(loader.block_size), losses.T, shares.T)
            if share.any()]
        out['window_losses'] = (means / mean_shares.mean()).round(5).tolist()
    return out


def loss_and_error(losses, shares, sets):
    """
    Return {'loss', 'standard_error'} per target, from the losses of windows in text order and their
    shares of targets. The error is None if there are too few windows.
    """
    if shares.min() < 1:  # conversations: the error is that of a ratio of two means
        ratio = losses.mean() / shares.mean()
        losses = ratio + (losses - ratio * shares) / shares.mean()
    loss, error, _ = mean_and_error(losses, sets)
    return dict(loss=loss, standard_error=error if math.isfinite(error) else None)


def sample_prompt(start, tokenizer, split, vocab_size):
    """
    Return the ids of the text `start`, with which samples begin. None: a question of the split's
    conversations, or a line end, or a token of the split's text if the tokenizer has no line end. A
    model continues these sensibly, because they occur in its data.
    """
    if start is not None:
        return prompt_ids(start, tokenizer, vocab_size)
    if not split.loader.packed:
        with contextlib.suppress(UserError):  # the tokenizer may have only a text's own characters
            return prompt_ids('\n', tokenizer, vocab_size)
    X, Y = split.loader.batch(np.arange(1))
    return X[0, :1 + int((Y[0] >= 0).int().argmax())].tolist()  # up to the first target


def sample_text(model, tokenizer, prompt, n_tokens, seed, parallel, autocast, end=None):
    """
    Return the text of a prompt's ids and of at most n_tokens after them, up to the text `end` if
    there is one. It uses a random generator of its own, so it depends only on the weights, the
    prompt and the seed.
    """
    slide = max(1, model.config.block_size // 2)
    with autocast(), without_cudnn():
        ids = model.generate(torch.tensor([prompt], device=parallel.device), n_tokens,
                             temperature=0.8, top_k=200, seed=seed, stop=tokenizer.eot,
                             slide=slide)[0].tolist()
    parallel.release_gathered(model)
    text = tokenizer.decode([i for i in ids if i != tokenizer.eot])
    start = len(tokenizer.decode([i for i in prompt if i != tokenizer.eot]))
    return text[:start] + text[start:].partition(end)[0] if end else text
