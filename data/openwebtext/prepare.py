"""OpenWebText, GPT-2's training text made again from its sources: 8,013,769 web pages, about 9 billion tokens.

    python data/openwebtext/prepare.py [--tokenizer=gpt2] [--input=PATH] [--out_dir=DIR]

Downloads 24 GB (80 parquet files of 305 MB, by huggingface_hub and pyarrow), one at a time, and writes 18 GB. 0.05 % of the pages are val,
as in nanoGPT, though not the same ones: with its shuffle, train had 9,035,582,198 tokens and val 4,434,897.
https://huggingface.co/datasets/Skylion007/openwebtext
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, from any working directory

from data.prepare import recipe

download_mb = 24400
vocab_size = 50257

if __name__ == '__main__':
    recipe(__file__, __doc__, 'Skylion007/openwebtext', {None: '*train-*-of-*.parquet'}, 9_040_000_000, val_fraction=0.0005)
