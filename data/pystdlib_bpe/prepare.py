"""The text of pystdlib in tokens of a byte-level BPE trained on its train files: 3.5 bytes a token, 4096 ids, without a download.

    python data/pystdlib_bpe/prepare.py [--out_dir=DIR]

The same files are train and val, each ended by <|endoftext|>, so a loss in bits per byte compares with that of pystdlib. Writes 7 MB in ten seconds;
needs pip install tokenizers.
"""
import platform
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, from any working directory

import numpy as np

from data.loader import write_dataset
from data.pystdlib.prepare import divide, sources
from data.source import run
from data.tokenizer import train_bpe

download_mb = 0
vocab_size = 4096


def prepare(out_dir):
    files = {split: [text.decode() for text in texts] for split, texts in divide(sources(Path(sysconfig.get_path('stdlib')))[0]).items()}
    tokenizer = train_bpe(files['train'], vocab_size)
    splits = {split: np.concatenate([np.append(tokenizer.encode_corpus(text), tokenizer.eot) for text in files[split]]) for split in files}
    write_dataset(out_dir, splits, {
        'vocab_size': tokenizer.vocab_size, 'tokenizer': tokenizer.spec, 'python_version': platform.python_version(),
        'bytes': {split: sum(len(text.encode()) for text in files[split]) for split in files}})
    print(', '.join(f'{split}: {len(ids):,} tokens' for split, ids in splits.items()))


if __name__ == '__main__':
    run(prepare, __file__, __doc__, takes_input=False)
