"""A random hundredth of SlimPajama: about 6 billion tokens of web, books, code and papers.

    python data/slimpajama_6b/prepare.py --tokenizer=PATH/tokenizer.json [--input=PATH]
        [--val_input=PATH] [--out_dir=DIR]

Downloads 14 GB (48 parquet files of 290 MB and its own val, by huggingface_hub and pyarrow), one at
a time, and writes about 12 GB. --tokenizer: gpt2, or LLaMA's tokenizer.json.
https://huggingface.co/datasets/DKYoon/SlimPajama-6B
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

from data.prepare import prepare_from_hub, recipe_parser

download_mb = 14000
vocab_size = 50257
takes_tokenizer = True

if __name__ == '__main__':
    args = recipe_parser(__file__, __doc__).parse_args()
    files = {'train': 'data/train-*.parquet', 'val': 'data/validation-*.parquet'}
    prepare_from_hub(args, 'DKYoon/SlimPajama-6B', files,
                     tokens=6_000_000_000, download_mb=download_mb)
