"""Encode documents as token ids in several processes, in their order."""
import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
from typing import NamedTuple

import numpy as np

from data.chat import stored_ids
from data.documents import parse_json, text_of
from data.folder import DTYPES, dtype_for
from data.tokenizer import get_tokenizer
from engine.common import UserError

SPLITS = 'train', 'val'
RESUME = 'run the same command again to resume'


# for a part of a data set, an item's entry in the index; `split` is empty if it depends on the
# number of documents in the parts before
ENTRY = np.dtype([('tokens', '<i8'), ('text_bytes', '<i8'), ('split', 'S5'), ('ends', '?'),
                  ('skipped', '?')])


class Encoded(NamedTuple):
    ids: bytes = b''
    documents: int = 0
    text_bytes: int = 0
    skipped: tuple = ()  # a text about each document that was left out: its place and why


def joined(parts):
    """Return one Encoded for a list of them."""
    return Encoded(b''.join(part.ids for part in parts),
                   sum(part.documents for part in parts),
                   sum(part.text_bytes for part in parts),
                   tuple(text for part in parts for text in part.skipped))


class Encoder:
    """Convert items, conversations if there is a template, to ids. Each process has its own."""

    def __init__(self, spec, field, bad_bytes, template=None):
        os.environ['TOKENIZERS_PARALLELISM'] = 'false'
        self.tokenizer = get_tokenizer(spec) if spec else None
        self.dtype = DTYPES[dtype_for(self.tokenizer.vocab_size, template)] if spec else None
        self.field, self.bad_bytes, self.template = field, bad_bytes, template

    def text(self, item):
        return text_of(item, self.field, self.bad_bytes)

    def characters(self, items):
        return set().union(*map(self.text, items))

    def encode(self, items):
        """Return {split: Encoded} for a list of items."""
        return {split: joined([self.encode_item(item) for item in items if item.split == split])
                for split in SPLITS}

    def encode_undivided(self, items):
        """Return {'ids': Encoded of all items, 'index': Encoded of their ENTRYs}."""
        encoded = [self.encode_item(item) for item in items]
        entries = [(len(e.ids) // self.dtype.itemsize, e.text_bytes, item.split or '', item.ends,
                    bool(e.skipped)) for e, item in zip(encoded, items)]
        return {'ids': joined(encoded), 'index': Encoded(np.array(entries, ENTRY).tobytes())}

    def encode_item(self, item):
        if item.too_long:
            place = f'{item.name}, entry {item.place},'
            return Encoded(skipped=(f'{place} is longer than --max_document_mb',))
        if self.template:
            return self.encode_conversation(item)
        text = self.text(item)
        if not text:
            return Encoded()
        ids = self.tokenizer.encode_corpus(text, item.continued).astype(self.dtype).tobytes()
        if item.ends and self.tokenizer.eot is not None:
            ids += np.array([self.tokenizer.eot], self.dtype).tobytes()
        return Encoded(ids, int(item.ends), len(text.encode('utf-8')))

    def encode_conversation(self, item):
        """Return the ids of a conversation as they are stored. A bad one is skipped."""
        try:
            row = parse_json(item.content, None, self.bad_bytes)
            ids = stored_ids(row, self.tokenizer, self.template)
        except (UserError, UnicodeError) as e:
            problem = e if isinstance(e, UserError) else f'is not UTF-8 ({e.reason})'
            return Encoded(skipped=(f'{item.name}, entry {item.place}, {problem}',))
        return Encoded(ids.astype(self.dtype).tobytes(), 1, len(item.content))


def start_worker(*settings):
    """
    Make the Encoder of this process. The process ends when its parent does, however that ends.
    """
    global encoder
    encoder = Encoder(*settings)
    parent = multiprocessing.parent_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def call_worker(method, items):
    return getattr(encoder, method)(items)


def in_order(method, batches, processes, settings):
    """
    Yield (Encoder.method(items), position) for each (items, position) of `batches`, in their order,
    computed a few batches ahead in several processes.
    """
    if processes == 1:
        run = getattr(Encoder(*settings), method)
        for items, position in batches:
            yield run(items), position
        return
    spawn = multiprocessing.get_context('spawn')
    pool = concurrent.futures.ProcessPoolExecutor(processes, spawn, start_worker, settings)
    waiting, errors = collections.deque(), []
    try:
        for items, position in until_error(batches, errors):
            waiting.append((pool.submit(call_worker, method, items), position))
            if len(waiting) > 2 * processes:
                future, done = waiting.popleft()
                yield future.result(), done
        for future, done in waiting:
            yield future.result(), done
    except concurrent.futures.BrokenExecutor:
        reason = 'perhaps because memory ran out (try a lower --processes=N)'
        message = f'one of the {processes} processes was killed from outside, {reason}'
        raise OSError(f'{message}; {RESUME}') from None
    finally:
        pool.shutdown(cancel_futures=True)
    if errors:
        raise errors[0]


def until_error(batches, errors):
    """Keep an error of reading until everything that was read before it is encoded."""
    try:
        yield from batches
    except (OSError, UserError) as e:
        errors.append(e)
