"""Quantize weights to int8, for sampling only."""
import torch
import torch.nn as nn
from torch.nn import functional as F


class Int8Linear(nn.Module):
    """
    A Linear with int8 weights and one scale per output: half the bytes of bfloat16.

    For up to 4 rows in bfloat16 on a CPU a kernel reads int8 directly and is no slower than
    bfloat16, and for one row torch.compile makes a faster one. Otherwise the weight is first
    converted to x's dtype, which is slower.
    """
    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.float().abs().amax(1).clamp(min=1e-8) / 127  # (out,)
        self.register_buffer('weight', (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer('scale', scale.to(weight.dtype))
        self.bias = linear.bias

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1))
        if rows.size(0) == 1 and torch.compiler.is_compiling():
            y = (self.weight * rows).sum(-1) * self.scale  # a loop that converts while it reads
        elif rows.size(0) <= 4 and x.device.type == 'cpu' and x.dtype == torch.bfloat16:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = self.converted(rows)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)

    def converted(self, rows):
        """
        Convert and multiply in parts, because converting a large head at once would take more
        memory than int8 saves.
        """
        parts = self.weight.split(max(1, 2 ** 22 // self.weight.size(1)))
        y = torch.cat([F.linear(rows, part.to(rows.dtype)) for part in parts], dim=-1)
        return y * self.scale

    def embed(self, ids):
        """Return the rows of these ids, for an embedding tied to this layer."""
        return self.weight[ids].to(self.scale.dtype) * self.scale[ids][..., None]


class Int8Embedding(nn.Module):
    """The token embedding of a model whose head is an Int8Linear with the same matrix."""
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, ids):
        return self.head.embed(ids)


@torch.no_grad()
def quantize_int8(model):
    """
    Replace every Linear of a GPT with an Int8Linear, in place, and the token embedding if it is
    tied to the head. Return the model.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
    if model.config.weight_tying:
        model.transformer.wte = Int8Embedding(model.lm_head)
    return model
