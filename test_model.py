"""
Tests of the model: its parts, loss, optimizers, counts and generation.

    python -m pytest test_model.py

The registry is tested on combinations in which every pair of choices meets at least once;
FULL_PRODUCT=1 in the environment takes every combination instead (minutes).
"""
import copy
import itertools
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from conftest import one_line
from engine import fast_linear, optim
from engine.attention_map import attention_weights
from engine.common import UserError
from engine.describe import params_by_part
from engine.fast_linear import kernels_here, matrix_bytes, prepare_to_generate
from engine.int8 import Int8Linear
from engine.machine import fastest_dtype
from model import (
    ACTIVATION,
    ATTENTION_BACKEND,
    FFN_TYPE,
    GPT,
    NORMALIZATION,
    POSITION_ENCODING,
    PRESETS,
    REGISTRY,
    ROPE_SCALING,
    GPTConfig,
    Linear,
    LinearCrossEntropy,
    apply_dropout,
    document_mask,
    linear_cross_entropy,
    register,
    sample_token,
)

ROOT = Path(__file__).resolve().parent
TINY = dict(block_size=16, vocab_size=64, n_layer=2, n_head=4, n_embd=32,
            attention_chunk_size=5)  # does not divide 16
V, T, B = TINY['vocab_size'], TINY['block_size'], 3
torch.set_num_threads(1)  # the models are too small to share


def build(seed=1, **settings):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**TINY | settings))


def shaken(seed=1, **settings):
    """A model in which every parameter matters: a fresh one has nearly uniform attention, no biases, gains of 1."""
    model = build(seed, **settings)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def on_meta(**settings):
    with torch.device('meta'):
        return GPT(GPTConfig(**settings))


def ids(*shape, vocab=V, seed=0):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model, idx, targets):
    model.zero_grad()
    loss = model(idx, targets)[1]
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, check_dtype=False)


# which combinations

FACTORS = {kind: list(parts) for kind, parts in REGISTRY.items()} | dict(
    n_kv_head=[None, 2, 1], d_ff=[None, 24], bias=[True, False], qk_norm=[False, True], logit_softcap=[0.0, 3.0],
    weight_tying=[True, False], zero_init_residual=[False, True], token_shift=[False, True])


def pairs(row, factors):
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(factors, 2)}


def all_pairs(factors):
    for a, b in itertools.combinations(factors, 2):
        for x, y in itertools.product(factors[a], factors[b]):
            yield a, x, b, y


def pairwise(factors):
    """Rows in which every pair of choices meets. Greedy: each row is the best of 50 random ones with an open pair."""
    rng, rows = random.Random(0), []
    todo = sorted(all_pairs(factors), key=str)
    while todo:
        a, x, b, y = todo[0]
        open_pairs = set(todo)
        tries = [{k: rng.choice(v) for k, v in factors.items()} | {a: x, b: y} for _ in range(50)]
        rows.append(max(tries, key=lambda row: len(pairs(row, factors) & open_pairs)))
        todo = [pair for pair in todo if pair not in pairs(rows[-1], factors)]
    return rows


def full_product(factors):
    """Every combination of parts; the other keys are drawn at random."""
    rng = random.Random(0)
    for row in itertools.product(*(factors[kind] for kind in REGISTRY)):
        yield {k: rng.choice(v) for k, v in factors.items()} | dict(zip(REGISTRY, row))


COMBINATIONS = list(full_product(FACTORS) if os.environ.get('FULL_PRODUCT') else pairwise(FACTORS))
every_combination = pytest.mark.parametrize(
    'parts', COMBINATIONS, ids=lambda row: '-'.join(str(v) for v in row.values()))


def test_the_combinations_cover_every_pair_of_choices():
    """A hole in the set would leave, say, post norm with swiglu untested without anybody knowing."""
    for a, x, b, y in all_pairs(FACTORS):
        assert any(row[a] == x and row[b] == y for row in COMBINATIONS), (a, x, b, y)


# a second implementation from the formulas: slow, float64, one head at a time; it shares nothing but the weights

REFERENCE_ACTIVATION = {
    'gelu': lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    'gelu_tanh': lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))),
    'silu': lambda x: x / (1 + torch.exp(-x)),
    'relu': lambda x: x.clamp(min=0),
    'leaky_relu': lambda x: torch.where(x > 0, x, 0.01 * x),
    'relu_squared': lambda x: x.clamp(min=0) ** 2,
}


def reference_norm(kind, x, weight, bias, eps):
    if kind != 'rmsnorm':
        x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x ** 2).mean(-1, keepdim=True) + eps) * weight + bias


def reference_rope(x, pos, theta):
    """x (..., T, D): dimensions i and i + D/2 form a complex number that turns by pos * theta^(-2i/D)."""
    half = x.size(-1) // 2
    turn = torch.exp(1j * pos.double()[:, None] * theta ** (-2 * torch.arange(half).double() / x.size(-1)))
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat((z.real, z.imag), dim=-1)


def reference_attention(q, k, v):
    """q (B, H, T, D), k, v (B, K, S, D): query head h reads key head h // (H/K); queries are the last positions."""
    out, offset = torch.zeros_like(q, dtype=torch.float64), k.size(2) - q.size(2)
    for h, t in itertools.product(range(q.size(1)), range(q.size(2))):
        kv = h // (q.size(1) // k.size(1))
        seen_k, seen_v = k[:, kv, :offset + t + 1].double(), v[:, kv, :offset + t + 1].double()
        weights = torch.softmax((seen_k @ q[:, h, t].double()[:, :, None])[:, :, 0] / math.sqrt(q.size(-1)), dim=-1)
        out[:, h, t] = (weights[:, :, None] * seen_v).sum(1)
    return out


class Reference:
    """The formulas applied to a state dict and a config."""
    def __init__(self, state, config):
        self.s = {k: v.detach().double() for k, v in state.items()}
        self.c = config

    def norm(self, x, name):
        bias = self.s.get(f'{name}.bias', 0)
        return reference_norm(self.c.normalization, x, self.s[f'{name}.weight'], bias, self.c.norm_eps)

    def linear(self, x, name):
        return torch.einsum('btc,fc->btf', x, self.s[f'{name}.weight']) + self.s.get(f'{name}.bias', 0)

    def attention(self, x, name):
        c = self.c
        H, K, D, pos = c.n_head, c.n_kv_head or c.n_head, c.n_embd // c.n_head, torch.arange(x.size(1))
        heads = torch.stack(self.linear(x, f'{name}.c_attn').split(D, dim=2), dim=1)  # (B, H + 2K, T, D)
        q, k, v = heads[:, :H], heads[:, H:H + K], heads[:, H + K:]
        if c.qk_norm:
            q, k = self.norm(q, f'{name}.q_norm'), self.norm(k, f'{name}.k_norm')
        if c.position_encoding == 'rope':
            q, k = reference_rope(q, pos, c.rope_theta), reference_rope(k, pos, c.rope_theta)
        y = reference_attention(q, k, v)
        return self.linear(torch.cat([y[:, h] for h in range(H)], dim=2), f'{name}.c_proj')

    def ffn(self, x, name):
        h, act = self.linear(x, f'{name}.c_fc'), REFERENCE_ACTIVATION[self.c.activation]
        if self.c.ffn_type in ('swiglu', 'geglu'):
            gate, up = h.chunk(2, dim=2)
            return self.linear(act(gate) * up, f'{name}.c_proj')
        return self.linear(act(h), f'{name}.c_proj')

    def block(self, x, h):
        if self.c.norm_position == 'pre':
            x = x + self.attention(self.norm(x, f'{h}.ln_1'), f'{h}.attn')
            return x + self.ffn(self.norm(x, f'{h}.ln_2'), f'{h}.mlp')
        x = self.norm(x + self.attention(x, f'{h}.attn'), f'{h}.ln_1')
        return self.norm(x + self.ffn(x, f'{h}.mlp'), f'{h}.ln_2')

    def logits(self, idx):
        """(B, T, V) float64 for ids (B, T)."""
        x = self.s['transformer.wte.weight'][idx]
        if self.c.token_shift:
            before = torch.stack([torch.zeros_like(x[:, 0]), *x.unbind(1)[:-1]], dim=1)
            x = x + self.s['transformer.shift.weight'] * before
        if self.c.position_encoding == 'learned_absolute':
            x = x + self.s['transformer.wpe.weight'][:idx.size(1)]
        for i in range(self.c.n_layer):
            x = self.block(x, f'transformer.h.{i}')
        if self.c.norm_position == 'pre':
            x = self.norm(x, 'transformer.ln_f')
        logits, cap = self.linear(x, 'lm_head'), self.c.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits


KNOWN = dict(
    normalization=['layernorm', 'layernorm_nobias', 'rmsnorm'], activation=list(REFERENCE_ACTIVATION),
    position_encoding=['learned_absolute', 'rope', 'none'], norm_position=['pre', 'post'],
    attention_backend=['sdpa', 'manual', 'chunked'],  # ways to compute the same softmax attention
    ffn_type=['standard', 'swiglu', 'geglu'])


# registry: properties of every combination

@every_combination
def test_logits_are_those_of_the_formulas(parts):
    """Two parts can be right alone and wrong together, such as norms of queries after the rotation."""
    new = [parts[kind] for kind, known in KNOWN.items() if parts[kind] not in known]
    if new:
        pytest.skip(f'no reference formula for {new}')
    model, idx = shaken(**parts), ids(B, T)
    close(model(idx, all_logits=True)[0].double(), Reference(model.state_dict(), model.config).logits(idx), 1e-4)


@every_combination
def test_two_steps_train_every_parameter(parts):
    """A parameter without a gradient would stay random, and nothing else would show it."""
    model, idx, targets = build(**parts), ids(B, T), ids(B, T, seed=1)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    before = model(idx, targets)[1].item()
    assert abs(before - math.log(V)) < 0.3  # an untrained model knows nothing
    for step in range(2):
        optimizer.zero_grad()
        model(idx, targets)[1].backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name
            # behind an output of 0 nothing learns in the first step; softmax cancels whatever all keys share
            asleep = step == 0 and parts['zero_init_residual'] or 'k_norm.bias' in name
            assert p.grad.any() or asleep, f'{name} has a gradient of nothing but 0'
        optimizer.step()
    assert model(idx, targets)[1].item() < before


