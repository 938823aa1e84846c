"""
The whole GPT in one file: its parts, the model, what it costs, and text out of it.

    python model.py config/full_llama_1.36b.py --n_layer=24     # describe: parameters, FLOPs, memory (built without memory)
    python model.py --ckpt=out                                  # inspect a checkpoint
    python model.py --ckpt=out --consolidate=ckpt.pt            # a sharded checkpoint as one file
    python model.py --ckpt=out --export=hf_dir                  # for Hugging Face's transformers; --export=model.onnx for ONNX
    python model.py --list=True                                 # every config with its counts

Shapes: B batch, T sequence, C n_embd, H heads, K key/value heads, D = C/H, F feed-forward width, V vocabulary.

References:
GPT-2 https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
LLaMA https://arxiv.org/abs/2302.13971
nanoGPT https://github.com/karpathy/nanoGPT, whose names and state dict these are
"""
import contextlib
import inspect
import itertools
import math
import re
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# The registry: one dict a kind of part. To add a part, write it below with its decorator and name it by flag. Everything
# else follows from structure: matrices and embeddings start at N(0, 0.02) and decay, vectors do not decay, a Linear named
# c_proj writes to the residual stream and starts smaller, and every Linear counts its FLOPs. Only optimizer='muon' asks
# for more: MUON_POLICY names every parameter.

NORMALIZATION = {}      # Module(dim, config): forward (..., dim) -> same shape
ACTIVATION = {}         # function, elementwise
POSITION_ENCODING = {}  # Module(config): forward x (B, T, C), pos (T,) -> x, rotate; rotate is None or a function on q and k (B, H, T, D)
ATTENTION_BACKEND = {}  # function q (B, H, T, D), k and v (B, K, S, D), dropout, config -> (B, H, T, D); queries are the last T of S positions.
                        # With a last argument mask=None, (B, 1, T, S) True where a query may look, it serves doc_mask too; see document_mask
NORM_POSITION = {}      # function x, norm, sublayer -> x; attribute final_norm says whether the last block's output still needs a norm
FFN_TYPE = {}           # Module(config): forward (B, T, C) -> same shape
REGISTRY = dict(normalization=NORMALIZATION, activation=ACTIVATION, position_encoding=POSITION_ENCODING,
                attention_backend=ATTENTION_BACKEND, norm_position=NORM_POSITION, ffn_type=FFN_TYPE)


def register(kind, name):
    """Decorator: make the class or function below it selectable as --<kind>=<name>."""
    def add(part):
        kind[name] = part
        return part
    return add


# What a preset says about the keys that nobody set. 'custom' is nanoGPT's own mix.
PRESETS = {
    'custom': dict(normalization='layernorm', activation='gelu', position_encoding='learned_absolute', attention_backend='sdpa',
                   norm_position='pre', ffn_type='standard', bias=False, weight_tying=True),
    'gpt2': dict(normalization='layernorm', activation='gelu_tanh', position_encoding='learned_absolute', attention_backend='sdpa',
                 norm_position='pre', ffn_type='standard', bias=True, weight_tying=True),
    'llama': dict(normalization='rmsnorm', activation='silu', position_encoding='rope', attention_backend='sdpa',
                  norm_position='pre', ffn_type='swiglu', bias=False, weight_tying=False),
    'hybrid': dict(normalization='layernorm', activation='gelu', position_encoding='rope', attention_backend='sdpa',
                   norm_position='pre', ffn_type='standard', bias=False, weight_tying=True),
}
PRESETS['team'] = PRESETS['llama']
# What the records of https://github.com/KellerJordan/modded-nanogpt have in common, as far as it is a part here
PRESETS['modern'] = PRESETS['llama'] | dict(activation='relu_squared', ffn_type='standard', qk_norm=True, zero_init_residual=True, logit_softcap=15.0)


ROPE_SCALING = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')


