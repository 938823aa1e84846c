"""
Continuous batching: requests share one batch, and each joins it and leaves it at any token
(https://www.usenix.org/conference/osdi22/presentation/yu).
"""
import asyncio
import traceback
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import functional as F

from model import penalize_repetition, sample_token


class Request:
    """
    A prompt that a Continuation, `reply`, continues. `ids` are those of both; `sampling` are
    arguments of sample_token. `arrived` gets each piece of the text, at last None or an exception.
    """
    def __init__(self, prompt, reply, seed=None, repetition_penalty=1.0, **sampling):
        self.ids, self.reply = list(prompt), reply
        self.repetition_penalty, self.sampling = repetition_penalty, sampling
        self.generator = torch.Generator()  # its own, so that no other request changes its draws
        self.generator.manual_seed(self.generator.seed() if seed is None else seed)
        self.arrived, self.cancelled = asyncio.Queue(), False

    @property
    def over(self):
        return self.cancelled or self.reply.finish is not None

    def draw(self, logits, n_ids):
        """Draw a token from logits (1, V). Return the text that it adds, or an exception."""
        if not logits.isfinite().all():
            self.cancelled = True
            return ValueError('the logits of the model are not finite')
        if self.repetition_penalty != 1:
            logits = penalize_repetition(logits, torch.tensor([self.ids]), self.repetition_penalty)
        token = sample_token(logits[:, :n_ids], generator=self.generator, **self.sampling).item()
        self.ids.append(token)
        return self.reply.push(token)


class Batcher:
    """
    Continues requests, up to max_rows of them at a time. A row of a KV cache holds all ids of a
    request but the last one, which the next step reads. Rows end in the same column, and shorter
    ones are padded on the left.
    """
    def __init__(self, model, max_rows):
        self.model, self.max_rows = model, max_rows
        self.waiting = []
        # a row: (cache, index in it); a new one has its own cache, to read its prompt unpadded
        self.requests, self.rows = [], []
        self.thread = ThreadPoolExecutor(1)  # the only one that uses the model
        self.task = None

    def submit(self, request):
        """Add a request, from a coroutine."""
        self.waiting.append(request)
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self.run())

    async def call(self, function, *args):
        """Return function(*args), which uses the model, between two steps."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *args)

    async def run(self):
        """Step until there is no request. An error ends the requests that it meets."""
        while self.requests or self.waiting:
            self.waiting = [request for request in self.waiting if not request.over]
            try:
                pieces = await self.call(self.step)
            except Exception as e:
                traceback.print_exc()  # the clients are told, too
                pieces, failed, self.requests, self.rows = [], self.requests, [], []
                for request in failed:
                    request.arrived.put_nowait(e)
            for request, piece in zip(self.requests, pieces):
                request.arrived.put_nowait(piece)
                if request.over:
                    request.arrived.put_nowait(None)

    @torch.no_grad()
    def step(self):
        """
        Drop requests that are over, draw a token for each of the others, and then the first one for
        those that join. Return the pieces of text that this adds.
        """
        kept = [i for i, request in enumerate(self.requests) if not request.over]
        if len(kept) < len(self.rows) or len({id(cache) for cache, _ in self.rows}) > 1:
            self.requests = [self.requests[i] for i in kept]
            self.rows = self.merge([self.rows[i] for i in kept]) if kept else []
        pieces = []
        if self.requests:
            cache, ends = self.rows[0][0], [request.ids[-1:] for request in self.requests]
            padding = [cache[0].length + 1 - len(request.ids) for request in self.requests]
            pieces = self.draw(self.requests, ends, cache, padding)
        while self.waiting and len(self.requests) < self.max_rows:
            request = self.waiting.pop(0)
            self.requests.append(request)
            width = len(request.ids) + request.reply.max_new_tokens
            self.rows.append((self.model.new_cache(1, width), 0))
            pieces += self.draw([request], [request.ids], self.rows[-1][0], [0])
        return pieces

    def draw(self, requests, idx, cache, padding):
        """Continue a cache by idx (B, T), and draw a token for each request. Return the pieces."""
        idx, padding = (torch.tensor(x, device=cache[0].k.device) for x in (idx, padding))
        logits, _ = self.model.forward(idx, cache=cache, left_padding=padding)
        logits = logits[:, -1].float().cpu()
        n_ids = self.model.config.unpadded_vocab_size or self.model.config.vocab_size
        return [request.draw(logits[[i]], n_ids) for i, request in enumerate(requests)]

    def merge(self, rows):
        """Return the rows of `requests` in one cache, without columns that none of them needs."""
        lengths = [len(request.ids) - 1 for request in self.requests]
        end = max(lengths)
        room = max(r.reply.max_new_tokens - len(r.reply.ids) for r in self.requests)
        merged = self.model.new_cache(len(rows), min(end + room, self.model.config.block_size))
        for to, (n, (cache, row)) in enumerate(zip(lengths, rows)):
            for new, old in zip(merged, cache):
                new.length = end
                new.k[to, :, :end - n] = new.v[to, :, :end - n] = 0  # NaN there would spread
                new.k[to, :, end - n:end] = old.k[row, :, old.length - n:old.length]
                new.v[to, :, end - n:end] = old.v[row, :, old.length - n:old.length]
        firsts = [(cache[0], row) for cache, row in rows]
        merged[0].doc = torch.stack(
            [F.pad(old.doc[row], (end - old.length, 0), value=-1) for old, row in firsts])
        if self.model.config.token_shift:
            merged[0].last = torch.stack([old.last[row] for old, row in firsts])
        return [(merged, i) for i in range(len(rows))]
