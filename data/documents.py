"""
Turn files of text into documents: find the files, read each kind, and decide which documents are
val. A long document comes in pieces, so no file is ever in memory as a whole.
"""
import functools
import json
import math
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from data.loader import permute
from engine.common import UserError, first_line, optional

PIECE = 2**18  # bytes: a longer text is encoded in pieces of about this size
NEAR = 2**9    # bytes: code has line breaks before unindented lines seldom, but spaces everywhere


class Source(NamedTuple):
    """A file to read."""
    name: str
    path: Path | None       # None: fetch(folder) downloads it and returns its path
    split: str | None       # 'train', 'val', or None to divide
    size: int               # bytes
    version: int | None     # the time of its last change, if it is a local file
    fetch: Callable | None = None


class Item(NamedTuple):
    """A document, or a piece of a long one."""
    content: bytes | str     # UTF-8 text, a str, or whatever parse() of its kind takes
    place: int               # the byte, line or row where it begins, for error messages
    read: int                # bytes of the file that were read so far
    continued: bool = False  # it continues the previous item
    ends: bool = True        # it ends its document
    split: str | None = None
    name: str = ''           # of the file
    too_long: bool = False   # it is longer than the limit, and its content was left out


class Kind(NamedTuple):
    """
    How one kind of file is read. read(path, field, limit) yields Items, those of documents above
    `limit` bytes without content and marked too_long. parse(content, field, bad_bytes) returns the
    text of one, as bytes or str; it runs in the processes that encode.
    """
    read: Callable
    parse: Callable = lambda content, field, bad_bytes: content


def find_sources(inputs, split, glob='*', out=None):
    """
    Return a Source for each file in `inputs`, which are files and folders. Files in folders must
    match `glob`, at any depth, and are sorted. The folder `out`, to which the data set is written,
    is skipped.
    """
    found = []
    for path in map(Path, inputs):
        paths = files_in(path, glob, out and Path(out).resolve()) if path.is_dir() else [path]
        for p in paths:
            kind, packed = kind_of(p.name)
            if kind.read is read_rows and packed:
                problem = f'{p} is parquet inside .{packed}, which is read from its end'
                raise UserError(f'{problem}: unpack it first')
            stat = p.stat()
            found.append(Source(str(p), p.resolve(), split, stat.st_size, stat.st_mtime_ns))
    return found


def files_in(folder, glob, out):
    paths = []
    inside_out = out and out in folder.resolve().parents  # otherwise everything would be skipped
    for path in sorted(folder.rglob(glob)):
        hidden = any(part.startswith('.') for part in path.relative_to(folder).parts)
        own = out and not inside_out and out in path.resolve().parents
        if path.is_file() and not hidden and not own:
            paths.append(path)
    if not paths:
        outside = f' outside {out}' if out else ''
        raise UserError(f'{folder} holds no file that matches {glob}{outside}')
    return paths


# ------------------------------------------------------------------------------------------------
# one function per kind of file

def read_text(path, field=None, limit=math.inf, cut=math.inf):
    """
    Yield the pieces of a text file, which is one document of any length. With `cut` it is two:
    train ends at the last good place before byte `cut`, and the rest is val.
    """
    text, start, split = b'', 0, 'train'
    for chunk, read in read_chunks(path):
        text += chunk
        while len(text) > PIECE:
            end = cut_before(text, PIECE)
            ends = split == 'train' and start + end >= cut
            if ends:
                end = cut_before(text, max(2, cut - start))
            yield Item(text[:end], start, read, start > 0, ends, split)
            text, start = text[end:], start + end
            split = 'val' if ends else split
    if split == 'train' and 2 <= cut - start < len(text):
        end = cut_before(text, cut - start)
        yield Item(text[:end], start, read, start > 0, True, split)
        text, start, split = text[end:], start + end, 'val'
    if text:
        yield Item(text, start, read, start > 0, True, split)


def read_lines(path, field, limit):
    """
    Yield the lines of a file of JSON lines, still as JSON, because other processes parse them.
    """
    number, line, read = 1, bytearray(), 0  # `line` holds no more than limit + 1 bytes
    for chunk, read in read_chunks(path):
        for n, part in enumerate(chunk.split(b'\n')):
            if n:
                yield from line_items(bytes(line), number, read, limit)
                number, line = number + 1, bytearray()
            line += part[:limit + 1 - len(line)]
    yield from line_items(bytes(line), number, read, limit)


def line_items(line, number, read, limit):
    if len(line) > limit:
        yield Item(b'', number, read, too_long=True)
    elif line.strip():
        yield Item(line, number, read)


def parse_json(line, field, bad_bytes):
    """Return what a field of a line of JSON holds, or all of the line if field is None."""
    text = line.decode('utf-8', bad_bytes)
    try:
        row = json.loads(text)
    except RecursionError:
        raise UserError('is JSON nested too deeply to be read') from None
    except ValueError as e:
        raise UserError(f'is not JSON ({getattr(e, "msg", e)})') from None
    if field is None:
        return row
    if not isinstance(row, dict):
        raise UserError(f'has no field {field!r}: --field names one')
    if field not in row:
        fields = ', '.join(map(repr, row))
        raise UserError(f'has no field {field!r}, but {fields}: --field names one')
    return row[field]


