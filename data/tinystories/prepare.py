"""TinyStories: 2,119,719 short stories in simple words, for models of a few million parameters.

    python data/tinystories/prepare.py [--tokenizer=gpt2] [--input=PATH] [--val_input=PATH]
        [--out_dir=DIR]

GPT-3.5 and GPT-4 wrote them. Downloads 1.0 GB (5 parquet files, by huggingface_hub and pyarrow),
one at a time, and writes about 1 GB for 1.9 GB of text. It has a val split of its own, of 21,990
stories. https://arxiv.org/abs/2305.07759, https://huggingface.co/datasets/roneneldan/TinyStories
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

from data.prepare import prepare_from_hub, recipe_parser

download_mb = 1001
vocab_size = 50257
takes_tokenizer = True

if __name__ == '__main__':
    args = recipe_parser(__file__, __doc__).parse_args()
    files = {'train': 'data/train-*.parquet', 'val': 'data/validation-*.parquet'}
    prepare_from_hub(args, 'roneneldan/TinyStories', files,
                     tokens=500_000_000, download_mb=download_mb)
