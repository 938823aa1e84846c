"""SlimPajama, 627 billion tokens of web, books, code and papers, cleaned and without repetitions (RedPajama's).

    python data/slimpajama_627b/prepare.py --tokenizer=PATH/tokenizer.json [--input=PATH] [--val_input=PATH] [--out_dir=DIR]

Downloads 895 GB (59,166 files of zstd JSON lines, by huggingface_hub and zstandard), one at a time, and writes about 1,250 GB; val is its own,
of 500 million tokens. --tokenizer: gpt2, or LLaMA's tokenizer.json. https://huggingface.co/datasets/cerebras/SlimPajama-627B
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, from any working directory

from data.prepare import recipe

download_mb = 895000
vocab_size = 50257

if __name__ == '__main__':
    recipe(__file__, __doc__, 'cerebras/SlimPajama-627B', {'train': 'train/*.jsonl.zst', 'val': 'validation/*.jsonl.zst'}, 627_000_000_000)