@every_combination
def test_logits_do_not_depend_on_later_tokens(parts):
    """A mask that is off by one, or a norm over the wrong dimension, lets the model read the answer."""
    model, idx = shaken(**parts), ids(B, T)
    logits = model(idx, all_logits=True)[0]
    for t in (1, T // 2, T - 1):
        changed = idx.clone()
        changed[:, t:] = (changed[:, t:] + 1) % V
        after = model(changed, all_logits=True)[0]
        assert torch.equal(after[:, :t], logits[:, :t])
        assert (after[:, t:] != logits[:, t:]).flatten(2).any(-1).all(), 'the change has to be seen from there on'


@every_combination
def test_backends_agree_on_logits_and_gradients(parts):
    """A backend with its own mask, scale or grouping of heads trains another model, silently."""
    idx, targets = ids(B, T), ids(B, T, seed=1)
    manual = shaken(**parts | {'attention_backend': 'manual'})
    logits, (loss, grads) = manual(idx, all_logits=True)[0], gradients(manual, idx, targets)
    for backend in set(KNOWN['attention_backend']) - {'manual'}:
        other = shaken(**parts | {'attention_backend': backend})
        close(other(idx, all_logits=True)[0], logits)
        other_loss, other_grads = gradients(other, idx, targets)
        close(other_loss, loss)
        assert other_grads.keys() == grads.keys()
        for name in grads:
            close(other_grads[name], grads[name])


@every_combination
def test_bfloat16_autocast_stays_near_float32(parts):
    """A part could fail under autocast, or compute angles in 8 bits. 0.1 is about 25 roundings of 2^-8."""
    model, idx, targets = shaken(**parts), ids(B, T), ids(B, T, seed=1)
    logits, loss = model(idx, targets, all_logits=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        rough, rough_loss = model(idx, targets, all_logits=True)
        generated = model.generate(idx[:, :5], 4, seed=1)
    assert (rough.float() - logits).norm() < 0.1 * logits.norm()
    assert abs(rough_loss - loss) < 0.1 * loss and rough_loss.dtype == torch.float32
    assert generated.shape == (B, 9)
    rough_loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())


@every_combination
@pytest.mark.parametrize('backend', ['sdpa', 'manual'])
def test_flops_are_those_that_torch_counts(parts, backend):
    """A part can outgrow its formula. 'chunked' sees fewer keys and computes them twice: it has its own test."""
    c = dict(parts, attention_backend=backend, block_size=24, vocab_size=100, n_layer=2, n_head=4, n_embd=32)
    assert_counted(on_meta(**c), B=3, T=20)


def assert_counted(model, B, T, tolerance=0):
    idx = torch.zeros(B, T, dtype=torch.long, device='meta')
    per_token = model.flops_per_token(seq_len=T)
    with FlopCounterMode(display=False) as counter:
        model(idx, all_logits=True)
    assert 3 * counter.get_total_flops() == per_token * B * T
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    assert counter.get_total_flops() == per_token * B * T
    return per_token * B * T


@every_combination
def test_parts_sum_to_all_parameters_and_flops(parts):
    """A table could forget a part, or count a tied matrix twice."""
    model = build(**parts)
    tensors = {p.data_ptr(): p.numel() for p in model.state_dict().values()}
    assert sum(params_by_part(model).values()) == model.get_num_params(non_embedding=False) == sum(tensors.values())
    assert params_by_part(model).get('head', 0) == (0 if parts['weight_tying'] else V * 32)
    assert 3 * sum(model.flops_by_part().values()) == model.flops_per_token()
    half_of_scores = 0.5 * 4 * T * 32 * 2  # 2 layers
    assert model.flops_per_token() - model.flops_per_token(causal=True) == 3 * half_of_scores


@every_combination
def test_a_checkpoint_brings_the_whole_model_back(parts, tmp_path):
    """A part whose name is not stored would come back as the default one."""
    model, idx = shaken(**parts), ids(B, T)
    torch.save({'model': model.state_dict(), 'model_args': vars(model.config)}, tmp_path / 'ckpt.pt')
    again = GPT.from_checkpoint(tmp_path)
    assert again.config == model.config and not again.training
    assert torch.equal(again(idx, all_logits=True)[0], model(idx, all_logits=True)[0])


@every_combination
def test_a_cache_filled_in_pieces_gives_the_same_logits(parts):
    """With several queries after cached keys, a causal mask could start at the wrong corner."""
    model, idx = shaken(**parts), ids(B, T)
    whole, cache, pieces = model(idx, all_logits=True)[0], model.new_cache(B, T), []
    with torch.no_grad():
        for piece in idx.split([5, 1, 7, 1, 2], dim=1):
            pieces.append(model(piece, cache=cache, all_logits=True)[0])
    close(torch.cat(pieces, dim=1), whole)


def watch_backend(model):
    """A list that the next forward fills with the (values, output) of each layer's attention backend."""
    seen = []
    for block in model.transformer.h:
        def attend(q, k, v, *rest, fast=block.attn.attend):
            y = fast(q, k, v, *rest)
            seen.append((v, y))
            return y
        block.attn.attend = attend
    return seen


@every_combination
@pytest.mark.parametrize('doc_mask_token', [None, 0], ids=['', 'doc_mask'])
def test_attention_weights_are_those_the_backend_used(parts, doc_mask_token):
    """The weights shown could be from before RoPE or the norm of q and k, without the mask, or of another head."""
    if parts['attention_backend'] not in KNOWN['attention_backend']:
        pytest.skip('the weights shown are those of softmax attention')
    model, idx = shaken(**parts, doc_mask_token=doc_mask_token), ids(B, T)
    idx[:, 5] = 0
    weights, logits = attention_weights(model, idx), model(idx)[0]
    seen = watch_backend(model)
    assert torch.equal(model(idx)[0], logits) and len(weights) == len(seen) == 2
    for w, (v, y) in zip(weights, seen):
        assert w.shape == (B, 4, T, T) and not w.triu(1).any() and w.dtype == torch.float32
        assert doc_mask_token is None or not w[:, :, 5:, :5].any()
        close(w.sum(-1), torch.ones(B, 4, T))
        close(w @ v.repeat_interleave(4 // v.size(1), dim=1), y)


def test_a_cache_is_used_whatever_else_is_on():
    """Checkpoints store activation_checkpointing; if it bypassed the cache, every token would be at position 0."""
    model, idx = shaken(activation_checkpointing=True), ids(B, T)
    cache = model.new_cache(B, T)
    pieces = [model(piece, cache=cache, all_logits=True)[0] for piece in idx.split(8, dim=1)]  # gradients are on
    close(torch.cat(pieces, dim=1), model(idx, all_logits=True)[0])


@every_combination
def test_activation_checkpointing_changes_nothing_but_memory(parts):
    """Recomputing could draw other dropout masks than the forward pass did."""
    idx, targets = ids(B, T), ids(B, T, seed=1)
    models = [shaken(**parts, dropout=0.1, activation_checkpointing=on).train() for on in (False, True)]
    results = []
    for model in models:
        torch.manual_seed(5)
        results.append(gradients(model, idx, targets))
    (loss, grads), (other_loss, other_grads) = results
    assert loss == other_loss and grads.keys() == other_grads.keys()
    for name in grads:
        close(other_grads[name], grads[name], 1e-6)
    torch.manual_seed(6)
    assert gradients(models[0], idx, targets)[0] != loss, 'dropout has to be at work'


# the parts, each against its formula

@pytest.mark.parametrize('name', REFERENCE_ACTIVATION)
def test_activation_is_its_formula(name):
    """GPT-2's tanh and nanoGPT's erf differ by 5e-4, enough to spoil loaded weights."""
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    close(ACTIVATION[name](x), REFERENCE_ACTIVATION[name](x), 1e-12)


@pytest.mark.parametrize('eps', [1e-5, 0.5])
@pytest.mark.parametrize('name', KNOWN['normalization'])
def test_normalization_is_its_formula(name, eps):
    """eps could be ignored or added outside the root, or the variance taken over n - 1."""
    norm, x = NORMALIZATION[name](32, GPTConfig(norm_eps=eps)), torch.randn(5, 32) + 1
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_()
    assert (getattr(norm, 'bias', None) is not None) == (name == 'layernorm')
    bias = norm.bias.double() if name == 'layernorm' else 0
    close(norm(x).double(), reference_norm(name, x.double(), norm.weight.double(), bias, eps))


def test_rmsnorm_computes_in_float32():
    """300 squared is beyond float16, and the mean of squares in bfloat16 has two digits."""
    norm = NORMALIZATION['rmsnorm'](64, GPTConfig())
    for dtype in (torch.float16, torch.bfloat16):
        x, weight = (300 * torch.randn(4, 64)).to(dtype), norm.weight.detach().uniform_(0.5, 2)
        y = norm(x)
        assert y.dtype == dtype
        expected = reference_norm('rmsnorm', x.double(), weight.double(), 0, 1e-5)
        error, rounding = (y.double() - expected).abs(), torch.finfo(dtype).eps * expected.abs()
        assert (error <= 0.505 * rounding).all(), 'rounded once, at the end'


@pytest.mark.parametrize('theta', [10000.0, 500000.0])
def test_rope_is_a_rotation_of_complex_numbers(theta):
    """The layout could be interleaved, or angles be in bfloat16, where position 256 equals 257."""
    rope = POSITION_ENCODING['rope'](GPTConfig(n_embd=64, n_head=4, rope_theta=theta))
    q, pos, x = torch.randn(2, 4, 1000, 16), torch.arange(1000), torch.randn(2, 1000, 64)
    same, rotate = rope(x, pos)
    assert same is x
    close(rotate(q).double(), reference_rope(q, pos, theta), 1e-3)  # an angle near 1000 in float32 has an error of 6e-5
    close(rotate(q)[:, :, :16].double(), reference_rope(q, pos, theta)[:, :, :16], 1e-5)
    _, rotate = rope(x.bfloat16(), pos)
    half = rotate(q.bfloat16())
    assert half.dtype == torch.bfloat16
    close(half.double(), reference_rope(q.bfloat16(), pos, theta), 0.02)


def test_rope_scores_depend_on_distance_only():
    """The rotation has to be the same for queries and keys, and linear in the position."""
    torch.manual_seed(0)
    _, rotate = POSITION_ENCODING['rope'](GPTConfig(n_embd=64, n_head=4))(torch.zeros(1, 40, 64), torch.arange(40))
    q, k = (rotate(torch.randn(1, 1, 1, 16).expand(1, 1, 40, 16))[0, 0] for _ in range(2))
    scores = q @ k.T
    for distance in (0, 1, 17):
        diagonal = scores.diagonal(-distance)
        close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[5, 5] != pytest.approx(scores[5, 4].item(), abs=1e-3)


@pytest.mark.parametrize('backend', KNOWN['attention_backend'])
@pytest.mark.parametrize('T, S', [(1, 1), (1, 9), (9, 9), (4, 9), (16, 16), (11, 16)])
@pytest.mark.parametrize('K', [4, 2, 1])
def test_attention_is_its_formula(backend, T, S, K):
    """Grouped heads could be paired the wrong way round, or the mask aligned to the first key."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, T, 8), torch.randn(2, K, S, 8), torch.randn(2, K, S, 8)
    y = ATTENTION_BACKEND[backend](q, k, v, 0.0, GPTConfig(attention_chunk_size=5))
    close(y.double(), reference_attention(q, k, v))


@pytest.mark.parametrize('backend', KNOWN['attention_backend'])
def test_attention_dropout_keeps_the_mean(backend):
    """Dropout before the softmax, or without the division by 1 - p, would shift what attention returns."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    n = 4000
    y = ATTENTION_BACKEND[backend](*(t.expand(n, 1, 4, 8) for t in (q, k, v)), 0.25, GPTConfig(attention_chunk_size=5))
    assert y.std(0).max() > 0.1, 'dropout has to be at work'
    close(y.double().mean(0), reference_attention(q, k, v)[0], 6 * y.std(0).max().item() / math.sqrt(n))


@pytest.mark.parametrize('ffn_type', FFN_TYPE)
def test_dropout_is_where_gpt2_has_it(ffn_type):
    """GPT-2 drops out embeddings and both sublayers' outputs; a forgotten place shows only as overfitting."""
    model, seen = shaken(ffn_type=ffn_type, dropout=0.25).train(), {}
    block = model.transformer.h[0]
    for name, module in (('embeddings', model.transformer.drop), ('attention', block.attn), ('ffn', block.mlp)):
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    for training in (True, False):
        model.train(training)(ids(8, T))
        for name, out in seen.items():
            assert out.eq(0).float().mean().item() == pytest.approx(0.25 * training, abs=0.04), name  # of 4096
    assert len(seen) == 3


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('p', [1e-6, 0.1, 0.25, 0.9, 0.999999])
def test_dropout_drops_each_element_with_probability_p_and_keeps_the_mean(p, dtype):
    """
    Four elements share a random number: one of them could be dropped more often than the others, or together with
    its neighbour. A scale of 1 / (1 - p), although p was rounded, would shift the mean.
    """
    torch.manual_seed(0)
    n, rounded = 2 ** 20, min(round(p * 65536), 65535) / 65536
    x = torch.ones(n + 3, dtype=dtype, requires_grad=True)  # no multiple of four
    y = apply_dropout(x, p)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, y) and y.shape == x.shape  # the same elements in both directions
    assert set(y.tolist()) <= {0.0, torch.tensor(1 / (1 - rounded), dtype=dtype).item()}
    dropped = y[:n].eq(0).view(-1, 4)
    sigma = math.sqrt(n * rounded * (1 - rounded))
    assert abs(dropped.sum().item() - n * rounded) <= 5 * sigma
    for i, j in itertools.combinations_with_replacement(range(4), 2):
        q = rounded if i == j else rounded ** 2
        both = (dropped[:, i] & dropped[:, j]).sum().item()
        assert abs(both - n / 4 * q) <= 5 * math.sqrt(n / 4 * q * (1 - q)), (i, j)


@pytest.mark.parametrize('backend', ATTENTION_BACKEND)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_dropout_on_a_cpu_draws_one_number_for_four_elements(backend, dtype):
    """torch's own dropout draws one number after another there, which doubled the time of a step."""
    model, idx = shaken(attention_backend=backend, dropout=0.1).train(), ids(B, T)
    with profile() as profiler, torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        model(idx, idx)[1].backward()
    calls = {event.key: event.count for event in profiler.key_averages()}
    assert not [name for name in calls if 'bernoulli' in name]
    assert calls['aten::randint'] >= 1 + 3 * TINY['n_layer']


def test_dropout_leaves_a_compiled_model_in_one_piece():
    """Each break of the graph costs more than dropout does, and nothing is fused across it."""
    model, idx = shaken(dropout=0.1).train(), ids(B, T)
    torch.compile(model, backend='aot_eager', fullgraph=True)(idx, idx)[1].backward()
    torch.compiler.reset()


def test_chunked_attention_holds_no_full_matrix_of_weights():
    """Chunks exist to avoid holding all (T, S) weights at once."""
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **kwargs or {})
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    q, k, v = (torch.randn(1, 2, 96, 4, requires_grad=True) for _ in range(3))
    with Largest():
        ATTENTION_BACKEND['chunked'](q, k, v, 0.0, GPTConfig(attention_chunk_size=16)).sum().backward()
    assert largest == 2 * 16 * 96


def test_chunked_attention_counts_the_keys_up_to_its_end():
    """Chunks that mask all keys cost twice as much. Only forward is compared, because backward recomputes."""
    model = on_meta(block_size=20, vocab_size=100, n_layer=2, n_head=4, n_embd=32,
                    attention_backend='chunked', attention_chunk_size=6)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 20, dtype=torch.long, device='meta'), all_logits=True)
    full, chunks = 4 * 32 * 20 * 20, 4 * 32 * (6 * 6 + 6 * 12 + 6 * 18 + 2 * 20)
    assert counter.get_total_flops() == 3 * (20 * model.flops_per_token(20) / 3 - 2 * (full - chunks))


