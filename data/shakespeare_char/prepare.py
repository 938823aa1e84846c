"""Tiny Shakespeare, one id per character: 1.1 MB of plays, 65 different characters.

    python data/shakespeare_char/prepare.py [--input=FILE] [--out_dir=DIR]

Downloads 1.1 MB once, keeps it as input.txt, and writes 2.2 MB: train.bin (1,003,854 tokens),
val.bin (111,540) and meta.json.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

from data.folder import write_dataset
from data.source import small_parser, tinyshakespeare
from data.tokenizer import get_tokenizer

download_mb = 1.1
vocab_size = 65


def prepare(out_dir, input=None):
    train, val = tinyshakespeare(out_dir, input)
    tokenizer = get_tokenizer({'name': 'char', 'chars': sorted(set(train + val))})
    splits = {'train': tokenizer.encode(train), 'val': tokenizer.encode(val)}
    write_dataset(out_dir, splits, {
        'vocab_size': tokenizer.vocab_size, 'tokenizer': tokenizer.spec,
        'bytes': {'train': len(train.encode('utf-8')), 'val': len(val.encode('utf-8'))}})
    n_train, n_val = len(splits['train']), len(splits['val'])
    print(f'{tokenizer.vocab_size} characters; '
          f'train has {n_train:,} tokens, val has {n_val:,} tokens')


if __name__ == '__main__':
    prepare(**vars(small_parser(__file__, __doc__).parse_args()))
