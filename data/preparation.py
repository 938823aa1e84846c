"""
Make a data set of documents: read, divide, encode, write. Work that was interrupted resumes, and
the bytes are the same.
"""
import concurrent.futures
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

from data.documents import PIECE, TEXT, is_val, kind_of, read_chunks, read_text, text_of
from data.encode import SPLITS, in_order
from data.folder import DTYPES, META, check_meta, dtype_for, meta_json, read_meta
from data.shards import Shards
from data.tokenizer import get_tokenizer, train_bpe
from engine.common import Locked, UserError, duration, printable, replacing, try_lock
from engine.schema import read_json

BATCH = 2**20  # bytes of text that a process encodes at a time, roughly
BPE_BYTES = 3 * 10**7  # of text, from all over it, to train a BPE on; this takes 200 MB of memory
NOTES = 5  # on skipped documents; more are only counted
MAX_DOCUMENT_MB = 16.0  # a tokenizer.json takes up to 2 GB to encode that; a book has 1 MB

# of state.json; 'meta' is there once everything is encoded
SHARD = {'tokens': int, 'crc32': range(2**32)}
RECORD = {'documents': int, 'bytes': int, 'skipped': int, 'shards': [SHARD]}
STATE = {'identity': str, 'position?': [int], 'train?': RECORD, 'val?': RECORD, 'ids?': RECORD,
         'index?': RECORD, 'meta?': META}


class Position(NamedTuple):
    """A place in the input."""
    source: int = 0     # number of the file
    items: int = 0      # items of that file before this place
    documents: int = 0  # documents of all files before this place
    read: int = 0       # bytes of all files before this place


class Progress:
    """Show a bar, redrawn twice a second on a terminal, else printed every 10 seconds."""

    def __init__(self, task, total, done=0):
        self.task, self.total, self.done_before = task, total, done
        self.started = self.shown = time.time()
        self.terminal = sys.stdout.isatty()

    def show(self, done, tokens=None):
        now = time.time()
        if now - self.shown < (0.5 if self.terminal else 10):
            return
        self.shown, share = now, done / self.total
        speed = max(1, done - self.done_before) / (now - self.started)
        counted = '' if tokens is None else f'{tokens / 1e6:,.1f}M tokens, '
        left = duration((self.total - done) / speed)
        line = f"{self.task} [{'#' * int(30 * share):30}] {share:4.0%}, {counted}"
        line += f'{speed / 1e6:.1f} MB/s, {left} left '
        if self.terminal:
            print('\r' + line, end='', flush=True)
        else:
            print(line, flush=True)

    def close(self):
        if self.terminal:
            print()


