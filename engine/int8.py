"""int8 weights for sampling."""
import torch
import torch.nn as nn
from torch.nn import functional as F


class Int8Linear(nn.Module):
    """
    A Linear for sampling whose weight is int8 with a scale for each output: half the bytes of bfloat16. For up to 4 rows of bfloat16 a CPU has a kernel that
    reads them as they are, no slower than bfloat16's; everything else turns them into x's dtype first, which is slower. embed(ids): rows, for tied embeddings.
    """
    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().float().abs().amax(1).clamp(min=1e-8) / 127  # (out,)
        self.register_buffer('weight', (linear.weight.detach() / scale[:, None]).round().to(torch.int8))
        self.register_buffer('scale', scale.to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x):
        rows = x.reshape(-1, x.size(-1))
        if rows.size(0) <= 4 and x.device.type == 'cpu' and x.dtype == torch.bfloat16:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            parts = self.weight.split(max(1, 2 ** 22 // self.weight.size(1)))  # a large head at once would be more memory than is saved
            y = torch.cat([F.linear(rows, part.to(x.dtype)) for part in parts], dim=-1) * self.scale
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)

    def embed(self, ids):
        return self.weight[ids].to(self.scale.dtype) * self.scale[ids][..., None]


class Int8Embedding(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, ids):
        return self.head.embed(ids)
