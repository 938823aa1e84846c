"""The Python standard library's own source, one id per byte: about 12 MB, without a download.

    python data/pystdlib/prepare.py [--out_dir=DIR]

Takes every .py file of the running interpreter's library except tests, installed packages and
bundled wheels; each ends in a 0 byte. A file is val where crc32(path) % 20 == 0, so it stays on its
side whatever the version of Python. Writes 24 MB: train.bin, val.bin and meta.json.
"""
import platform
import sys
import sysconfig
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

from data.folder import write_dataset
from data.source import small_parser
from engine.common import UserError

download_mb = 0
vocab_size = 256

# Test code is half of the library and repeats itself. The others are not the library's own source.
LEFT_OUT = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__',
            '_bundled', '_vendor'}


def sources(stdlib):
    """
    Return [(path relative to stdlib, bytes)] of the source files, sorted by path, and the number of
    files skipped because they are not UTF-8.
    """
    found, skipped = [], 0
    paths = [p.relative_to(stdlib).as_posix() for p in stdlib.rglob('*.py') if p.is_file()]
    for path in sorted(paths):
        if LEFT_OUT.isdisjoint(path.split('/')):
            source = (stdlib / path).read_bytes()
            try:
                source.decode('utf-8')
                found.append((path, source))
            except UnicodeDecodeError:
                skipped += 1
    if not found:
        problem = f'{stdlib} holds no .py files, so this Python came without its sources'
        raise UserError(f'{problem}: run it with another one')
    return found, skipped


def divide(found):
    """Divide files into {'train': [bytes of each file], 'val': ...}."""
    splits = {'train': [], 'val': []}
    for path, source in found:
        split = 'val' if zlib.crc32(path.encode()) % 20 == 0 else 'train'
        splits[split].append(source)
    return splits


def prepare(out_dir):
    found, skipped = sources(Path(sysconfig.get_path('stdlib')))
    files = divide(found)
    splits = {split: b''.join(f + b'\0' for f in files[split]) for split in files}
    version = platform.python_version()
    write_dataset(out_dir, splits, {
        'vocab_size': 256, 'tokenizer': {'name': 'byte'}, 'python_version': version,
        'n_files': {split: len(files[split]) for split in files},
        'bytes': {split: sum(map(len, files[split])) for split in files}})
    train, val = len(splits['train']), len(splits['val'])
    print(f'Python {version}: {len(found)} files, {(train + val) / 1e6:.1f} MB '
          f'({skipped} not UTF-8, skipped); train has {train:,} tokens, val has {val:,} tokens')


if __name__ == '__main__':
    prepare(**vars(small_parser(__file__, __doc__, takes_input=False).parse_args()))
