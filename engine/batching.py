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
    A prompt that a Continuation, `reply`, continues. `ids` are those of both; a row of a KV cache
    holds all of them but the last one, which the next step reads. `sampling` are arguments of
    sample_token. `arrived` gets each piece of the text, at last None or an exception.
    """
    def __init__(self, prompt, reply, seed=None, repetition_penalty=1.0, **sampling):
        self.ids, self.reply = list(prompt), reply
        self.cache, self.row = None, 0
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
    Continues requests, up to max_rows of them at a time. Their rows of a common cache end in the
    same column, and shorter ones are padded on the left.
    """
    def __init__(self, model, max_rows):
        self.model, self.max_rows = model, max_rows
        self.waiting, self.requests = [], []
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
                for request in self.requests:
                    request.arrived.put_nowait(e)
                pieces, self.requests = [], []
            for request, piece in zip(self.requests, pieces):
                request.arrived.put_nowait(piece)
                if request.over:
                    request.arrived.put_nowait(None)
                    request.cache = None  # free its memory, even while the client is still reading

    @torch.no_grad()
    def step(self):
        """
        Drop requests that are over, draw a token for each of the others, and then the first one for
        those that join. Return the pieces of text that this adds.
        """
        requests = [request for request in self.requests if not request.over]
        n_caches = len({id(request.cache) for request in requests})
        if n_caches > 1 or 0 < len(requests) < len(self.requests):
            self.merge(requests)
        self.requests, pieces = requests, []
        if requests:
            end = requests[0].cache[0].length
            padding = [end + 1 - len(request.ids) for request in requests]
            pieces = self.draw(requests, [request.ids[-1:] for request in requests], padding)
        while self.waiting and len(self.requests) < self.max_rows:
            request = self.waiting.pop(0)
            self.requests.append(request)
            width = len(request.ids) + request.reply.max_new_tokens
            request.cache = self.model.new_cache(1, width)  # its own, to read its prompt unpadded
            pieces += self.draw([request], [request.ids], [0])
        return pieces

    def draw(self, requests, idx, padding):
        """Continue a cache by idx (B, T), and draw a token for each request. Return the pieces."""
        cache = requests[0].cache
        idx, padding = (torch.tensor(x, device=cache[0].k.device) for x in (idx, padding))
        logits, _ = self.model.forward(idx, cache=cache, left_padding=padding)
        logits = logits[:, -1].float().cpu()
        n_ids = self.model.config.unpadded_vocab_size or self.model.config.vocab_size
        return [request.draw(logits[[i]], n_ids) for i, request in enumerate(requests)]

    def merge(self, requests):
        """Copy the rows of requests into one cache, without columns that none of them needs."""
        end = max(len(request.ids) for request in requests) - 1
        room = max(r.reply.max_new_tokens - len(r.reply.ids) for r in requests)
        width = min(end + room, self.model.config.block_size)
        merged = self.model.new_cache(len(requests), width)
        for row, request in enumerate(requests):
            n = len(request.ids) - 1
            for new, old in zip(merged, request.cache):
                first, new.length = old.length - n, end
                new.k[row, :, :end - n] = new.v[row, :, :end - n] = 0  # NaN there would spread
                new.k[row, :, end - n:end] = old.k[request.row, :, first:old.length]
                new.v[row, :, end - n:end] = old.v[request.row, :, first:old.length]
        firsts = [(request.cache[0], request.row) for request in requests]
        merged[0].doc = torch.stack(
            [F.pad(old.doc[row], (end - old.length, 0), value=-1) for old, row in firsts])
        if self.model.config.token_shift:
            merged[0].last = torch.stack([old.last[row] for old, row in firsts])
        for row, request in enumerate(requests):
            request.cache, request.row = merged, row
