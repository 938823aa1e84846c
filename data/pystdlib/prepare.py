"""The Python standard library's own source, one id a byte: about 12 MB from the running interpreter, without a download.

    python data/pystdlib/prepare.py [--out_dir=DIR]

Takes every .py file of the library but tests, installed packages and bundled wheels; each ends in a 0 byte. A file is
validation text where crc32(path) % 20 == 0, so it stays on its side whatever the version of Python. Writes 24 MB:
train.bin, val.bin and meta.json.
"""
import platform
import sys
import sysconfig
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, from any working directory

from data.loader import write_dataset
from data.source import run

download_mb = 0
vocab_size = 256

# test code is half of the library and repeats itself; the others hold what is not the library's, or not source
LEFT_OUT = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__', '_bundled', '_vendor'}


def sources(stdlib):
    """(path relative to stdlib, bytes) of each source file, sorted by path, and the number skipped as not UTF-8."""
    found, skipped = [], 0
    for path in sorted(p.relative_to(stdlib).as_posix() for p in stdlib.rglob('*.py') if p.is_file()):
        if LEFT_OUT.isdisjoint(path.split('/')):
            source = (stdlib / path).read_bytes()
            try:
                source.decode('utf-8')
                found.append((path, source))
            except UnicodeDecodeError:
                skipped += 1
    if not found:
        raise ValueError(f'{stdlib} holds no .py files, so this Python came without its sources: run it with another one')
    return found, skipped


def divide(found):
    """{'train', 'val': the bytes of each file} of what sources found."""
    return {split: [source for path, source in found if (zlib.crc32(path.encode()) % 20 == 0) == (split == 'val')] for split in ('train', 'val')}


def prepare(out_dir):
    found, skipped = sources(Path(sysconfig.get_path('stdlib')))
    files = divide(found)
    splits = {split: b''.join(source + b'\0' for source in files[split]) for split in files}
    write_dataset(out_dir, splits, {
        'vocab_size': 256, 'tokenizer': {'name': 'byte'}, 'python_version': platform.python_version(),
        'n_files': {split: len(files[split]) for split in files},
        'bytes': {split: sum(map(len, files[split])) for split in files}})
    print(f'Python {platform.python_version()}: {len(found)} files, {sum(map(len, splits.values())) / 1e6:.1f} MB '
          f'({skipped} not UTF-8, skipped); train has {len(splits["train"]):,} tokens, val has {len(splits["val"]):,} tokens')


if __name__ == '__main__':
    run(prepare, __file__, __doc__, takes_input=False)
