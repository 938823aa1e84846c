"""Beam search: find the likeliest continuation as a whole, instead of drawing token by token."""
import math
from typing import NamedTuple

import torch

from engine.common import UserError


class Beam(NamedTuple):
    """A continuation, ended or not."""
    log_prob: float  # the sum over its tokens
    ids: list

    def score(self, length_penalty):
        """Return the number by which beams of different lengths are compared."""
        return self.log_prob * len(self.ids) ** -length_penalty


@torch.no_grad()
def beam_search(model, prompt, max_new_tokens, num_beams, length_penalty=1.0, ends=()):
    """
    Return up to num_beams continuations of a list of ids as [(score, ids)], best first; they are
    those of transformers. Each ends with an id of `ends` or at max_new_tokens. Its score is the sum
    of log probabilities / length ** length_penalty, so that a higher penalty favours longer ones.
    """
    block_size = model.config.block_size
    n_ids = model.config.unpadded_vocab_size or model.config.vocab_size
    if len(prompt) + max_new_tokens > block_size:
        raise UserError(f'beam search is limited to block_size={block_size} tokens, and the prompt '
                        f'has {len(prompt)}: set --max_new_tokens to what is left or less')
    cache = model.new_cache(1, len(prompt) + max_new_tokens)
    idx = torch.tensor([prompt], device=cache[0].k.device)
    running, ended = [Beam(0.0, [])], []
    # so many that num_beams remain even if every beam ends in each way that it can
    n_candidates = max(2, 1 + len(ends)) * num_beams
    for length in range(1, max_new_tokens + 1):
        logits, _ = model.forward(idx, cache=cache)
        log_probs = logits[:, -1, :n_ids].float().log_softmax(-1).cpu()
        totals = torch.tensor([beam.log_prob for beam in running])[:, None] + log_probs
        best = totals.flatten().topk(min(n_candidates, totals.numel()))
        going_on, parents = [], []
        for rank, (log_prob, i) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            parent, token = divmod(i, n_ids)
            beam = Beam(log_prob, running[parent].ids + [token])
            if token not in ends and length < max_new_tokens:
                going_on.append(beam)
                parents.append(parent)
            elif rank < num_beams:
                ended.append(beam)
        running, parents = going_on[:num_beams], parents[:num_beams]
        ended = sorted(ended, key=lambda beam: -beam.score(length_penalty))[:num_beams]
        if not running:
            break
        worst = ended[-1].score(length_penalty) if len(ended) == num_beams else -math.inf
        if running[0].score(length_penalty) <= worst:
            break
        for layer in cache:
            layer.k, layer.v = layer.k[parents], layer.v[parents]
            layer.doc = None if layer.doc is None else layer.doc[parents]
            layer.last = None if layer.last is None else layer.last[parents]
        idx = idx.new_tensor([beam.ids[-1:] for beam in running])
    return [(beam.score(length_penalty), beam.ids) for beam in ended]
