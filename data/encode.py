"""Encode documents as token ids in several processes, in their order."""
import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
from typing import NamedTuple

import numpy as np

from data.documents import text_of
from data.loader import DTYPES, dtype_for
from data.tokenizer import get_tokenizer
from engine.common import UserError

SPLITS = 'train', 'val'
RESUME = 'run the same command again to resume'


class Encoded(NamedTuple):
    ids: bytes
    documents: int
    text_bytes: int
    too_long: list  # places of the documents that were left out because of their length


class Encoder:
    """Convert items to ids. Each process has its own."""

    def __init__(self, spec, field, bad_bytes):
        os.environ['TOKENIZERS_PARALLELISM'] = 'false'
        self.tokenizer = get_tokenizer(spec) if spec else None
        self.field, self.bad_bytes = field, bad_bytes

    def text(self, item):
        return text_of(item, self.field, self.bad_bytes)

    def characters(self, items):
        return set().union(*map(self.text, items))

    def encode(self, items):
        """Return {split: Encoded} for a list of items."""
        parts = {split: [] for split in SPLITS}
        for item in items:
            parts[item.split].append(item)
        return {split: self.encode_split(part) for split, part in parts.items()}

    def encode_split(self, items):
        dtype = DTYPES[dtype_for(self.tokenizer.vocab_size)]
        eot = self.tokenizer.eot
        ids, documents, text_bytes, too_long = [], 0, 0, []
        for item in items:
            text = self.text(item)
            if item.too_long:
                too_long.append(f'{item.name}, entry {item.place}')
            if not text:
                continue
            ids.append(self.tokenizer.encode_corpus(text, item.continued).astype(dtype))
            if item.ends and eot is not None:
                ids.append(np.array([eot], dtype))
            documents += item.ends
            text_bytes += len(text.encode('utf-8'))
        return Encoded(b''.join(part.tobytes() for part in ids), documents, text_bytes, too_long)


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
