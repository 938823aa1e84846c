"""
The whole GPT in one file: its parts, the model, its loss, and text out of it.

    python model.py config/full_llama_1.36b.py --n_layer=24     # parameters, FLOPs and memory
    python model.py --ckpt=out                                  # inspect a checkpoint
    python model.py --ckpt=out --consolidate=ckpt.pt            # a sharded checkpoint as one file
    python model.py --ckpt=out --export=hf_dir                  # for transformers, or model.onnx
    python model.py --list=True                                 # every config with its counts

Shapes: B batch, T queries, S keys, C n_embd, H heads, K key/value heads, D = C / H, V vocabulary.

Names and state dict are those of nanoGPT, https://github.com/karpathy/nanoGPT, and so of GPT-2,
https://github.com/openai/gpt-2. LLaMA: https://arxiv.org/abs/2302.13971
"""
import contextlib
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# The registry: one dict per kind of part. To add a part, write it below with its decorator and
# choose it by flag. Everything else follows from its structure: matrices and embeddings start at
# N(0, 0.02) and decay, vectors do not decay; a Linear named c_proj writes to the residual stream
# and starts smaller; every Linear counts its FLOPs, and inside a block Muon may train it.

# Module(dim, config); forward: (..., dim) -> same shape
NORMALIZATION = {}
# elementwise function
ACTIVATION = {}
# Module(config); forward: x (B, T, C), pos (T,) -> x, rotate
# rotate is None or a function that turns q and k, (B, H or K, T, D) -> same shape
POSITION_ENCODING = {}
# function(q, k, v, dropout, config, mask=None) -> (B, H, T, D), for q (B, H, T, D) and
# k, v (B, K, S, D); queries are the last T of the S positions. mask: see attention_mask
ATTENTION_BACKEND = {}
# function(x, norm, sublayer) -> x
# its attribute final_norm says whether the output of the last block still needs a norm
NORM_POSITION = {}
# Module(config); forward: (B, T, C) -> same shape. extra_flops(T, causal) counts its FLOPs per
# token beyond those of its Linears, if there are any
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


# The values that a preset gives to keys that nobody set. 'custom' is nanoGPT's own mix.
PRESETS = {'custom': dict(
    normalization='layernorm', activation='gelu', position_encoding='learned_absolute',
    attention_backend='sdpa', norm_position='pre', ffn_type='standard',
    bias=False, weight_tying=True)}
PRESETS['gpt2'] = PRESETS['custom'] | dict(activation='gelu_tanh', bias=True)
PRESETS['llama'] = PRESETS['custom'] | dict(
    normalization='rmsnorm', activation='silu', position_encoding='rope', ffn_type='swiglu',
    weight_tying=False)
PRESETS['hybrid'] = PRESETS['custom'] | dict(position_encoding='rope')
PRESETS['team'] = PRESETS['llama']
# The parts that the records of https://github.com/KellerJordan/modded-nanogpt have in common
PRESETS['modern'] = PRESETS['llama'] | dict(
    activation='relu_squared', ffn_type='standard',
    qk_norm=True, zero_init_residual=True, logit_softcap=15.0)


# config

ROPE_SCALING = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
SIZES = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_kv_head', 'd_ff',
         'attention_chunk_size')


def check_range(name, value, in_range):
    if not in_range:
        raise ValueError(f'{name}={value!r} is out of range')


