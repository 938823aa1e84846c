"""
The Hugging Face transformers classes that our model can be loaded from and exported to: the
GPTConfig settings that each covers, and how its config.json and tensors map to ours.
"""
from dataclasses import dataclass

from engine.common import UserError

ACTIVATIONS = {  # name there: name here; of several, the first is exported
    'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu': 'gelu',
    'silu': 'silu',
    'swish': 'silu',
    'relu': 'relu',
    'leaky_relu': 'leaky_relu',
    'relu2': 'relu_squared',
}


@dataclass
class Family:
    """One transformers class. 'Here' means our model and 'there' means theirs."""
    model_type: str
    architecture: str
    parts: dict     # key of GPTConfig: values that the class covers; it loads as the first
    keys: dict      # key of GPTConfig: key of config.json
    defaults: dict  # key of GPTConfig: value if config.json has none; activations by their name
    modules: dict   # module here: modules there, whose tensors are stacked in ours
    blocks: str = 'model.layers'  # prefix of the blocks there
    biased: tuple = ()            # modules here whose bias always exists there
    transposed: tuple = ()        # modules here whose weight is (in, out) there


LLAMA_PARTS = dict(
    normalization=('rmsnorm',),
    position_encoding=('rope',),
    ffn_type=('swiglu', 'geglu'),
    activation=tuple(ACTIVATIONS.values()),
    bias=(False,),
    qkv_bias=(False, True),  # with zeros as the bias of the attention's output
    qk_norm=(False,),
)
LLAMA_KEYS = dict(
    block_size='max_position_embeddings',
    vocab_size='vocab_size',
    n_layer='num_hidden_layers',
    n_head='num_attention_heads',
    n_embd='hidden_size',
    d_ff='intermediate_size',
    n_kv_head='num_key_value_heads',
    norm_eps='rms_norm_eps',
    activation='hidden_act',
    weight_tying='tie_word_embeddings',
    rope_theta='rope_theta',
    rope_scaling='rope_scaling',
)
LLAMA_DEFAULTS = dict(norm_eps=1e-6, activation='silu', weight_tying=False)
LLAMA_MODULES = {
    'transformer.wte': ['model.embed_tokens'],
    'transformer.ln_f': ['model.norm'],
    'lm_head': ['lm_head'],
    'ln_1': ['input_layernorm'],
    'ln_2': ['post_attention_layernorm'],
    'attn.c_attn': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
    'attn.c_proj': ['self_attn.o_proj'],
    'attn.q_norm': ['self_attn.q_norm'],
    'attn.k_norm': ['self_attn.k_norm'],
    'mlp.c_fc': ['mlp.gate_proj', 'mlp.up_proj'],
    'mlp.c_proj': ['mlp.down_proj'],
}
GPT2_PARTS = dict(
    normalization=('layernorm', 'layernorm_nobias'),
    position_encoding=('learned_absolute',),
    ffn_type=('standard',),
    activation=tuple(ACTIVATIONS.values()),
    bias=(True, False),
    qkv_bias=(False, True),
    qk_norm=(False,),
)
GPT2_KEYS = dict(
    block_size='n_positions',
    vocab_size='vocab_size',
    n_layer='n_layer',
    n_head='n_head',
    n_embd='n_embd',
    d_ff='n_inner',
    norm_eps='layer_norm_epsilon',
    activation='activation_function',
    weight_tying='tie_word_embeddings',
)
GPT2_BLOCK = ('ln_1', 'ln_2', 'attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')
GPT2_MODULES = ('transformer.wte', 'transformer.wpe', 'transformer.ln_f', 'lm_head', *GPT2_BLOCK)