class Preparation:
    """
    Make one data set. Everything is written to data_dir/unfinished, where state.json says how much
    is done; publish() then moves it to data_dir. So a shard has its final name only beside a
    meta.json: without one, the folder would be taken for a data set of nanoGPT's.

    `tokenizer` is a Tokenizer, or 'char' or 'bpe' (of vocab_size ids), which are made from the
    text. data/parts.py makes a data set on several machines. If the documents are conversations,
    `chat` has the chat_template and chat_separator of the future meta.json.
    """
    streams = SPLITS  # names of the shards

    def __init__(self, sources, data_dir, tokenizer, vocab_size=None, *, field='text',
                 val_fraction=None, tokens_per_shard=10**8, bad_bytes='strict', processes=0,
                 max_document_mb=MAX_DOCUMENT_MB, chat=None):
        self.sources, self.data_dir = sources, Path(data_dir)
        self.folder = self.data_dir / 'unfinished'
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.field, self.bad_bytes = field, bad_bytes
        self.max_document_mb, self.chat = max_document_mb, chat or {}
        self.tokens_per_shard = tokens_per_shard
        self.total = sum(source.size for source in sources)
        if not self.total:
            raise UserError(f'{sources[0].name} is empty: give a file with text in it')
        self.processes = processes or (count_cores() if self.total > 2**23 else 1)
        if val_fraction is None:  # 10 MB, at most a tenth, at least nanoGPT's share of OpenWebText
            val_fraction = min(0.1, max(0.0005, 10**7 / self.total))
        self.val_fraction = val_fraction
        self.period = round(1 / val_fraction)
        self.val_is_given = any(source.split == 'val' for source in sources)
        all_text = all(kind_of(source.name)[0] is TEXT for source in sources)
        few = len(sources) < self.period
        self.val_is_end_of_files = few and all_text and not self.val_is_given
        self.identity = self.digest()
        self.start, self.end = Position(), len(sources)  # of what this process encodes
        self.span = self.total  # bytes of it

    def digest(self):
        """Return a digest of everything that determines the result."""
        files = [(str(s.path or s.name), s.split, s.size, s.version) for s in self.sources]
        made = isinstance(self.tokenizer, str)
        tokenizer = [self.tokenizer, self.vocab_size] if made else self.tokenizer.spec
        settings = [self.field, self.val_fraction, self.tokens_per_shard, self.bad_bytes, PIECE,
                    self.max_document_mb, *self.chat.values()]
        decisive = json.dumps([files, tokenizer, *settings])
        return hashlib.sha256(decisive.encode()).hexdigest()[:16]

    def run(self, overwrite=False):
        """
        Make the data set, or resume making it. After a UserError, which means bad input, only
        downloads are kept; after any other interruption the same call resumes.
        """
        meta, left = read_meta(self.data_dir), self.read_state()
        if self.is_complete(meta, left):
            if left.get('identity') in (None, self.identity):
                shutil.rmtree(self.folder, ignore_errors=True)  # a kill may have left it
            say(f'{self.data_dir} is already prepared from this input with these settings: '
                'nothing to do')
            return
        if not overwrite:
            self.refuse_to_replace(meta, left)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.lock():
            try:
                self.publish(self.make())
            except UserError:
                self.clean_up()
                raise

    def make(self):
        """Encode what is not encoded yet. Return the future meta.json."""
        state = self.resume() or self.begin()
        if 'meta' not in state:
            tokenizer = get_tokenizer(read_json(self.folder / 'tokenizer', dict))
            state = self.encode_all(tokenizer, state)
            state = self.finish(tokenizer, state)
        return state['meta']

    # whether to begin, and from where

    def half_published(self, left):
        return left.get('identity') == self.identity and 'meta' in left

    def is_complete(self, meta, left):
        if meta.get('prepared_from') != self.identity or self.half_published(left):
            return False
        return all((self.data_dir / name).exists() for name in meta.get('files', ['none listed']))

    def refuse_to_replace(self, meta, left):
        """
        Raise UserError if another data set, or another command's unfinished work, is in the way.
        """
        taken = meta or any(self.data_dir.glob('train*.bin'))
        if taken and not self.half_published(left):
            remedy = '--overwrite replaces it, another --out keeps it'
            raise UserError(f'{self.data_dir} already holds another data set: {remedy}')
        if left and left['identity'] != self.identity:
            problem = f'{self.folder} is the unfinished work of a command with other settings'
            remedy = 'that command resumes it, --overwrite or removing the folder starts anew'
            raise UserError(f'{problem} or another input: {remedy}')

    def lock(self):
        try:
            return try_lock(self.folder / 'lock', f'process {os.getpid()}')
        except Locked as e:
            remedy = 'wait for it, or choose another --out'
            raise UserError(f'{self.folder} is being written by {e.holder}: {remedy}') from None

    def read_state(self):
        """
        Return the state that a stopped preparation left; {} if there is none. UserError if it is
        damaged, which no kill does.
        """
        path = self.folder / 'state.json'
        if not path.exists():
            return {}
        try:
            state = read_json(path, STATE)
            check_meta(state.get('meta', {}), path)
            if len(state.get('position', Position())) != len(Position()):
                raise UserError(f"'{path}' cannot be used: position is not of 4 numbers")
        except UserError as e:
            raise UserError(f'{e}; remove {self.folder} to start anew') from None
        return state

    def save(self, state, shards=()):
        for stream in shards:
            stream.sync()
        with replacing(self.folder / 'state.json', 'w') as f:
            json.dump(state, f)

    def resume(self):
        """
        Return the state to continue from, with the shards cut back to it. If there is none, remove
        all files and return None.
        """
        state = self.read_state()
        try:
            if state.get('identity') == self.identity:
                if 'meta' not in state:
                    spec = read_json(self.folder / 'tokenizer', dict)
                    for shards in self.open_shards(get_tokenizer(spec), state):
                        shards.cut_back()
                    done = (state['position'][-1] - self.start.read) / self.span
                    say(f'resuming at {done:.0%} of the input')
                return state
        except (OSError, ValueError, KeyError):
            pass  # it was killed before anything was saved
        if state:
            say(f'{self.folder} cannot be resumed with these settings: starting anew')
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != 'lock':
                path.unlink()
        return None

    def begin(self):
        """Make the tokenizer, if it is made from the text, and save the first state."""
        tokenizer = self.tokenizer
        if tokenizer == 'char':
            tokenizer = self.make_char()
        elif tokenizer == 'bpe':
            tokenizer = train_bpe(self.sample_texts(), self.vocab_size)
        with replacing(self.folder / 'tokenizer', 'w') as f:  # apart, because it may be large
            json.dump(tokenizer.spec, f)
        state = {'identity': self.identity, 'position': self.start}
        for name in self.streams:
            state[name] = {'documents': 0, 'bytes': 0, 'skipped': 0, 'shards': []}
        self.save(state)
        return state

    def make_char(self):
        characters, progress = set(), Progress('characters', self.total)
        settings = None, self.field, self.bad_bytes
        batches = self.batches(Position(), len(self.sources))
        for found, position in in_order('characters', batches, self.processes, settings):
            characters |= found
            progress.show(position.read)
        return get_tokenizer({'name': 'char', 'chars': sorted(characters)})

    def sample_texts(self):
        """Yield documents from all over the input, BPE_BYTES of them, to train a BPE on."""
        every = max(1, round(self.total / BPE_BYTES))
        length, progress = 0, Progress('reading for the BPE', self.total)
        batches = self.batches(Position(), len(self.sources))
        for items, position in itertools.islice(batches, 0, None, every):
            for item in items:
                text = text_of(item, self.field, self.bad_bytes)
                length += len(text)
                yield text
            progress.show(position.read)
            if length > BPE_BYTES:
                return

    # reading

    def batches(self, start, end):
        """Yield (items, the position after them) from a position to file number `end`."""
        batch, size, position = [], 0, start
        for item, position in self.items(start, end):
            if item:
                batch.append(item)
                size += len(item.content) if isinstance(item.content, (bytes, str)) else 0
            # a downloaded file is removed at its end, so resuming must be possible from there
            at_end = item is None and self.sources[position.source - 1].fetch
            if batch and (at_end or size >= BATCH or len(batch) >= 10**4):
                yield batch, position
                batch, size = [], 0
        if batch:
            yield batch, position

    def items(self, start, end):
        """Yield (item, the position after it), and (None, position) at the end of each file."""
        documents = start.documents
        before = sum(source.size for source in self.sources[:start.source])
        for number, path in self.local_files(start.source, end):
            source = self.sources[number]
            skip = start.items if number == start.source else 0
            try:
                for n, item in enumerate(self.read_file(path), 1):
                    if n > skip:
                        item = self.label(item, source, documents)
                        documents += item.ends
                        yield item, Position(number, n, documents, before + item.read)
            except UserError:
                if source.fetch:  # it is damaged, so the next run must download it again
                    path.unlink()
                raise
            before += source.size
            if source.fetch:
                path.unlink()
            yield None, Position(number + 1, 0, documents, before)

    def local_files(self, first, end):
        """Yield (number, path) of each file. The next one is downloaded while one is encoded."""
        with concurrent.futures.ThreadPoolExecutor(1) as downloads:
            coming = {}
            for number, source in enumerate(self.sources[first:end], first):
                for n, wanted in enumerate(self.sources[number:min(number + 2, end)], number):
                    if wanted.fetch and n not in coming:
                        coming[n] = downloads.submit(wanted.fetch, self.folder / 'download')
                yield number, coming.pop(number).result() if source.fetch else source.path

    def read_file(self, path):
        kind, packed = kind_of(path.name)
        if not self.val_is_end_of_files:
            return kind.read(path, self.field, int(self.max_document_mb * 10**6))
        length = path.stat().st_size
        if packed:
            length = sum(len(chunk) for chunk, _ in read_chunks(path))
        return read_text(path, cut=int(length * (1 - self.val_fraction)))

    def label(self, item, source, document):
        """Return the item with the name of its file and its split."""
        split = item.split
        if source.split:
            split = source.split
        elif self.val_is_given:
            split = 'train'
        elif not self.val_is_end_of_files:
            split = self.split_of(document)
        return item._replace(name=source.name, split=split)

    def split_of(self, document):
        return 'val' if is_val(document, self.period) else 'train'

    # writing

    def open_shards(self, tokenizer, state):
        return [Shards(self.folder, name, self.dtype_of(name, tokenizer), self.tokens_per_shard,
                       state[name]) for name in self.streams]

    def dtype_of(self, name, tokenizer):
        return DTYPES[dtype_for(tokenizer.vocab_size, self.chat)]

    def encoded(self, tokenizer, start):
        """Yield ({name of shards: Encoded}, the position after it) from a position on."""
        settings = tokenizer.spec, self.field, self.bad_bytes, self.chat.get('chat_template')
        return in_order('encode', self.batches(start, self.end), self.processes, settings)

    def encode_all(self, tokenizer, state):
        """Append all batches from `state` on to the shards. Return the last state."""
        start, saved = Position(*state['position']), time.time()
        progress = Progress('encoding', self.span, start.read - self.start.read)
        shards, n_noted = self.open_shards(tokenizer, state), 0
        encoding = self.encoded(tokenizer, start)
        try:
            for encoded, position in encoding:
                filled = [stream.append(encoded[stream.name]) for stream in shards]
                skipped = [text for e in encoded.values() for text in e.skipped]
                for text in skipped[:NOTES - n_noted]:
                    say(f'NOTE: skipped: {text}')
                n_noted = min(NOTES, n_noted + len(skipped))
                records = {stream.name: stream.record() for stream in shards}
                # an interruption before this line goes back to the end of the previous batch
                state = {'identity': self.identity, 'position': position, **records}
                if any(filled) or time.time() - saved > 5:
                    self.save(state, shards)
                    saved = time.time()
                n_tokens = sum(stream.tokens() for stream in shards if stream.name != 'index')
                progress.show(position.read - self.start.read, n_tokens)
        finally:
            encoding.close()
            self.save(state, shards)
            for stream in shards:
                stream.close()
        progress.close()
        return state

    def finish(self, tokenizer, state):
        """Return the state with the future meta.json in it, after saving it."""
        files = {}
        for shards in self.open_shards(tokenizer, state):
            if not shards.shards and shards.name in SPLITS:
                documents = sum(state[split]['documents'] for split in SPLITS)
                problem = f'no {shards.name} text: the input has {documents} documents, too few'
                remedy = 'give more text, another --val_fraction, or --val_input'
                raise UserError(f'{problem} for val_fraction={self.val_fraction:g}; {remedy}')
            shards.join_short_tail()
            files |= shards.listed()
        state['meta'] = {
            'vocab_size': tokenizer.vocab_size,
            'tokenizer': tokenizer.spec,
            'documents': {name: state[name]['documents'] for name in self.streams},
            'bytes': {name: state[name]['bytes'] for name in self.streams},
            'prepared_from': self.identity,
            'dtype': dtype_for(tokenizer.vocab_size, self.chat),
            'files': files,
            **self.chat,
        }
        self.save(state)
        skipped = sum(state[name]['skipped'] for name in self.streams)
        if skipped:
            say(f'NOTE: skipped {skipped:,} in all')
        return state

    def publish(self, meta):
        """
        Move the data set into data_dir, meta.json first: shards without it would be taken for
        nanoGPT's, while a meta.json without its shards is noticed. After a kill, calling this again
        completes it.
        """
        with replacing(self.data_dir / 'meta.json') as f:
            f.write(meta_json(meta))
        for stream in self.streams:
            for path in self.data_dir.glob(f'{stream}*.bin'):
                if path.name not in meta['files']:  # from the data set that this one replaces
                    path.unlink()
        for name in meta['files']:
            if (self.folder / name).exists():
                os.replace(self.folder / name, self.data_dir / name)
        shutil.rmtree(self.folder)
        self.report(meta)

    def report(self, meta):
        for split in SPLITS:
            shards = [s['tokens'] for name, s in meta['files'].items() if name.startswith(split)]
            text, documents = meta['bytes'][split] / 1e6, meta['documents'][split]
            count = f"{len(shards)} shard{'s' if len(shards) > 1 else ''}"
            say(f'{split}: {sum(shards):,} tokens of {text:,.1f} MB in {documents:,} documents, '
                f'{count}')
        say(f'{self.data_dir}: {meta["vocab_size"]:,} ids of {meta["dtype"]}')

    def clean_up(self):
        """Remove what bad input left, but keep downloads: the same command then resumes."""
        if not any(source.fetch for source in self.sources):
            shutil.rmtree(self.folder)
            if not any(self.data_dir.iterdir()):
                self.data_dir.rmdir()


def say(text):
    print(printable(text), flush=True)


def count_cores():
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