@dataclass
class GPTConfig:
    """Everything that defines a model. Defaults are nanoGPT's, so its checkpoints load as meant."""
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
    n_kv_head: int = None  # None: n_head
    d_ff: int = None  # None: 4 C; swiglu: 8/3 C, rounded up to a multiple of 256
    qk_norm: bool = False  # normalize q and k per head: https://arxiv.org/abs/2010.04245
    zero_init_residual: bool = False  # blocks start as the identity: arxiv.org/abs/1901.09321
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    logit_softcap: float = 0.0  # 0: none. https://arxiv.org/abs/2408.00118
    attention_chunk_size: int = 256  # queries at a time with attention_backend='chunked'
    activation_checkpointing: bool = False
    qkv_bias: bool = False  # biases of q, k and v even where bias is False, as in Qwen2
    rope_scaling: dict = None  # LLaMA 3's stretched RoPE, with the keys of ROPE_SCALING
    unpadded_vocab_size: int = None  # ids below it are the tokenizer's; others are never sampled
    doc_mask_token: int = None  # end-of-text id; attention never crosses it. None: no mask

    def __post_init__(self):
        for kind, parts in REGISTRY.items():
            name = getattr(self, kind)
            if name not in parts:
                raise ValueError(f"unknown {kind} {name!r}; choose from {', '.join(parts)}")
        for key in SIZES:
            value = getattr(self, key)
            if value is not None and not (type(value) is int and value > 0):
                raise ValueError(f'{key} must be a positive int, not {value!r}')
        n_ids, scaling = self.unpadded_vocab_size, self.rope_scaling
        check_range('dropout', self.dropout, 0 <= self.dropout < 1)
        check_range('norm_eps', self.norm_eps, self.norm_eps > 0)
        check_range('rope_theta', self.rope_theta, self.rope_theta > 0)
        check_range('logit_softcap', self.logit_softcap, self.logit_softcap >= 0)
        check_range('rope_scaling', scaling, scaling is None or set(scaling) == set(ROPE_SCALING))
        check_range('unpadded_vocab_size', n_ids, n_ids is None or 0 < n_ids <= self.vocab_size)
        C, H, K = self.n_embd, self.n_head, self.n_kv_head or self.n_head
        if C % H:
            raise ValueError(f'n_embd ({C}) must be a multiple of n_head ({H})')
        if H % K:
            raise ValueError(f'n_head ({H}) must be a multiple of n_kv_head ({K})')
        if self.position_encoding == 'rope' and C // H % 2:
            raise ValueError(f'rope needs an even head size, not n_embd / n_head = {C // H}')

    @classmethod
    def from_settings(cls, settings, data_vocab=None):
        """
        The model that a dict of settings describes. Keys that are None or missing come from
        arch_preset, then from the defaults above. data_vocab, the number of ids in the data set,
        becomes vocab_size if that is unset; above 1024 it is padded to a multiple of 64 for speed.
        """
        name = settings.get('arch_preset', 'custom')
        if name not in PRESETS:
            raise ValueError(f"unknown arch_preset {name!r}; choose from {', '.join(PRESETS)}")
        chosen = dict(PRESETS[name])
        for field in fields(cls):
            if settings.get(field.name) is not None:
                chosen[field.name] = settings[field.name]
        if data_vocab is not None:
            padded = data_vocab if data_vocab <= 1024 else math.ceil(data_vocab / 64) * 64
            vocab_size = chosen.setdefault('vocab_size', padded)
            if vocab_size < data_vocab:
                raise ValueError(f'vocab_size={vocab_size} is too small for the data set, '
                                 f'which has {data_vocab} ids')
            chosen['unpadded_vocab_size'] = data_vocab
        return cls(**chosen)


# normalization

