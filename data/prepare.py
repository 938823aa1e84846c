"""Make any text a data set: text files, folders, JSON lines and parquet, encoded on all cores.

    python data/prepare.py --input=book.txt --out=book --tokenizer=byte
    python data/prepare.py --input=notes/ --input=more.jsonl.gz --out=notes --tokenizer=gpt2
    python data/prepare.py --input=corpus/ --glob='*.parquet' --field=text --out=corpus \\
        --tokenizer=llama/tokenizer.json
    python data/prepare.py --input=corpus.txt --out=corpus --tokenizer=bpe --vocab_size=4096
    python data/prepare.py --chat=talks.jsonl --out=talks --tokenizer=byte
    python train.py --dataset=book

Files may be of any size; text and JSON lines may also be packed as .gz or .zst. A text file is one
document; so is each line of .jsonl and each row of .parquet, and one above --max_document_mb is
skipped. An end-of-text token follows each document (--tokenizer=char has none). One document in
every 1 / val_fraction is held out as val, chosen by a hash of its number. If there are fewer text
files than that, the end of each is val. With --chat each line is a conversation, of which a model
learns the assistant's replies only; docs/chat.md shows the formats.

Writes data/OUT/train_00000.bin, ..., val_00000.bin and meta.json.

A command that was killed resumes when it is run again, and writes the same bytes. On several
machines each runs it with --part=K/N, and one of them at the end with --join=N.
"""
import argparse
import functools
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root

from data.chat import CHATML, folder_template, with_separator
from data.documents import KINDS, TEXT, find_sources, kind_of
from data.encode import RESUME
from data.folder import DTYPES, HERE, dtype_for
from data.parts import Join, Part, files_of, folder_of
from data.preparation import MAX_DOCUMENT_MB, Preparation, say
from data.source import add_out_dir, hub_files, script_parser
from data.tokenizer import tokenizer_by_name
from engine.common import UserError

PLAIN_TEXT = '', 'txt', 'text', 'md'  # ends of names that say that a file is text


def above(kind, low, high=2**31):
    def number(text):
        value = float(text)
        if not low < value < high or (kind is int and value != int(value)):
            raise ValueError
        return kind(value)
    number.__name__ = f'number above {low} and below {high}'  # argparse prints it
    return number


def fraction(text):
    value = above(float, 0)(text)
    if value > 0.5:
        problem = f'{value:g} would leave less than half of the text for training'
        raise argparse.ArgumentTypeError(problem)
    return value


def part(text):
    number, n_parts = map(int, text.split('/'))
    if not 1 <= number <= n_parts < 10**5:
        raise ValueError
    return number, n_parts


part.__name__ = 'part such as 3/16'  # argparse prints it


def add_text_flags(parser):
    add = parser.add_argument
    add('--field', default='text',
        help='key of JSON lines or column of parquet that holds the text (text)')
    add('--val_fraction', type=fraction,
        help='share of the text that is val; by default 10 MB of it, but from 0.0005 to 0.1')
    add('--tokens_per_shard', type=above(int, 0), default=10**8, help='(1e8)')
    add('--bad_bytes', choices=('strict', 'replace'), default='strict',
        help='whether bytes that are not UTF-8 are an error or become U+FFFD')
    add('--max_document_mb', type=above(float, 0, 10**6), default=MAX_DOCUMENT_MB,
        help='skip lines of JSON and rows of parquet above this, because each has to be in memory '
             'as a whole, 130 times over at worst; text files may have any size (16)')
    add('--processes', type=above(int, -1, 1025), default=0, help='0: one per core')
    add('--overwrite', action='store_true', help='replace another data set that is there')
    machines = parser.add_mutually_exclusive_group()
    machines.add_argument('--part', type=part, metavar='K/N',
                          help='encode only the Kth of N parts of the files, on a machine of N')
    machines.add_argument('--join', type=above(int, 0, 10**5), metavar='N',
                          help='make the data set of N parts that --part has encoded')


