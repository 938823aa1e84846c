"""Muon beside AdamW as one optimizer."""
import contextlib

import torch
from torch.overrides import TorchFunctionMode

from engine.machine import pick_device


class Float32(TorchFunctionMode):
    """While entered, Tensor.bfloat16() gives float32: for Muon's matmuls, which are 20 times as slow where bfloat16 is emulated."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0].float().clone() if func is torch.Tensor.bfloat16 else func(*args, **(kwargs or {}))


class MuonAdamW(torch.optim.Optimizer):
    """
    torch.optim.Muon (https://kellerjordan.github.io/posts/muon/) for the groups that have a momentum, and torch.optim.AdamW, as one optimizer with one
    state dict, so that ZeRO-1, fp16's scaler and checkpoints need not know.
    """
    def __init__(self, groups, **adamw):
        self.parts = torch.optim.AdamW([g for g in groups if 'momentum' not in g], **adamw), torch.optim.Muon([g for g in groups if 'momentum' in g])
        super().__init__(groups, {})  # the parts have filled in their defaults
        device = next((p.device.type for g in groups for p in g['params']), 'cpu')
        self.precision = contextlib.nullcontext() if pick_device(device)[1] == 'bfloat16' else Float32()

    @torch.no_grad()
    def step(self, closure=None):
        for part in self.parts:
            part.state, part.param_groups = self.state, [g for g in self.param_groups if ('momentum' in g) == isinstance(part, torch.optim.Muon)]
            with self.precision:
                part.step()