@register(NORMALIZATION, 'layernorm')
class LayerNorm(nn.Module):
    def __init__(self, dim, config, bias=None):
        super().__init__()
        has_bias = config.bias if bias is None else bias
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if has_bias else None
        self.eps = config.norm_eps

    def forward(self, x):
        # FSDP gathers weights in 16 bits while x may be float32
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
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = config.norm_eps

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
    i + D/2 form a pair, which turns by an angle proportional to the position.
    """
    def __init__(self, config):
        super().__init__()
        self.dim = config.n_embd // config.n_head
        self.theta = config.rope_theta
        self.scaling = config.rope_scaling

    def frequencies(self, device):
        """(D/2,) float32, radians per position."""
        i = torch.arange(0, self.dim, 2, device=device).float()
        freq = self.theta ** (i / -self.dim)
        if not self.scaling:
            return freq
        # LLaMA 3.1: pairs that turn fewer than low_freq_factor times in the original context
        # slow down by `factor`, those above high_freq_factor turns stay, others lie in between
        factor, low, high, original = (self.scaling[key] for key in ROPE_SCALING)
        turns = original * freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return freq * (keep + (1 - keep) / factor)

    def forward(self, x, pos):
        # float32, because bfloat16 cannot tell position 256 from 257
        angle = pos.float()[:, None] * self.frequencies(x.device)  # (T, D/2)
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
    """(T, S) bool, True where a query may look. Query i is at position S - T + i."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def attention_mask(T, S, device, doc=None, window=None, flex=False):
    """
    Which of S positions the last T may look at: a bool tensor that broadcasts to (B, H, T, S).
    None means plain causal attention, for which every backend has a cheaper way of its own.

    doc (B, S) numbers the documents: no query sees another document. window: a query sees itself
    and the window - 1 positions before it. flex: return a BlockMask instead, for T == S, with
    which flex attention skips empty blocks of 128 x 128: https://arxiv.org/abs/2412.05496.
    """
    if doc is None and window is None:
        return None

    def visible(b, h, i, j):
        seen = j <= i
        if doc is not None:
            seen = seen & (doc[b, i] == doc[b, j])
        if window is not None:
            seen = seen & (i - j < window)
        return seen

    B = 1 if doc is None else doc.size(0)
    if flex:  # whose import brings in torch.compile's front end
        from torch.nn.attention.flex_attention import create_block_mask
        return create_block_mask(visible, B, None, T, S, device=device)
    b = torch.arange(B, device=device).view(B, 1, 1)
    i = torch.arange(S - T, S, device=device).view(T, 1)
    j = torch.arange(S, device=device)
    return visible(b, None, i, j).view(B, 1, T, S)


@register(ATTENTION_BACKEND, 'sdpa')
def sdpa_attention(q, k, v, dropout, config, mask=None):
    """torch's fused kernels, except for short bfloat16 training on a CPU."""
    T, S = q.size(2), k.size(2)
    grouped = q.size(1) != k.size(1)
    if mask is not None and not isinstance(mask, torch.Tensor):  # a BlockMask
        from torch.nn.attention.flex_attention import flex_attention
        # under autocast qk_norm returns float32; torch 2.13 gave wrong results for mixed strides
        q, k, v = (t.type_as(v).contiguous() for t in (q, k, v))
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
    bfloat16_on_cpu = q.device.type == 'cpu' and v.dtype == torch.bfloat16
    if bfloat16_on_cpu and v.requires_grad and T <= 512:
        return bfloat16_cpu_attention(q, k, v, dropout, mask)
    causal = mask is None and 1 < T == S  # the kernels' own case; a single query sees every key
    if mask is None and 1 < T < S:
        mask = causal_mask(T, S, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped)


