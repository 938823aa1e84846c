"""Any text as a data set: files, folders, JSON lines, these also as .gz or .zst, and parquet, of any size, encoded on all cores.

    python data/prepare.py --input=book.txt --out=book --tokenizer=byte
    python data/prepare.py --input=notes/ --input=more.jsonl.gz --out=notes --tokenizer=gpt2
    python data/prepare.py --input=corpus/ --glob='*.parquet' --field=text --out=corpus --tokenizer=llama/tokenizer.json
    python data/prepare.py --input=corpus.txt --out=corpus --tokenizer=bpe --vocab_size=4096
    python train.py --dataset=book

Writes data/OUT/train_00000.bin, ..., val_00000.bin and meta.json. A text file is one document, a line of .jsonl or a row of .parquet
is another, and an end-of-text token follows each (characters have none). One document of every 1 / val_fraction is held out as val, chosen by
a hash of its number; fewer text files than that are divided instead, the end of each for val.

Killed at any moment, the same command goes on where it was and writes the same bytes; until then everything is in data/OUT/unfinished.
"""
import argparse
import collections
import concurrent.futures
import fcntl
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root, from any working directory

import numpy as np

from data.loader import DTYPES, permute, prepare_facts, read_meta, write_files
from data.source import Parser, hub_files
from data.tokenizer import get_tokenizer, tokenizer_from_file, train_bpe

HERE = Path(__file__).resolve().parent
PIECE, BATCH = 2**18, 2**20  # bytes: a long text is encoded in pieces of the one, a process is sent documents of about the other
BPE_BYTES = 3 * 10**7  # of text that a BPE is trained on, from all over it: the library takes 200 MB of memory for these

# A file to read. path: a Path, or None for one that fetch(folder) downloads; split: 'train', 'val', or None to divide; version: of its time, if it is local
Source = collections.namedtuple('Source', 'name path split size version fetch', defaults=[None])


# ---------------------------------------------------------------------------------------------------------------------
# reading: files to documents

def find_sources(inputs, split, glob='*', out=None):
    """
    A Source for each file that inputs name, of folders those of the pattern glob, at any depth, sorted. ValueError or OSError if there is none.
    out: the folder to write; as part of an input folder it would be text of its own making, so that is left out.
    """
    found, out = [], out and Path(out).resolve()
    for path in map(Path, inputs):
        paths = [path] if not path.is_dir() else sorted(p for p in path.rglob(glob) if p.is_file() and not any(
            part.startswith('.') for part in p.relative_to(path).parts))
        if path.is_dir() and out and out not in path.resolve().parents:
            paths = [p for p in paths if out not in p.resolve().parents]
        if not paths:
            raise ValueError(f'{path} holds no file that matches {glob}' + f', outside {out}' * bool(out))
        for p in paths:
            if kind_of(p.name)[0] == 'parquet' and kind_of(p.name)[1]:
                raise ValueError(f'{p} is parquet inside .{kind_of(p.name)[1]}, which is read from its end: unpack it first')
            stat = p.stat()
            found.append(Source(str(p), p.resolve(), split, stat.st_size, stat.st_mtime_ns))
    return found


def kind_of(name):
    """('text', 'jsonl' or 'parquet', '' or 'gz' or 'zst') by the name of a file."""
    parts = name.lower().split('.')
    packed = parts.pop() if parts[-1] in ('gz', 'zst') else ''
    return {'jsonl': 'jsonl', 'ndjson': 'jsonl', 'parquet': 'parquet'}.get(parts[-1], 'text'), packed


def unpacker(packed):
    if packed == 'gz':
        return zlib.decompressobj(31)
    try:
        import zstandard
    except ImportError:
        raise ValueError('a .zst file is read by the library zstandard: pip install zstandard') from None
    return zstandard.ZstdDecompressor().decompressobj()


