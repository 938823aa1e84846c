"""Write the README.md of an exported model from its checkpoint and run logs."""
import contextlib
import math
import os

import torch

from engine.results import files_of
from engine.schema import read_json
from model import REGISTRY

BATCH = ('batch_size', 'gradient_accumulation_steps', 'block_size')  # tokens per iteration
CARD = '''\
---
library_name: transformers
pipeline_tag: text-generation
---

{title}

| | |
| --- | --- |
{table}

## Limits

This is a plain language model: it continues a text and sees the last {block_size} tokens of it. \
Nothing has been measured except the losses above. It can repeat false or offensive statements \
from its training text.{doc_mask}
'''
DOC_MASK = (
    ' It was trained with attention limited to one document, which this format cannot express. '
    'After an end-of-text token, transformers gives other logits than plainGPT, so give it one '
    'document at a time.'
)


def model_card(model, ckpt, architecture, tokenizer):
    """Return the card as text. Facts that neither the checkpoint nor the logs give are left out."""
    c, trained, logs = model.config, ckpt.get('config') or {}, run_logs(ckpt)
    rows = {
        'architecture': describe_architecture(c, architecture),
        'parameters': f'{model.get_num_params(False):,}, '
                      f'non-embedding {model.get_num_params():,}',
        'context': f'{c.block_size} tokens',
        'vocabulary': describe_vocabulary(c),
        'tokenizer': tokenizer.name if tokenizer else None,
        'data set': trained.get('dataset'),
        'tokens seen': describe_tokens_seen(ckpt, logs),
    }
    for split, losses in (ckpt.get('losses') or {}).items():
        rows[f'{split} loss'] = describe_loss(losses, trained, c.block_size)
    if trained and logs:
        rows['hardware'] = logs[-1]['startup_info']['device']
    rows['software'] = f"plainGPT, torch {ckpt.get('torch_version', torch.__version__)}"
    return CARD.format(
        title=f"# A GPT trained on {rows['data set']}" if trained else '# A GPT',
        table='\n'.join(f'| {name} | {value} |' for name, value in rows.items() if value),
        block_size=c.block_size,
        doc_mask='' if c.doc_mask_token is None else DOC_MASK,
    )


def describe_architecture(c, architecture):
    names = [getattr(c, kind) for kind in REGISTRY if kind != 'attention_backend']
    biases = 'biases' if c.bias else 'no biases'
    return (f'{architecture}: {c.n_layer} layers, width {c.n_embd}, {c.n_head} heads, '
            f"{c.kv_heads} key/value heads, {', '.join(names)}, {biases}")


def describe_vocabulary(c):
    used = f', of which {c.unpadded_vocab_size} in use' if c.unpadded_vocab_size else ''
    return f'{c.vocab_size} ids{used}'


def describe_tokens_seen(ckpt, logs):
    tokens, began = tokens_seen(ckpt, logs)
    if tokens is None:
        return None
    foreign = began not in ('scratch', 'resume', 'auto')
    after = f', after the weights of {began}' if foreign else ''
    return f"{tokens:,} in {ckpt['iter_num']:,} iterations{after}"


def describe_loss(losses, trained, block_size):
    windows = trained['eval_iters'] * trained['batch_size']
    text = f"{losses['loss']:.4f} nats per token"
    if 'bits_per_byte' in losses:
        text += f", {losses['bits_per_byte']:.4f} bits per byte of text"
    return (f'{text}, the mean over at most {windows:,} windows of {block_size} tokens, '
            'always the same ones')


LOG = {'config': {'init_from': str}, 'startup_info': {'tokens_per_iter': int, 'device': str},
       'summary': {'iterations': int, 'iter_num': int}}  # what is read of a run log


def run_logs(ckpt):
    """
    Return the run_*.json files beside a checkpoint as dicts, oldest first. Unreadable ones are
    skipped.
    """
    logs = []
    for path in files_of(os.path.dirname(ckpt.get('path', '')), 'run_*.json'):
        with contextlib.suppress(OSError, ValueError):
            logs.append(read_json(path, LOG))
    return logs


def tokens_seen(ckpt, logs):
    """
    Return (tokens that a checkpoint was trained on, init_from of its first run), or (None, None).
    Its config describes only the last of several runs; the logs describe the others.
    """
    trained, reached = ckpt.get('config') or {}, ckpt.get('iter_num')
    if reached is None:
        return None, None
    init_from = trained.get('init_from', 'resume')
    batch = [trained.get(key) for key in BATCH]
    if init_from not in ('resume', 'auto') and None not in batch:  # there was only one run
        return reached * math.prod(batch), init_from
    tokens = 0
    for log in reversed(logs):
        end = log['summary']['iter_num']
        begin = end - log['summary']['iterations']
        if begin < reached <= end:  # a run may have gone beyond the checkpoint that was resumed
            tokens += (reached - begin) * log['startup_info']['tokens_per_iter']
            reached = begin
            if begin == 0:
                return tokens, log['config']['init_from']
    return None, None