def named_tokenizer(name, vocab_size=None):
    """
    Return the Tokenizer of a name or file, or 'char' or 'bpe' themselves, which are made from the
    text.
    """
    if vocab_size is not None and name != 'bpe':
        raise UserError(f'--vocab_size is for --tokenizer=bpe, not for {name}, which has its own')
    if name == 'bpe' and vocab_size is None:
        raise UserError('--tokenizer=bpe needs --vocab_size, 4096 say')
    if name in ('char', 'bpe'):
        return name
    return tokenizer_by_name(name)


def prepare(args, sources, data_dir, tokenizer, vocab_size=None, chat=None):
    """Run a Preparation with the flags of add_text_flags."""
    note_other_kinds(sources)
    kind = Preparation
    if args.part:
        kind = functools.partial(Part, part=args.part)
    elif args.join:
        kind = functools.partial(Join, n_parts=args.join)
    preparation = kind(
        sources, data_dir, tokenizer, vocab_size, field=args.field,
        val_fraction=args.val_fraction, tokens_per_shard=args.tokens_per_shard,
        bad_bytes=args.bad_bytes, processes=args.processes, max_document_mb=args.max_document_mb,
        chat=chat)
    try:
        preparation.run(args.overwrite)
    except KeyboardInterrupt:
        print(f'\nstopped; {RESUME}', file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as e:
        if e.errno is None or e.filename:
            raise
        raise UserError(f'{data_dir}: {e}; {RESUME}') from e  # a full disk: it names no file


def note_other_kinds(sources):
    """Print a NOTE on files that are read as plain text although their names suggest otherwise."""
    names = [source.name.removesuffix('.gz').removesuffix('.zst')
             for source in sources if kind_of(source.name)[0] is TEXT]
    ends = {os.path.splitext(name)[1].lower().removeprefix('.') for name in names}
    others = ', '.join(f'.{end}' for end in sorted(ends.difference(PLAIN_TEXT)))
    if others:
        say(f'NOTE: files that end in {others:.200} are read as plain text, each as one document '
            'with everything in it; .jsonl and .parquet give one document per row')


def recipe_parser(script, doc):
    """Return the parser of a data set on Hugging Face. Its prepare.py may add its own flags."""
    parser = script_parser(script, doc)
    add_text_flags(parser)
    add_out_dir(parser, script)
    parser.add_argument('--input', action='append', default=[], metavar='PATH',
                        help='local files of the same format instead of the download')
    parser.add_argument('--val_input', action='append', default=[], metavar='PATH',
                        help='local files for val')
    parser.add_argument('--tokenizer', default='gpt2',
                        help="gpt2 or another of tiktoken's, or a tokenizer.json (gpt2)")
    return parser


def prepare_from_hub(args, repo, splits, tokens, download_mb):
    """
    Prepare a data set on Hugging Face. Only one file at a time is on the disk; it is removed once
    encoded. `splits` is {split: pattern} of the files, or {None: pattern} to divide them. `tokens`
    and `download_mb` are the approximate sizes, for the check of the disk.
    """
    if args.tokenizer in ('char', 'bpe'):
        problem = f'--tokenizer={args.tokenizer} would be made of the whole text'
        raise UserError(f'{problem}, and only data/prepare.py reads a text twice')
    tokenizer = named_tokenizer(args.tokenizer)
    if args.input:
        sources = given_sources(args, args.out_dir)
    else:
        sources = hub_files(repo, splits)
        first, end = files_of(args.part or (1, 1), len(sources))
        own = sources[first:end]
        tokens *= sum(source.size for source in own) / 1e6 / download_mb
        folder = folder_of(args.out_dir, *args.part) if args.part else args.out_dir
        done = [folder / 'unfinished', folder / 'meta.json', args.out_dir / 'meta.json']
        begun = any(path.exists() for path in done)  # and has taken some of the disk
        if not args.join:
            check_disk(folder, repo, own, tokens, dtype_for(tokenizer.vocab_size), begun)
    prepare(args, sources, args.out_dir, tokenizer)


def given_sources(args, out, glob='*'):
    """Return the Sources of --input and --val_input."""
    split = 'train' if args.val_input else None
    train = find_sources(args.input, split, glob, out)
    return train + find_sources(args.val_input, 'val', glob, out)


def check_disk(out_dir, repo, sources, tokens, dtype, begun):
    """
    Print how much the download and the data set take. Raise UserError if the disk is too small for
    a preparation that has not begun.
    """
    sizes = sorted(source.size for source in sources)
    in_transit = sum(sizes[-2:])  # one file is encoded while the next one is downloaded
    needed = tokens * DTYPES[dtype].itemsize + in_transit
    existing = next(path for path in (out_dir, *out_dir.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    say(f'{repo}: {len(sources):,} files, {sum(sizes) / 1e9:,.1f} GB to download, '
        f'about {needed / 1e9:,.0f} GB of disk in the end ({free / 1e9:,.0f} GB free), '
        f'{in_transit / 1e9:,.1f} GB of them for files in transit')
    if free < needed and not begun:
        problem = f'{out_dir} has {free / 1e9:,.0f} GB free, and about {needed / 1e9:,.0f} GB'
        raise UserError(f'{problem} are needed: --out_dir takes another disk')


def chat_settings(args, tokenizer):
    """Make --chat the input, and return chat_template and chat_separator for meta.json."""
    if args.input:
        raise UserError('--chat is conversations and --input text: leave one of them out')
    others = [path for path in args.chat if kind_of(path)[0] != KINDS['jsonl']]
    if others:
        raise UserError(f'--chat={others[0]} is no file of JSON lines, .jsonl or .jsonl.gz')
    if isinstance(tokenizer, str):
        raise UserError(f"--tokenizer={tokenizer} is made from text: with --chat, give the base "
                        "model's tokenizer")
    args.input, args.tokens_per_shard = args.chat, 2**62  # a shard ends with a conversation
    template = folder_template(args.tokenizer) or CHATML
    template, separator = with_separator(template, tokenizer)
    return {'chat_template': template, 'chat_separator': separator}


def main():
    parser = script_parser(__file__, __doc__)
    add_text_flags(parser)
    add = parser.add_argument
    add('paths', nargs='*', metavar='PATH', help='the same as --input=PATH')
    add('--input', action='append', default=[], metavar='PATH',
        help='a file or a folder of text; may be given several times')
    add('--chat', action='append', default=[], metavar='FILE.jsonl',
        help='conversations instead of text: one JSON object per line')
    add('--val_input', action='append', default=[], metavar='PATH',
        help='text for val, which makes all of --input train')
    add('--glob', default='*',
        help="files to take from folders, such as '*.txt' (all but hidden ones)")
    add('--out', required=True, metavar='NAME',
        help='the folder to write, in data/, or anywhere if it has a slash')
    add('--tokenizer', default='gpt2',
        help="byte, char, bpe (trained on the text), gpt2 or another of tiktoken's, "
             'or the path of a tokenizer.json (gpt2)')
    add('--vocab_size', type=above(int, 0, 2**24 + 1), help='of --tokenizer=bpe')
    args = parser.parse_args()
    args.input += args.paths
    if not (args.input or args.chat):
        parser.error('no text given: --input=PATH')
    if args.out in ('', '.', '..'):
        remedy = '--out=NAME writes data/NAME, --out=./NAME a folder NAME here'
        parser.error(f'--out={args.out} is not the name of a data set: {remedy}')
    out = Path(args.out) if '/' in args.out else HERE / args.out
    tokenizer = named_tokenizer(args.tokenizer, args.vocab_size)
    chat = chat_settings(args, tokenizer) if args.chat else None
    prepare(args, given_sources(args, out, args.glob), out, tokenizer, args.vocab_size, chat)


if __name__ == '__main__':
    main()
