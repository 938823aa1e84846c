"""FineWeb, 10 billion tokens of web pages, as llm.c's ready-made shards in GPT-2's tokens: nothing is left to encode.

    python data/fineweb10B/prepare.py [--shards=103] [--input=FOLDER] [--out_dir=DIR]

Downloads val and 103 shards of 100 million tokens, 200 MB each and 21 GB in all, by huggingface_hub; --shards=9 is enough for 124M parameters on
0.9 billion tokens. A stopped download goes on. --input takes a folder of such shards. https://huggingface.co/datasets/kjj0/fineweb10B-gpt2
"""
import argparse
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root, from any working directory

from data.loader import check_shard, crc32, write_files
from data.source import Parser, hub_files

download_mb = 20800
vocab_size = 50257


def prepare(out_dir, shards, input=None):
    """Every shard lies in out_dir/unfinished, checked, before the first has its final name."""
    folder, files = out_dir / 'unfinished', {}
    names = ['fineweb_val_000000.bin', *(f'fineweb_train_{n:06d}.bin' for n in range(1, shards + 1))]
    if input:
        fetch = {name: lambda _, name=name: Path(shutil.copy(input / name, folder / 'copy')) for name in names}
    else:
        listed = {name: (size, get) for _, name, size, get in hub_files('kjj0/fineweb10B-gpt2', {None: 'fineweb_*.bin'})}
        if missing := [name for name in names if name not in listed]:
            raise ValueError(f'there is no {missing[0]}, only {len(listed) - 1} shards: a lower --shards')
        fetch = {name: listed[name][1] for name in names}
        print(f'{len(names)} files, {sum(listed[name][0] for name in names) / 1e9:.1f} GB to download and of disk', flush=True)
    (folder / 'copy').mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        path = folder / name.removeprefix('fineweb_')
        if not path.exists() and not (out_dir / path.name).exists():
            fetched = fetch[name](folder / 'download')
            check_shard(fetched, {}, 1, {})
            os.replace(fetched, path)
            print(f'{number + 1}/{len(names)} {path.name}', flush=True)
    for name in names:
        path = folder / name.removeprefix('fineweb_')
        path = path if path.exists() else out_dir / path.name  # killed while they were renamed
        stat, (_, header_bytes, n_tokens) = path.stat(), check_shard(path, {}, 1, {})
        files[path.name] = {'tokens': n_tokens, 'crc32': crc32(path, stat.st_size, stat.st_mtime_ns)}
    meta = {'vocab_size': vocab_size, 'tokenizer': {'name': 'gpt2'}, 'dtype': 'uint16', 'files': files}
    write_files({out_dir / 'meta.json': (json.dumps(meta, indent=1) + '\n').encode()})
    for name in files:
        if (folder / name).exists():
            os.replace(folder / name, out_dir / name)
    shutil.rmtree(folder)
    print(f'{out_dir}: {len(files)} shards, {sum(entry["tokens"] for entry in files.values()):,} tokens')


if __name__ == '__main__':
    parser = Parser(prog='data/fineweb10B/prepare.py', description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shards', type=int, default=103, help='of train, from the first on (103, all)')
    parser.add_argument('--input', metavar='FOLDER', type=Path, help='a folder of such shards instead of the download')
    parser.add_argument('--out_dir', metavar='DIR', type=Path, default=Path(__file__).resolve().parent, help='where to write, by default beside the script')
    args = parser.parse_args()
    if args.shards < 1:
        parser.error(f'argument --shards: {args.shards} is less than 1')
    try:
        prepare(args.out_dir, args.shards, args.input)
    except (OSError, ValueError) as e:
        if args.input:
            shutil.rmtree(args.out_dir / 'unfinished', ignore_errors=True)
        parser.exit(2, f"{parser.prog}: {' '.join(str(e).split())}\n")
