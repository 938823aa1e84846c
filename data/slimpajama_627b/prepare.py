"""SlimPajama, 627 billion tokens of web, books, code and papers: RedPajama deduplicated.

    python data/slimpajama_627b/prepare.py --tokenizer=PATH/tokenizer.json [--input=PATH]
        [--val_input=PATH] [--out_dir=DIR]

Downloads 895 GB (59,166 files of zstd JSON lines, by huggingface_hub and zstandard), one at a time,
and writes about 1,250 GB. It has a val split of its own, of 500 million tokens. --tokenizer: gpt2,
or LLaMA's tokenizer.json. https://huggingface.co/datasets/cerebras/SlimPajama-627B
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

from data.prepare import prepare_from_hub, recipe_parser

download_mb = 895000
vocab_size = 50257
takes_tokenizer = True

if __name__ == '__main__':
    args = recipe_parser(__file__, __doc__).parse_args()
    files = {'train': 'train/*.jsonl.zst', 'val': 'validation/*.jsonl.zst'}
    prepare_from_hub(args, 'cerebras/SlimPajama-627B', files,
                     tokens=627_000_000_000, download_mb=download_mb)
