"""
Register the optimizers that --optimizer can name, and combine several into one.

To add one, write a function that returns the keyword arguments of its class and decorate it with
@register. Training, checkpoints, ZeRO-1, FSDP, the memory estimate and bench.py use the registry.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from engine.common import UserError
from engine.machine import pick_device


class Entry(NamedTuple):
    cls: type          # the torch.optim.Optimizer
    options: Callable  # (settings, device_type) -> its keyword arguments but lr and weight_decay
    moments: int       # tensors of state per parameter that have the parameter's shape
    rate: str          # the setting with its highest learning rate
    rest: str | None   # the optimizer of all parameters but hidden_matrices(); None: this one
                       # trains all parameters


OPTIMIZER = {}


def register(name, cls, moments, rate='learning_rate', rest=None):
    """Decorator: make `cls` selectable. The decorated function returns its keyword arguments."""
    def add(options):
        OPTIMIZER[name] = Entry(cls, options, moments, rate, rest)
        return options
    return add


@register('adamw', torch.optim.AdamW, moments=2)
def adamw(settings, device_type):
    fused = device_type in ('cuda', 'cpu', 'mps')
    return dict(betas=(settings['beta1'], settings['beta2']), fused=fused)


# Muon stacks matrices up to this many elements. Larger stacks would need more memory for nothing.
MAX_STACK = 2 ** 26


def dtype_of_matmuls(groups):
    """
    Return the dtype of Muon's matmuls: float32 on devices that only emulate bfloat16, where it
    would take 20 times as long.
    """
    params = [p for group in groups for p in group['params']]
    device = params[0].device.type if params else 'cpu'
    has_units = pick_device(device)[1] == 'bfloat16'
    return torch.bfloat16 if has_units else torch.float32


def newton_schulz(x, coefficients, steps, eps):
    """Bring the singular values of each matrix of x, (n, rows, columns), near 1."""
    is_tall = x.size(1) > x.size(2)
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)  # the iteration diverges above 1
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


def gathered(tensor):
    """Return the whole of a tensor that FSDP may have divided."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def divided_like(p, tensor):
    """Return a whole tensor as a DTensor if FSDP has divided p, so that the two can be added."""
    if not hasattr(p, 'full_tensor'):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate
    return DTensor.from_local(tensor, p.device_mesh, [Replicate()] * p.device_mesh.ndim)


