"""
The whole GPT in one file: the parts, the model, the loss, and text generation.

    python model.py config/full_llama_1.36b.py --n_layer=24     # parameters, FLOPs and memory
    python model.py --ckpt=out                                  # inspect a checkpoint
    python model.py --ckpt=out --export=hf_dir                  # to a folder for transformers
    python model.py --help                                      # everything else that it does

Shapes: B batch, T queries, S keys, C n_embd, H heads, K key/value heads, D = C / H, V vocabulary.

Module names and state dict keys follow nanoGPT (https://github.com/karpathy/nanoGPT), which follows
GPT-2 (https://github.com/openai/gpt-2). LLaMA: https://arxiv.org/abs/2302.13971
"""
import contextlib
import math
import zlib
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

# One dict per kind of part. To add a part, define it below with @register and select it with its
# flag. The rest follows from its modules:
# - Weights of Linear and Embedding are initialized from N(0, 0.02). A Linear named c_proj writes to
#   the residual stream and starts smaller.
# - Parameters with 2 or more dimensions are decayed; vectors are not.
# - Every Linear counts towards FLOPs, and Muon may train those inside a block. Any other module
#   may define extra_flops(T, causal): its forward FLOPs per token beyond its Linears.

# Module(dim, config); forward: (..., dim) -> same shape
NORMALIZATION = {}
# elementwise function
ACTIVATION = {}
# Module(config); forward: x (B, T, C), pos (T,) or (B, T) -> x, rotate
# rotate is None or a function that rotates q or k, (B, H or K, T, D) -> same shape
POSITION_ENCODING = {}
# function(q, k, v, dropout, config, mask=None) -> (B, H, T, D), for q (B, H, T, D) and
# k, v (B, K, S, D); queries are the last T of the S positions. mask is None for plain causal
# attention, or comes from document_mask(). Only sdpa ever gets a BlockMask.
ATTENTION_BACKEND = {}
# function(x, norm, sublayer) -> x. Set its attribute final_norm to True if the last block's output
# still has to be normalized, otherwise to False.
NORM_POSITION = {}
# Module(config); forward: (B, T, C) -> same shape. If it has an attribute default_activation, that
# replaces the preset's activation, but not one that was set.
FFN_TYPE = {}

REGISTRY = dict(
    normalization=NORMALIZATION, activation=ACTIVATION, position_encoding=POSITION_ENCODING,
    attention_backend=ATTENTION_BACKEND, norm_position=NORM_POSITION, ffn_type=FFN_TYPE)


def register(kind, name):
    """Decorator: make the class or function below it selectable as --<kind>=<name>."""
    def add(part):
        kind[name] = part
        return part
    return add


# Values of the keys that are still None after config files and flags. 'custom' is what nanoGPT's
# train.py builds (bias=False; the default in GPTConfig is True, as in nanoGPT's).
PRESETS = {'custom': dict(
    normalization='layernorm', activation='gelu', position_encoding='learned_absolute',
    attention_backend='sdpa', norm_position='pre', ffn_type='standard',
    bias=False, weight_tying=True)}
PRESETS['gpt2'] = PRESETS['custom'] | dict(activation='gelu_tanh', bias=True)
PRESETS['llama'] = PRESETS['custom'] | dict(
    normalization='rmsnorm', activation='silu', position_encoding='rope', ffn_type='swiglu',
    weight_tying=False)
PRESETS['hybrid'] = PRESETS['custom'] | dict(position_encoding='rope')
PRESETS['team'] = PRESETS['llama']  # the name that config/full_team_124m.py uses
# Parts shared by the record runs of https://github.com/KellerJordan/modded-nanogpt
PRESETS['modern'] = PRESETS['llama'] | dict(
    activation='relu_squared', ffn_type='standard',
    qk_norm=True, zero_init_residual=True, logit_softcap=15.0)


# config

ROPE_SCALING = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
# the largest value of each; no machine needs more, and products of two do not overflow
SIZES = dict.fromkeys(('block_size', 'vocab_size', 'n_head', 'n_embd', 'n_kv_head', 'd_ff',
                       'attention_chunk_size'), 2 ** 24) | {'n_layer': 1000}


def require_range(name, value, in_range):
    if not in_range:
        raise ValueError(f'{name}={value!r} is out of range')


def divides_logits(value):
    """Return whether float32 logits can be divided by a value without overflow. 0: no division."""
    return value == 0 or 1e-3 <= value <= 1e6