def document_numbers(T):
    return torch.randint(2, (2, T), generator=torch.Generator().manual_seed(0)).cumsum(1) // 2


MASKS = {
    'causal': lambda T, S: None,
    'documents': lambda T, S: document_mask(document_numbers(S), T),
    'documents of one row': lambda T, S: document_mask(document_numbers(S)[:1], T),
}


@pytest.mark.parametrize('T, S', [(1, 1), (1, 9), (9, 9), (4, 9)])
def test_a_mask_shows_what_it_promises(T, S):
    """Off by one, a query would see the next token, miss itself, or see the document before."""
    doc = document_numbers(S)
    mask = document_mask(doc, T)
    assert mask.shape == (2, 1, T, S) and mask.dtype == torch.bool
    for b, t, j in itertools.product(range(2), range(T), range(S)):
        i = S - T + t
        assert mask[b, 0, t, j] == (j <= i and doc[b, i] == doc[b, j])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('masked', MASKS)
@pytest.mark.parametrize('backend', [name for name in KNOWN['attention_backend'] if name != 'manual'])
@pytest.mark.parametrize('T, S', [(9, 9), (4, 9)])
@pytest.mark.parametrize('K', [4, 2])
def test_every_backend_broadcasts_every_mask(backend, masked, T, S, K, dtype):
    """A mask for all sequences, (1, 1, T, S), must also expand where bfloat16 trains on a CPU."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, T, 8), torch.randn(2, K, S, 8), torch.randn(2, K, S, 8)
    q, k, v = (t.to(dtype).requires_grad_() for t in (q, k, v))
    config, mask = GPTConfig(attention_chunk_size=5), MASKS[masked](T, S)
    expected = ATTENTION_BACKEND['manual'](q.double(), k.double(), v.double(), 0.0, config, mask)
    y = ATTENTION_BACKEND[backend](q, k, v, 0.0, config, mask)
    assert y.dtype == dtype
    close(y.double(), expected, 1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize('kv_heads, masked', [(4, False), (2, False), (4, True), (2, True)], ids=str)
@pytest.mark.parametrize('T', [128, 640])  # short sequences take the definition, long ones the kernel
def test_bfloat16_attention_on_a_cpu_is_near_float32(T, kv_heads, masked):
    """The faster way for short sequences could be bypassed, or compute something else."""
    torch.manual_seed(0)
    sdpa, manual, config = ATTENTION_BACKEND['sdpa'], ATTENTION_BACKEND['manual'], GPTConfig()
    q, k, v = (torch.randn(2, heads, T, 64).bfloat16().requires_grad_() for heads in (4, kv_heads, kv_heads))
    doc = torch.randint(2, (2, T)).cumsum(1) // 20
    mask = document_mask(doc, T) if masked else None
    double = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = manual(*double, 0.0, config, mask)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = sdpa(q, k, v, 0.0, config, mask)
        last = sdpa(q[:, :, -20:], k, v, 0.0, config, document_mask(doc, 20) if masked else None)
    assert y.dtype == torch.bfloat16 and (y - expected).norm() < 0.01 * expected.norm()
    assert (last - expected[:, :, -20:]).norm() < 0.01 * expected[:, :, -20:].norm()
    assert any('ScaledDotProduct' in node.name() for node in walk(y.grad_fn)) == (T > 512)
    out = torch.randn(y.shape)
    grads = torch.autograd.grad(y, (q, k, v), out.bfloat16())
    expected_grads = torch.autograd.grad(expected, double, out.double())
    for grad, expected_grad in zip(grads, expected_grads):
        assert (grad - expected_grad).norm() < 0.02 * expected_grad.norm()


def test_dropout_of_bfloat16_attention_on_a_cpu_is_that_of_the_definition():
    """Dropout could be left out, or weights be dropped without scaling up the others."""
    q, k, v = (torch.randn(2, 3, 96, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    outputs = []
    for backend in ('sdpa', 'manual'):
        torch.manual_seed(0)
        outputs.append(ATTENTION_BACKEND[backend](q, k, v, 0.3, GPTConfig()))
    assert (outputs[0] - outputs[1]).norm() < 0.01 * outputs[1].norm()


def walk(node):
    """All nodes of an autograd graph, from its end."""
    yield node
    for parent, _ in node.next_functions:
        yield from walk(parent) if parent is not None else ()


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_a_single_token_goes_through_a_linear_as_many_do(bias, dtype, tolerance):
    """Generation uses a matrix-vector product of its own."""
    torch.manual_seed(0)
    linear, x = Linear(24, 40, bias=bias, dtype=dtype), torch.randn(3, 1, 24, dtype=dtype)
    many = linear(x)
    with torch.no_grad():
        for i in range(3):
            one = linear(x[i:i + 1])
            assert one.shape == (1, 1, 40) and one.dtype == dtype
            torch.testing.assert_close(one, many[i:i + 1].detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('d_ff, C, width', [(None, 96, 256), (None, 128, 512), (24, 96, 24)])
def test_swiglu_is_its_formula(d_ff, C, width):
    """Gate and up could be swapped, or the width not be 8/3 C rounded up to a multiple of 256."""
    config, x = GPTConfig(n_embd=C, n_head=4, d_ff=d_ff, activation='silu', bias=False), torch.randn(5, C)
    ffn = FFN_TYPE['swiglu'](config)
    gate, up = ffn.c_fc.weight.double().split(width)
    z = x.double() @ gate.T
    close(ffn(x).double(), ((z * torch.sigmoid(z)) * (x.double() @ up.T)) @ ffn.c_proj.weight.double().T)


def test_swiglu_costs_what_four_times_the_width_costs():
    """A fair comparison needs equal cost: three matrices at 8/3 C are two at 4 C."""
    c = dict(n_embd=768, n_layer=1)
    for ffn_type in ('standard', 'swiglu', 'geglu'):
        assert on_meta(**c, ffn_type=ffn_type).flops_by_part()['ffn'] == 2 * 2 * 768 * 3072


def test_post_norm_has_no_final_norm():
    """A second norm right after the last one would be a parameter that GPT-1 does not have."""
    names = build(norm_position='post').state_dict().keys()
    assert not [n for n in names if 'ln_f' in n] and 'transformer.h.1.ln_2.weight' in names
    assert 'transformer.ln_f.weight' in build(norm_position='pre').state_dict()


def test_a_part_added_with_the_decorator_gets_everything_else():
    """Initialization, decay, FLOPs or Muon that knew parts by name would overlook a new one."""
    @register(FFN_TYPE, 'lowrank')
    class LowRank(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.down, self.c_proj = torch.nn.Linear(config.n_embd, 100), torch.nn.Linear(100, config.n_embd)
            self.scale, self.table = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(3, 4))

        def forward(self, x):
            return self.c_proj(self.down(x)) * self.scale

        def extra_flops(self, T, causal):
            return 7 * T
    try:
        model = build(ffn_type='lowrank', n_embd=128)
        ffn = model.transformer.h[0].mlp
        assert ffn.down.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert ffn.c_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not ffn.down.bias.any()
        assert model.flops_by_part()['ffn'] == 2 * (2 * 2 * 128 * 100 + 7 * T)
        assert params_by_part(model)['ffn'] == 2 * (2 * 128 * 100 + 100 + 128 + 1 + 12)
        decayed = {id(p) for p in model.parameter_groups(0.1)[0]['params']}
        assert id(ffn.down.weight) in decayed and id(ffn.scale) not in decayed
        hidden = {id(p) for p in optim.hidden_matrices(model)}
        assert id(ffn.down.weight) in hidden and not hidden & {id(ffn.scale), id(ffn.table), id(ffn.down.bias)}
        ffn.down.hidden_matrix, ffn.hidden_matrix = False, True
        hidden = {id(p) for p in optim.hidden_matrices(model)}
        assert id(ffn.down.weight) not in hidden and id(ffn.table) in hidden and id(ffn.scale) not in hidden
        with pytest.raises(ValueError, match='standard, swiglu.*lowrank'):
            GPTConfig(ffn_type='lowrnk')
    finally:
        del FFN_TYPE['lowrank']


# loss

def plain_loss(x, weight, targets, softcap=0.0):
    """The definition, in float64. Without any target torch's own mean is nan, and ours is 0."""
    z = x.double() @ weight.double().T
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return F.cross_entropy(z, targets, ignore_index=-1, reduction='sum') / (targets >= 0).sum().clamp(min=1)