@dataclass
class GPTConfig:
    """What a model is. The defaults are those of nanoGPT's GPTConfig, so that its checkpoints mean the same here."""
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    normalization: str = 'layernorm'
    activation: str = 'gelu'
    position_encoding: str = 'learned_absolute'
    attention_backend: str = 'sdpa'
    norm_position: str = 'pre'
    ffn_type: str = 'standard'
    weight_tying: bool = True
    n_kv_head: int = None            # None: n_head
    d_ff: int = None                 # None: 4 C, or for gated FFNs 8/3 C rounded up to a multiple of 256
    qk_norm: bool = False            # https://arxiv.org/abs/2010.04245
    zero_init_residual: bool = False  # what writes to the residual stream starts at 0, so a block starts as the identity: https://arxiv.org/abs/1901.09321
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    logit_softcap: float = 0.0
    attention_chunk_size: int = 256
    activation_checkpointing: bool = False
    qkv_bias: bool = False           # biases of queries, keys and values without the others: Qwen2
    rope_scaling: dict = None        # LLaMA 3's stretched RoPE, a dict with the keys of ROPE_SCALING
    unpadded_vocab_size: int = None  # ids the tokenizer has, None: all; the padding beyond is never sampled
    doc_mask_token: int = None       # id that ends a document and opens the next: attention does not reach back beyond it; None: it does

    def __post_init__(self):
        for kind, parts in REGISTRY.items():
            if getattr(self, kind) not in parts:
                raise ValueError(f"unknown {kind} {getattr(self, kind)!r}; choose from {', '.join(parts)}")
        for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_kv_head', 'd_ff', 'attention_chunk_size'):
            value = getattr(self, key)
            if value is not None and not (type(value) is int and value > 0):
                raise ValueError(f'{key} must be a positive int, not {value!r}')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})')
        if self.n_head % (self.n_kv_head or self.n_head):
            raise ValueError(f'n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})')
        if self.position_encoding == 'rope' and self.n_embd // self.n_head % 2:
            raise ValueError(f'rope needs an even head size, not n_embd / n_head = {self.n_embd // self.n_head}')
        for key, good in (('dropout', 0 <= self.dropout < 1), ('norm_eps', self.norm_eps > 0), ('rope_theta', self.rope_theta > 0),
                          ('logit_softcap', self.logit_softcap >= 0),
                          ('rope_scaling', self.rope_scaling is None or set(self.rope_scaling) == set(ROPE_SCALING)),
                          ('unpadded_vocab_size', self.unpadded_vocab_size is None or 0 < self.unpadded_vocab_size <= self.vocab_size)):
            if not good:
                raise ValueError(f'{key}={getattr(self, key)!r} is out of range')
        self.check_doc_mask()

    def check_doc_mask(self):
        if self.doc_mask_token is not None and 'mask' not in inspect.signature(ATTENTION_BACKEND[self.attention_backend]).parameters:
            raise ValueError(f"attention_backend='{self.attention_backend}' takes no mask, which doc_mask needs; sdpa, manual and chunked do")

    @classmethod
    def from_settings(cls, settings, data_vocab=None):
        """
        The model that a dict of settings describes: what is None or missing comes from its arch_preset, then from the defaults
        above. A data set's vocabulary (data_vocab ids) becomes vocab_size where that is None, over 1024 padded to a multiple of 64 for speed.
        """
        name = settings.get('arch_preset', 'custom')
        if name not in PRESETS:
            raise ValueError(f"unknown arch_preset {name!r}; choose from {', '.join(PRESETS)}")
        chosen = PRESETS[name] | {f.name: settings[f.name] for f in fields(cls) if settings.get(f.name) is not None}
        if data_vocab is not None:
            vocab_size = chosen.setdefault('vocab_size', data_vocab if data_vocab <= 1024 else math.ceil(data_vocab / 64) * 64)
            if vocab_size < data_vocab:
                raise ValueError(f'vocab_size={vocab_size} is too small for the data set, which has {data_vocab} ids')
            chosen['unpadded_vocab_size'] = data_vocab
        return cls(**chosen)


# ---------------------------------------------------------------------------------------------------------------------
# normalization

