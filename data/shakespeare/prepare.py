"""Tiny Shakespeare in GPT-2's tokens: 1.1 MB of plays, 301,966 tokens of train and 36,059 of val.

    python data/shakespeare/prepare.py [--input=FILE] [--out_dir=DIR]

Downloads 1.1 MB once, keeps it as input.txt, and writes 0.7 MB: train.bin, val.bin and meta.json.
The first time, tiktoken downloads GPT-2's encoding, 1.5 MB.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

from data.folder import write_dataset
from data.source import small_parser, tinyshakespeare
from data.tokenizer import get_tokenizer

download_mb = 1.1
vocab_size = 50257


def prepare(out_dir, input=None):
    train, val = tinyshakespeare(out_dir, input)
    tokenizer = get_tokenizer('gpt2')
    splits = {'train': tokenizer.encode_corpus(train), 'val': tokenizer.encode_corpus(val)}
    write_dataset(out_dir, splits, {
        'vocab_size': tokenizer.vocab_size, 'tokenizer': tokenizer.spec,
        'bytes': {'train': len(train.encode('utf-8')), 'val': len(val.encode('utf-8'))}})
    print(f'train has {len(splits["train"]):,} tokens, val has {len(splits["val"]):,} tokens')


if __name__ == '__main__':
    prepare(**vars(small_parser(__file__, __doc__).parse_args()))