def loss_inputs(N, C, V, scale=1.0):
    """x (N, C), weight (V, C), targets (N,)."""
    x, weight, targets = torch.randn(N, C), scale * torch.randn(V, C), torch.randint(V, (N,))
    return x.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize('chunk', [1, 7, 40, 1000, None])  # None: as the model calls it
@pytest.mark.parametrize('softcap', [0.0, 2.0])
@pytest.mark.parametrize('ignored', ['none', 'some', 'all'])
def test_chunked_loss_is_cross_entropy(chunk, softcap, ignored):
    """The loss could be a mean of chunk means, ignored rows have gradients, or the softcap lack its derivative."""
    torch.manual_seed(0)
    x, weight, targets = loss_inputs(40, 16, 50)
    targets[{'none': slice(0), 'some': slice(3, 17), 'all': slice(None)}[ignored]] = -1
    expected = plain_loss(x, weight, targets, softcap)
    expected_grads = torch.autograd.grad(expected * 3, (x, weight))  # * 3: as accumulation and loss scaling do
    if chunk is None:
        loss = linear_cross_entropy(x, weight, targets, softcap)
    else:
        loss = LinearCrossEntropy.apply(x, weight, targets, softcap, torch.float32, chunk, 3, True)
    assert loss.dtype == torch.float32
    close(loss.double(), expected.detach())
    for grad, expected_grad in zip(torch.autograd.grad(loss * 3, (x, weight)), expected_grads):
        close(grad, expected_grad)
    with torch.no_grad():
        close(linear_cross_entropy(x, weight, targets, softcap).double(), expected.detach())


def test_the_default_chunk_splits_a_large_vocabulary():
    """
    Chunks exist to avoid holding all logits: 2^26 floats are 1024 rows of a vocabulary of 2^16, 2^22 are 64.

    torch's own cross-entropy is no reference, because its float32 sums over a vocabulary are as rough as ours and
    differ between CPUs. In any order, a sum of n products ends within n 2^-24 of the sum of their absolute values
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). Softmax and the product with the weights
    each have such a sum over the vocabulary, the gradient of the weights one over the rows.
    """
    torch.manual_seed(0)
    N, V = 1040, 2 ** 16
    x, weight, targets = loss_inputs(N, 2, V)
    targets[5] = -1
    logits = (x.double() @ weight.double().T).detach().requires_grad_()
    expected = F.cross_entropy(logits, targets, ignore_index=-1)
    dlogits, = torch.autograd.grad(expected, logits)
    loss = linear_cross_entropy(x, weight, targets)
    assert abs(loss.double() - expected) < (V + N * expected) * 2 ** -24
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    for grad, a, b, n in ((dx, dlogits, weight, 2 * V), (dweight, dlogits.T, x, V + N)):
        error = (grad - a @ b.double()).abs()
        assert (error <= n * 2 ** -24 * (a.abs() @ b.double().abs())).all()


@pytest.mark.parametrize('softcap', [0.0, 2.0])
def test_loss_under_bfloat16_autocast_is_near_float32(softcap):
    """The softmax must not be in bfloat16. Tolerances: operands have 8 bits, sums 24."""
    torch.manual_seed(0)
    x, weight, targets = loss_inputs(400, 64, 500, scale=0.3)
    targets[::7] = -1
    expected = plain_loss(x, weight, targets, softcap)
    expected_grads = torch.autograd.grad(expected, (x, weight))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets, softcap)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=0.01)
    assert loss.item() != pytest.approx(expected.item(), rel=1e-7), 'bfloat16 has to be at work'
    for grad, expected_grad in zip(torch.autograd.grad(loss, (x, weight)), expected_grads):
        assert grad.dtype == torch.float32 and (grad - expected_grad).norm() < 0.02 * expected_grad.norm()


def test_float16_gradients_survive_with_a_loss_scale():
    """softmax / N underflows in float16 if it is rounded before the scaler's factor arrives."""
    torch.manual_seed(0)
    x, weight, targets = loss_inputs(2048, 64, 4096, scale=0.05)
    expected = torch.autograd.grad(plain_loss(x, weight, targets, 0.0), (x, weight))
    loss = LinearCrossEntropy.apply(x, weight, targets, 0.0, torch.float16, 512, 100, True)
    for grad, expected_grad in zip(torch.autograd.grad(loss * 2 ** 16, (x, weight)), expected):
        assert (grad / 2 ** 16 - expected_grad).norm() < 0.005 * expected_grad.norm()


@pytest.mark.parametrize('tied', [True, False])
def test_the_models_loss_is_cross_entropy_of_its_logits(tied):
    """A tied matrix gets two gradients; a loss that returns one of them trains half of it."""
    model, idx, targets = shaken(weight_tying=tied, logit_softcap=3.0), ids(B, T), ids(B, T, seed=1)
    targets[0, :4] = -1
    logits = model(idx, all_logits=True)[0]
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    for name, grad in gradients(model, idx, targets)[1].items():
        close(grad, expected[name])


@pytest.mark.parametrize('softcap', [0.0, 2.0])
@pytest.mark.parametrize('chunk', [1, 7, 40, 1000])
def test_losses_of_tokens_are_cross_entropy_chunk_by_chunk(chunk, softcap):
    """A mean would not show chunks in the wrong order, or an ignored token with a loss."""
    torch.manual_seed(0)
    x, weight, targets = torch.randn(40, 16), torch.randn(50, 16), torch.randint(50, (40,))
    targets[3:17] = -1
    z = x.double() @ weight.double().T
    z = softcap * torch.tanh(z / softcap) if softcap else z
    expected = F.cross_entropy(z, targets, ignore_index=-1, reduction='none')
    losses = LinearCrossEntropy.apply(x, weight, targets, softcap, torch.float32, chunk, 3, False, 'none')
    assert losses.dtype == torch.float32 and not losses[3:17].any()
    close(losses.double(), expected)
    close(linear_cross_entropy(x, weight, targets, softcap, 'none').double(), expected)


def test_the_models_losses_of_tokens_have_the_shape_of_the_targets():
    """Windows and positions could be swapped, or a gradient silently be missing."""
    model, idx, targets = shaken(logit_softcap=3.0), ids(B, T), ids(B, T, seed=1)
    targets[0, :4] = -1
    with torch.no_grad():
        logits, losses = model(idx, targets, reduction='none')
        all_logits = model(idx, all_logits=True)[0].transpose(1, 2)
        close(losses, F.cross_entropy(all_logits, targets, ignore_index=-1, reduction='none'))
        assert logits is None and losses.shape == (B, T)
    for reduction, context in (('none', torch.enable_grad()), ('sum', torch.no_grad())):
        with context, pytest.raises(ValueError, match=f"reduction='{reduction}'"):
            model(idx, targets, reduction=reduction)


def test_forward_returns_what_it_says():
    """Callers rely on which one is None; nanoGPT's (B, T, V) logits beside the loss would fill the memory."""
    model, idx = shaken(), ids(B, T)
    logits, loss = model(idx)
    assert logits.shape == (B, 1, V) and loss is None
    logits_all, loss = model(idx, all_logits=True)
    assert logits_all.shape == (B, T, V) and loss is None
    close(logits, logits_all[:, -1:])
    logits, loss = model(idx, idx)
    assert logits is None and loss.shape == ()
    logits, both = model(idx, idx, all_logits=True)
    assert torch.equal(logits, logits_all) and both == loss
    with torch.no_grad():
        assert model(idx, idx)[1] == loss and not model(idx, idx)[1].requires_grad


def test_targets_may_be_a_slice_of_the_same_tensor():
    """People write x, y = ids[:, :-1], ids[:, 1:], and such a slice cannot be viewed flat."""
    model, data = shaken(), ids(B, T + 1)
    assert model(data[:, :-1], data[:, 1:])[1] == model(data[:, :-1], data[:, 1:].contiguous())[1]


def test_a_sequence_beyond_block_size_is_refused():
    """Without learned positions nothing else would notice a context that was never trained."""
    for position in POSITION_ENCODING:
        with pytest.raises(ValueError, match=f'length {T + 1}: block_size is {T}'):
            build(position_encoding=position)(ids(B, T + 1))


# config and presets

MEANING = {
    'custom': ('layernorm', 'gelu', 'learned_absolute', 'sdpa', 'pre', 'standard', False, True, False, False, 0.0),
    'gpt2': ('layernorm', 'gelu_tanh', 'learned_absolute', 'sdpa', 'pre', 'standard', True, True, False, False, 0.0),
    'llama': ('rmsnorm', 'silu', 'rope', 'sdpa', 'pre', 'swiglu', False, False, False, False, 0.0),
    'team': ('rmsnorm', 'silu', 'rope', 'sdpa', 'pre', 'swiglu', False, False, False, False, 0.0),
    'hybrid': ('layernorm', 'gelu', 'rope', 'sdpa', 'pre', 'standard', False, True, False, False, 0.0),
    'modern': ('rmsnorm', 'relu_squared', 'rope', 'sdpa', 'pre', 'standard', False, False, True, True, 15.0),
}
COMPONENTS = [*REGISTRY, 'bias', 'weight_tying', 'qk_norm', 'zero_init_residual', 'logit_softcap']


