"""
Questions about signatures in the Python standard library, as a chat, without a download.

    python data/chat_pystdlib/prepare.py [--out_dir=DIR]

Functions whose crc32(name) % 10 == 0 are val, wherever they occur.
"""
import ast
import random
import sys
import sysconfig
import zlib
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

from data.chat import CHATML, stored_ids, with_separator
from data.folder import write_dataset
from data.pystdlib.prepare import sources
from data.source import small_parser
from data.tokenizer import get_tokenizer

download_mb = 0
vocab_size = 256
LONGEST = 67  # bytes of a question and its answer; with ChatML two of them fit into 256 ids


def questions(module, f):
    """Return {question: answer} about an ast.FunctionDef."""
    names = [arg.arg for arg in f.args.args if arg.arg not in ('self', 'cls')]
    if f.name.startswith('_') or not names or f.args.vararg or f.args.kwarg or f.args.kwonlyargs:
        return {}
    shown = f'{module}.{f.name}({ast.unparse(f.args)})'
    i = zlib.crc32(shown.encode()) % len(names)
    found = {f'{shown} Module?': module, f'{shown} Argument {i + 1}?': names[i],
             f'{shown} How many arguments?': str(len(names))}
    for default in f.args.defaults[-1:]:
        found[f'{shown} Default of {names[-1]}?'] = ast.unparse(default)
    return {q: a for q, a in found.items() if len((q + a).encode()) <= LONGEST}


def conversations():
    """Return {'train': {question: answer}, 'val': ...} about all functions."""
    found = {'train': {}, 'val': {}}
    for path, source in sources(Path(sysconfig.get_path('stdlib')))[0]:
        module = path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')
        for f in ast.walk(ast.parse(source)):
            if isinstance(f, ast.FunctionDef):
                split = 'train' if zlib.crc32(f.name.encode()) % 10 else 'val'
                found[split] |= questions(module, f)
    return found


def in_twos(pairs):
    """Yield conversations of two random questions each, so that a model learns to go on."""
    pairs = random.Random(0).sample([*pairs.items()], len(pairs))
    for two in zip(pairs[::2], pairs[1::2]):
        yield {'messages': [{'role': role, 'content': text} for pair in two
                            for role, text in zip(('user', 'assistant'), pair)]}


def prepare(out_dir):
    tokenizer = get_tokenizer('byte')
    template, separator = with_separator(CHATML, tokenizer)
    splits = {}
    for split, pairs in conversations().items():
        ids = [stored_ids(talk, tokenizer, template) for talk in in_twos(pairs)]
        splits[split] = np.concatenate(ids)
        print(f'{split}: {len(splits[split]):,} tokens in {len(ids):,} conversations')
    write_dataset(out_dir, splits, {
        'vocab_size': tokenizer.vocab_size, 'tokenizer': tokenizer.spec,
        'chat_template': template, 'chat_separator': separator})


if __name__ == '__main__':
    prepare(**vars(small_parser(__file__, __doc__, takes_input=False).parse_args()))