@dataclass
class GPTConfig:
    """
    Everything that defines a model. Defaults are nanoGPT's, so its checkpoints, which omit newer
    keys, load with the right architecture.
    """
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
    n_kv_head: int | None = None  # None: n_head
    d_ff: int | None = None  # None: 4 n_embd; gated: 8/3 n_embd, rounded up to a multiple of 256
    qk_norm: bool = False  # normalize q and k per head: https://arxiv.org/abs/2010.04245
    zero_init_residual: bool = False  # blocks start as the identity: arxiv.org/abs/1901.09321
    token_shift: bool = False  # see TokenShift
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    logit_softcap: float = 0.0  # see cap_logits; 0: none
    attention_chunk_size: int = 256  # queries per chunk with attention_backend='chunked'
    activation_checkpointing: bool = False
    qkv_bias: bool = False  # biases of q, k and v even where bias is False, as in Qwen2
    rope_scaling: dict | None = None  # LLaMA 3.1's RoPE scaling, with the keys of ROPE_SCALING
    unpadded_vocab_size: int | None = None  # ids from here on are padding and are never sampled
    doc_mask_token: int | None = None  # end-of-text id; attention never crosses it. None: no mask

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and type(value) is int and abs(value) < 2 ** 1000:
                value = float(value)
                setattr(self, field.name, value)
            if not isinstance(value, field.type):
                kind = getattr(field.type, '__name__', field.type)
                raise ValueError(f'{field.name}={value!r:.60} must be of type {kind}')
        for kind, parts in REGISTRY.items():
            name = getattr(self, kind)
            if name not in parts:
                raise ValueError(f"unknown {kind} {name!r}; choose from {', '.join(parts)}")
        for key, largest in SIZES.items():
            value = getattr(self, key)
            if value is not None and not (type(value) is int and 0 < value <= largest):
                raise ValueError(f'{key} must be an int from 1 to {largest}, not {value!r}')
        n_ids, token, scaling = self.unpadded_vocab_size, self.doc_mask_token, self.rope_scaling
        if scaling is not None and set(scaling) != set(ROPE_SCALING):
            raise ValueError(f"rope_scaling needs exactly the keys {', '.join(ROPE_SCALING)}, "
                             f'not {scaling!r}')
        require_range('dropout', self.dropout, 0 <= self.dropout < 1)
        require_range('norm_eps', self.norm_eps, 0 < self.norm_eps < 1)
        require_range('rope_theta', self.rope_theta, 1e-30 <= self.rope_theta <= 1e30)
        require_range('logit_softcap', self.logit_softcap, divides_logits(self.logit_softcap))
        require_range('unpadded_vocab_size', n_ids, n_ids is None or 0 < n_ids <= self.vocab_size)
        require_range('doc_mask_token', token, token is None or 0 <= token < self.vocab_size)
        for key, value in (scaling or {}).items():
            is_number = type(value) in (int, float)
            require_range(f'rope_scaling[{key!r}]', value, is_number and 0 < value <= 1e9)
        C, H, K = self.n_embd, self.n_head, self.kv_heads
        if C % H:
            raise ValueError(f'n_embd ({C}) must be a multiple of n_head ({H})')
        if H % K:
            raise ValueError(f'n_head ({H}) must be a multiple of n_kv_head ({K})')
        if self.position_encoding == 'rope' and self.head_dim % 2:
            raise ValueError(f'rope needs an even head size, not n_embd / n_head = {self.head_dim}')

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @classmethod
    def from_settings(cls, settings, data_vocab=None):
        """
        Build the config from a dict of settings. Keys that are None or missing come from
        arch_preset, then from the defaults above. An activation that is None is the ffn_type's
        default_activation if there is one.

        data_vocab is the number of ids in the data set. It becomes vocab_size if that is unset,
        padded to a multiple of 64 above 1024, for speed.
        """
        name = settings.get('arch_preset', 'custom')
        if name not in PRESETS:
            raise ValueError(f"unknown arch_preset {name!r}; choose from {', '.join(PRESETS)}")
        chosen = dict(PRESETS[name])
        for field in fields(cls):
            if settings.get(field.name) is not None:
                chosen[field.name] = settings[field.name]
        ffn = FFN_TYPE.get(chosen['ffn_type'])
        if settings.get('activation') is None and hasattr(ffn, 'default_activation'):
            chosen['activation'] = ffn.default_activation
        if data_vocab is not None:
            padded = data_vocab if data_vocab <= 1024 else math.ceil(data_vocab / 64) * 64
            vocab_size = chosen.setdefault('vocab_size', padded)
            if vocab_size < data_vocab:
                raise ValueError(f'vocab_size={vocab_size} is too small for the data set, '
                                 f'which has {data_vocab} ids')
            chosen['unpadded_vocab_size'] = data_vocab
        return cls(**chosen)


# shared by attention and feed-forward networks

class Linear(nn.Linear):
    """nn.Linear that uses a matrix-vector product for a single token on a CPU: it is faster."""
    def forward(self, x):
        if x.numel() == self.in_features and x.device.type == 'cpu':
            if not torch.is_grad_enabled() and not torch.is_autocast_enabled('cpu'):
                y = torch.mv(self.weight, x.view(-1))
                y = y if self.bias is None else y + self.bias
                return y.view(*x.shape[:-1], -1)
        return super().forward(x)


