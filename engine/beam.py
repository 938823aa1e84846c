"""Beam search: find the likeliest continuation as a whole, instead of drawing token by token."""
import math

import torch

from engine.common import UserError


@torch.no_grad()
def beam_search(model, prompt, max_new_tokens, num_beams, length_penalty=1.0, ends=()):
    """
    Return up to num_beams continuations of a list of ids as [(score, ids)], best first; they are
    those of transformers. Each ends with an id of `ends` or at max_new_tokens. Its score is the sum
    of log probabilities / length ** length_penalty, so that a higher penalty favours longer ones.
    """
    def score(beam):
        log_prob, ids = beam
        return log_prob * len(ids) ** -length_penalty

    block_size = model.config.block_size
    n_ids = model.config.unpadded_vocab_size or model.config.vocab_size
    if len(prompt) + max_new_tokens > block_size:
        raise UserError(f'beam search is limited to block_size={block_size} tokens, and the prompt '
                        f'has {len(prompt)}: set --max_new_tokens to what is left or less')
    cache = model.new_cache(1, len(prompt) + max_new_tokens)
    idx = torch.tensor([prompt], device=cache[0].k.device)
    running, ended = [(0.0, [])], []  # (log probability, ids)
    # so many that num_beams remain even if every beam ends in each way that it can
    n_candidates = max(2, 1 + len(ends)) * num_beams
    for length in range(1, max_new_tokens + 1):
        logits, _ = model.forward(idx, cache=cache)
        log_probs = logits[:, -1, :n_ids].float().log_softmax(-1).cpu()
        totals = torch.tensor([log_prob for log_prob, _ in running])[:, None] + log_probs
        best = totals.flatten().topk(min(n_candidates, totals.numel()))
        going_on, parents = [], []
        for rank, (log_prob, i) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            parent, token = divmod(i, n_ids)
            beam = log_prob, running[parent][1] + [token]
            if token not in ends and length < max_new_tokens:
                going_on.append(beam)
                parents.append(parent)
            elif rank < num_beams:
                ended.append(beam)
        running, parents = going_on[:num_beams], parents[:num_beams]
        ended = sorted(ended, key=score, reverse=True)[:num_beams]
        worst = score(ended[-1]) if len(ended) == num_beams else -math.inf
        if not running or score(running[0]) <= worst:
            break
        for layer in cache:
            layer.k, layer.v = layer.k[parents], layer.v[parents]
            layer.doc = None if layer.doc is None else layer.doc[parents]
            layer.last = None if layer.last is None else layer.last[parents]
        idx = idx.new_tensor([ids[-1:] for _, ids in running])
    return [(score(beam), beam[1]) for beam in ended]
