"""What a run reports."""
import math

import torch


@torch.no_grad()
def gradient_norms(grads, all_reduce=None):
    """The norm of each gradient, (len(grads),) float32. all_reduce: what sums a tensor over processes, if each has a shard of every gradient."""
    if all_reduce is None:
        return torch.stack(torch._foreach_norm(grads))
    return all_reduce(torch.stack(torch._foreach_norm([g.to_local() for g in grads])).double().square()).sqrt().float()


@torch.no_grad()
def gradient_statistics(model, all_reduce=None):
    """
    Of the gradients that model's parameters have: dict(norm, layers={'wte', 'wpe', '0', ..., 'ln_f', 'lm_head': norm of each}, mean, std),
    floats. norm is bit for bit what clip_grad_norm_ computes, so clipping need not do it again. Two passes, one transfer to the host.
    all_reduce as for gradient_norms.
    """
    names, grads = zip(*((name.split('.'), p.grad) for name, p in model.named_parameters() if p.grad is not None))
    norms, n = gradient_norms(grads, all_reduce), sum(g.numel() for g in grads)
    mean = torch.stack([(g.to_local() if all_reduce else g).sum() for g in grads]).sum() / n
    mean = all_reduce(mean) if all_reduce else mean
    total, mean, *norms = torch.stack((torch.linalg.vector_norm(norms), mean, *norms)).tolist()
    layers = {}
    for path, norm in zip(names, norms):  # transformer.h.0.attn.c_attn.weight, transformer.wte.weight, lm_head.weight
        layer = path[2] if path[1] == 'h' else path[0] if path[0] == 'lm_head' else path[1]
        layers[layer] = math.hypot(layers.get(layer, 0.0), norm)
    return dict(norm=total, layers=layers, mean=mean, std=math.sqrt(max(0.0, total ** 2 / n - mean ** 2)))
