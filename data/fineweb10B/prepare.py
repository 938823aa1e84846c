"""FineWeb, 10 billion tokens of web pages, as llm.c's ready-made shards in GPT-2's tokens.

    python data/fineweb10B/prepare.py [--shards=103] [--input=FOLDER] [--out_dir=DIR]

Downloads val and 103 shards of 100 million tokens, 200 MB each and 21 GB in all, by
huggingface_hub; --shards=9 is enough for 124M parameters on 0.9 billion tokens. An interrupted
download resumes. --input takes a folder of such shards.
https://huggingface.co/datasets/kjj0/fineweb10B-gpt2
"""
import functools
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

from data.folder import meta_json
from data.shards import check_shard, crc32
from data.source import add_out_dir, hub_files, script_parser
from engine.common import UserError, replacing

download_mb = 20800
vocab_size = 50257
REPO = 'kjj0/fineweb10B-gpt2'


def prepare(out_dir, shards, input=None):
    """Collect every shard, checked, in out_dir/unfinished before the first gets its final name."""
    folder = out_dir / 'unfinished'
    names = ['fineweb_val_000000.bin']
    names += [f'fineweb_train_{n:06d}.bin' for n in range(1, shards + 1)]
    fetch = copies(names, input) if input else downloads(names)
    (folder / 'download').mkdir(parents=True, exist_ok=True)
    paths = []
    for number, name in enumerate(names, 1):
        path = folder / name.removeprefix('fineweb_')
        final = out_dir / path.name
        if not path.exists() and not final.exists():
            fetched = fetch[name](folder / 'download')
            check_shard(fetched, {}, 1, {})
            os.replace(fetched, path)
            print(f'{number}/{len(names)} {path.name}', flush=True)
        paths.append(path if path.exists() else final)  # a kill may have come during the renames
    files = {path.name: describe(path) for path in paths}
    with replacing(out_dir / 'meta.json') as f:
        f.write(meta_json({'vocab_size': vocab_size, 'tokenizer': {'name': 'gpt2'},
                           'dtype': 'uint16', 'files': files}))
    for path in paths:
        os.replace(path, out_dir / path.name)
    shutil.rmtree(folder)
    n_tokens = sum(entry['tokens'] for entry in files.values())
    print(f'{out_dir}: {len(files)} shards, {n_tokens:,} tokens')


def copies(names, input):
    """Return {name: function that copies this shard into a folder and returns its path}."""
    return {name: functools.partial(copy, input / name) for name in names}


def copy(path, folder):
    return Path(shutil.copy(path, folder))


def downloads(names):
    """Return {name: function that downloads this shard into a folder and returns its path}."""
    listed = {Path(s.name).name: s for s in hub_files(REPO, {None: 'fineweb_*.bin'})}
    for name in names:
        if name not in listed:
            raise UserError(f'there is no {name}, only {len(listed) - 1} shards: a lower --shards')
    size = sum(listed[name].size for name in names)
    print(f'{len(names)} files, {size / 1e9:.1f} GB to download and of disk', flush=True)
    return {name: listed[name].fetch for name in names}


def describe(path):
    """Return the entry of a shard in meta.json."""
    stat = path.stat()
    n_tokens = check_shard(path, {}, 1, {}).n_tokens
    return {'tokens': n_tokens, 'crc32': crc32(path, stat.st_size, stat.st_mtime_ns)}


def main():
    parser = script_parser(__file__, __doc__)
    add_out_dir(parser, __file__)
    parser.add_argument('--shards', type=int, default=103,
                        help='of train, from the first on (103, all)')
    parser.add_argument('--input', metavar='FOLDER', type=Path,
                        help='a folder of such shards instead of the download')
    args = parser.parse_args()
    if args.shards < 1:
        parser.error(f'argument --shards: {args.shards} is less than 1')
    try:
        prepare(**vars(args))
    except (OSError, UserError):
        if args.input:
            shutil.rmtree(args.out_dir / 'unfinished', ignore_errors=True)
        raise


if __name__ == '__main__':
    main()