@pytest.mark.parametrize('preset', MEANING)
def test_preset_means_what_its_name_promises(preset):
    """GPT-2 with exact GELU, or LLaMA with biases, would be compared under a wrong name."""
    nobody_set = dict.fromkeys([*COMPONENTS, 'n_kv_head', 'd_ff', 'vocab_size']) | {'arch_preset': preset}
    for settings in ({'arch_preset': preset}, nobody_set):
        config = GPTConfig.from_settings(settings)
        assert tuple(getattr(config, key) for key in COMPONENTS) == MEANING[preset]
    if preset == 'custom':
        assert GPTConfig.from_settings({}) == GPTConfig.from_settings({'arch_preset': 'custom'})


ACTIVATION_OF = dict(swiglu='silu', geglu='gelu')


@pytest.mark.parametrize('settings, activation', [
    (dict(ffn_type='swiglu'), 'silu'),
    (dict(ffn_type='swiglu', arch_preset='gpt2'), 'silu'),
    (dict(ffn_type='swiglu', activation=None), 'silu'),
    (dict(ffn_type='swiglu', activation='gelu'), 'gelu'),
    (dict(ffn_type='geglu', arch_preset='llama'), 'gelu'),
    (dict(ffn_type='standard', arch_preset='llama'), 'silu'),
    (dict(arch_preset='llama', activation='relu'), 'relu'),
    (dict(arch_preset='modern'), 'relu_squared'),
], ids=str)
def test_the_gate_of_an_ffn_is_the_one_that_its_name_says(settings, activation):
    """--ffn_type=swiglu on a preset with GELU trained GEGLU."""
    assert GPTConfig.from_settings(settings).activation == activation


def test_an_old_checkpoint_keeps_its_gate():
    """Before geglu had a name, swiglu was stored with the activation of its preset."""
    old = shaken(ffn_type='swiglu', activation='gelu')
    loaded = GPT.from_dict(dict(model=old.state_dict(), model_args=vars(old.config)))
    assert loaded.config == old.config
    geglu = GPT(replace(old.config, ffn_type='geglu')).eval()
    geglu.load_state_dict(old.state_dict())
    for model in loaded, geglu:
        assert torch.equal(model(ids(B, T))[0], old(ids(B, T))[0])


@pytest.mark.parametrize('preset', PRESETS)
def test_a_key_set_by_hand_wins_over_the_preset(preset):
    """--arch_preset=llama --bias=True must have biases; False must not count as unset."""
    for key in COMPONENTS:
        preset_says = getattr(GPTConfig.from_settings({'arch_preset': preset}), key)
        for value in REGISTRY.get(key, (0.0, 5.0) if key == 'logit_softcap' else (True, False)):
            config = GPTConfig.from_settings({'arch_preset': preset, key: value})
            assert getattr(config, key) == value
            same = GPTConfig.from_settings({'arch_preset': preset})
            setattr(same, key, value)
            if key == 'ffn_type':
                same.activation = ACTIVATION_OF.get(value, same.activation)
            assert config == same, f'{key} changed more than itself from {preset_says!r}'


def test_settings_that_are_no_part_pass_through_and_those_of_training_do_not():
    """A size that from_settings forgets would silently be GPT-2's."""
    given = dict(
        block_size=32, vocab_size=96, n_layer=3, n_head=4, n_embd=64, dropout=0.1, n_kv_head=2, d_ff=99, qk_norm=True,
        zero_init_residual=True, rope_theta=5e5, norm_eps=1e-6, logit_softcap=30.0, attention_chunk_size=8,
        activation_checkpointing=True)
    config = GPTConfig.from_settings(given | {'learning_rate': 1.0, 'out_dir': 'x'})
    assert {k: getattr(config, k) for k in given} == given


@pytest.mark.parametrize('data_vocab, vocab_size', [
    (1, 1),
    (65, 65),
    (1024, 1024),
    (1025, 1088),
    (32001, 32064),
    (50257, 50304),
    (50304, 50304),
])
def test_a_large_data_vocabulary_is_padded_to_a_multiple_of_64(data_vocab, vocab_size):
    """Padding 65 characters would waste a third of the table; not padding 50257 ids would cost speed."""
    config = GPTConfig.from_settings({'vocab_size': None}, data_vocab)
    assert (config.vocab_size, config.unpadded_vocab_size) == (vocab_size, data_vocab)


def test_a_vocab_size_by_hand_is_kept_unless_too_small():
    """Ids beyond the embeddings are an index error deep inside, and on a GPU an assert without a name."""
    config = GPTConfig.from_settings({'vocab_size': 50300}, 50257)
    assert (config.vocab_size, config.unpadded_vocab_size) == (50300, 50257)
    with pytest.raises(ValueError) as e:
        GPTConfig.from_settings({'vocab_size': 64}, 65)
    one_line(e.value, 'vocab_size', 64, 65)


@pytest.mark.parametrize('key', [*REGISTRY, 'arch_preset'])
def test_an_unknown_name_lists_the_choices(key):
    """A misspelt part that falls back to the default is a wasted run."""
    with pytest.raises(ValueError) as e:
        GPTConfig.from_settings({key: 'nonesuch'})
    one_line(e.value, key, "'nonesuch'", *(PRESETS if key == 'arch_preset' else REGISTRY[key]))


SIZES = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_kv_head', 'd_ff', 'attention_chunk_size')


BAD_SIZES = [({key: value}, key) for key in SIZES for value in (0, -1, 2.0, True, '8')]


@pytest.mark.parametrize('settings, key', [
    *BAD_SIZES,
    ({'n_embd': 33}, 'n_embd'),
    ({'n_head': 5}, 'n_head'),
    ({'n_kv_head': 3}, 'n_kv_head'),
    ({'n_kv_head': 8}, 'n_kv_head'),
    ({'dropout': 1.0}, 'dropout'),
    ({'dropout': -0.1}, 'dropout'),
    ({'dropout': math.nan}, 'dropout'),
    ({'norm_eps': 0.0}, 'norm_eps'),
    ({'rope_theta': 0.0}, 'rope_theta'),
    ({'rope_scaling': {'factor': 8.0}}, 'rope_scaling'),
    ({'logit_softcap': -1.0}, 'logit_softcap'),
    ({'unpadded_vocab_size': V + 1}, 'unpadded_vocab_size'),
    ({'unpadded_vocab_size': -1}, 'unpadded_vocab_size'),
    ({'unpadded_vocab_size': 0}, 'unpadded_vocab_size'),
    ({'doc_mask_token': 'x'}, 'doc_mask_token'),
    ({'doc_mask_token': -5}, 'doc_mask_token'),
    ({'doc_mask_token': 10 ** 30}, 'doc_mask_token'),
    ({'weight_tying': 'x'}, 'weight_tying'),
    ({'rope_theta': 10 ** 31}, 'rope_theta'),
    ({'rope_scaling': dict.fromkeys(ROPE_SCALING, 'x')}, 'rope_scaling'),
    ({'rope_scaling': dict.fromkeys(ROPE_SCALING, 0)}, 'rope_scaling'),
], ids=str)
def test_a_bad_size_is_refused_by_name(settings, key):
    """0 heads would be a ZeroDivisionError and 33 / 4 a reshape error, neither of which names the key."""
    with pytest.raises(ValueError) as e:
        GPTConfig(**TINY | settings)
    one_line(e.value, key)


def test_rope_refuses_an_odd_head_size():
    """9 dimensions have no halves to pair: it would be a shape error in the first step."""
    with pytest.raises(ValueError) as e:
        build(n_embd=36, position_encoding='rope')
    one_line(e.value, 'rope', 'n_embd', 'n_head', 9)
    build(n_embd=36)  # others do not mind


# initialisation and decay

@pytest.mark.parametrize('preset', PRESETS)
def test_initialisation_is_gpt2s(preset):
    """Residual projections at full size would make the stream grow with depth."""
    torch.manual_seed(0)
    sizes = TINY | dict(n_layer=3, n_embd=128, vocab_size=256, block_size=64)
    model = GPT(GPTConfig.from_settings(dict(sizes, arch_preset=preset)))
    residual_std = 0.0 if model.config.zero_init_residual else 0.02 / math.sqrt(2 * 3)
    matrices = 0
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert p.eq(1.0 if name.endswith('weight') else 0.0).all(), name
        else:
            matrices += 1
            std = residual_std if name.endswith('c_proj.weight') else 0.02
            assert p.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * p.numel())), name  # 5 standard errors
            assert abs(p.mean().item()) <= 5 * std / math.sqrt(p.numel()), name
    embeddings = 1 + (model.config.position_encoding == 'learned_absolute') + (not model.config.weight_tying)
    assert matrices == 3 * 4 + embeddings


@pytest.mark.parametrize('other', [dict(position_encoding='rope'), dict(bias=True), dict(ffn_type='swiglu'),
                                   dict(token_shift=True), dict(weight_tying=False)], ids=str)
def test_layers_of_the_same_name_and_shape_start_alike(other):
    """If the order of creation decided, a change in one part would give every later layer other weights."""
    model = build().state_dict()
    changed = build(**other).state_dict()
    shared = [name for name in model if name in changed and model[name].shape == changed[name].shape]
    assert len(shared) >= 2 + 2 * 3
    for name in shared:
        if name != 'transformer.wte.weight':  # with tied weights it is the head
            assert model[name].equal(changed[name]), name
    assert not model['lm_head.weight'].equal(build(seed=2).state_dict()['lm_head.weight'])


@pytest.mark.parametrize('preset', PRESETS)
def test_matrices_decay_and_vectors_do_not(preset):
    """Decay on norms pulls gains to 0; a tied matrix listed twice would be stepped twice."""
    model = GPT(GPTConfig.from_settings(dict(TINY, arch_preset=preset, qk_norm=True)))
    frozen = model.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
    optimizer = model.configure_optimizers(0.3, 1e-3, (0.8, 0.9), 'cpu')
    listed = [(p, group['weight_decay']) for group in optimizer.param_groups for p in group['params']]
    numbers = {id(p) for p, _ in listed}
    assert numbers == {id(p) for p in model.parameters()} - {id(frozen)} and len(numbers) == len(listed)
    assert all(decay == (0.3 if p.dim() == 2 else 0.0) for p, decay in listed)
    assert all(group['lr'] == 1e-3 and group['betas'] == (0.8, 0.9) for group in optimizer.param_groups)


# optimizers

SETTINGS = dict(learning_rate=1e-3, weight_decay=0.3, beta1=0.8, beta2=0.9, muon_learning_rate=0.02, muon_momentum=0.7)


def train_steps(model, optimizers, n):
    for i in range(n):
        model.zero_grad()
        model(ids(B, T, seed=i), ids(B, T, seed=i + 1))[1].backward()
        for optimizer in optimizers:
            optimizer.step()
    return model.state_dict()