@register(NORMALIZATION, 'layernorm')
class LayerNorm(nn.Module):
    def __init__(self, dim, config, bias=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if (config.bias if bias is None else bias) else None
        self.eps = config.norm_eps

    def forward(self, x):
        weight, bias = (p if p is None else p.to(torch.promote_types(p.dtype, x.dtype)) for p in (self.weight, self.bias))  # FSDP gathers in 16 bits
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


@register(NORMALIZATION, 'layernorm_nobias')
def layernorm_nobias(dim, config):
    return LayerNorm(dim, config, bias=False)


@register(NORMALIZATION, 'rmsnorm')
class RMSNorm(nn.Module):
    """https://arxiv.org/abs/1910.07467, in float32 whatever comes in, as LLaMA does."""
    def __init__(self, dim, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = config.norm_eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


# activation

register(ACTIVATION, 'gelu')(F.gelu)  # exact, by erf


@register(ACTIVATION, 'gelu_tanh')
def gelu_tanh(x):
    return F.gelu(x, approximate='tanh')  # GPT-2's


register(ACTIVATION, 'silu')(F.silu)
register(ACTIVATION, 'relu')(F.relu)
register(ACTIVATION, 'leaky_relu')(F.leaky_relu)


@register(ACTIVATION, 'relu_squared')
def relu_squared(x):
    return F.relu(x).square()  # Primer, https://arxiv.org/abs/2109.08668


# position encoding

@register(POSITION_ENCODING, 'learned_absolute')
class LearnedAbsolute(nn.Embedding):
    def __init__(self, config):
        super().__init__(config.block_size, config.n_embd)

    def forward(self, x, pos):
        return x + super().forward(pos), None


@register(POSITION_ENCODING, 'rope')
class RoPE(nn.Module):
    """https://arxiv.org/abs/2104.09864 in the half-rotation layout of Hugging Face's LLaMA: dimension i turns with i + D/2."""
    def __init__(self, config):
        super().__init__()
        self.dim, self.theta, self.scaling = config.n_embd // config.n_head, config.rope_theta, config.rope_scaling

    def forward(self, x, pos):
        freq = self.theta ** (torch.arange(0, self.dim, 2, device=x.device).float() / -self.dim)  # (D/2,)
        if self.scaling:  # LLaMA 3.1: what turns less than low_freq_factor times in the original context is slowed down, more than high_freq_factor kept
            factor, low, high, original = (self.scaling[key] for key in ROPE_SCALING)
            keep = ((original * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
            freq = freq * (keep + (1 - keep) / factor)
        angle = pos.float()[:, None] * freq  # (T, D/2), float32: bfloat16 cannot tell position 256 from 257
        cos, sin = angle.cos(), angle.sin()

        def rotate(q):
            a, b = q.float().chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(q)
        return x, rotate


@register(POSITION_ENCODING, 'none')
class NoPosition(nn.Module):
    """The causal mask alone tells order: https://arxiv.org/abs/2305.19466."""
    def __init__(self, config):
        super().__init__()

    def forward(self, x, pos):
        return x, None


# attention backend

def causal_mask(T, S, device):
    """(T, S) bool, True where a query may look: query i is position S - T + i."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def document_mask(doc, T, flex):
    """
    Where the last T of S positions may look, which is not ahead and not into another document; doc (B, S) numbers them. (B, 1, T, S) bool, or with
    flex, for T == S, a BlockMask, with which flex attention leaves out the 128 x 128 blocks where nothing is to be seen: https://arxiv.org/abs/2412.05496.
    """
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask  # which imports torch.compile's front end
        return create_block_mask(lambda b, h, i, j: (j <= i) & (doc[b, i] == doc[b, j]), doc.size(0), None, T, T, device=doc.device)
    return (causal_mask(T, doc.size(1), doc.device) & (doc[:, -T:, None] == doc[:, None])).unsqueeze(1)


@register(ATTENTION_BACKEND, 'sdpa')
def sdpa_attention(q, k, v, dropout, config, mask=None):
    n_head, T, S = q.size(1), q.size(2), k.size(2)
    if mask is not None and not isinstance(mask, torch.Tensor):  # a BlockMask
        from torch.nn.attention.flex_attention import flex_attention
        q, k, v = (t.type_as(v).contiguous() for t in (q, k, v))  # qk_norm gives float32 under autocast; in torch 2.13 unlike strides gave wrong results
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))
    if q.device.type == 'cpu' and v.dtype == torch.bfloat16 and v.requires_grad and T <= 512:
        # as manual does it, scores in bfloat16 and 2 B H T S bytes of weights kept for backward, with fewer passes: half the time of the kernel
        k, v = (t.repeat_interleave(n_head // t.size(1), dim=1) for t in (k, v))
        bias = torch.where(causal_mask(T, S, q.device) if mask is None else mask.expand(-1, n_head, -1, -1).flatten(0, 1), 0.0, float('-inf')).type_as(v)
        q, k, v = (t.flatten(0, 1).type_as(v) for t in (q, k, v))  # (B H, T or S, D)
        att = F.softmax(torch.baddbmm(bias, q, k.transpose(1, 2), alpha=q.size(-1) ** -0.5), dim=-1)
        return (F.dropout(att, dropout) @ v).unflatten(0, (-1, n_head))
    causal = mask is None and 1 < T == S  # the kernels' own case; one query sees every key
    mask = causal_mask(T, S, q.device) if mask is None and 1 < T < S else mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=q.size(1) != k.size(1))


@register(ATTENTION_BACKEND, 'manual')
def manual_attention(q, k, v, dropout, config, mask=None):
    """The definition, for reading and for checking the others: holds all (B, H, T, S) weights."""
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))  # (B, H, T, D) x (B, H, D, S) -> (B, H, T, S)
    att = att.masked_fill(~(causal_mask(q.size(2), k.size(2), q.device) if mask is None else mask), float('-inf'))
    att = F.dropout(F.softmax(att.float(), dim=-1), dropout).type_as(v)
    return att @ v  # (B, H, T, S) x (B, H, S, D) -> (B, H, T, D)


@register(ATTENTION_BACKEND, 'chunked')
def chunked_attention(q, k, v, dropout, config, mask=None):
    """A chunk of queries at a time against the keys up to its end, recomputed in backward: (chunk, S) weights instead of (T, S)."""
    ends = range(k.size(2) - q.size(2), k.size(2), config.attention_chunk_size)
    masks = itertools.repeat(None) if mask is None else mask.split(config.attention_chunk_size, dim=2)
    chunks = [(c, k[:, :, :e + c.size(2)], v[:, :, :e + c.size(2)], dropout, config, m if m is None else m[..., :e + c.size(2)])
              for e, c, m in zip(ends, q.split(config.attention_chunk_size, dim=2), masks)]
    if torch.is_grad_enabled() and q.requires_grad:
        return torch.cat([checkpoint(manual_attention, *c, use_reentrant=False) for c in chunks], dim=2)
    return torch.cat([manual_attention(*c) for c in chunks], dim=2)


# norm position

@register(NORM_POSITION, 'pre')
def pre_norm(x, norm, sublayer):
    return x + sublayer(norm(x))


@register(NORM_POSITION, 'post')
def post_norm(x, norm, sublayer):
    return norm(x + sublayer(x))  # GPT-1 and the 2017 paper


pre_norm.final_norm, post_norm.final_norm = True, False


# ffn type

class Linear(nn.Linear):
    """nn.Linear, except that on a CPU a single token goes through a matrix-vector product, which reads the matrix faster than a matmul."""
    def forward(self, x):
        if x.numel() == self.in_features and x.device.type == 'cpu' and not torch.is_grad_enabled() and not torch.is_autocast_enabled('cpu'):
            y = torch.mv(self.weight, x.view(-1))
            return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)
        return super().forward(x)


@register(FFN_TYPE, 'standard')
class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        d_ff = config.d_ff or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, d_ff, bias=config.bias)
        self.c_proj = Linear(d_ff, config.n_embd, bias=config.bias)
        self.activation = ACTIVATION[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


@register(FFN_TYPE, 'swiglu')
class SwiGLU(nn.Module):
    """https://arxiv.org/abs/2002.05202; with --activation=gelu it is that paper's GEGLU. c_fc holds gate, then up, in one matmul."""
    def __init__(self, config):
        super().__init__()
        d_ff = config.d_ff or 256 * math.ceil(8 * config.n_embd / 3 / 256)  # the FLOPs of a 4 C two-matrix FFN
        self.c_fc = Linear(config.n_embd, 2 * d_ff, bias=config.bias)
        self.c_proj = Linear(d_ff, config.n_embd, bias=config.bias)
        self.activation = ACTIVATION[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        gate, up = self.c_fc(x).chunk(2, dim=-1)
        return self.dropout(self.c_proj(self.activation(gate) * up))


# ---------------------------------------------------------------------------------------------------------------------
# the whole

class KVCache:
    """Keys and values of one layer so far, in buffers of shape (B, K, max_length, D)."""
    def __init__(self, shape, **kwargs):
        self.k, self.v, self.length = torch.empty(shape, **kwargs), torch.empty(shape, **kwargs), 0

    def append(self, k, v):
        """k, v (B, K, T, D) written after what there is; returns all of it, (B, K, length, D) each, as views."""
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start:self.length], self.v[:, :, start:self.length] = k, v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.n_head, self.n_kv_head = config, config.n_head, config.n_kv_head or config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.c_attn = Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=config.bias or config.qkv_bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        norm = NORMALIZATION[config.normalization]
        self.q_norm = norm(self.head_dim, config) if config.qk_norm else nn.Identity()
        self.k_norm = norm(self.head_dim, config) if config.qk_norm else nn.Identity()
        self.attend = ATTENTION_BACKEND[config.attention_backend]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotate=None, cache=None, mask=None):
        B, T, C = x.size()
        heads = (self.n_head, self.n_kv_head, self.n_kv_head)
        q, k, v = self.c_attn(x).split([n * self.head_dim for n in heads], dim=2)
        q, k, v = (t.view(B, T, n, self.head_dim).transpose(1, 2) for t, n in zip((q, k, v), heads))  # (B, H or K, T, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        if cache is not None:
            k, v = cache.append(k, v)
        y = self.attend(q, k, v, self.config.dropout if self.training else 0.0, self.config, *([] if mask is None else [mask]))
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side
        return self.dropout(self.c_proj(y))

    def extra_flops(self, T):
        """Forward FLOPs a token beyond the Linears: scores and values against T keys, the full convention of PaLM's appendix B."""
        return 4 * T * self.n_head * self.head_dim


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        norm = NORMALIZATION[config.normalization]
        self.ln_1 = norm(config.n_embd, config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = norm(config.n_embd, config)
        self.mlp = FFN_TYPE[config.ffn_type](config)
        self.residual = NORM_POSITION[config.norm_position]

    def forward(self, x, rotate=None, cache=None, mask=None):
        x = self.residual(x, self.ln_1, lambda h: self.attn(h, rotate, cache, mask))
        return self.residual(x, self.ln_2, self.mlp)


class LinearCrossEntropy(torch.autograd.Function):
    """
    Mean cross-entropy of (x @ weight.T) against targets, -1 ignored, without ever holding the logits of more than a chunk
    of rows: each chunk makes its logits, loss and gradients at once, in forward (Liger Kernel, https://arxiv.org/abs/2410.10989).
    x (N, C), weight (V, C), targets (N,) -> scalar float32. Three matmuls as in the plain way, none repeated; softmax in float32.
    reduction='none' gives (N,) losses instead, 0 where ignored, which have no gradient.

    Why not F.linear_cross_entropy of newer torch: its chunked path ignores autocast, breaks torch.compile's graph, is invisible
    to FlopCounterMode, and was several times slower than plain cross-entropy on a CPU.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, softcap, dtype, chunk, part, need_grad, reduction='mean'):
        w, loss, losses, dw = weight.to(dtype), torch.zeros((), dtype=torch.float32, device=x.device), [], None
        dx = torch.empty_like(x) if need_grad else None
        for i in range(0, x.size(0), chunk):
            rows, t = x[i:i + chunk].to(dtype), targets[i:i + chunk, None]
            seen, t = t >= 0, t.clamp(min=0)
            logits = rows @ w.T  # (chunk, V)
            for z, tz, sz in zip(logits.split(part), t.split(part), seen.split(part)):
                capped = softcap * torch.tanh(z.float() / softcap) if softcap else z
                log_probs = F.log_softmax(capped, dim=-1, dtype=torch.float32)
                seen_log_probs = log_probs.gather(1, tz) * sz
                loss -= seen_log_probs.sum()
                if reduction == 'none':
                    losses.append(-seen_log_probs[:, 0])
                if need_grad:
                    g = log_probs.exp_().scatter_add_(1, tz, torch.full_like(tz, -1.0, dtype=torch.float32))  # softmax - one_hot
                    if softcap:
                        g *= 1 - (capped / softcap).square()
                    z.copy_(g)  # logits become their gradient, not yet divided by count: fp16's loss scale arrives only in backward
            if need_grad:
                dx[i:i + chunk] = (logits @ w) * seen
                dw_chunk = logits.T @ (rows * seen)
                dw = dw_chunk if dw is None else dw.float().add_(dw_chunk)  # in float32 from the second chunk on
        if reduction == 'none':
            return torch.cat(losses)
        count = (targets >= 0).sum().clamp(min=1)
        ctx.save_for_backward(dx, dw, count)
        ctx.weight_dtype = weight.dtype
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        grad = (grad / count).view(1, 1)  # with dimensions its float32 wins over dw's dtype
        return (dx * grad).to(dx.dtype), (dw * grad).to(ctx.weight_dtype), *[None] * 7


def linear_cross_entropy(x, weight, targets, softcap=0.0, reduction='mean'):
    """
    LinearCrossEntropy.apply with what it needs to know from outside: autocast's dtype, how many rows make a chunk of at most 2^26
    logits, 2^27 on a GPU, and of how many a CPU takes the float32 softmax at a time, 2^22 logits, which its cache holds.
    x (N, C), weight (V, C), targets (N,) -> scalar float32, nats a token; (N,) with reduction='none', without gradients only, else ValueError.
    """
    device, V = x.device.type, weight.size(0)
    dtype = torch.get_autocast_dtype(device) if device != 'meta' and torch.is_autocast_enabled(device) else x.dtype
    n_chunks = math.ceil(x.size(0) * V / (2 ** 27 if device == 'cuda' else 2 ** 26))
    chunk = max(1, math.ceil(x.size(0) / n_chunks))
    part = max(1, 2 ** 22 // V) if device == 'cpu' else chunk
    need_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if reduction not in ('mean', 'none') or reduction == 'none' and need_grad:
        raise ValueError(f"reduction={reduction!r}: 'mean', or inside torch.no_grad() 'none'")
    with torch.autocast(device, enabled=False) if device != 'meta' else contextlib.nullcontext():
        return LinearCrossEntropy.apply(x, weight, targets, softcap, dtype, chunk, part, need_grad, reduction)


# Who steps what with optimizer='muon': Muon the matrices from hidden states to hidden states, each as it is stored (queries, keys and values are one),
# AdamW the rest. Each name has to be in one, whole.
MUON_POLICY = dict(muon=r'transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight',
                   adamw=r'(transformer\.wte|transformer\.wpe|lm_head)\.weight|.*(ln_1|ln_2|ln_f|q_norm|k_norm)\.(weight|bias)|.*(c_attn|c_fc|c_proj)\.bias')


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=POSITION_ENCODING[config.position_encoding](config),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=NORMALIZATION[config.normalization](config.n_embd, config) if NORM_POSITION[config.norm_position].final_norm else nn.Identity(),
        ))
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.weight_tying:
            self.transformer.wte.weight = self.lm_head.weight  # https://arxiv.org/abs/1608.05859
        self.init_weights()

    def init_weights(self):
        """GPT-2's: N(0, 0.02), biases 0, and what writes to the residual stream smaller by sqrt(2 n_layer), so that depth does not add up, or 0."""
        residual = math.inf if self.config.zero_init_residual else math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                shrink = residual if name.endswith('c_proj') else 1.0
                nn.init.normal_(module.weight, mean=0.0, std=0.02 / shrink)
                if getattr(module, 'bias', None) is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, cache=None, all_logits=False, reduction='mean'):
        """
        idx (B, T) int64 -> (logits, loss). With targets (B, T), -1 ignored, loss is the mean cross-entropy in nats and logits is
        None, because holding (B, T, V) floats is what costs the most memory; without, loss is None and logits are those of
        the last position, (B, 1, V). all_logits=True gives (B, T, V) in either case. cache: a list from new_cache(), whose
        positions come before idx. reduction='none', inside torch.no_grad() only: loss is that of each token, (B, T) float32, 0 where
        ignored. ValueError if the sequence is longer than block_size.
        """
        start = cache[0].length if cache else 0
        B, T = idx.size()
        if start + T > self.config.block_size:
            raise ValueError(f'cannot forward a sequence of length {start + T}: block_size is {self.config.block_size}')
        pos = torch.arange(start, start + T, device=idx.device)
        x, rotate = self.transformer.wpe(self.transformer.wte(idx), pos)
        x = self.transformer.drop(x)
        mask = None
        if self.config.doc_mask_token is not None:  # positions are not begun anew, which only learned ones would notice
            doc = (idx == self.config.doc_mask_token).cumsum(1)  # (B, T), the number of its document in the row
            if cache:
                doc = cache[0].doc = torch.cat((cache[0].doc, doc + cache[0].doc[:, -1:]), dim=1) if start else doc
            mask = document_mask(doc, T, torch.compiler.is_compiling() and not cache and self.takes_flex(idx.device.type))
        for i, block in enumerate(self.transformer.h):
            if self.config.activation_checkpointing and torch.is_grad_enabled() and not cache:
                x = checkpoint(block, x, rotate, None, mask, use_reentrant=False)  # keep a block's input, recompute the rest in backward
            else:
                x = block(x, rotate, cache[i] if cache else None, mask)
        x = self.transformer.ln_f(x)

        loss = logits = None
        if targets is not None:
            loss = linear_cross_entropy(x.reshape(B * T, -1), self.lm_head.weight, targets.reshape(-1), self.config.logit_softcap, reduction)
            loss = loss.view(B, T) if reduction == 'none' else loss
        if targets is None or all_logits:
            logits = self.lm_head(x if all_logits else x[:, [-1], :])
            if self.config.logit_softcap:
                logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)  # https://arxiv.org/abs/2408.00118
        return logits, loss

    def takes_flex(self, device_type):
        """Whether doc_mask goes through flex attention where forward is compiled: a GPU's kernels are not for less than these sizes, and have no dropout."""
        c = self.config
        return device_type == 'cuda' and c.attention_backend == 'sdpa' and not c.dropout and c.block_size >= 128 and c.n_embd // c.n_head >= 16

    def get_num_params(self, non_embedding=True):
        """
        Number of parameters. Non-embedding, as nanoGPT counts it, leaves out the position embeddings, and the token embeddings
        unless they are tied, because tied they are the head's matrix.
        """
        n = sum(p.numel() for p in self.parameters())
        if non_embedding:
            n -= sum(p.numel() for p in self.transformer.wpe.parameters())
            n -= 0 if self.config.weight_tying else self.transformer.wte.weight.numel()
        return n

    def params_by_part(self):
        """{part: number of parameters}; a tied matrix is counted once, as token embeddings."""
        parts = {}
        for name, p in self.named_parameters():  # wte before lm_head, and a shared tensor only once
            path = [*name.split('.'), '', '']  # transformer.h.0.attn.c_attn.weight, transformer.wte.weight, lm_head.weight
            part = {'wte': 'token embeddings', 'wpe': 'position embeddings', 'attn': 'attention', 'mlp': 'ffn'}.get(path[3] if path[1] == 'h' else path[1])
            part = 'head' if path[0] == 'lm_head' else part or 'norms'
            parts[part] = parts.get(part, 0) + p.numel()
        return parts

    def flops_by_part(self, seq_len=None, causal=False):
        """
        {part: forward FLOPs a token} at seq_len (default block_size), by walking the modules: 2 a weight for every Linear, plus
        what a module's extra_flops(T) says. Matmuls only; norms, RoPE, activations and softmax are by convention not counted.
        Attention scores are counted in full (PaLM, https://arxiv.org/abs/2204.02311, appendix B), or half of that with causal=True.
        """
        T, parts = seq_len or self.config.block_size, {'attention projections': 0, 'attention scores': 0, 'ffn': 0, 'head': 0}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                parts['head' if name == 'lm_head' else 'attention projections' if '.attn.' in name else 'ffn'] += 2 * module.weight.numel()
            elif hasattr(module, 'extra_flops'):
                scores = name.endswith('.attn')
                parts['attention scores' if scores else 'ffn'] += module.extra_flops(T) / (2 if causal and scores else 1)
        return parts

    def flops_per_token(self, seq_len=None, causal=False):
        """Training FLOPs a token, forward and backward: 3 x forward. Recomputation by activation checkpointing is not counted."""
        return 3 * sum(self.flops_by_part(seq_len, causal).values())

    def muon_parameters(self):
        """The list of parameters that optimizer='muon' gives to Muon. ValueError names a parameter that MUON_POLICY gives to nobody, or to both."""
        found = []
        for name, p in self.named_parameters():
            whose = [who for who, names in MUON_POLICY.items() if re.fullmatch(names, name)]
            if len(whose) != 1:
                raise ValueError(f"optimizer='muon' does not know whose parameter '{name}' is: MUON_POLICY in model.py has to name it, once")
            found += [p] * (whose == ['muon'])
        return found

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, muon=None):
        """
        AdamW, fused where torch has it for the device; matrices and embeddings decay, biases and norms do not. With muon, a dict of its lr and momentum,
        the parameters that MUON_POLICY says go to torch.optim.Muon, whose steps then measure lr * sqrt(max(1, rows / columns)) in spectral norm.
        """
        if muon and not hasattr(torch.optim, 'Muon'):
            raise ValueError(f"optimizer='muon' needs torch 2.9 or newer, and this is {torch.__version__}")
        from engine.machine import keep_dynamo_out
        from engine.optim import MuonAdamW
        hidden = {id(p) for p in self.muon_parameters()} if muon else ()
        params = [p for p in self.parameters() if p.requires_grad]
        rest, fused = [p for p in params if id(p) not in hidden], device_type in ('cuda', 'cpu', 'mps')
        groups = [{'params': [p for p in rest if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0}]
        adamw = torch.optim.AdamW
        keep_dynamo_out(adamw.add_param_group, adamw.zero_grad, adamw.state_dict, adamw.load_state_dict)
        if adamw.step is torch.optim.Adam.step:  # a step, but for hooks, is its innermost function without gradients; what is around it imports the same
            adamw.step = torch.no_grad()(inspect.unwrap(adamw.step))
        if not muon:
            return adamw(groups, lr=learning_rate, betas=betas, fused=fused)
        groups.append({'params': [p for p in params if id(p) in hidden], 'weight_decay': weight_decay} | muon)
        return MuonAdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def crop_block_size(self, block_size):
        """Change the context length of a trained model, e.g. to fine-tune at a smaller one. ValueError where learned positions would have to grow."""
        if block_size < 1:
            raise ValueError(f'block_size must be positive, not {block_size}')
        if block_size > self.config.block_size and self.config.position_encoding == 'learned_absolute':
            raise ValueError(f'block_size {block_size} is beyond the {self.config.block_size} positions this model has learned')
        self.config.block_size = block_size
        if self.config.position_encoding == 'learned_absolute':
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    @classmethod
    def from_checkpoint(cls, path):
        """The model in a checkpoint, ours or nanoGPT's, on the CPU, in eval mode. path: a file, or a folder that has ckpt.pt. Errors as load_checkpoint."""
        from engine.checkpoint import load_checkpoint, model_of
        return model_of(load_checkpoint(path))

    @classmethod
    def from_pretrained(cls, name, dtype=torch.float32, **overrides):
        """
        The model in a folder that Hugging Face's save_pretrained wrote, or of a hub id such as gpt2, on the CPU, in eval mode: GPT-2, LLaMA, Mistral,
        Qwen2, Qwen3, Arcee or Starcoder2. overrides: dropout, block_size and other keys of GPTConfig that no weight depends on. ValueError names what
        cannot be held.
        """
        from engine.huggingface import from_pretrained
        return from_pretrained(name, dtype, overrides)

    def save_pretrained(self, folder, ckpt=None):
        """
        Write the model as transformers loads it: safetensors, config.json, a model card, and with ckpt, the checkpoint dict that it is from, its
        tokenizer. folder must be new or empty. ValueError names the parts that Hugging Face has no class for.
        """
        from engine.huggingface import save_pretrained
        save_pretrained(self, folder, ckpt)

    @torch.no_grad()
    def quantize_int8(self):
        """Every Linear as int8, in place, to sample from (Int8Linear); embeddings too, if they are tied to the head, and nothing else. Returns self."""
        from engine.int8 import Int8Embedding, Int8Linear
        for parent in [m for m in self.modules() if not isinstance(m, Int8Linear)]:
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear(child))
        if self.config.weight_tying:
            self.transformer.wte = Int8Embedding(self.lm_head)
        return self

    def new_cache(self, batch_size, max_length):
        """An empty KV cache for forward(cache=...), a KVCache a layer."""
        c, w = self.config, next(self.parameters())  # of an int8 model, what is left in the dtype of its activations
        dtype = torch.get_autocast_dtype(w.device.type) if torch.is_autocast_enabled(w.device.type) else w.dtype
        shape = (batch_size, c.n_kv_head or c.n_head, max_length, c.n_embd // c.n_head)
        return [KVCache(shape, dtype=dtype, device=w.device) for _ in range(c.n_layer)]

    @torch.no_grad()
    def attention_weights(self, idx):
        """
        Where each head looks: a (B, H, T, T) float32 a layer, of which rows, the queries, sum to 1. They are computed by the definition from
        the very q, k and mask that the attention backend is given in a forward of idx (B, T).
        """
        weights, attns = [], [block.attn for block in self.transformer.h]

        def watch(attend):
            def watched(q, k, v, dropout, config, *mask):
                one = torch.eye(k.size(2), device=k.device).expand(*k.shape[:2], -1, -1)  # in place of values
                weights.append(manual_attention(q.float(), k.float(), one, 0.0, config, *mask))
                return attend(q, k, v, dropout, config, *mask)
            return watched
        fast = [attn.attend for attn in attns]
        try:
            for attn, attend in zip(attns, fast):
                attn.attend = watch(attend)
            self.forward(idx)
        finally:
            for attn, attend in zip(attns, fast):
                attn.attend = attend
        return weights

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None, stop=None, use_cache=True, slide=1):
        """
        Continue idx (B, T), one step at a time: yields (B,) int64 ids. temperature 0 is greedy; top_k keeps that many tokens;
        top_p keeps the fewest whose probabilities reach it; seed makes the draws repeatable. A row that has drawn the id
        `stop` goes on with `stop`, and when all have, it ends. Ids of padding are never drawn.

        Past block_size the window slides: the model sees the last block_size tokens, at positions from 0, as in nanoGPT. That
        changes every position, so nothing cached holds and each token costs a whole forward. slide=n moves the window
        n tokens at a time instead: the cache then lives for n tokens, and the model sees between block_size - n + 1 and
        block_size tokens. The ids are the same with and without the cache, whatever the slide. ValueError names an argument out of range.
        """
        B, T = idx.size()
        block_size, limit = self.config.block_size, self.config.unpadded_vocab_size or self.config.vocab_size
        for name, value, good in (('prompt length', T, T > 0), ('max_new_tokens', max_new_tokens, max_new_tokens >= 0),
                                  ('temperature', temperature, temperature >= 0), ('top_k', top_k, top_k is None or top_k > 0),
                                  ('top_p', top_p, top_p is None or 0 < top_p <= 1), ('slide', slide, 1 <= slide <= block_size)):
            if not good:
                raise ValueError(f'{name}={value} is out of range')
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        done = torch.zeros(B, dtype=torch.bool, device=idx.device)
        tokens = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), dim=1)
        cache, window, was_training = None, 0, self.training
        self.eval()
        try:
            for n in range(T, T + max_new_tokens):
                first = max(0, math.ceil((n - block_size) / slide) * slide)  # where the window begins
                context = tokens[:, first:n]
                if use_cache and cache is None:
                    cache = self.new_cache(B, min(block_size, T + max_new_tokens))
                elif use_cache and first == window:
                    context = context[:, -1:]
                elif use_cache:
                    for layer in cache:
                        layer.length = 0
                window = first
                logits = self.forward(context, cache=cache)[0][:, -1, :limit].float()  # .forward: shapes vary, so never the compiled one
                token = sample_token(logits, temperature, top_k, top_p, generator)
                if stop is not None:
                    token = token.masked_fill(done, stop)
                    done |= token == stop
                tokens[:, n] = token
                yield token
                if stop is not None and done.all():
                    return
        finally:
            self.train(was_training)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **kwargs):
        """idx (B, T) continued: (B, T + n), n <= max_new_tokens. Arguments and errors are those of stream()."""
        steps = list(self.stream(idx, max_new_tokens, temperature, top_k, **kwargs))
        return torch.cat((idx, torch.stack(steps, dim=1)), dim=1) if steps else idx


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One id a row from logits (B, V) float32: (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, ids = logits / temperature, None
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)  # the draw below is among these only
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # the tokens before it already reach top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float('-inf'))
    drawn = torch.multinomial(logits.softmax(-1), num_samples=1, generator=generator)
    return (drawn if ids is None else ids.gather(1, drawn))[:, 0]


if __name__ == '__main__':
    from engine.cost import main
    main()