def apply_dropout(x, p):
    """
    F.dropout. On a CPU, where torch draws a random number for each element, one 64-bit number
    decides on four elements; p is then rounded to a multiple of 1/65536.
    """
    if p == 0 or x.device.type != 'cpu':
        return F.dropout(x, p)
    n = x.numel()
    dropped = min(round(65536 * p), 65535)  # how many of the 65536 values of an int16 drop
    bits = torch.randint(-2 ** 63, 2 ** 63 - 1, (n // 4 + 1,), device=x.device).view(torch.int16)
    keep = bits[:n].ge_(dropped - 32768).view(x.shape).to(x.dtype)
    return x * keep * (65536 / (65536 - dropped))


class Dropout(nn.Dropout):
    def forward(self, x):
        return apply_dropout(x, self.p if self.training else 0.0)


# normalization

@register(NORMALIZATION, 'layernorm')
class LayerNorm(nn.Module):
    """https://arxiv.org/abs/1607.06450, with or without a bias."""
    def __init__(self, dim, config, bias=None):
        super().__init__()
        has_bias = config.bias if bias is None else bias
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if has_bias else None
        self.eps = config.norm_eps
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        # under FSDP the weights may be 16-bit while x is float32
        dtype = torch.promote_types(self.weight.dtype, x.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(dtype), bias, self.eps)


@register(NORMALIZATION, 'layernorm_nobias')
def layernorm_nobias(dim, config):
    return LayerNorm(dim, config, bias=False)


@register(NORMALIZATION, 'rmsnorm')
class RMSNorm(nn.Module):
    """https://arxiv.org/abs/1910.07467, always computed in float32, as in LLaMA."""
    def __init__(self, dim, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = config.norm_eps
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(self, x):
        y = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return y.type_as(x)


# activation

register(ACTIVATION, 'gelu')(F.gelu)  # exact, with erf
register(ACTIVATION, 'silu')(F.silu)
register(ACTIVATION, 'relu')(F.relu)
register(ACTIVATION, 'leaky_relu')(F.leaky_relu)


@register(ACTIVATION, 'gelu_tanh')
def gelu_tanh(x):
    return F.gelu(x, approximate='tanh')  # GPT-2's


@register(ACTIVATION, 'relu_squared')
def relu_squared(x):
    return F.relu(x).square()  # Primer, https://arxiv.org/abs/2109.08668


# embeddings

class TokenShift(nn.Module):
    """
    Add to each token's embedding that of the token before it, times a weight per channel, so that
    the first layer can already look for what followed a token earlier. The idea is RWKV's:
    https://arxiv.org/abs/2305.13048.
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_embd))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.weight)

    def forward(self, x, idx, pos, cache=None):
        """
        x (B, T, C) -> same shape. idx (B, T) are the ids, pos (T,) or (B, T) their positions. cache
        is the KVCache of the first layer.
        """
        is_first = pos <= 0
        if self.config.doc_mask_token is not None:  # that token opens a document
            is_first = is_first | (idx == self.config.doc_mask_token)
        before = torch.zeros_like(x[:, :1])
        if cache is not None:
            before = cache.last if cache.length else before
            cache.last = x[:, -1:]
        before = torch.cat((before, x[:, :-1]), dim=1)
        return x + self.weight * before.masked_fill(is_first[..., None], 0.0)


# position encoding

@register(POSITION_ENCODING, 'learned_absolute')
class LearnedAbsolute(nn.Embedding):
    def __init__(self, config):
        super().__init__(config.block_size, config.n_embd)

    def forward(self, x, pos):
        return x + super().forward(pos), None


@register(POSITION_ENCODING, 'rope')
class RoPE(nn.Module):
    """
    https://arxiv.org/abs/2104.09864 in the layout of Hugging Face's LLaMA: dimensions i and
    i + D/2 form a pair, which is rotated by an angle proportional to the position.
    """
    def __init__(self, config):
        super().__init__()
        self.dim = config.head_dim
        self.theta = config.rope_theta
        self.scaling = config.rope_scaling

    def frequencies(self, device):
        """(D/2,) float32, radians per position."""
        i = torch.arange(0, self.dim, 2, device=device).float()
        freq = self.theta ** (-i / self.dim)
        if not self.scaling:
            return freq
        # LLaMA 3.1: frequencies with fewer than low_freq_factor turns in the original context are
        # divided by `factor`; those with more than high_freq_factor turns are kept; the others are
        # interpolated
        factor, low, high, original = (self.scaling[key] for key in ROPE_SCALING)
        turns = original * freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return freq * (keep + (1 - keep) / factor)

    def forward(self, x, pos):
        # float32, because bfloat16 cannot represent 257
        angle = pos.float()[..., None, :, None] * self.frequencies(x.device)  # (..., 1, T, D/2)
        cos, sin = angle.cos(), angle.sin()

        def rotate(q):
            a, b = q.float().chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(q)
        return x, rotate


@register(POSITION_ENCODING, 'none')
class NoPosition(nn.Module):
    """The causal mask alone conveys order: https://arxiv.org/abs/2305.19466."""
    def __init__(self, config):
        super().__init__()

    def forward(self, x, pos):
        return x, None


# attention

def causal_mask(T, S, device):
    """(T, S) bool, True where a query may attend. Query i is at position S - T + i."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def document_mask(doc, T, flex=False):
    """
    Return a bool mask (B, 1, T, S), True where a query may attend: to itself and to what precedes
    it in its document. doc (B, S) holds document numbers; the queries are the last T positions.

    With flex=True (T == S only) the result is a BlockMask, with which flex attention skips empty
    128 x 128 blocks: https://arxiv.org/abs/2412.05496.
    """
    B, S = doc.size()
    device = doc.device

    def visible(b, h, i, j):
        return (j <= i) & (doc[b, i] == doc[b, j])

    if flex:
        # imported late: it loads torch.compile's front end
        from torch.nn.attention.flex_attention import create_block_mask
        return create_block_mask(visible, B, None, T, S, device=device)
    b = torch.arange(B, device=device).view(B, 1, 1)
    i = torch.arange(S - T, S, device=device).view(T, 1)
    j = torch.arange(S, device=device)
    return visible(b, None, i, j).view(B, 1, T, S)


@register(ATTENTION_BACKEND, 'sdpa')
def sdpa_attention(q, k, v, dropout, config, mask=None):
    """
    torch's fused kernels; flex attention for a BlockMask; bfloat16_cpu_attention for training on
    a CPU with T <= 512, where it is faster.
    """
    T, S = q.size(2), k.size(2)
    grouped = q.size(1) != k.size(1)
    if mask is not None and not isinstance(mask, torch.Tensor):  # a BlockMask
        from torch.nn.attention.flex_attention import flex_attention
        # one dtype (qk_norm returns float32 under autocast), and contiguous (torch 2.13 gives wrong
        # results for mixed strides)
        q, k, v = (t.type_as(v).contiguous() for t in (q, k, v))
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    on_cpu = q.device.type == 'cpu'
    if on_cpu and v.dtype == torch.bfloat16 and v.requires_grad and (T <= 512 or dropout):
        return bfloat16_cpu_attention(q, k, v, dropout, mask)
    if on_cpu and dropout:  # torch's dropout there is slow, and it has no fused kernel with it
        return manual_attention(q, k, v, dropout, config, mask)
    if mask is None and 1 < T < S:  # is_causal assumes T == S
        mask = causal_mask(T, S, q.device)
    causal = mask is None and T > 1  # a single query may see every key
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped)


def bfloat16_cpu_attention(q, k, v, dropout, mask):
    """
    Attention by definition in bfloat16, with fewer passes than `manual`. For T <= 512 it takes half
    the time of torch's kernel, but keeps 2 B H T S bytes of weights for backward.
    """
    B, H, T, _ = q.shape
    k, v = (t.repeat_interleave(H // t.size(1), dim=1) for t in (k, v))
    if mask is None:
        mask = causal_mask(T, k.size(2), q.device)
    else:
        mask = mask.expand(B, H, -1, -1).flatten(0, 1)  # (B H, T, S)
    bias = torch.where(mask, 0.0, float('-inf')).type_as(v)
    q, k, v = (t.flatten(0, 1).type_as(v) for t in (q, k, v))  # (B H, T or S, D)
    att = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=q.size(-1) ** -0.5)
    att = apply_dropout(F.softmax(att, dim=-1), dropout)
    return (att @ v).unflatten(0, (B, H))


@register(ATTENTION_BACKEND, 'manual')
def manual_attention(q, k, v, dropout, config, mask=None):
    """Attention by definition, to read and to check others. It holds all (B, H, T, S) weights."""
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    if mask is None:
        mask = causal_mask(q.size(2), k.size(2), q.device)
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))  # (B, H, T, S)
    att = att.masked_fill(~mask, float('-inf'))
    att = apply_dropout(F.softmax(att.float(), dim=-1), dropout).type_as(v)
    return att @ v  # (B, H, T, S) x (B, H, S, D) -> (B, H, T, D)


@register(ATTENTION_BACKEND, 'chunked')
def chunked_attention(q, k, v, dropout, config, mask=None):
    """
    Process one chunk of queries at a time against the keys up to its end, and recompute it in
    backward, so that a head holds (chunk, S) weights instead of (T, S).
    """
    recompute = torch.is_grad_enabled() and q.requires_grad
    T, S = q.size(2), k.size(2)
    start, out = 0, []
    for rows in q.split(config.attention_chunk_size, dim=2):
        stop = start + rows.size(2)
        end = S - T + stop
        chunk_mask = None if mask is None else mask[..., start:stop, :end]
        args = rows, k[:, :, :end], v[:, :, :end], dropout, config, chunk_mask
        if recompute:
            out.append(checkpoint(manual_attention, *args, use_reentrant=False))
        else:
            out.append(manual_attention(*args))
        start = stop
    return torch.cat(out, dim=2)


class KVCache:
    """
    Keys and values of one layer, (B, K, max_length, D), filled up to `length`. With a document
    mask the first layer's cache also holds the document number of each position, (B, length), and
    with token_shift the last token's embedding, (B, 1, C).
    """
    def __init__(self, shape, dtype, device):
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.doc = None
        self.last = None

    def append(self, k, v):
        """Append k, v (B, K, T, D) and return views of all keys and values, (B, K, length, D)."""
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start:self.length] = k
        self.v[:, :, start:self.length] = v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]

    def continue_documents(self, doc):
        """
        Append the document numbers of new tokens, doc (B, T), in which 0 is the document that the
        cached tokens end in. Return all of them, (B, length + T). Call this before append().
        """
        if self.length:
            doc = torch.cat((self.doc, self.doc[:, -1:] + doc), dim=1)
        self.doc = doc
        return doc


class CausalSelfAttention(nn.Module):
    """
    (B, T, C) -> same shape, with n_head heads of queries. With fewer heads of keys and values,
    neighbouring query heads share one (GQA, https://arxiv.org/abs/2305.13245).
    """
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.n_head = config.n_head
        self.n_kv_head = config.kv_heads
        self.head_dim = config.head_dim
        width = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        self.c_attn = Linear(config.n_embd, width, bias=config.bias or config.qkv_bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        norm = NORMALIZATION[config.normalization]
        self.q_norm = norm(self.head_dim, config) if config.qk_norm else nn.Identity()
        self.k_norm = norm(self.head_dim, config) if config.qk_norm else nn.Identity()
        self.attend = ATTENTION_BACKEND[config.attention_backend]
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, rotate=None, cache=None, mask=None):
        B, T, C = x.size()
        H, K, D = self.n_head, self.n_kv_head, self.head_dim
        q, k, v = self.c_attn(x).split([H * D, K * D, K * D], dim=2)
        q = q.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, K, D).transpose(1, 2)  # (B, K, T, D)
        v = v.view(B, T, K, D).transpose(1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, D)
            q = q.type_as(k)  # see cache_dtype()
        dropout = self.config.dropout if self.training else 0.0
        y = self.attend(q, k, v, dropout, self.config, mask)
        if cache is not None:
            y = y.type_as(x)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side
        return self.resid_dropout(self.c_proj(y))

    def extra_flops(self, T, causal):
        """
        Return the forward FLOPs per token of the two attention matmuls against T keys, or half as
        many if causal.
        """
        return 4 * T * self.n_head * self.head_dim * (0.5 if causal else 1.0)


# feed-forward networks

@register(FFN_TYPE, 'standard')
class MLP(nn.Module):
    """(B, T, C) -> same shape, through d_ff activations per token."""
    def __init__(self, config):
        super().__init__()
        d_ff = config.d_ff or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, d_ff, bias=config.bias)
        self.c_proj = Linear(d_ff, config.n_embd, bias=config.bias)
        self.activation = ACTIVATION[config.activation]
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


@register(FFN_TYPE, 'swiglu')
class SwiGLU(nn.Module):
    """Gated FFN (https://arxiv.org/abs/2002.05202), gated by SiLU unless activation is set."""
    default_activation = 'silu'

    def __init__(self, config):
        super().__init__()
        # with 8/3 C, three matrices have as many parameters as a standard FFN's two with 4 C
        d_ff = config.d_ff or 256 * math.ceil(8 * config.n_embd / 3 / 256)
        self.c_fc = Linear(config.n_embd, 2 * d_ff, bias=config.bias)  # gate and up, in one matmul
        self.c_proj = Linear(d_ff, config.n_embd, bias=config.bias)
        self.activation = ACTIVATION[config.activation]
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        gate, up = self.c_fc(x).chunk(2, dim=-1)
        return self.dropout(self.c_proj(self.activation(gate) * up))


@register(FFN_TYPE, 'geglu')
class GEGLU(SwiGLU):
    """The same, gated by GELU unless activation is set."""
    default_activation = 'gelu'


# the block

@register(NORM_POSITION, 'pre')
def pre_norm(x, norm, sublayer):
    return x + sublayer(norm(x))


pre_norm.final_norm = True


@register(NORM_POSITION, 'post')
def post_norm(x, norm, sublayer):
    return norm(x + sublayer(x))  # as in GPT-1 and the Transformer of 2017


post_norm.final_norm = False


class Block(nn.Module):
    """Attention, then the FFN, each added to the residual stream x (B, T, C)."""
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


# the loss

def cap_logits(logits, softcap):
    """Squash logits smoothly into (-softcap, softcap): https://arxiv.org/abs/2408.00118."""
    return softcap * torch.tanh(logits / softcap)


def softmax_losses(logits, targets, softcap, need_grad):
    """
    Return the cross-entropy of each row, (n, 1) float32, for logits (n, V) and targets (n, 1); 0
    where the target is negative. With need_grad, overwrite the logits with their gradient; the
    caller has to zero it in the rows with a negative target.
    """
    seen, targets = targets >= 0, targets.clamp(min=0)
    capped = cap_logits(logits.float(), softcap) if softcap else logits
    log_probs = F.log_softmax(capped, dim=-1, dtype=torch.float32)
    losses = -log_probs.gather(1, targets) * seen
    if need_grad:
        minus_one = torch.full_like(targets, -1.0, dtype=torch.float32)
        grad = log_probs.exp_().scatter_add_(1, targets, minus_one)  # softmax - one_hot
        if softcap:
            grad *= 1 - (capped / softcap).square()
        logits.copy_(grad)
    return losses


class LinearCrossEntropy(torch.autograd.Function):
    """
    Mean cross-entropy of x @ weight.T against targets (-1 is ignored) that never holds logits of
    more than `chunk` rows. Forward computes each chunk's logits, loss and gradients together (Liger
    Kernel, https://arxiv.org/abs/2410.10989), with the usual three matmuls and no recomputation.
    The softmax is in float32, on `softmax_rows` rows at a time.

    x (N, C), weight (V, C), targets (N,) -> scalar float32. reduction='none' returns the (N,)
    losses, 0 where ignored, and has no gradients. loss_of_rows(first row, ...) replaces
    softmax_losses(...), as in engine/distill.py.

    F.linear_cross_entropy of newer torch is not used, because its chunked path ignores autocast,
    breaks torch.compile's graph, is invisible to FlopCounterMode, and was several times slower than
    plain cross-entropy on a CPU.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, softcap, dtype, chunk, softmax_rows, need_grad,
                reduction='mean', loss_of_rows=None):
        w, dw = weight.to(dtype), None
        dx = torch.empty_like(x) if need_grad else None
        loss, losses = torch.zeros((), dtype=torch.float32, device=x.device), []
        for i in range(0, x.size(0), chunk):
            rows, t = x[i:i + chunk].to(dtype), targets[i:i + chunk, None]
            logits = rows @ w.T  # (chunk, V)
            parts = zip(range(i, x.size(0), softmax_rows),
                        logits.split(softmax_rows), t.split(softmax_rows))
            for first, part, part_targets in parts:
                if loss_of_rows is None:
                    row_losses = softmax_losses(part, part_targets, softcap, need_grad)
                else:
                    row_losses = loss_of_rows(first, part, part_targets, softcap, need_grad)
                loss += row_losses.sum()
                if reduction == 'none':
                    losses.append(row_losses[:, 0])
            if need_grad:
                # `logits` now holds its gradient. It is divided by the number of targets only in
                # backward, because float16 would underflow before the loss scale is applied.
                seen = t >= 0  # zeroes the gradient of ignored rows, in C columns instead of V
                dx[i:i + chunk] = (logits @ w) * seen
                if ctx.needs_input_grad[1]:  # otherwise the head is frozen
                    dw_chunk = logits.T @ (rows * seen)
                    dw = dw_chunk if dw is None else dw.float().add_(dw_chunk)  # sum in float32
        if reduction == 'none':
            return torch.cat(losses)
        count = (targets >= 0).sum().clamp(min=1)
        ctx.save_for_backward(dx, dw, count)
        ctx.weight_dtype = weight.dtype
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        # a (1, 1) tensor, because a 0-dim float32 would not promote dw's dtype
        grad = (grad / count).view(1, 1)
        dw = None if dw is None else (dw * grad).to(ctx.weight_dtype)
        return (dx * grad).to(dx.dtype), dw, *[None] * 8


def linear_cross_entropy(x, weight, targets, softcap=0.0, reduction='mean', loss_of_rows=None):
    """
    Apply LinearCrossEntropy to x (N, C), weight (V, C), targets (N,) in autocast's dtype. Return a
    scalar in nats per token or, with reduction='none' inside torch.no_grad(), (N,) losses.
    """
    device, V = x.device.type, weight.size(0)
    dtype, no_autocast = x.dtype, contextlib.nullcontext()
    if device != 'meta':  # meta tensors have no autocast
        no_autocast = torch.autocast(device, enabled=False)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
    max_logits = 2 ** 27 if device == 'cuda' else 2 ** 26  # held at a time
    n_chunks = math.ceil(x.size(0) * V / max_logits)
    chunk = max(1, math.ceil(x.size(0) / n_chunks))
    # on a CPU the softmax of a part should stay in its cache
    softmax_rows = max(1, 2 ** 22 // V) if device == 'cpu' else chunk
    need_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if reduction not in ('mean', 'none') or reduction == 'none' and need_grad:
        raise ValueError(
            f"reduction={reduction!r}, but it must be 'mean', or 'none' inside torch.no_grad()")
    with no_autocast:
        return LinearCrossEntropy.apply(
            x, weight, targets, softcap, dtype, chunk, softmax_rows, need_grad, reduction,
            loss_of_rows)


# the model

class NoRandomInit(TorchFunctionMode):
    """Inside this context, torch.nn.init draws no random numbers and leaves tensors as they are."""
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs['tensor']
        return func(*args, **(kwargs or {}))


class GPT(nn.Module):
    """Embeddings, n_layer blocks, a final norm if norm_position asks for one, and the head."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        final_norm = nn.Identity()
        if NORM_POSITION[config.norm_position].final_norm:
            final_norm = NORMALIZATION[config.normalization](config.n_embd, config)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=POSITION_ENCODING[config.position_encoding](config),  # any kind; nanoGPT's name
            drop=Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=final_norm,
        ))
        if config.token_shift:
            self.transformer.shift = TokenShift(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.weight_tying:
            self.transformer.wte.weight = self.lm_head.weight  # https://arxiv.org/abs/1608.05859
        self.init_weights()

    def init_weights(self):
        """
        Initialize as GPT-2 does: weights N(0, 0.02), biases 0. Divide the std of layers that write
        to the residual stream by sqrt(2 n_layer), so that the stream does not grow with depth.
        zero_init_residual sets them to 0.

        The random numbers of a layer depend on the seed and its name alone, so that two models
        with other parts have the same weights wherever names and shapes agree.
        """
        zero = self.config.zero_init_residual
        residual_std = 0.0 if zero else 0.02 / math.sqrt(2 * self.config.n_layer)
        generator = torch.Generator()
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                generator.manual_seed(torch.initial_seed() ^ zlib.crc32(name.encode()))
                std = residual_std if name.endswith('c_proj') else 0.02
                nn.init.normal_(module.weight, mean=0.0, std=std, generator=generator)
                if getattr(module, 'bias', None) is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, cache=None, all_logits=False, reduction='mean',
                left_padding=None, loss_of_rows=None):
        """
        idx (B, T) int64 -> (logits, loss). Raise ValueError if idx and the cache together are
        longer than block_size.

        Without targets, loss is None and logits are those of the last position, (B, 1, V). With
        targets (B, T), where -1 is ignored, loss is the mean cross-entropy in nats and logits are
        None, because (B, T, V) floats would take more memory than anything else.

        all_logits=True returns logits (B, T, V) in either case; beside a loss they cost another
        matmul with the head. All logits are after the softcap. reduction='none', only inside
        torch.no_grad(): the loss is per token, (B, T), 0 where ignored. cache is a list from
        new_cache(); idx continues it. The first left_padding (B,) ids of each row are ignored.
        loss_of_rows changes the loss: see LinearCrossEntropy.
        """
        B, T = idx.size()
        start = cache[0].length if cache else 0
        if start + T > self.config.block_size:
            raise ValueError(f'cannot forward a sequence of length {start + T}: '
                             f'block_size is {self.config.block_size}')
        pos = torch.arange(start, start + T, device=idx.device)
        if left_padding is not None:
            pos = pos - left_padding[:, None]  # (B, T), negative in the padding
        x = self.transformer.wte(idx)
        if self.config.token_shift:
            x = self.transformer.shift(x, idx, pos, cache[0] if cache else None)
        x, rotate = self.transformer.wpe(x, pos.clamp(min=0))
        x = self.transformer.drop(x)
        mask = self.make_mask(idx, cache, pos)
        for i, block in enumerate(self.transformer.h):
            if self.config.activation_checkpointing and torch.is_grad_enabled() and not cache:
                # keep only the block's input and recompute the rest in backward
                x = checkpoint(block, x, rotate, None, mask, use_reentrant=False)
            else:
                x = block(x, rotate, cache[i] if cache else None, mask)
        x = self.transformer.ln_f(x)

        loss = logits = None
        softcap = self.config.logit_softcap
        if targets is not None:
            loss = linear_cross_entropy(
                x.reshape(B * T, -1), self.lm_head.weight, targets.reshape(-1), softcap, reduction,
                loss_of_rows)
            loss = loss.view(B, T) if reduction == 'none' else loss
        if targets is None or all_logits:
            logits = self.lm_head(x if all_logits else x[:, [-1], :])
            logits = cap_logits(logits, softcap) if softcap else logits
        return logits, loss

    def make_mask(self, idx, cache, pos):
        """
        Return the attention mask of a forward pass: by documents if doc_mask_token is set or rows
        are padded, otherwise None. An end-of-text token belongs to the document that it opens. With
        a cache, this also appends to the cached document numbers. Positions do not restart with a
        document; only learned positions depend on that.
        """
        token = self.config.doc_mask_token
        if token is None and pos.dim() == 1:
            return None
        doc = torch.zeros_like(idx)  # (B, T), numbers of documents, from 0 within the row
        if token is not None:
            doc = (idx == token).cumsum(1)
        if pos.dim() == 2:
            doc = doc.masked_fill(pos < 0, -1)  # left padding is a document of its own
        if cache:
            doc = cache[0].continue_documents(doc)
        compiled = torch.compiler.is_compiling() and not cache
        flex = compiled and self.can_use_flex(idx.device.type)
        return document_mask(doc, idx.size(1), flex)

    def can_use_flex(self, device_type):
        """
        Return whether a compiled forward masks documents with flex attention. Flex attention has no
        dropout.
        """
        c = self.config
        large = c.block_size >= 128 and c.head_dim >= 16  # the smallest sizes its kernels support
        return device_type == 'cuda' and c.attention_backend == 'sdpa' and not c.dropout and large

    # counts

    def get_num_params(self, non_embedding=True):
        """
        Return the number of parameters. With non_embedding, as in nanoGPT, position embeddings are
        left out, and so are token embeddings unless they are tied to the head.
        """
        n = sum(p.numel() for p in self.parameters())
        if non_embedding:
            n -= sum(p.numel() for p in self.transformer.wpe.parameters())
        if non_embedding and not self.config.weight_tying:
            n -= self.transformer.wte.weight.numel()
        return n

    def flops_by_part(self, seq_len=None, causal=False, training=False):
        """
        Return {part: FLOPs per token}, forward or to train, at seq_len (default block_size). Only
        matmuls count: 2 per weight of every Linear, plus each module's extra_flops(T, causal).
        Attention scores count in full, as in PaLM (https://arxiv.org/abs/2204.02311, appendix B),
        or half with causal=True.
        """
        T, passes = seq_len or self.config.block_size, 3 if training else 1
        flops = {'attention projections': 0, 'attention scores': 0, 'ffn': 0, 'head': 0}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                part = 'attention projections' if '.attn.' in name else 'ffn'
                part = 'head' if name == 'lm_head' else part
                no_gradient = training and not module.weight.requires_grad
                flops[part] += (passes - no_gradient) * 2 * module.weight.numel()
            elif hasattr(module, 'extra_flops'):
                part = 'attention scores' if name.endswith('.attn') else 'ffn'
                flops[part] += passes * module.extra_flops(T, causal)
        return flops

    def flops_per_token(self, seq_len=None, causal=False):
        """
        Return training FLOPs per token: 3 x forward, or 2 x for frozen Linears. Recomputation by
        activation checkpointing is not counted.
        """
        return sum(self.flops_by_part(seq_len, causal, training=True).values())

    # optimizer

    def parameter_groups(self, weight_decay):
        """
        Return two groups: matrices and embeddings, which are decayed, and biases and norms, which
        are not. Checkpoints number the parameters in this order.
        """
        params = [p for p in self.parameters() if p.requires_grad]
        decayed = [p for p in params if p.dim() >= 2]
        others = [p for p in params if p.dim() < 2]
        return [{'params': decayed, 'weight_decay': weight_decay},
                {'params': others, 'weight_decay': 0.0}]

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """Build AdamW, for code written for nanoGPT. train.py uses engine/optim.py."""
        fused = device_type in ('cuda', 'cpu', 'mps')
        return torch.optim.AdamW(
            self.parameter_groups(weight_decay), lr=learning_rate, betas=betas, fused=fused)

    # weights in and out

    @classmethod
    def without_data(cls, config):
        """
        Return a model on the meta device, which has shapes but no data, to be counted or filled.
        Random initialization would import torch.compile's front end there, for a second.
        """
        with torch.device('meta'), NoRandomInit():
            return cls(config)

    @classmethod
    def from_dict(cls, ckpt):
        """
        Build the model of a checkpoint dict, ours or nanoGPT's, in eval mode. The model shares the
        dict's tensors. Raise ValueError if they do not fit.
        """
        try:
            known = {field.name for field in fields(GPTConfig)}
            unknown = [str(key) for key in ckpt['model_args'] if key not in known]
            if unknown:
                raise ValueError(f"unknown model_args {', '.join(unknown)}")
            model = cls.without_data(GPTConfig(**ckpt['model_args']))
            # nanoGPT: names with torch.compile's prefix; causal masks as attn.bias before torch 2.0
            state = {name.removeprefix('_orig_mod.'): tensor
                     for name, tensor in ckpt['model'].items() if not name.endswith('.attn.bias')}
            model.load_state_dict(state, assign=True)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
            path = f" '{ckpt['path']}'" if 'path' in ckpt else ''
            reason = ' '.join(str(e).split())[:300]
            raise ValueError(f'checkpoint{path} cannot be loaded as a model: {reason}') from e
        if model.config.weight_tying:  # assign=True has untied them
            model.transformer.wte.weight = model.lm_head.weight
        return model.eval()

    @classmethod
    def from_checkpoint(cls, path):
        """Load a checkpoint file, or the checkpoint in a run's folder, on the CPU, in eval mode."""
        from engine.checkpoint import load_checkpoint
        return cls.from_dict(load_checkpoint(path))

    @classmethod
    def from_pretrained(cls, name, dtype=torch.float32, **overrides):
        """
        Load a Hugging Face folder, or a hub id such as gpt2, on the CPU, in eval mode. overrides:
        keys of GPTConfig that do not change the shape of any weight, such as dropout, and a
        block_size.
        """
        from engine.huggingface import from_pretrained
        return from_pretrained(name, dtype, overrides)

    def save_pretrained(self, folder, ckpt=None):
        """Write a folder for transformers, with the tokenizer of ckpt, a checkpoint dict."""
        from engine.export import save_pretrained
        save_pretrained(self, folder, ckpt)

    def quantize_int8(self):
        """Make every Linear int8, in place, for sampling only. Return the model."""
        from engine.int8 import quantize_int8
        return quantize_int8(self)

    def crop_block_size(self, block_size):
        """Change the context length. Raise ValueError if learned positions would have to grow."""
        learned = self.config.position_encoding == 'learned_absolute'
        if block_size < 1:
            raise ValueError(f'block_size must be positive, not {block_size}')
        if learned and block_size > self.config.block_size:
            raise ValueError(f'block_size {block_size} exceeds the {self.config.block_size} '
                             'positions that this model has learned')
        self.config.block_size = block_size
        if learned:
            weight = self.transformer.wpe.weight[:block_size].detach().clone()
            self.transformer.wpe.weight = nn.Parameter(weight)

    # generation

    def new_cache(self, batch_size, max_length):
        """Return an empty cache for forward(cache=...): a list of one KVCache per layer."""
        c, device = self.config, next(self.parameters()).device
        shape = (batch_size, c.kv_heads, max_length, c.head_dim)
        return [KVCache(shape, self.cache_dtype(), device) for _ in range(c.n_layer)]

    def cache_dtype(self):
        """
        Return the dtype of cached keys and values. 16-bit weights on a CPU have a float32 cache,
        because torch's bfloat16 attention takes longer for a single query, with 16 samples twice as
        long.
        """
        # int8 weights are buffers, and the remaining parameters have the activations' dtype
        weight = next(self.parameters())
        if torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        if weight.device.type == 'cpu':
            return torch.promote_types(weight.dtype, torch.float32)
        return weight.dtype

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None,
               stop=None, use_cache=True, slide=1, left_padding=None, min_p=0.0,
               repetition_penalty=1.0):
        """
        Yield (B,) int64 ids that continue idx (B, T). temperature 0 is greedy. top_k keeps the k
        likeliest tokens. top_p keeps the fewest likeliest tokens whose probabilities add up to it.
        min_p drops tokens below this share of the likeliest one's probability. seed makes the draws
        of the batch repeatable. After a row draws `stop` it only repeats it; the stream ends when
        all rows have stopped. Padding ids are never drawn. left_padding (B,) ids, of any value,
        precede shorter prompts. Raise ValueError if an argument is out of range.

        Past block_size the model sees only the last block_size tokens, at positions from 0, as in
        nanoGPT. Every position then changes with each token, so the cache is useless and each token
        costs a full forward pass. With slide=k the window moves k tokens at a time: the cache stays
        valid for k tokens and the model sees block_size - k + 1 to block_size tokens. The ids do
        not depend on use_cache, up to rounding.
        """
        B, T = idx.size()
        block_size = self.config.block_size
        n_ids = self.config.unpadded_vocab_size or self.config.vocab_size
        require_range('prompt length', T, T > 0)
        require_range('max_new_tokens', max_new_tokens, max_new_tokens >= 0)
        require_range('temperature', temperature, divides_logits(temperature))
        require_range('top_k', top_k, top_k is None or top_k > 0)
        require_range('top_p', top_p, top_p is None or 0 < top_p <= 1)
        require_range('min_p', min_p, 0 <= min_p < 1)
        require_range('repetition_penalty', repetition_penalty, repetition_penalty > 0)
        require_range('slide', slide, 1 <= slide <= block_size)
        pads = [0] * B if left_padding is None else left_padding.tolist()
        require_range('left_padding', pads, len(pads) == B and all(0 <= pad < T for pad in pads))
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        tokens = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), dim=1)
        for row, pad in zip(tokens, pads):
            row[:pad] = row[pad]  # an id of the prompt, so that padding penalizes no other
        done = torch.zeros(B, dtype=torch.bool, device=idx.device)
        cache = self.new_cache(B, min(block_size, T + max_new_tokens)) if use_cache else None
        was_training, previous = self.training, None
        self.eval()
        try:
            for n in range(T, T + max_new_tokens):
                # where each row's window starts
                first = [p + max(0, math.ceil((n - p - block_size) / slide) * slide) for p in pads]
                context = tokens[:, min(first):n]
                if cache and first == previous:
                    context = context[:, -1:]  # the cache already holds the rest of the windows
                else:
                    previous = first
                    padding = idx.new_tensor(first) - min(first) if max(pads) else None
                    for layer in cache or ():
                        layer.length = 0
                # .forward, because a compiled __call__ would recompile for each shape
                logits, _ = self.forward(context, cache=cache, left_padding=padding)
                logits = logits[:, -1].float()
                if repetition_penalty != 1:
                    logits = penalize_repetition(logits, tokens[:, :n], repetition_penalty)
                token = sample_token(logits[:, :n_ids], temperature, top_k, top_p, generator, min_p)
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
        """Continue idx (B, T) to (B, T + n), n <= max_new_tokens. Arguments: see stream()."""
        steps = list(self.stream(idx, max_new_tokens, temperature, top_k, **kwargs))
        return torch.cat((idx, torch.stack(steps, dim=1)), dim=1) if steps else idx


def penalize_repetition(logits, tokens, penalty):
    """
    Make the ids in tokens (B, T) less likely to come again: divide positive logits (B, V) by the
    penalty and multiply negative ones by it. https://arxiv.org/abs/1909.05858
    """
    seen = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(seen < 0, seen * penalty, seen / penalty))


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None, min_p=0.0):
    """Draw one id per row from logits (B, V) float32. Return (B,) int64."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, ids = logits / temperature, None
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        # drop a token if the likelier ones already reach top_p
        drop = probs.cumsum(-1) - probs >= top_p
        drop = torch.zeros_like(drop).scatter(1, order, drop)  # undo the sort
        logits = logits.masked_fill(drop, float('-inf'))
    if min_p:
        least = logits.amax(-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < least, float('-inf'))
    drawn = torch.multinomial(logits.softmax(-1), num_samples=1, generator=generator)
    if ids is not None:
        drawn = ids.gather(1, drawn)
    return drawn[:, 0]


if __name__ == '__main__':
    from engine.describe import main
    main()