def assert_equal(state, other):
    assert state.keys() == other.keys()
    for name in state:
        assert torch.equal(state[name], other[name]), name


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@every_combination
def test_muon_is_torchs_on_the_matrices_of_blocks_beside_adamw(parts, monkeypatch):
    """Against both by hand: Muon could take the head, nobody a parameter, or one the other's rate."""
    monkeypatch.setattr(optim, 'dtype_of_matmuls', lambda groups: torch.bfloat16)  # as in torch's
    model, reference = build(**parts), build(**parts)
    optimizer = optim.build('muon', model, SETTINGS, 'cpu')
    named = dict(reference.named_parameters())
    hidden = {name: p for name, p in named.items() if p.dim() == 2 and name.startswith('transformer.h.')}
    rest = [p for name, p in named.items() if name not in hidden]
    assert len(hidden) == 2 * 4
    matrices, vectors = [p for p in rest if p.dim() == 2], [p for p in rest if p.dim() < 2]
    by_hand = [
        torch.optim.Muon(hidden.values(), lr=0.02, momentum=0.7, weight_decay=0.3),
        torch.optim.AdamW(matrices, lr=1e-3, betas=(0.8, 0.9), weight_decay=0.3, fused=True),
        torch.optim.AdamW(vectors, lr=1e-3, betas=(0.8, 0.9), weight_decay=0.0, fused=True)]
    for i in range(3):
        for one, optimizers in (model, [optimizer]), (reference, by_hand):
            give_gradients(one, seed=i)
            for each in optimizers:
                each.step()
    for name, p in model.named_parameters():
        # an element of Muon's step is about 0.02 / sqrt(16), and bfloat16 rounds it by a percent
        torch.testing.assert_close(p, named[name], rtol=0, atol=2e-4 if name in hidden else 0)


def matmuls_in_a_step(model):
    optimizer = optim.build('muon', model, SETTINGS, 'cpu')
    give_gradients(model, seed=0)
    with profile() as profiler:
        optimizer.step()
    return sum(event.name in ('aten::bmm', 'aten::baddbmm', 'aten::mm', 'aten::addmm') for event in profiler.events())


def test_muon_multiplies_all_matrices_of_one_shape_together(monkeypatch):
    """Small matrices one by one leave a GPU idle; all of them in one stack could take too much memory."""
    shallow = matmuls_in_a_step(build(n_layer=2))
    assert matmuls_in_a_step(build(n_layer=6)) == shallow
    whole, parts = build(n_layer=3), build(n_layer=3)
    train_steps(whole, [optim.build('muon', whole, SETTINGS, 'cpu')], 1)
    largest = max(p.numel() for p in optim.hidden_matrices(parts))
    monkeypatch.setattr(optim, 'MAX_STACK', 2 * largest)
    assert matmuls_in_a_step(build(n_layer=6)) > shallow
    train_steps(parts, [optim.build('muon', parts, SETTINGS, 'cpu')], 1)
    for p, q in zip(parts.parameters(), whole.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-4)