def read_rows(path, field, limit):
    """Yield the rows of a parquet file."""
    parquet = optional('pyarrow.parquet', 'a .parquet file')
    from pyarrow import ArrowException
    size, number = path.stat().st_size, 0
    try:
        with closing(parquet.ParquetFile(path)) as f:
            columns = f.schema_arrow.names
            if field not in columns:
                has = ', '.join(columns)
                raise UserError(f'{path} has no column {field!r}, but {has}: --field names one')
            for rows in f.iter_batches(batch_size=1000, columns=[field], use_threads=False):
                for text in rows.column(0).to_pylist():
                    number += 1
                    read = size * number // f.metadata.num_rows
                    too_long = isinstance(text, str) and len(text.encode()) > limit
                    yield Item('' if too_long else text, number, read, too_long=too_long)
    except ArrowException as e:
        problem = f'{path} is not a whole parquet file ({first_line(e):.100})'
        raise UserError(f'{problem}: fetch it again') from None


# Kinds by the end of a file's name. To add one, list it here with a function that yields Items.
TEXT = Kind(read_text)
KINDS = {
    'jsonl': Kind(read_lines, parse_json),
    'ndjson': Kind(read_lines, parse_json),
    'parquet': Kind(read_rows),
}


def kind_of(name):
    """Return (Kind, packed) for the name of a file; packed is 'gz', 'zst' or ''."""
    parts = name.lower().split('.')
    packed = parts.pop() if parts[-1] in ('gz', 'zst') else ''
    return KINDS.get(parts[-1], TEXT), packed


def text_of(item, field, bad_bytes):
    """
    Return the text of an item. UserError names the file and the place if there is no text or it is
    not UTF-8. The text of an item that is too long is empty.
    """
    if item.too_long:
        return ''
    kind, _ = kind_of(item.name)
    entry = f'{item.name}, entry {item.place},'
    try:
        content = kind.parse(item.content, field, bad_bytes)
        if isinstance(content, bytes):
            return content.decode('utf-8', bad_bytes)
        if not isinstance(content, str):
            raise UserError(f'has no text in field {field!r}')
        return content.encode('utf-8', bad_bytes).decode('utf-8')  # JSON can hold half a surrogate
    except UserError as e:
        raise UserError(f'{entry} {e}') from None
    except UnicodeError as e:
        if kind is TEXT:
            entry = f'{item.name}, byte {item.place + e.start},'
        remedy = 'convert it, or --bad_bytes=replace puts U+FFFD there'
        raise UserError(f'{entry} is not UTF-8 ({e.reason}): {remedy}') from None


# ------------------------------------------------------------------------------------------------
# reading and dividing

def read_chunks(path):
    """Yield (bytes, bytes of the file read so far) of a file, unpacked."""
    _, packed = kind_of(path.name)
    with open(path, 'rb') as f:
        if packed:
            yield from unpack(f, path, packed)
        else:
            while chunk := f.read(2**20):
                yield chunk, f.tell()


def unpack(f, path, packed):
    """
    Yield the same as read_chunks for a .gz or .zst file. Raise UserError if it is damaged or cut
    off.
    """
    problem, remedy = f'{path} is not a whole .{packed} file', 'fetch or pack it again'
    unpacker, whole, unpacked = make_unpacker(packed), True, bytearray()
    while chunk := f.read(2**10):  # .gz unfolds to at most 1 MB of it, .zst to 32 MB
        while chunk:
            try:
                unpacked += unpacker.decompress(chunk)
            except Exception as e:  # each library raises its own types
                raise UserError(f'{problem} ({e}): {remedy}') from None
            whole = unpacker.eof
            chunk = unpacker.unused_data if whole else b''
            if whole:  # another packed file may follow in the same file
                unpacker = make_unpacker(packed)
        if len(unpacked) >= 2**20:
            yield bytes(unpacked), f.tell()
            unpacked.clear()
    if unpacked:
        yield bytes(unpacked), f.tell()
    if not whole:
        raise UserError(f'{problem} (it ends too early): {remedy}')


def make_unpacker(packed):
    if packed == 'gz':
        return zlib.decompressobj(31)
    return optional('zstandard', 'a .zst file').ZstdDecompressor().decompressobj()


def cut_before(text, end):
    """
    Return where to divide the bytes of a text so that its parts have the tokens of the whole: the
    last place before `end` that follows a line break or, failing that, precedes a single space
    between printing characters, where common tokenizers divide it too. A place within NEAR bytes is
    better than one farther away. If there is none, divide it between any two characters.
    """
    for least in (max(0, end - NEAR), 0):
        for separator, keep in ((b'\n', 1), (b' ', 0)):
            at = end - 1
            while (at := text.rfind(separator, least, at)) > 0:
                if not text[at - 1:at].isspace() and text[at + 1] not in b' \t\r\n\v\f/':
                    return at + keep
    end -= 1
    while end > 1 and text[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end


def is_val(document, period):
    """
    Return whether a document, given by its number, is val: one of every `period` documents is,
    chosen by a hash.
    """
    block, place = divmod(document, period)
    return place == val_place(block, period)


@functools.lru_cache(2)
def val_place(block, period):
    return permute([0], period, block)[0]