class Muon(torch.optim.Muon):
    """
    torch.optim.Muon (https://kellerjordan.github.io/posts/muon/) for stacks of matrices of the same
    shape: a few large matmuls take less time than many small ones. They are in float32 where
    bfloat16 is emulated. A step has spectral norm lr * sqrt(max(1, rows / columns)).
    """
    def __init__(self, groups, **options):
        super().__init__(groups, **options)
        self.dtype = dtype_of_matmuls(self.param_groups)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            same_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    same_shape.setdefault(p.shape, []).append(p)
            for shape, params in same_shape.items():
                n = max(1, MAX_STACK // shape.numel())
                for i in range(0, len(params), n):
                    self.step_together(params[i:i + n], group)

    def step_together(self, params, group):
        """Update matrices of the same shape. Their matmuls are on whole matrices, FSDP or not."""
        stack = torch.stack([gathered(self.update(p, group).to(self.dtype)) for p in params])
        stack = self.orthogonalized(stack, group)
        rows, columns = params[0].shape
        step_size = group['lr'] * math.sqrt(max(1, rows / columns))
        for p, update in zip(params, stack):
            p.mul_(1 - group['lr'] * group['weight_decay'])
            p.add_(divided_like(p, update), alpha=-step_size)

    def orthogonalized(self, stack, group):
        return newton_schulz(stack, group['ns_coefficients'], group['ns_steps'], group['eps'])

    def update(self, p, group):
        """Average the gradient of p into its momentum, and return Nesterov's step."""
        state = self.state[p]
        if 'momentum_buffer' not in state:
            state['momentum_buffer'] = torch.zeros_like(p.grad)
        state['momentum_buffer'].lerp_(p.grad, 1 - group['momentum'])
        return p.grad.lerp(state['momentum_buffer'], group['momentum'])


class NorMuon(Muon):
    """
    Muon with rows of equal norm in each update, so that every output moves as far. This is NorMuon
    (https://arxiv.org/abs/2510.05491) without its average over steps.
    """
    def orthogonalized(self, stack, group):
        stack = super().orthogonalized(stack, group)
        row_norms = stack.norm(dim=2, keepdim=True)
        root_mean_square = row_norms.square().mean(dim=1, keepdim=True).sqrt()
        return stack * root_mean_square / row_norms.clamp(min=group['eps'])


@register('normuon', NorMuon, moments=1, rate='muon_learning_rate', rest='adamw')
@register('muon', Muon, moments=1, rate='muon_learning_rate', rest='adamw')
def muon(settings, device_type):
    return dict(momentum=settings['muon_momentum'])


class Together(torch.optim.Optimizer):
    """
    Several optimizers with one state dict, so that ZeRO-1, the fp16 scaler and checkpoints see a
    single optimizer. group['optimizer'] names the optimizer of a group. Groups must contain every
    setting, because ZeRO-1 constructs this class as Together(groups).
    """
    def __init__(self, groups):
        self.parts = {}
        for name in dict.fromkeys(group['optimizer'] for group in groups):
            own = [group for group in groups if group['optimizer'] == name]
            self.parts[name] = OPTIMIZER[name].cls(own)  # adds its defaults to the groups
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        for name, part in self.parts.items():
            # pass them on at each step, because loading a state dict replaces both
            part.state = self.state
            part.param_groups = [g for g in self.param_groups if g['optimizer'] == name]
            part.step()


def check_name(name):
    """Raise UserError, with the choices, for a name that is not registered."""
    if name not in OPTIMIZER:
        raise UserError(f"unknown optimizer {name!r}; choose from {', '.join(OPTIMIZER)}")


def hidden_matrices(model):
    """
    Return the matrices of a GPT that Muon may train: the weights of Linears in the blocks. A module
    may override this for its own 2-D parameters with hidden_matrix = True or False.
    """
    found = {}
    for module in model.transformer.h.modules():
        if getattr(module, 'hidden_matrix', isinstance(module, nn.Linear)):
            for p in module.parameters(recurse=False):
                if p.dim() == 2 and p.requires_grad:
                    found[id(p)] = p
    return list(found.values())


def parameter_groups(name, model, weight_decay=0.0):
    """
    Return the model's parameter groups, each with its optimizer's name. Groups of `rest` come
    first. Checkpoints number parameters in this order.
    """
    check_name(name)
    rest = OPTIMIZER[name].rest
    groups = model.parameter_groups(weight_decay)
    for group in groups:
        group['optimizer'] = rest or name
    if rest is not None:
        hidden = hidden_matrices(model)
        taken = {id(p) for p in hidden}
        for group in groups:
            group['params'] = [p for p in group['params'] if id(p) not in taken]
        groups.append({'params': hidden, 'weight_decay': weight_decay, 'optimizer': name})
    return groups


def moment_numel(name, model):
    """Return the number of elements of optimizer state that are shaped like the parameters."""
    return sum(OPTIMIZER[group['optimizer']].moments * p.numel()
               for group in parameter_groups(name, model) for p in group['params'])


def build(name, model, settings, device_type):
    """
    Build the optimizer `name` for a GPT from settings. The training loop must set each group's lr
    to the scheduled rate times 'lr_scale'. Raise UserError if the name is unknown.
    """
    groups = parameter_groups(name, model, settings['weight_decay'])
    for group in groups:
        entry = OPTIMIZER[group['optimizer']]
        # an lr_scale from GPT.parameter_groups is relative to this optimizer's own rate; below it
        # becomes relative to learning_rate, which is what the loop schedules
        rate = settings[entry.rate] * group.get('lr_scale', 1.0)
        group.update(entry.options(settings, device_type), lr=rate,
                     lr_scale=rate / settings['learning_rate'])
    if OPTIMIZER[name].rest is not None:
        return Together(groups)
    # pass the options again: torch's AdamW checks its arguments to see whether it is fused
    return OPTIMIZER[name].cls(groups, **OPTIMIZER[name].options(settings, device_type))


def describe(optimizer):
    """
    Describe an optimizer, as in 'muon at 0.02 for 48 matrices, adamw at 0.0006', with the rates
    before any schedule.
    """
    texts = []
    for group in reversed(optimizer.param_groups):
        name = group['optimizer']
        text = f"{name} at {group['lr']:g}"
        if OPTIMIZER[name].rest is not None:
            text += f" for {len(group['params'])} matrices"
        if text not in texts:
            texts.append(text)
    return ', '.join(texts)