@pytest.mark.parametrize('lr', [0.02, 0.5])
def test_a_step_of_muon_has_the_spectral_norm_that_is_promised(lr):
    """A learning rate must mean the same for a wide matrix as for a tall one."""
    model = build(n_embd=64, n_kv_head=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = SETTINGS | dict(muon_learning_rate=lr, muon_momentum=0.95, weight_decay=0.0)
    optimizer = optim.build('muon', model, settings, 'cpu')
    model(ids(32, T), ids(32, T, seed=1))[1].backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if name.startswith('transformer.h.') and p.dim() == 2:
            rows, columns = p.shape
            values = torch.linalg.svdvals((p.detach() - before[name]).double())
            values /= lr * math.sqrt(max(1, rows / columns))
            # five Newton-Schulz steps bring every value that is not tiny near 1
            assert 0.6 < values.median() and values.max() < 1.3, name


def steps_of_matrices(name):
    """Return the first step of each matrix of the blocks, from the same gradients for every optimizer."""
    model = build(n_embd=64, n_kv_head=2)
    before = [p.detach().clone() for p in optim.hidden_matrices(model)]
    optimizer = optim.build(name, model, SETTINGS | dict(weight_decay=0.0), 'cpu')
    model(ids(32, T), ids(32, T, seed=1))[1].backward()
    optimizer.step()
    return [p.detach() - start for p, start in zip(optim.hidden_matrices(model), before)]


def test_a_step_of_normuon_has_rows_of_equal_norm_and_the_norm_of_muons():
    """A matrix moves further in all, so that another learning rate would do the same."""
    for step, reference in zip(steps_of_matrices('normuon'), steps_of_matrices('muon')):
        row_norms = step.norm(dim=1)
        torch.testing.assert_close(row_norms, row_norms.mean().expand_as(row_norms), rtol=0.02, atol=0)
        torch.testing.assert_close(step.norm(), reference.norm(), rtol=0.01, atol=0)
        cosine = (step * reference).sum() / step.norm() / reference.norm()
        assert 0.8 < cosine <= 1.0


def test_muon_works_in_float32_where_there_is_no_bfloat16(monkeypatch):
    """On most laptops its bfloat16 matmuls take 20 times as long. The reference is the iteration in float64."""
    monkeypatch.setattr(optim, 'pick_device', lambda *_: (torch.device('cpu'), 'float32'))
    model = build(seed=0, n_embd=64)
    settings = SETTINGS | dict(muon_learning_rate=0.5, muon_momentum=0.0, weight_decay=0.0)
    optimizer = optim.build('muon', model, settings, 'cpu')
    p = model.transformer.h[1].mlp.c_fc.weight  # tall
    before = p.detach().double()
    model(ids(32, T), ids(32, T, seed=1))[1].backward()
    grad, x = p.grad.clone(), p.grad.double().T / p.grad.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    optimizer.step()
    torch.testing.assert_close(p.detach().double(), before - 0.5 * math.sqrt(4) * x.T, rtol=0, atol=1e-4)
    assert torch.equal(p.grad, grad)


@pytest.mark.parametrize('name', optim.OPTIMIZER)
def test_every_optimizer_resumes_bit_for_bit(name):
    """Together hands state and groups to its parts, and loading a state dict replaces both."""
    model, again, whole = build(), build(seed=2), build()
    expected = train_steps(whole, [optim.build(name, whole, SETTINGS, 'cpu')], 4)
    optimizer = optim.build(name, model, SETTINGS, 'cpu')
    again.load_state_dict(train_steps(model, [optimizer], 2))
    # as ZeRO-1 does it: from groups that have all of their settings
    resumed = optim.build(name, again, SETTINGS, 'cpu')
    resumed = type(resumed)([dict(group) for group in resumed.param_groups])
    resumed.load_state_dict(optimizer.state_dict())
    for i in (2, 3):
        again.zero_grad()
        again(ids(B, T, seed=i), ids(B, T, seed=i + 1))[1].backward()
        resumed.step()
    assert_equal(again.state_dict(), expected)


@pytest.mark.parametrize('name', optim.OPTIMIZER)
def test_groups_name_their_optimizer_and_its_rate(name):
    """The schedule, the report and a resume look at the groups alone."""
    model = build()
    optimizer = optim.build(name, model, SETTINGS, 'cpu')
    numbered = [p for group in optimizer.param_groups for p in group['params']]
    assert {id(p) for p in numbered} == {id(p) for p in model.parameters()} and len(set(numbered)) == len(numbered)
    for group in optimizer.param_groups:
        rate = SETTINGS[optim.OPTIMIZER[group['optimizer']].rate]
        assert group['lr'] == rate and group['lr_scale'] == rate / SETTINGS['learning_rate']
    assert name == optimizer.param_groups[-1]['optimizer'] and f'{name} at ' in optim.describe(optimizer)


def test_a_group_may_have_a_learning_rate_of_its_own(monkeypatch):
    """build() overwrote the lr_scale that GPT.parameter_groups had set."""
    ours = GPT.parameter_groups

    def groups(model, weight_decay):
        found = ours(model, weight_decay)
        found[1]['lr_scale'] = 5.0
        return found
    monkeypatch.setattr(GPT, 'parameter_groups', groups)
    built = optim.build('adamw', build(), SETTINGS, 'cpu')
    assert [group['lr_scale'] for group in built.param_groups] == [1.0, 5.0]


@pytest.mark.parametrize('name', optim.OPTIMIZER)
def test_moments_are_counted_as_the_optimizer_keeps_them(name):
    """The memory estimate multiplies what the registry says, without building the optimizer."""
    model = build()
    optimizer = optim.build(name, model, SETTINGS, 'cpu')
    train_steps(model, [optimizer], 1)
    states = [(p, t) for p, state in optimizer.state.items() for t in state.values()]
    assert optim.moment_numel(name, model) == sum(t.numel() for p, t in states if t.shape == p.shape)


def test_an_optimizer_is_one_entry():
    """Places that know optimizers by name would pass a new one by."""
    class Sign(torch.optim.Optimizer):
        def __init__(self, groups, **options):
            super().__init__(groups, options)

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group['params']:
                    p -= group['lr'] * p.grad.sign()

    @optim.register('sign', Sign, moments=0)
    def sign(settings, device_type):
        return {}
    try:
        model, before = build(), build().lm_head.weight
        optimizer = optim.build('sign', model, SETTINGS, 'cpu')
        train_steps(model, [optimizer], 1)
        assert ((model.lm_head.weight - before).abs() < 1.001e-3).all()
        assert optim.moment_numel('sign', model) == 0 and optim.describe(optimizer) == 'sign at 0.001'
    finally:
        del optim.OPTIMIZER['sign']


def test_an_optimizer_that_is_not_there_is_one_line():
    """A misspelt name must list the choices."""
    with pytest.raises(UserError) as e:
        optim.build('muno', build(), SETTINGS, 'cpu')
    one_line(e.value, "'muno'", *optim.OPTIMIZER)


# accounting

def test_flops_of_the_known_small_model():
    """Formula and counter could drift together: these two figures were worked out by hand."""
    model = on_meta(n_layer=2, n_embd=64, n_head=4, block_size=128, vocab_size=512, bias=False)
    assert assert_counted(model, B=1, T=128) == 125_829_120
    assert model.flops_per_token() / 3 * 128 == 41_943_040


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('sizes', [{}, {'n_kv_head': 2}, {'d_ff': 100}], ids=str)
def test_flops_of_the_presets_are_those_that_torch_counts(preset, sizes):
    """If a preset's FLOPs are wrong, so is every comparison of its MFU."""
    with torch.device('meta'):
        small = dict(n_layer=2, n_head=8, n_embd=64, vocab_size=300, block_size=32)
        model = GPT(GPTConfig.from_settings(dict(small, arch_preset=preset, **sizes)))
    assert_counted(model, B=2, T=32)
    assert_counted(model, B=2, T=7)


def test_flops_of_gpt2_124m():
    """28.5 GFLOP per token is in circulation: 33 times too much."""
    model = on_meta(bias=False)
    assert model.flops_per_token() / 1e9 == pytest.approx(0.855, abs=5e-4)
    assert model.flops_per_token(causal=True) / 1e9 == pytest.approx(0.798, abs=5e-4)
    assert model.flops_per_token(512) < model.flops_per_token(1024) == model.flops_per_token()


GPT2_124M = dict(block_size=1024, n_layer=12, n_head=12, n_embd=768)
LARGE = dict(block_size=2048, n_layer=18, n_head=18, n_embd=2304)


@pytest.mark.parametrize('settings, total, non_embedding', [
    (dict(GPT2_124M, arch_preset='gpt2', vocab_size=50257), 124_439_808, 124_439_808 - 1024 * 768),
    (dict(GPT2_124M, arch_preset='custom', vocab_size=50304), 124_373_760, 123_587_328),
    (dict(GPT2_124M, arch_preset='llama', vocab_size=50304, weight_tying=True), 123_587_328, 123_587_328),
    (dict(GPT2_124M, arch_preset='llama', vocab_size=50304), 162_220_800, 162_220_800 - 50304 * 768),
    (dict(LARGE, arch_preset='llama', vocab_size=32000, d_ff=6656), 1_357_860_096, 1_357_860_096 - 32000 * 2304),
    (dict(LARGE, arch_preset='custom', vocab_size=50304, d_ff=10304), 1_357_565_184, 1_357_565_184 - 2048 * 2304)])
def test_parameter_counts_are_the_published_ones(settings, total, non_embedding):
    """One bias too many, or a matrix counted twice, shows in no loss curve."""
    with torch.device('meta'):
        model = GPT(GPTConfig.from_settings(settings))
    assert model.get_num_params(non_embedding=False) == sum(params_by_part(model).values()) == total
    assert model.get_num_params() == non_embedding


# generation

@torch.no_grad()
def naive_generate(model, idx, n, seed, temperature=1.0, top_k=None, slide=1):
    """nanoGPT's loop: crop, run the whole window, draw among the top_k. A full window moves by `slide`."""
    generator, start = torch.Generator().manual_seed(seed), 0
    for _ in range(n):
        while idx.size(1) - start > model.config.block_size:
            start += slide
        logits = model(idx[:, start:])[0][:, -1, :] / temperature
        order = logits.argsort(descending=True)[:, :top_k] if top_k else torch.arange(logits.size(1)).expand_as(logits)
        drawn = torch.multinomial(F.softmax(logits.gather(1, order), dim=-1), num_samples=1, generator=generator)
        idx = torch.cat((idx, order.gather(1, drawn)), dim=1)
    return idx


@pytest.mark.parametrize('position', POSITION_ENCODING)
@pytest.mark.parametrize('n_kv_head', [None, 2])
@pytest.mark.parametrize('prompt, n', [(1, 15), (5, 11), (5, 40), (16, 20), (37, 12)])  # block_size is 16
def test_generation_with_and_without_cache_is_the_naive_loop(position, n_kv_head, prompt, n):
    """The cache could outlive its window, positions count on past it, or a prompt exceed block_size."""
    model = shaken(position_encoding=position, n_kv_head=n_kv_head, qk_norm=True)
    idx, options = ids(B, prompt), dict(temperature=1.5, top_k=20, seed=7)
    for slide in (1, T // 2):
        expected = naive_generate(model, idx, n, slide=slide, **options)
        for use_cache in (True, False):
            ours = model.generate(idx, n, slide=slide, use_cache=use_cache, **options)
            assert torch.equal(ours, expected), (slide, use_cache)


def padded_left(prompts):
    """Return rows of the same length, padded with ids that must not be seen, and the padding of each."""
    longest = max(len(prompt) for prompt in prompts)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    rows = [torch.cat((torch.full((n,), 3), prompt)) for n, prompt in zip(padding.tolist(), prompts)]
    return torch.stack(rows), padding


@pytest.mark.parametrize('doc_mask_token', [None, 3])
@every_combination
def test_a_batch_of_prompts_continues_each_as_it_does_alone(parts, doc_mask_token):
    """Padding that is seen, positions that count it, windows that all move with that of the longest prompt."""
    model = shaken(doc_mask_token=doc_mask_token, **parts)
    prompts = [ids(1, n, seed=n)[0] for n in (1, 9, 16, 20)]  # block_size is 16
    idx, padding = padded_left(prompts)
    for slide, use_cache in ((1, False), (5, True)):
        options = dict(temperature=0, slide=slide, use_cache=use_cache)
        together = model.generate(idx, 8, left_padding=padding, **options)
        for row, n, prompt in zip(together, padding, prompts):
            assert torch.equal(row[n:], model.generate(prompt[None], 8, **options)[0]), (slide, use_cache)


def test_prompts_of_different_lengths_draw_from_their_own_probabilities():
    """One generator draws for the whole batch: its rows' draws are those from each prompt's own logits."""
    model, generator = shaken(position_encoding='rope'), torch.Generator().manual_seed(7)
    rows = [ids(1, n, seed=n) for n in (1, 4, 6)]
    idx, padding = padded_left([row[0] for row in rows])
    together = model.generate(idx, 8, temperature=1.5, top_k=20, seed=7, left_padding=padding)
    for _ in range(8):
        logits = torch.cat([model(row)[0][:, -1] for row in rows])
        drawn = sample_token(logits, 1.5, 20, generator=generator)
        rows = [torch.cat((row, token.view(1, 1)), dim=1) for row, token in zip(rows, drawn)]
    for row, n, expected in zip(together, padding, rows):
        assert torch.equal(row[n:], expected[0])


@every_combination
def test_every_combination_generates_the_same_with_and_without_cache(parts):
    """A part written for sequences could fail on one token at a time."""
    model, idx = shaken(**parts), ids(B, 6)
    for slide in (1, 5, T):
        cached = model.generate(idx, 30, seed=3, slide=slide)
        assert torch.equal(cached, model.generate(idx, 30, seed=3, slide=slide, use_cache=False)), slide


def test_greedy_takes_the_likeliest_token():
    """Temperature 0 would divide by 0 if it were not argmax; rows of a batch must not mix."""
    model, idx = shaken(), ids(B, 4)
    out = model.generate(idx, 8, temperature=0)
    for t in range(4, 12):
        for b in range(B):
            assert out[b, t] == model(out[b:b + 1, :t])[0][0, -1].argmax()
    assert torch.equal(out, model.generate(idx, 8, top_k=1, seed=1))
    assert torch.equal(out, model.generate(idx, 8, top_p=1e-9, seed=1))


def test_the_seed_alone_decides_the_draws():
    """Draws from the global generator would make sampling disturb training, and training sampling."""
    model, idx = shaken(), ids(B, 4)
    torch.manual_seed(1)
    first, state = model.generate(idx, 20, seed=5), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(model.generate(idx, 20, seed=5), first)
    assert not torch.equal(model.generate(idx, 20, seed=6), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), 'a seeded run leaves the global generator alone'
    unseeded = model.generate(idx, 20)
    torch.manual_seed(1)
    assert torch.equal(model.generate(idx, 20), unseeded) and not torch.equal(model.generate(idx, 20), unseeded)


PROBS = torch.tensor([0.15, 0.5, 0.1, 0.25])


@pytest.mark.parametrize('options, expected', [
    (dict(), [0.15, 0.5, 0.1, 0.25]),
    (dict(temperature=0.5), [0.0225, 0.25, 0.01, 0.0625]),
    (dict(temperature=2.0), [0.15 ** 0.5, 0.5 ** 0.5, 0.1 ** 0.5, 0.25 ** 0.5]),
    (dict(top_k=2), [0, 0.5, 0, 0.25]),
    (dict(top_k=4), [0.15, 0.5, 0.1, 0.25]),
    (dict(top_k=99), [0.15, 0.5, 0.1, 0.25]),
    (dict(top_p=0.4), [0, 0.5, 0, 0]),
    (dict(top_p=0.6), [0, 0.5, 0, 0.25]),
    (dict(top_p=0.8), [0.15, 0.5, 0, 0.25]),
    (dict(top_p=0.95), [0.15, 0.5, 0.1, 0.25]),
    (dict(top_p=1.0), [0.15, 0.5, 0.1, 0.25]),
    (dict(top_k=3, top_p=0.8), [0, 0.5, 0, 0.25]),  # of the three that top_k leaves, two hold 0.83
    (dict(temperature=0.5, top_p=0.8), [0, 0.25, 0, 0.0625]),  # temperature first: 0.72 alone is not enough
], ids=str)
def test_tokens_are_drawn_from_the_right_distribution(options, expected):
    """top_p could drop the token that crosses it, or put its mask back in the wrong order."""
    n = 20000
    drawn = sample_token(PROBS.log().expand(n, 4), generator=torch.Generator().manual_seed(0), **options)
    expected = torch.tensor(expected) / sum(expected)
    counts = drawn.bincount(minlength=4)
    assert not counts[expected == 0].any()
    close(counts / n, expected, 5 * 0.5 / math.sqrt(n))


def test_rows_are_sampled_each_from_its_own():
    """A threshold or an order of one row could be used for all of them."""
    logits = torch.stack([PROBS.log(), PROBS.flip(0).log()])
    drawn = set()
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        drawn.add(tuple(sample_token(logits, top_p=0.6, generator=generator).tolist()))
    assert drawn == {(a, b) for a in (1, 3) for b in (0, 2)}


def test_top_k_keeps_that_many_tokens_when_they_tie():
    """Many bfloat16 logits are equal: with a threshold more than k would stay, and top_k=1 would not be greedy."""
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]).expand(2000, 5)
    drawn = sample_token(logits, top_k=2, generator=torch.Generator().manual_seed(0))
    assert len(drawn.unique()) == 2


def test_a_row_that_stopped_goes_on_with_stop_and_all_end_together():
    """Text must not follow the end of text, nor a finished batch wait for max_new_tokens."""
    model, idx, stop = shaken(), ids(8, 4), 9
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)  # flatter, so that rows differ in when they stop
    free, stopped = model.generate(idx, 600, seed=1), model.generate(idx, 600, seed=1, stop=stop)
    ends = [row.index(stop) for row in free[:, 4:].tolist()]
    assert len(set(ends)) > 2 and stopped.size(1) == 4 + max(ends) + 1
    for row, expected, end in zip(stopped[:, 4:].tolist(), free[:, 4:].tolist(), ends):
        assert row[:end + 1] == expected[:end + 1] and set(row[end:]) == {stop}


@pytest.mark.parametrize('options', [{}, {'temperature': 0}, {'top_k': 60}, {'top_p': 0.99}], ids=str)
def test_padding_ids_are_never_drawn(options):
    """No tokenizer can decode padding ids, and training only pushes their rows of the head down."""
    model = shaken(unpadded_vocab_size=50, weight_tying=False)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_(), model.transformer.ln_f.bias.fill_(1.0)  # logits are the rows' sums
        model.lm_head.weight[50:] = 100.0
    assert (model(ids(B, 4))[0].argmax(-1) >= 50).all(), 'padding has to be the likeliest'
    out = model.generate(ids(B, 4, vocab=50), 200, seed=1, **options)
    assert out.max() < 50