def bfloat16_cpu_attention(q, k, v, dropout, mask):
    """
    The definition in bfloat16, with fewer passes than `manual`: half the time of torch's kernel
    for T <= 512, at the price of keeping 2 B H T S bytes of weights for backward.
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
    att = F.dropout(F.softmax(att, dim=-1), dropout)
    return (att @ v).unflatten(0, (B, H))


@register(ATTENTION_BACKEND, 'manual')
def manual_attention(q, k, v, dropout, config, mask=None):
    """The definition, for reading and for checking the others: holds all (B, H, T, S) weights."""
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    if mask is None:
        mask = causal_mask(q.size(2), k.size(2), q.device)
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))  # (B, H, T, S)
    att = att.masked_fill(~mask, float('-inf'))
    att = F.dropout(F.softmax(att.float(), dim=-1), dropout).type_as(v)
    return att @ v  # (B, H, T, S) x (B, H, S, D) -> (B, H, T, D)


@register(ATTENTION_BACKEND, 'chunked')
def chunked_attention(q, k, v, dropout, config, mask=None):
    """
    One chunk of queries at a time against the keys up to the chunk's end, recomputed in backward,
    so that a head holds (chunk, S) weights instead of (T, S).
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
    mask the first layer's cache also holds the document number of each position, (B, length).
    """
    def __init__(self, shape, dtype, device):
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.doc = None

    def append(self, k, v):
        """Write k, v (B, K, T, D) after the rest; returns views of all, (B, K, length, D)."""
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start:self.length] = k
        self.v[:, :, start:self.length] = v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]

    def continue_documents(self, doc):
        """Number the documents of new positions (B, T) on from the cached ones: (B, length + T)."""
        if self.length:
            doc = torch.cat((self.doc, self.doc[:, -1:] + doc), dim=1)
        self.doc = doc
        return doc


class Linear(nn.Linear):
    """nn.Linear with a faster way for a single token on a CPU: a matrix-vector product."""
    def forward(self, x):
        if x.numel() == self.in_features and x.device.type == 'cpu':
            if not torch.is_grad_enabled() and not torch.is_autocast_enabled('cpu'):
                y = torch.mv(self.weight, x.view(-1))
                y = y if self.bias is None else y + self.bias
                return y.view(*x.shape[:-1], -1)
        return super().forward(x)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_dim = config.n_embd // config.n_head
        width = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        self.c_attn = Linear(config.n_embd, width, bias=config.bias or config.qkv_bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        norm = NORMALIZATION[config.normalization]
        self.q_norm = norm(self.head_dim, config) if config.qk_norm else nn.Identity()
        self.k_norm = norm(self.head_dim, config) if config.qk_norm else nn.Identity()
        self.attend = ATTENTION_BACKEND[config.attention_backend]
        self.dropout = nn.Dropout(config.dropout)

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
        dropout = self.config.dropout if self.training else 0.0
        y = self.attend(q, k, v, dropout, self.config, mask)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side
        return self.dropout(self.c_proj(y))

    def extra_flops(self, T, causal):
        """Forward FLOPs per token of scores and values against T keys; causal: against half."""
        return 4 * T * self.n_head * self.head_dim * (0.5 if causal else 1.0)


# feed-forward networks

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
    """https://arxiv.org/abs/2002.05202; with --activation=gelu it is that paper's GEGLU."""
    def __init__(self, config):
        super().__init__()
        # at 8/3 C three matrices cost as much as the two of a standard FFN at 4 C
        d_ff = config.d_ff or 256 * math.ceil(8 * config.n_embd / 3 / 256)
        self.c_fc = Linear(config.n_embd, 2 * d_ff, bias=config.bias)  # gate and up, in one matmul
        self.c_proj = Linear(d_ff, config.n_embd, bias=config.bias)
        self.activation = ACTIVATION[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        gate, up = self.c_fc(x).chunk(2, dim=-1)
        return self.dropout(self.c_proj(self.activation(gate) * up))


# the block

@register(NORM_POSITION, 'pre')
def pre_norm(x, norm, sublayer):
    return x + sublayer(norm(x))


@register(NORM_POSITION, 'post')
def post_norm(x, norm, sublayer):
    return norm(x + sublayer(x))  # as in GPT-1 and the Transformer of 2017


pre_norm.final_norm = True
post_norm.final_norm = False


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


# the loss

def softmax_losses(logits, targets, softcap, need_grad):
    """
    Cross-entropy per row, (n, 1) float32, for logits (n, V) and targets (n, 1); 0 where the
    target is -1. With need_grad the logits are overwritten by their gradient.
    """
    seen, targets = targets >= 0, targets.clamp(min=0)
    capped = softcap * torch.tanh(logits.float() / softcap) if softcap else logits
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
    Mean cross-entropy of x @ weight.T against targets, where -1 is ignored, without ever holding
    the logits of more than `chunk` rows: each chunk computes its logits, loss and gradients at
    once, in forward (Liger Kernel, https://arxiv.org/abs/2410.10989). The plain way's three
    matmuls, none repeated. The softmax is in float32 and takes `part` rows of a chunk at a time.

    x (N, C), weight (V, C), targets (N,) -> scalar float32; with reduction='none' the (N,)
    losses, 0 where ignored, without gradients.

    Why not F.linear_cross_entropy of newer torch: its chunked path ignores autocast, breaks
    torch.compile's graph, is invisible to FlopCounterMode, and was several times slower than plain
    cross-entropy on a CPU.
    """
    @staticmethod
    def forward(ctx, x, weight, targets, softcap, dtype, chunk, part, need_grad, reduction='mean'):
        w, dw = weight.to(dtype), None
        dx = torch.empty_like(x) if need_grad else None
        loss, losses = torch.zeros((), dtype=torch.float32, device=x.device), []
        for i in range(0, x.size(0), chunk):
            rows, t = x[i:i + chunk].to(dtype), targets[i:i + chunk, None]
            logits = rows @ w.T  # (chunk, V)
            for logits_part, t_part in zip(logits.split(part), t.split(part)):
                part_losses = softmax_losses(logits_part, t_part, softcap, need_grad)
                loss += part_losses.sum()
                if reduction == 'none':
                    losses.append(part_losses[:, 0])
            if need_grad:
                # logits hold their gradient here, not yet divided by the number of targets:
                # in float16 that would underflow, as the loss scale only arrives in backward
                seen = t >= 0
                dx[i:i + chunk] = (logits @ w) * seen
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
        grad = (grad / count).view(1, 1)  # not a scalar, so that its float32 wins over dw's dtype
        return (dx * grad).to(dx.dtype), (dw * grad).to(ctx.weight_dtype), *[None] * 7


def linear_cross_entropy(x, weight, targets, softcap=0.0, reduction='mean'):
    """
    LinearCrossEntropy of x (N, C), weight (V, C), targets (N,) in autocast's dtype: a scalar in
    nats per token, or (N,) losses with reduction='none', which needs torch.no_grad().
    """
    device, V = x.device.type, weight.size(0)
    dtype, no_autocast = x.dtype, contextlib.nullcontext()
    if device != 'meta':  # which has no autocast
        no_autocast = torch.autocast(device, enabled=False)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
    max_logits = 2 ** 27 if device == 'cuda' else 2 ** 26
    n_chunks = math.ceil(x.size(0) * V / max_logits)
    chunk = max(1, math.ceil(x.size(0) / n_chunks))
    part = max(1, 2 ** 22 // V) if device == 'cpu' else chunk  # softmax within a CPU's cache
    need_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if reduction not in ('mean', 'none') or reduction == 'none' and need_grad:
        raise ValueError(f"reduction={reduction!r}: 'mean', or inside torch.no_grad() 'none'")
    with no_autocast:
        return LinearCrossEntropy.apply(
            x, weight, targets, softcap, dtype, chunk, part, need_grad, reduction)


# the whole

# a module's name in the path of a parameter -> its row in params_by_part(); the rest are norms
PARTS = dict(wte='token embeddings', wpe='position embeddings', attn='attention', mlp='ffn',
             lm_head='head')


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        final_norm = nn.Identity()
        if NORM_POSITION[config.norm_position].final_norm:
            final_norm = NORMALIZATION[config.normalization](config.n_embd, config)
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=POSITION_ENCODING[config.position_encoding](config),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=final_norm,
        ))
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.weight_tying:
            self.transformer.wte.weight = self.lm_head.weight  # https://arxiv.org/abs/1608.05859
        self.init_weights()

    def init_weights(self):
        """
        GPT-2's initialization: N(0, 0.02) and biases 0. Layers that write to the residual stream
        start smaller by sqrt(2 n_layer), so that the stream does not grow with depth, or at 0.
        """
        zero = self.config.zero_init_residual
        residual_std = 0.0 if zero else 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = residual_std if name.endswith('c_proj') else 0.02
                nn.init.normal_(module.weight, mean=0.0, std=std)
                if getattr(module, 'bias', None) is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, cache=None, all_logits=False, reduction='mean'):
        """
        idx (B, T) int64 -> (logits, loss). ValueError if it is longer than block_size.

        Without targets, loss is None and logits are those of the last position, (B, 1, V). With
        targets (B, T), where -1 is ignored, loss is the mean cross-entropy in nats and logits are
        None, because (B, T, V) floats would take the most memory of all. all_logits=True returns
        (B, T, V) in either case. reduction='none', only inside torch.no_grad(): loss per token,
        (B, T), 0 where ignored. cache: a list from new_cache(), whose positions precede idx.
        """
        B, T = idx.size()
        start = cache[0].length if cache else 0
        if start + T > self.config.block_size:
            raise ValueError(f'cannot forward a sequence of length {start + T}: '
                             f'block_size is {self.config.block_size}')
        pos = torch.arange(start, start + T, device=idx.device)
        x, rotate = self.transformer.wpe(self.transformer.wte(idx), pos)
        x = self.transformer.drop(x)
        mask = self.mask(idx, cache)
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
                x.reshape(B * T, -1), self.lm_head.weight, targets.reshape(-1), softcap, reduction)
            loss = loss.view(B, T) if reduction == 'none' else loss
        if targets is None or all_logits:
            logits = self.lm_head(x if all_logits else x[:, [-1], :])
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        return logits, loss

    def mask(self, idx, cache):
        """
        The attention mask of a forward: by documents where doc_mask_token is set. Positions do not
        restart with a document, which only learned position embeddings could notice.
        """
        if self.config.doc_mask_token is None:
            return None
        doc = (idx == self.config.doc_mask_token).cumsum(1)  # (B, T), numbered within the row
        if cache:
            doc = cache[0].continue_documents(doc)
        compiled = torch.compiler.is_compiling() and not cache
        flex = compiled and self.takes_flex(idx.device.type)
        return attention_mask(idx.size(1), doc.size(1), idx.device, doc, flex=flex)

    def takes_flex(self, device_type):
        """Whether a compiled forward masks documents by flex attention, which has no dropout."""
        c = self.config
        large = c.block_size >= 128 and c.n_embd // c.n_head >= 16  # the least its kernels take
        return device_type == 'cuda' and c.attention_backend == 'sdpa' and not c.dropout and large

    # counts

    def get_num_params(self, non_embedding=True):
        """
        Number of parameters. Non-embedding, as nanoGPT counts, leaves out position embeddings, and
        token embeddings unless they are tied, because then they are also the head's matrix.
        """
        n = sum(p.numel() for p in self.parameters())
        if non_embedding:
            n -= sum(p.numel() for p in self.transformer.wpe.parameters())
        if non_embedding and not self.config.weight_tying:
            n -= self.transformer.wte.weight.numel()
        return n

    def params_by_part(self):
        """{part: number of parameters}; a tied matrix counts once, as token embeddings."""
        counts = {}
        for name, p in self.named_parameters():  # lists a shared tensor once, under wte
            part = next((PARTS[word] for word in name.split('.') if word in PARTS), 'norms')
            counts[part] = counts.get(part, 0) + p.numel()
        return counts

    def flops_by_part(self, seq_len=None, causal=False):
        """
        {part: forward FLOPs per token} at seq_len (default block_size), of matmuls only: 2 per
        weight of every Linear, plus each module's own extra_flops(T, causal). Attention counts in
        full, as in PaLM (https://arxiv.org/abs/2204.02311, appendix B), or with causal by half.
        """
        T = seq_len or self.config.block_size
        flops = {'attention projections': 0, 'attention scores': 0, 'ffn': 0, 'head': 0}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                part = 'attention projections' if '.attn.' in name else 'ffn'
                part = 'head' if name == 'lm_head' else part
                flops[part] += 2 * module.weight.numel()
            elif hasattr(module, 'extra_flops'):
                part = 'attention scores' if name.endswith('.attn') else 'ffn'
                flops[part] += module.extra_flops(T, causal)
        return flops

    def flops_per_token(self, seq_len=None, causal=False):
        """Training FLOPs per token: 3 x forward, without activation checkpointing's recomputing."""
        return 3 * sum(self.flops_by_part(seq_len, causal).values())

    # optimizer

    def parameter_groups(self, weight_decay):
        """Matrices and embeddings, which decay, and biases and norms, which do not."""
        params = [p for p in self.parameters() if p.requires_grad]
        decayed = [p for p in params if p.dim() >= 2]
        others = [p for p in params if p.dim() < 2]
        return [{'params': decayed, 'weight_decay': weight_decay},
                {'params': others, 'weight_decay': 0.0}]

    def hidden_matrices(self):
        """
        The matrices from hidden states to hidden states, which Muon may train: the weights of
        Linear layers in the blocks. A module in a block can decide otherwise for its own 2-D
        parameters with an attribute, hidden_matrix = True or False.
        """
        found = {}
        for module in self.transformer.h.modules():
            if getattr(module, 'hidden_matrix', isinstance(module, nn.Linear)):
                for p in module.parameters(recurse=False):
                    if p.dim() == 2 and p.requires_grad:
                        found[id(p)] = p
        return list(found.values())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW, fused where torch has it. engine/optim.py builds the other optimizers."""
        fused = device_type in ('cuda', 'cpu', 'mps')
        return torch.optim.AdamW(
            self.parameter_groups(weight_decay), lr=learning_rate, betas=betas, fused=fused)

    # weights in and out

    @classmethod
    def from_dict(cls, ckpt):
        """
        The model of a checkpoint dict, ours or nanoGPT's, in eval mode; it shares the tensors.
        ValueError if they do not fit.
        """
        try:
            known = {field.name for field in fields(GPTConfig)}
            unknown = [str(key) for key in ckpt['model_args'] if key not in known]
            if unknown:
                raise ValueError(f"unknown model_args {', '.join(unknown)}")
            with torch.device('meta'):
                model = cls(GPTConfig(**ckpt['model_args']))
            # nanoGPT: names with torch.compile's prefix; causal masks as attn.bias before torch 2.0
            state = {name.removeprefix('_orig_mod.'): tensor
                     for name, tensor in ckpt['model'].items() if not name.endswith('.attn.bias')}
            model.load_state_dict(state, assign=True)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
            path = f" '{ckpt['path']}'" if 'path' in ckpt else ''
            reason = ' '.join(str(e).split())[:300]
            raise ValueError(f'checkpoint{path} is not a model we can hold: {reason}') from e
        if model.config.weight_tying:
            model.transformer.wte.weight = model.lm_head.weight
        return model.requires_grad_(True).eval()

    @classmethod
    def from_checkpoint(cls, path):
        """The model of a checkpoint file, or of a run's folder, on the CPU, in eval mode."""
        from engine.checkpoint import load_checkpoint
        return cls.from_dict(load_checkpoint(path))

    @classmethod
    def from_pretrained(cls, name, dtype=torch.float32, **overrides):
        """
        The model of a Hugging Face folder, or hub id such as gpt2, on the CPU, in eval mode.
        overrides: dropout, block_size and other keys of GPTConfig on which no weight depends.
        """
        from engine.huggingface import from_pretrained
        return from_pretrained(name, dtype, overrides)

    def save_pretrained(self, folder, ckpt=None):
        """Write a folder for transformers, with the tokenizer of ckpt, a checkpoint dict."""
        from engine.huggingface import save_pretrained
        save_pretrained(self, folder, ckpt)

    def quantize_int8(self):
        """Make every Linear int8, in place, for sampling only. Returns the model."""
        from engine.int8 import quantize_int8
        return quantize_int8(self)

    def crop_block_size(self, block_size):
        """Change the context length. ValueError where learned positions would have to grow."""
        learned = self.config.position_encoding == 'learned_absolute'
        if block_size < 1:
            raise ValueError(f'block_size must be positive, not {block_size}')
        if learned and block_size > self.config.block_size:
            raise ValueError(f'block_size {block_size} is beyond the {self.config.block_size} '
                             'positions that this model has learned')
        self.config.block_size = block_size
        if learned:
            weight = self.transformer.wpe.weight[:block_size].detach().clone()
            self.transformer.wpe.weight = nn.Parameter(weight)

    # generation

    def new_cache(self, batch_size, max_length):
        """An empty KV cache for forward(cache=...): a list of one KVCache per layer."""
        c = self.config
        weight = next(self.parameters())  # of an int8 model, too, these have the activations' dtype
        dtype, device = weight.dtype, weight.device
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        shape = (batch_size, c.n_kv_head or c.n_head, max_length, c.n_embd // c.n_head)
        return [KVCache(shape, dtype, device) for _ in range(c.n_layer)]

    @torch.no_grad()
    def attention_weights(self, idx):
        """
        Where each head looks in idx (B, T): per layer (B, H, T, T) float32, whose rows, the
        queries, sum to 1. By the definition, from the q, k and mask that the backend is given.
        """
        weights = []
        backend = ATTENTION_BACKEND[self.config.attention_backend]

        def record(q, k, v, dropout, config, mask=None):
            identity = torch.eye(k.size(2), device=k.device).expand(*k.shape[:2], -1, -1)
            weights.append(manual_attention(q.float(), k.float(), identity, 0.0, config, mask))
            return backend(q, k, v, dropout, config, mask)
        try:
            for block in self.transformer.h:
                block.attn.attend = record
            self.forward(idx)
        finally:
            for block in self.transformer.h:
                block.attn.attend = backend
        return weights

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None,
               stop=None, use_cache=True, slide=1):
        """
        Continue idx (B, T) token by token: yields (B,) int64 ids. temperature 0 is greedy; top_k
        keeps that many tokens; top_p keeps the fewest whose probabilities reach it; seed makes the
        draws repeatable. A row that has drawn the id `stop` repeats it, and the stream ends when
        all rows have. Ids of padding are never drawn.

        Past block_size the window slides: the model sees the last block_size tokens, at positions
        from 0, as in nanoGPT. Every position changes then, so the cache is void and each token
        costs a whole forward. With slide=n the window moves n tokens at a time: the cache lives
        for n tokens, and the model sees between block_size - n + 1 and block_size tokens. The ids
        do not depend on use_cache. ValueError names an argument that is out of range.
        """
        B, T = idx.size()
        block_size = self.config.block_size
        n_ids = self.config.unpadded_vocab_size or self.config.vocab_size
        check_range('prompt length', T, T > 0)
        check_range('max_new_tokens', max_new_tokens, max_new_tokens >= 0)
        check_range('temperature', temperature, temperature >= 0)
        check_range('top_k', top_k, top_k is None or top_k > 0)
        check_range('top_p', top_p, top_p is None or 0 < top_p <= 1)
        check_range('slide', slide, 1 <= slide <= block_size)
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        tokens = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), dim=1)
        done = torch.zeros(B, dtype=torch.bool, device=idx.device)
        cache = self.new_cache(B, min(block_size, T + max_new_tokens)) if use_cache else None
        was_training = self.training
        self.eval()
        try:
            for n in range(T, T + max_new_tokens):
                first = max(0, math.ceil((n - block_size) / slide) * slide)  # start of the window
                context = tokens[:, first:n]
                if cache and cache[0].length == n - 1 - first:
                    context = context[:, -1:]  # the cache holds the rest of this window
                elif cache:
                    for layer in cache:
                        layer.length = 0
                # .forward, because a compiled __call__ would recompile for each shape
                logits, _ = self.forward(context, cache=cache)
                logits = logits[:, -1, :n_ids].float()
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
        """Continue idx (B, T) to (B, T + n), n <= max_new_tokens. Arguments are stream()'s."""
        steps = list(self.stream(idx, max_new_tokens, temperature, top_k, **kwargs))
        return torch.cat((idx, torch.stack(steps, dim=1)), dim=1) if steps else idx


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one id per row from logits (B, V) float32: (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, ids = logits / temperature, None
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # the likelier tokens reach top_p by themselves
        beyond = torch.zeros_like(beyond).scatter(1, order, beyond)  # back in the order of logits
        logits = logits.masked_fill(beyond, float('-inf'))
    drawn = torch.multinomial(logits.softmax(-1), num_samples=1, generator=generator)
    if ids is not None:
        drawn = ids.gather(1, drawn)
    return drawn[:, 0]


if __name__ == '__main__':
    from engine.cost import main
    main()