# Export chooses the first of the best fits. So models with qkv_bias leave as LLaMA, not as Qwen2:
# for qwen2 in config.json, AutoTokenizer ignores the tokenizer that the folder names and splits
# text in Qwen2's way.
FAMILIES = {family.model_type: family for family in [
    Family(
        'gpt2', 'GPT2LMHeadModel', GPT2_PARTS, GPT2_KEYS,
        defaults=dict(activation='gelu_new', weight_tying=True),
        modules={name: [name] for name in GPT2_MODULES},
        blocks='transformer.h',
        biased=('transformer.ln_f', *GPT2_BLOCK),
        transposed=('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'),
    ),
    Family(
        'llama', 'LlamaForCausalLM', LLAMA_PARTS | dict(bias=(False, True)),
        LLAMA_KEYS, LLAMA_DEFAULTS, LLAMA_MODULES,
    ),
    Family(
        'qwen2', 'Qwen2ForCausalLM', LLAMA_PARTS | dict(qkv_bias=(True,)),
        LLAMA_KEYS, LLAMA_DEFAULTS, LLAMA_MODULES,
    ),
    Family(
        'qwen3', 'Qwen3ForCausalLM', LLAMA_PARTS | dict(qk_norm=(True,)),
        LLAMA_KEYS, LLAMA_DEFAULTS, LLAMA_MODULES,
    ),
    Family(
        'arcee', 'ArceeForCausalLM', LLAMA_PARTS | dict(ffn_type=('standard',), bias=(False, True)),
        LLAMA_KEYS, dict(activation='relu2', weight_tying=False),
        LLAMA_MODULES | {'mlp.c_fc': ['mlp.up_proj']},
    ),
    Family(
        'starcoder2', 'Starcoder2ForCausalLM',
        GPT2_PARTS | dict(position_encoding=('rope',), qkv_bias=(False,)),
        LLAMA_KEYS | dict(norm_eps='norm_epsilon'),
        dict(activation='gelu_pytorch_tanh', weight_tying=True),
        LLAMA_MODULES | {'mlp.c_fc': ['mlp.c_fc'], 'mlp.c_proj': ['mlp.c_proj']},
        biased=('ln_1', 'ln_2', 'transformer.ln_f'),
    ),
    Family(
        'mistral', 'MistralForCausalLM', LLAMA_PARTS | dict(qkv_bias=(False,)),
        LLAMA_KEYS, LLAMA_DEFAULTS, LLAMA_MODULES,
    ),
]}


def module_of(name, family):
    """Return the key of family.modules that one of our tensors belongs to."""
    owner = '.' + name.rpartition('.')[0]
    for module in family.modules:
        if owner.endswith('.' + module):
            return module
    raise UserError(f"{family.architecture} has no place for the tensor '{name}'")


def names_there(name, family):
    """Return the names of their tensors that, stacked in this order, make our tensor."""
    module = module_of(name, family)
    prefix, _, kind = name.rpartition(f'{module}.')
    prefix = prefix.replace('transformer.h', family.blocks)
    return [f'{prefix}{theirs}.{kind}' for theirs in family.modules[module]]


def is_transposed(name, family):
    return name.endswith('.weight') and module_of(name, family) in family.transposed


# Keys of GPTConfig that affect only training, speed or memory, and two that save_pretrained handles
# itself. Every other key must be in a Family or have its default.
NOT_EXPORTED = (
    'dropout', 'zero_init_residual', 'attention_chunk_size',
    'activation_checkpointing', 'unpadded_vocab_size', 'doc_mask_token',
)

SOFTMAX_BACKENDS = 'sdpa', 'manual', 'chunked'


def effective_settings(config):
    """Return the settings of a model, with settings that have no effect reset to their defaults."""
    settings, defaults = dict(vars(config)), vars(type(config)())
    if settings['position_encoding'] != 'rope':
        settings |= {key: defaults[key] for key in ('rope_theta', 'rope_scaling')}
    if settings['n_kv_head'] == settings['n_head']:
        settings['n_kv_head'] = None
    if settings['bias']:
        settings['qkv_bias'] = False
    return settings


def misfits(config, family):
    """Return ['key=value', ...] for the settings that a family cannot express."""
    defaults = vars(type(config)())
    found = []
    for key, value in effective_settings(config).items():
        if key == 'attention_backend':
            fits = value in SOFTMAX_BACKENDS
        elif key in family.parts:
            fits = value in family.parts[key]
        else:
            known = key in family.keys or key in NOT_EXPORTED
            fits = known or value == defaults[key]
        if not fits:
            found.append(f'{key}={value}')
    return found


def family_of(config):
    """
    Return the family to export a model as. If none fits, UserError names what the nearest lacks.
    """
    lacks = {name: misfits(config, family) for name, family in FAMILIES.items()}
    nearest = min(lacks, key=lambda name: len(lacks[name]))
    if lacks[nearest]:
        raise UserError("Hugging Face's transformers has no class for this combination; the "
                        f"nearest, {nearest}, does not support {', '.join(lacks[nearest])}")
    return FAMILIES[nearest]