def test_streaming_gives_what_generate_gives():
    """Two sampling loops would come to differ."""
    model, idx = shaken(), ids(B, 4)
    steps = list(model.stream(idx, 30, top_p=0.9, seed=2))
    assert all(s.shape == (B,) and s.dtype == torch.int64 for s in steps)
    assert torch.equal(torch.cat((idx, torch.stack(steps, dim=1)), dim=1), model.generate(idx, 30, top_p=0.9, seed=2))
    assert torch.equal(model.generate(idx, 0), idx)


def test_generation_gives_the_mode_back_and_drops_nothing_out():
    """A sample during training must not leave the model in eval mode, or use dropout."""
    model, idx = shaken(dropout=0.5), ids(B, 4)
    expected = model.generate(idx, 8, seed=1)
    assert not model.training
    model.train()
    assert torch.equal(model.generate(idx, 8, seed=1), expected) and model.training
    stream = model.stream(idx, 8, seed=1)
    next(stream)
    assert torch.is_grad_enabled(), 'between two tokens gradients are as before'
    stream.close()
    assert model.training and model.transformer.h[0].mlp.dropout.training
    with pytest.raises(IndexError):
        model.generate(torch.full((1, 2), V), 2)
    assert model.training


@pytest.mark.parametrize('options, name', [
    ({'max_new_tokens': -1}, 'max_new_tokens'),
    ({'temperature': -0.1}, 'temperature'),
    ({'temperature': math.nan}, 'temperature'),
    ({'top_k': 0}, 'top_k'),
    ({'top_k': -1}, 'top_k'),
    ({'top_p': 0.0}, 'top_p'),
    ({'top_p': 1.1}, 'top_p'),
    ({'top_p': -1}, 'top_p'),
    ({'slide': 0}, 'slide'),
    ({'slide': T + 1}, 'slide'),
], ids=str)
def test_a_bad_argument_of_generation_is_named(options, name):
    """top_k=0 would mask everything and fail in multinomial, without a word about top_k."""
    model = shaken().train()
    with pytest.raises(ValueError) as e:
        model.generate(ids(B, 4), **{'max_new_tokens': 3} | options)
    one_line(e.value, name, *options.values())
    assert model.training


@pytest.mark.parametrize('padding', [[0, 4, 0], [0, -1, 0], [0]], ids=str)
def test_padding_that_leaves_no_prompt_is_refused(padding):
    """A row of nothing but padding has no token to predict from."""
    with pytest.raises(ValueError, match='left_padding'):
        shaken().generate(ids(3, 4), 3, left_padding=torch.tensor(padding))


def test_an_empty_prompt_is_refused():
    """There is no token to predict from; the slice [:, -1] would be an index error."""
    with pytest.raises(ValueError, match='prompt'):
        shaken().generate(torch.empty(1, 0, dtype=torch.long), 3)


# int8 weights

def linears(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear)]


@pytest.mark.parametrize('settings', [
    dict(),
    dict(arch_preset='gpt2', weight_tying=False),
    dict(arch_preset='llama', n_kv_head=2, weight_tying=True),
], ids=str)
def test_an_int8_model_is_the_model_of_its_rounded_weights(settings):
    """A scale could run along the other dimension, a bias be lost, or a tied embedding stay behind."""
    ours = GPT(GPTConfig.from_settings(TINY | settings)).eval()
    quantized = copy.deepcopy(ours).quantize_int8()
    with torch.no_grad():
        for m in linears(ours):
            step = m.weight.abs().amax(1, keepdim=True) / 127
            rounded = (m.weight / step).round() * step
            assert ((rounded - m.weight).abs() <= step / 2 * 1.001).all()
            m.weight.copy_(rounded)
        close(quantized(ids(B, T), all_logits=True)[0], ours(ids(B, T), all_logits=True)[0], 1e-4)
    expected = ours.generate(ids(B, 5), 20, seed=1)
    for use_cache in (True, False):
        assert torch.equal(quantized.generate(ids(B, 5), 20, seed=1, use_cache=use_cache), expected)
    matrices = sum(m.weight.numel() for m in linears(ours))
    assert sum(b.numel() for b in quantized.buffers() if b.dtype == torch.int8) == matrices


@torch.no_grad()
@pytest.mark.parametrize('rows', [1, 4, 5])
def test_int8_kernels_agree(rows):
    """The CPU's own kernel for a few rows of bfloat16 and the general way, both against float64."""
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(768, 96), torch.randn(rows, 768)
    quantized = Int8Linear(linear)
    expected = x.bfloat16().double() @ (quantized.weight * quantized.scale[:, None]).double().T + linear.bias.double()
    close(quantized.bfloat16()(x.bfloat16()).double(), expected, 0.03)


# weights in the form that a CPU multiplies fastest

@torch.no_grad()
@pytest.mark.parametrize('rows', [1, 3, 40])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('kernel', kernels_here('auto'), ids=lambda kernel: kernel.name)
def test_a_kernel_multiplies_by_the_weights_it_was_given(kernel, bias, rows):
    """A bias lost, a transposed weight, or more rounding than that of its dtypes."""
    torch.manual_seed(0)
    linear, dtype = torch.nn.Linear(768, 96, bias=bias), getattr(torch, kernel.dtype)
    x = torch.randn(rows, 1, 768).to(dtype)
    made = kernel.make(linear) if kernel.make else copy.deepcopy(linear).to(dtype)
    expected = torch.nn.functional.linear(x.double(), linear.weight.double())
    expected += linear.bias.double() if bias else 0
    assert made(x).dtype == dtype
    close(made(x).double(), expected, 0.02 if dtype == torch.bfloat16 else 1e-3)


def test_a_prepared_model_generates_as_before(monkeypatch):
    """Packed weights that lose the tied embedding, or a dtype that the person named and does not get."""
    monkeypatch.setattr(fast_linear, 'FEWEST_WEIGHTS', 1)
    ours, cpu = shaken(), torch.device('cpu')
    expected = ours.generate(ids(B, 5), 10, temperature=0)
    for asked in ('auto', 'float32', 'bfloat16', 'float16'):
        names = [kernel.name for kernel in kernels_here(asked)] or [asked]
        model = copy.deepcopy(ours)
        name, dtype, said = prepare_to_generate(model, cpu, asked, '', rows=B)
        assert name in names and all(p.dtype == getattr(torch, dtype) for p in model.parameters())
        assert all(name in said for name in names) or len(names) == 1 and not said
        assert (matrix_bytes(model) == 4 * sum(m.weight.numel() for m in linears(ours))) == (name == 'float32')
        assert name != 'float32' or torch.equal(model.generate(ids(B, 5), 10, temperature=0), expected)
        close(model(ids(B, T))[0].float(), ours(ids(B, T))[0], 0.1 if dtype == 'bfloat16' else 0.02)


def test_a_small_model_has_no_trial():
    """A trial that takes longer than the sample."""
    model = shaken()
    name, dtype, said = prepare_to_generate(model, torch.device('cpu'), 'auto', '', rows=1)
    assert name == dtype == fastest_dtype(torch.device('cpu')) and not said
    assert len(linears(model)) == len(linears(shaken()))


@torch.no_grad()
@pytest.mark.parametrize('quantize, settings', [
    ('', dict(position_encoding='rope', normalization='rmsnorm', qk_norm=True, n_kv_head=2, token_shift=True)),
    ('int8', dict(doc_mask_token=7))])
def test_a_compiled_step_generates_as_before(quantize, settings):
    """Other text, or compiling again, which takes seconds, for another length or at the end of the context."""
    torch.compiler.reset()
    counters.clear()
    ours, cpu = shaken(**settings), torch.device('cpu')
    compiled = copy.deepcopy(ours)
    prepare_to_generate(ours, cpu, 'float32', quantize, 1)
    name, dtype, _ = prepare_to_generate(compiled, cpu, 'float32', quantize, 1, compile=True)
    assert name == (quantize or 'float32') and dtype == 'float32' and matrix_bytes(compiled) == matrix_bytes(ours)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, new, slide in (1, 8, 1), (5, 4, 1), (3, 20, 1), (3, 30, 4):  # the last two pass block_size
            tokens = compiled.generate(ids(1, length), new, temperature=0, slide=slide)
            assert torch.equal(tokens, ours.generate(ids(1, length), new, temperature=0, slide=slide))
        close(compiled(ids(B, T), all_logits=True)[0], ours(ids(B, T), all_logits=True)[0], 1e-5)
    assert counters['stats']['unique_graphs'] == 2  # one for all blocks, one for the head


def test_a_cache_on_a_cpu_is_float32():
    """torch's bfloat16 attention took more than half of the time of 16 prompts."""
    model = shaken().bfloat16()
    assert model.new_cache(1, T)[0].k.dtype == model.cache_dtype() == torch.float32
    assert model.double().cache_dtype() == torch.float64
    with torch.autocast('cpu', torch.bfloat16):
        assert model.float().cache_dtype() == torch.bfloat16
    reference = model.generate(ids(B, 5), 10, temperature=0)
    assert torch.equal(model.generate(ids(B, 5), 10, temperature=0, use_cache=False), reference)


# the file alone

STANDALONE = """
import sys
import torch
import model
torch.manual_seed(0)
config = model.GPTConfig.from_settings(dict(
    arch_preset='llama', block_size=16, vocab_size=64, n_layer=2, n_head=4, n_embd=32))
gpt = model.GPT(config)
optimizer = gpt.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
idx = torch.arange(32).view(2, 16) % 5
losses = []
for _ in range(3):
    loss = gpt(idx[:, :-1], idx[:, 1:])[1]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[0] > losses[1] > losses[2], losses
assert gpt.generate(idx[:, :4], 20).shape == (2, 24)
again = model.GPT.from_dict({'model': gpt.state_dict(), 'model_args': vars(config)})
assert torch.equal(again(idx)[0], gpt.eval()(idx)[0])
assert not [name for name in sys.modules if name.split('.')[0] in ('engine', 'data', 'configurator')]
"""


def test_model_py_alone_builds_trains_and_generates(tmp_path):
    """People copy this one file; an import of ours at its top would break it there."""
    shutil.copy(ROOT / 'model.py', tmp_path)
    (tmp_path / 'run.py').write_text(STANDALONE)
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run([sys.executable, 'run.py'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_dict_that_does_not_fit_is_one_line():
    """The reason can be a key, a value, a shape or something missing; each must become one line with the path."""
    model = build()
    good = {'model': model.state_dict(), 'model_args': dict(vars(model.config))}
    for change, reason in [
        ({'model_args': good['model_args'] | {'n_lear': 2}}, 'unknown model_args n_lear'),
        ({'model_args': good['model_args'] | {'n_layer': 'two'}}, 'n_layer=\'two\' must be of type int'),
        ({'model_args': good['model_args'] | {'n_embd': 64}}, 'size mismatch'),
        ({'model': {}}, 'Missing key'),
        ({'model': None}, 'items'),
    ]:
        with pytest.raises(ValueError) as e:
            GPT.from_dict(good | change | {'path': 'out/ckpt.pt'})
        one_line(e.value, "checkpoint 'out/ckpt.pt' cannot be loaded as a model: ", reason)
    assert not GPT.from_dict(good).training
