"""TinyStories: 2,119,719 short stories in the words of a four-year-old, written by GPT-3.5 and GPT-4, for models of a few million parameters.

    python data/tinystories/prepare.py [--tokenizer=gpt2] [--input=PATH] [--val_input=PATH] [--out_dir=DIR]

Downloads 1.0 GB (5 parquet files, by huggingface_hub and pyarrow), one at a time, and writes about 1 GB of 1.9 GB of text; val is its own, of
21,990 stories. https://arxiv.org/abs/2305.07759, https://huggingface.co/datasets/roneneldan/TinyStories
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, from any working directory

from data.prepare import recipe

download_mb = 1001
vocab_size = 50257

if __name__ == '__main__':
    recipe(__file__, __doc__, 'roneneldan/TinyStories', {'train': 'data/train-*.parquet', 'val': 'data/validation-*.parquet'}, 500_000_000)
