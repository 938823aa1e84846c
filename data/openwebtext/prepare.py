"""OpenWebText, GPT-2's training text rebuilt: 8,013,769 web pages, about 9 billion tokens.

    python data/openwebtext/prepare.py [--tokenizer=gpt2] [--input=PATH] [--out_dir=DIR]

Downloads 24 GB (80 parquet files of 305 MB, by huggingface_hub and pyarrow), one at a time, and
writes 18 GB. 0.05 % of the pages are val, as in nanoGPT, but not the same pages: with its shuffle,
train had 9,035,582,198 tokens and val 4,434,897.
https://huggingface.co/datasets/Skylion007/openwebtext
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

from data.prepare import prepare_from_hub, recipe_parser

download_mb = 24400
vocab_size = 50257
takes_tokenizer = True

if __name__ == '__main__':
    parser = recipe_parser(__file__, __doc__)
    parser.set_defaults(val_fraction=0.0005)
    files = {None: '*train-*-of-*.parquet'}
    prepare_from_hub(parser.parse_args(), 'Skylion007/openwebtext', files,
                     tokens=9_040_000_000, download_mb=download_mb)