def read_chunks(path):
    """Yield (bytes, how far the file was read) of a file, unpacked. ValueError for a packed file that is damaged or cut."""
    packed = kind_of(path.name)[1]
    with open(path, 'rb') as f:
        if not packed:
            while chunk := f.read(2**20):
                yield chunk, f.tell()
            return
        unpack, whole = unpacker(packed), True
        while chunk := f.read(2**17):
            while chunk:
                try:
                    yield unpack.decompress(chunk), f.tell()
                except Exception as e:  # each library has its own
                    raise ValueError(f'{path} is not a whole .{packed} file ({e}): fetch or pack it again') from None
                whole, chunk = unpack.eof, unpack.unused_data if unpack.eof else b''
                if whole:  # there may be another one behind
                    unpack = unpacker(packed)
        if not whole:
            raise ValueError(f'{path} is not a whole .{packed} file (it ends too early): fetch or pack it again')


def cut_before(text, end):
    """
    Where to divide the bytes of a text so that its parts have the same tokens: the last place before end that follows a line break, or
    else precedes a space, alone among printing characters, where the encodings of this world divide it too; or between any two characters.
    """
    for separator, keep in ((b'\n', 1), (b' ', 0)):
        at = end - 1
        while (at := text.rfind(separator, 0, at)) > 0:
            if not text[at - 1:at].isspace() and text[at + 1] not in b' \t\r\n\v\f/':
                return at + keep
    end -= 1
    while end > 1 and text[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end


def read_text(path, cut):
    """Items of a text file: see read_items. What begins at byte cut or later is val; None: one split."""
    text, start, held_out = b'', 0, False
    for chunk, position in read_chunks(path):
        text += chunk
        while len(text) > PIECE:
            end = cut_before(text, PIECE)
            ends = cut is not None and not held_out and start + end >= cut
            if ends:
                end = cut_before(text, max(2, cut - start))
            yield text[:end], 'val' if held_out else 'train', start > 0, ends, start, position
            text, start, held_out = text[end:], start + end, held_out or ends
    if cut is not None and not held_out and 2 <= cut - start < len(text):
        end = cut_before(text, cut - start)
        yield text[:end], 'train', start > 0, True, start, position
        text, start, held_out = text[end:], start + end, True
    if text:
        yield text, 'val' if held_out else 'train', start > 0, True, start, position


def read_lines(path):
    """Items of a file of JSON lines, still as JSON: parsing is the other processes' work."""
    rest, number = b'', 0
    for chunk, position in read_chunks(path):
        *lines, rest = (rest + chunk).split(b'\n')
        for number, line in enumerate(lines, number + 1):
            if line.strip():
                yield line, None, False, True, number, position
    if rest.strip():
        yield rest, None, False, True, number + 1, position


def read_rows(path, field):
    """Items of a parquet file, a row each."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError('a .parquet file is read by the library pyarrow: pip install pyarrow') from None
    size, number = path.stat().st_size, 0
    try:
        with closing(pyarrow.parquet.ParquetFile(path)) as f:
            if field not in f.schema_arrow.names:
                raise ValueError(f'{path} has no column {field!r}, but {", ".join(f.schema_arrow.names)}: --field names one')
            for rows in f.iter_batches(batch_size=1000, columns=[field], use_threads=False):
                for number, text in enumerate(rows.column(0).to_pylist(), number + 1):
                    yield text, None, False, True, number, size * number // f.metadata.num_rows
    except pyarrow.ArrowException as e:
        raise ValueError(f'{path} is not a whole parquet file ({str(e).splitlines()[0]:.100}): fetch it again') from None


def read_items(path, field, cut):
    """
    Yield (content, split or None, continued, ends, place, how far the file was read) of a file: bytes of a text or of a JSON line, or a str.
    continued: it goes on with a document; ends: the document ends with it; place: byte, line or row, to name it by.
    """
    kind = kind_of(path.name)[0]
    return read_text(path, cut) if kind == 'text' else read_lines(path) if kind == 'jsonl' else read_rows(path, field)


def text_of(content, name, place, field, bad_bytes):
    """The str of an item. ValueError names file and place of what is not UTF-8, not JSON or has no text."""
    try:
        if kind_of(name)[0] == 'jsonl':
            row = json.loads(content.decode('utf-8', bad_bytes))
            if not isinstance(row, dict) or field not in row:
                raise ValueError(f'has no field {field!r}' + (f', but {", ".join(map(repr, row))}' if isinstance(row, dict) else '') + ': --field names one')
            content = row[field]
        if isinstance(content, bytes):
            return content.decode('utf-8', bad_bytes)
        if not isinstance(content, str):
            raise ValueError(f'has no text in field {field!r}')
        return content.encode('utf-8', bad_bytes).decode('utf-8')  # JSON can hold half a pair of surrogates
    except UnicodeError as e:
        where = f'byte {place + e.start}' if isinstance(e, UnicodeDecodeError) and kind_of(name)[0] == 'text' else f'entry {place}'
        raise ValueError(f'{name}, {where}, is not UTF-8 ({e.reason}): convert it, or --bad_bytes=replace puts U+FFFD there') from None
    except RecursionError:
        raise ValueError(f'{name}, entry {place}, is JSON nested too deeply to be read') from None
    except ValueError as e:
        raise ValueError(f'{name}, entry {place}, ' + (f'is not JSON ({e.msg})' if isinstance(e, json.JSONDecodeError) else str(e))) from None


# ---------------------------------------------------------------------------------------------------------------------
# encoding: documents to ids, in many processes

def start_process(spec, settings):
    """What a process sets up before it encodes; it ends when the one that started it does, however that ended."""
    global tokenizer, options
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    tokenizer, options = spec and get_tokenizer(spec), settings
    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode(batch):
    """{split: (ids as bytes, documents, bytes of text)} of a list of (content, split, continued, ends, name, place)."""
    parts = {'train': ([], [0, 0]), 'val': ([], [0, 0])}
    for content, split, continued, ends, name, place in batch:
        text, (ids, counts) = text_of(content, name, place, *options), parts[split]
        if not text:
            continue
        ids.append(tokenizer.encode_corpus(text, continued))
        if ends and tokenizer.eot is not None:
            ids.append(np.array([tokenizer.eot]))
        counts[0] += ends
        counts[1] += len(text.encode('utf-8'))
    dtype = dtype_of(tokenizer)
    return {split: (b''.join(i.astype(DTYPES[dtype]).tobytes() for i in ids), *counts) for split, (ids, counts) in parts.items()}


def characters(batch):
    return set().union(*(text_of(content, name, place, *options) for content, _, _, _, name, place in batch))


def dtype_of(tokenizer):
    return 'uint16' if tokenizer.vocab_size <= 2**16 else 'uint32'


def in_order(function, batches, processes, spec, settings):
    """Yield (function(batch), position) for each (batch, position), computed ahead in processes, a few batches and no more."""
    if processes == 1:
        start_process(spec, settings)
        yield from ((function(batch), position) for batch, position in batches)
        return
    pool = concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context('spawn'), start_process, (spec, settings))
    ahead, error = collections.deque(), None
    try:
        while True:
            try:
                batch, position = next(batches, (None, None))
            except (OSError, ValueError) as e:  # raised when what was read before it is done
                batch, error = None, e
            if batch:
                ahead.append((pool.submit(function, batch), position))
            if ahead and (not batch or len(ahead) > 2 * processes):
                future, done = ahead.popleft()
                yield future.result(), done
            elif error:
                raise error
            elif not batch:
                return
    except concurrent.futures.BrokenExecutor:
        raise OSError(f'one of the {processes} processes was ended from outside, for want of memory perhaps (--processes takes fewer); '
                      'the same command goes on from here') from None
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# the whole

def sync(f):
    f.flush()
    os.fsync(f.fileno())


class Preparation:
    """One data set in the making. Everything is in folder, data_dir/unfinished, until publish() gives it its names."""

    def __init__(self, sources, data_dir, *, field='text', val_fraction=None, tokens_per_shard=10**8, bad_bytes='strict', processes=0):
        self.sources, self.data_dir, self.folder = sources, Path(data_dir), Path(data_dir) / 'unfinished'
        self.field, self.tokens_per_shard, self.bad_bytes = field, tokens_per_shard, bad_bytes
        self.total = sum(source.size for source in sources)
        if not self.total:
            raise ValueError(f'{sources[0].name} is empty: give a file with text in it')
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        self.processes = processes or (cores if self.total > 2**23 else 1)
        self.held_out = any(source.split == 'val' for source in sources)
        if val_fraction is None:  # 10 MB of val, but no more than a tenth, and no less than nanoGPT's share of OpenWebText
            val_fraction = min(0.1, max(0.0005, 10**7 / self.total))
        self.val_fraction, self.period = val_fraction, round(1 / val_fraction)
        self.by_position = not self.held_out and len(sources) < self.period and all(kind_of(source.name)[0] == 'text' for source in sources)
        self.last_shown = 0.0
        self.place_in = functools.lru_cache(2)(lambda block: permute([0], self.period, block)[0])

    def identity(self, tokenizer):
        """A digest of all that decides the result, to know what an unfinished or finished data set was made of."""
        what = [[(str(s.path or s.name), s.split, s.size, s.version) for s in self.sources], tokenizer, self.field, self.val_fraction,
                self.tokens_per_shard, self.bad_bytes, PIECE]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    def split_of(self, number):
        """'val' for one document of every self.period, 'train' for the others."""
        block, place = divmod(number, self.period)
        return 'val' if place == self.place_in(block) else 'train'

    def batches(self, first=0, skip=0, documents=0):
        """Yield (list of items for encode(), (source number, its items so far, documents so far, bytes read so far)), from a position on."""
        batch, size, before = [], 0, sum(source.size for source in self.sources[:first])
        with concurrent.futures.ThreadPoolExecutor(1) as downloads:
            fetched = {}
            for number in range(first, len(self.sources)):
                source = self.sources[number]
                for n in (number, number + 1):  # the next one is fetched while this one is encoded
                    if n < len(self.sources) and self.sources[n].fetch and n not in fetched:
                        fetched[n] = downloads.submit(self.sources[n].fetch, self.folder / 'download')
                path, cut = fetched.pop(number).result() if source.fetch else source.path, None
                if self.by_position:
                    length = source.size if not kind_of(source.name)[1] else sum(len(chunk) for chunk, _ in read_chunks(path))
                    cut = int(length * (1 - self.val_fraction))
                n_items = 0
                try:
                    for content, split, continued, ends, place, position in read_items(path, self.field, cut):
                        n_items += 1
                        if n_items <= skip:
                            continue
                        if cut is None:
                            split = source.split or ('train' if self.held_out else self.split_of(documents))
                        documents += ends
                        batch.append((content, split, continued, ends, source.name, place))
                        size += len(content) if isinstance(content, (bytes, str)) else 0  # a row without text, of which text_of says so
                        if size >= BATCH or len(batch) >= 10**4:
                            yield batch, (number, n_items, documents, before + position)
                            batch, size = [], 0
                except ValueError:
                    if source.fetch:  # damaged, so it is to be fetched again
                        path.unlink()
                    raise
                if source.fetch:
                    path.unlink()
                skip, before = 0, before + source.size
                if source.fetch and batch:  # so that its end is a place to go on from
                    yield batch, (number + 1, 0, documents, before)
                    batch, size = [], 0
        if batch:
            yield batch, (len(self.sources), 0, documents, self.total)

    def make_tokenizer(self, name, vocab_size):
        """A tokenizer made of the text, 'char' or 'bpe', which reads it once for that."""
        if name == 'char':
            found, t0 = set(), time.time()
            for chars, position in in_order(characters, self.batches(), self.processes, None, (self.field, self.bad_bytes)):
                found |= chars
                self.show('characters', position[3], 0, t0)
            return get_tokenizer({'name': 'char', 'chars': sorted(found)})
        read, t0 = 0, time.time()

        def texts():
            nonlocal read
            for batch, position in itertools.islice(self.batches(), 0, None, max(1, round(self.total / BPE_BYTES))):
                for content, _, _, _, name, place in batch:
                    text = text_of(content, name, place, self.field, self.bad_bytes)
                    read += len(text)
                    yield text
                self.show('reading for the BPE', position[3], 0, t0)
                if read > BPE_BYTES:
                    return
        return train_bpe(texts(), vocab_size)

    def show(self, what, done, done_before, t0, tokens=None):
        """The bar, on a terminal twice a second, else a line every 10 seconds."""
        now, terminal = time.time(), sys.stdout.isatty()
        if now - max(self.last_shown, t0) < (0.5 if terminal else 10):
            return
        self.last_shown, share = now, done / self.total
        speed = max(1, done - done_before) / (now - t0)
        left = int((self.total - done) / speed)
        left = f'{left // 3600}h{left // 60 % 60:02d}m' if left >= 3600 else f'{left // 60}m{left % 60:02d}s'
        bar = '#' * int(30 * share)
        print('\r' * terminal + f'{what} [{bar:30}] {share:4.0%}, ' + (f'{tokens / 1e6:,.1f}M tokens, ' if tokens is not None else '') +
              f'{speed / 1e6:.1f} MB/s, {left} left ', end='' if terminal else '\n', flush=True)

    def run(self, tokenizer, vocab_size=None, overwrite=False):
        """
        Make the data set, or go on with it. tokenizer: a Tokenizer, or 'char' or 'bpe' (of vocab_size ids), which are made of the text.
        ValueError for bad input, and then nothing stays but downloads; OSError for what the system refuses, and then the same call goes on later.
        """
        made = tokenizer if isinstance(tokenizer, str) else None
        identity = self.identity([made, vocab_size] if made else tokenizer.spec)
        meta = read_meta(self.data_dir)
        if meta.get('prepared_from') == identity and all((self.data_dir / name).exists() for name in meta['files']):
            if self.left_by() in (None, identity):
                shutil.rmtree(self.folder, ignore_errors=True)  # if it was killed at that
            print(f'{self.data_dir} is prepared already, of this input and with these settings: nothing to do')
            return
        publishing = self.left_by() == identity and (self.folder / 'meta.json').exists()  # what is there may be the first part of this one
        if not overwrite and not publishing and (meta or [*self.data_dir.glob('train*.bin')]):
            raise ValueError(f'{self.data_dir} holds another data set already: --overwrite replaces it, another --out keeps it')
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / 'lock', 'w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(f'{self.folder} is being written by another process: wait for it, or choose another --out') from None
            if not overwrite and self.left_by() not in (None, identity):
                raise ValueError(f'{self.folder} is what a command with another input or other settings has done so far: that command goes on with it, '
                                 '--overwrite or removing the folder starts anew')
            try:
                state = self.resume(identity)
                if not state:
                    tokenizer = self.make_tokenizer(made, vocab_size) if made else tokenizer
                    state = {'identity': identity, 'position': [0, 0, 0, 0], 'shards': {'train': [], 'val': []}, 'documents': {'train': 0, 'val': 0},
                             'bytes': {'train': 0, 'val': 0}}
                    write_files({self.folder / 'tokenizer': json.dumps(tokenizer.spec).encode()})  # before the state, which is what counts
                    self.save(state, {})
                tokenizer = get_tokenizer(json.loads((self.folder / 'tokenizer').read_text()))
                if not (self.folder / 'meta.json').exists():
                    self.encode_all(tokenizer, state)
                    self.finish(tokenizer, state)
                self.publish()
            except ValueError:
                if not any(source.fetch for source in self.sources):  # what took a download stays, and the same command goes on
                    shutil.rmtree(self.folder)
                    if not any(self.data_dir.iterdir()):
                        self.data_dir.rmdir()
                raise

    def shard(self, split, number):
        return self.folder / f'{split}_{number:05d}.bin'

    def left_by(self):
        """The identity of what was stopped in folder, None if there is nothing to go on with."""
        try:
            return json.loads((self.folder / 'state.json').read_text(encoding='utf-8'))['identity']
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def resume(self, identity):
        """The state that a stopped preparation left, with its shards cut back to it; None, and an empty folder, if there is none for this identity."""
        try:
            state = json.loads((self.folder / 'state.json').read_text(encoding='utf-8'))
            width = DTYPES[dtype_of(get_tokenizer(json.loads((self.folder / 'tokenizer').read_text())))].itemsize
            if state['identity'] == identity and not (self.folder / 'meta.json').exists():
                for split, shards in state['shards'].items():
                    for number, shard in enumerate(shards):
                        if self.shard(split, number).stat().st_size < shard['tokens'] * width:
                            raise ValueError(f'{self.shard(split, number)} is shorter than it was')
                        os.truncate(self.shard(split, number), shard['tokens'] * width)
                    for path in self.folder.glob(f'{split}_*.bin'):
                        if int(path.stem[-5:]) >= len(shards):
                            path.unlink()
            if state['identity'] == identity:
                print(f'going on at {state["position"][3] / self.total:.0%} of the input' if not (self.folder / 'meta.json').exists() else 'all but done')
                return state
            print(f'{self.folder} is of another input or other settings: starting anew')
        except (OSError, ValueError, KeyError):
            pass  # killed before anything was saved
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != 'lock':
                path.unlink()

    def save(self, state, files):
        for f in files.values():
            sync(f)
        write_files({self.folder / 'state.json': json.dumps(state).encode()})

    def encode_all(self, tokenizer, state):
        """Write the shards of all batches from state on; it is saved every 5 seconds and with every full shard."""
        files, width, saved, t0, before, consistent = {}, DTYPES[dtype_of(tokenizer)].itemsize, time.time(), time.time(), state['position'][3], True
        n_tokens = {split: sum(shard['tokens'] for shard in shards) for split, shards in state['shards'].items()}
        try:
            for encoded, position in in_order(encode, self.batches(*state['position'][:3]), self.processes, tokenizer.spec, (self.field, self.bad_bytes)):
                full = consistent = False
                for split, (ids, documents, n_bytes) in encoded.items():
                    shards, ids = state['shards'][split], memoryview(ids)
                    state['documents'][split] += documents
                    state['bytes'][split] += n_bytes
                    n_tokens[split] += len(ids) // width
                    while len(ids):
                        if not shards or shards[-1]['tokens'] == self.tokens_per_shard:
                            shards.append({'tokens': 0, 'crc32': 0})
                        if split not in files:
                            files[split] = open(self.shard(split, len(shards) - 1), 'ab')
                        room = (self.tokens_per_shard - shards[-1]['tokens']) * width
                        part, ids = ids[:room], ids[room:]
                        files[split].write(part)
                        shards[-1] = {'tokens': shards[-1]['tokens'] + len(part) // width, 'crc32': zlib.crc32(part, shards[-1]['crc32'])}
                        if shards[-1]['tokens'] == self.tokens_per_shard:
                            full = True
                            sync(files[split])
                            files.pop(split).close()
                state['position'], consistent = position, True
                if full or time.time() - saved > 5:
                    self.save(state, files)
                    saved = time.time()
                self.show('encoding', position[3], before, t0, sum(n_tokens.values()))
        finally:
            if consistent:  # stopped or not, up to here it is done
                self.save(state, files)
            for f in files.values():
                f.close()
        if sys.stdout.isatty():
            print()

    def finish(self, tokenizer, state):
        """Write the meta.json to come. A last shard that is short is joined to the one before, as shards shorter than a window are of no use."""
        for split, shards in state['shards'].items():
            if not shards:
                n_documents = sum(state['documents'].values())
                raise ValueError(f'no {split} text: the input has {n_documents} documents, too few for val_fraction={self.val_fraction:g}; '
                                 'give more text, another --val_fraction, or --val_input')
            if len(shards) > 1 and shards[-1]['tokens'] < self.tokens_per_shard // 10:
                last = shards.pop()
                with open(self.shard(split, len(shards) - 1), 'ab') as f:
                    rest = self.shard(split, len(shards)).read_bytes()
                    f.write(rest)
                    sync(f)
                shards[-1] = {'tokens': shards[-1]['tokens'] + last['tokens'], 'crc32': zlib.crc32(rest, shards[-1]['crc32'])}
        files = {self.shard(split, n).name: shard for split, shards in state['shards'].items() for n, shard in enumerate(shards)}
        meta = {'vocab_size': tokenizer.vocab_size, 'tokenizer': tokenizer.spec, 'documents': state['documents'], 'bytes': state['bytes'],
                'prepared_from': state['identity'], 'dtype': dtype_of(tokenizer), 'files': files}
        write_files({self.folder / 'meta.json': (json.dumps(meta, indent=1) + '\n').encode()})

    def publish(self):
        """Give everything its name, meta.json first, as write_dataset does; a second time after a kill does the rest."""
        meta = json.loads((self.folder / 'meta.json').read_text(encoding='utf-8'))
        write_files({self.folder / 'published': (self.folder / 'meta.json').read_bytes()})
        os.replace(self.folder / 'published', self.data_dir / 'meta.json')
        for name in meta['files']:
            if (self.folder / name).exists():
                os.replace(self.folder / name, self.data_dir / name)
        for path in [*self.data_dir.glob('train*.bin'), *self.data_dir.glob('val*.bin')]:
            if path.name not in meta['files']:  # of the data set that this one replaces
                path.unlink()
        shutil.rmtree(self.folder)
        for split in ('train', 'val'):
            shards = [shard['tokens'] for name, shard in meta['files'].items() if name.startswith(split)]
            print(f"{split}: {sum(shards):,} tokens of {meta['bytes'][split] / 1e6:,.1f} MB in {meta['documents'][split]:,} documents, {len(shards)} "
                  f"shard{'s' * (len(shards) > 1)}")
        print(f'{self.data_dir}: {meta["vocab_size"]:,} ids of {meta["dtype"]}')


# ---------------------------------------------------------------------------------------------------------------------
# the command line

def find_tokenizer(name, vocab_size=None):
    """The Tokenizer of a name or file; 'char' and 'bpe' themselves, which take the text to make."""
    if vocab_size is not None and name != 'bpe':
        raise ValueError(f'--vocab_size is for --tokenizer=bpe, not for {name}, which has its own')
    if name == 'bpe' and vocab_size is None:
        raise ValueError('--tokenizer=bpe needs --vocab_size, 4096 say')
    if not os.path.exists(name) and ('/' in name or name.endswith('.json')):
        raise ValueError(f'--tokenizer={name}: no such file')
    return name if name in ('char', 'bpe') else tokenizer_from_file(name) if os.path.exists(name) else get_tokenizer(name)


def above(kind, low):
    def number(text):
        value = float(text)
        if not low < value or kind is int and value != int(value) or value == float('inf'):
            raise ValueError
        return kind(value)
    number.__name__ = f'number above {low}'  # argparse says it
    return number


def parser_for(script, doc):
    """The flags that data/prepare.py and the recipes for public data sets have in common."""
    parser = Parser(prog='/'.join(Path(script).resolve().parts[-3 if Path(script).resolve().parent != HERE else -2:]), description=doc, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--field', default='text', help='the key of JSON lines or the column of parquet that has the text (text)')
    parser.add_argument('--val_fraction', type=above(float, 0), help='share of the text that is val; by default 10 MB of it, but from 0.0005 to 0.1')
    parser.add_argument('--tokens_per_shard', type=above(int, 0), default=10**8, help='(1e8)')
    parser.add_argument('--bad_bytes', choices=('strict', 'replace'), default='strict', help='what is not UTF-8 is an error, or becomes U+FFFD')
    parser.add_argument('--processes', type=above(int, -1), default=0, help='0: one a core')
    parser.add_argument('--overwrite', action='store_true', help='replace another data set that is there')
    return parser


def prepare(parser, args, find_sources, data_dir, tokenizer, vocab_size=None):
    """Run a Preparation with parsed flags; whatever goes wrong is one line and status 2, Ctrl-C 130."""
    try:
        if args.val_fraction and args.val_fraction > 0.5:
            raise ValueError(f'val_fraction is {args.val_fraction:g}, and more than half of the text should be for training')
        tokenizer = find_tokenizer(tokenizer, vocab_size)
        preparation = Preparation(find_sources(), data_dir, field=args.field, val_fraction=args.val_fraction, tokens_per_shard=args.tokens_per_shard,
                                  bad_bytes=args.bad_bytes, processes=args.processes)
        preparation.run(tokenizer, vocab_size, args.overwrite)
    except (OSError, ValueError) as e:
        at = f'{data_dir}, ' * (isinstance(e, OSError) and e.errno is not None and not e.filename)  # a full disk does not name itself
        parser.exit(2, f"{parser.prog}: {at}{' '.join(str(e).split())}" + '; the same command goes on from here' * bool(at) + '\n')
    except KeyboardInterrupt:
        parser.exit(130, f'\n{parser.prog}: stopped; the same command goes on from here\n')


def recipe(script, doc, repo, splits, tokens, val_fraction=None):
    """
    The prepare.py of a public data set: the files of a data set on Hugging Face, one at a time on the disk, each gone when it is encoded.
    splits: the pattern of the files of each, {None: ...} to divide; tokens: about how many that makes, to say what it takes.
    """
    parser = parser_for(script, doc)
    parser.set_defaults(val_fraction=val_fraction)
    parser.add_argument('--input', action='append', default=[], metavar='PATH', help='local files of the same format instead of the download')
    parser.add_argument('--val_input', action='append', default=[], metavar='PATH', help='local files for val')
    parser.add_argument('--out_dir', type=Path, default=Path(script).resolve().parent, help='where to write, by default beside the script')
    parser.add_argument('--tokenizer', default='gpt2', help="gpt2 or another of tiktoken's, or the path of a tokenizer.json, LLaMA's say (gpt2)")
    args = parser.parse_args()
    if args.tokenizer in ('char', 'bpe'):
        parser.error(f'--tokenizer={args.tokenizer} would be made of the whole text, and only data/prepare.py reads a text twice')

    def sources():
        if args.input:
            return find_sources(args.input, 'train' if args.val_input else None, out=args.out_dir) + find_sources(args.val_input, 'val', out=args.out_dir)
        found = [Source(f'{repo}/{name}', None, split, size, None, fetch) for split, name, size, fetch in hub_files(repo, splits)]
        download, both = sum(source.size for source in found), sum(sorted(source.size for source in found)[-2:])
        tokens_here = tokens * download / 1e6 / prepare_facts(script)['download_mb']  # should the hub have another part of it by now
        disk = tokens_here * DTYPES[dtype_of(find_tokenizer(args.tokenizer))].itemsize + both
        free = shutil.disk_usage(next(p for p in (args.out_dir, *args.out_dir.parents) if p.exists())).free
        print(f'{repo}: {len(found):,} files, {download / 1e9:,.1f} GB to download, about {disk / 1e9:,.0f} GB of disk in the end ({free / 1e9:,.0f} GB free), '
              f'{both / 1e9:,.1f} GB of them for files on their way', flush=True)
        if free < disk and not (args.out_dir / 'unfinished').exists():
            raise ValueError(f'{args.out_dir} has {free / 1e9:,.0f} GB free, and about {disk / 1e9:,.0f} GB are needed: --out_dir takes another disk')
        return found
    prepare(parser, args, sources, args.out_dir, args.tokenizer)


def main():
    parser = parser_for(__file__, __doc__)
    parser.add_argument('paths', nargs='*', metavar='PATH', help='the same as --input=PATH')
    parser.add_argument('--input', action='append', default=[], metavar='PATH', help='a file or a folder of text; may be given several times')
    parser.add_argument('--val_input', action='append', default=[], metavar='PATH', help='text for val, which makes all of --input train')
    parser.add_argument('--glob', default='*', help="files to take from folders, such as '*.txt' (all but hidden ones)")
    parser.add_argument('--out', required=True, metavar='NAME', help='the folder to write, in data/, or anywhere if it has a slash')
    parser.add_argument('--tokenizer', default='gpt2',
                        help="byte, char, bpe (trained on the text), gpt2 or another of tiktoken's, or the path of a tokenizer.json (gpt2)")
    parser.add_argument('--vocab_size', type=above(int, 0), help='of --tokenizer=bpe')
    args = parser.parse_args()
    inputs = args.input + args.paths
    if not inputs:
        parser.error('no text given: --input=PATH')
    if args.out in ('', '.', '..'):
        parser.error(f'--out={args.out} is not the name of a data set: --out=NAME writes data/NAME, --out=./NAME a folder NAME here')
    out, split = Path(args.out) if '/' in args.out else HERE / args.out, 'train' if args.val_input else None
    prepare(parser, args, lambda: find_sources(inputs, split, args.glob, out) + find_sources(args.val_input, 'val', args.glob, out), out, args.tokenizer,
            args.vocab_size)


if __name__ == '__main__':
    main()
