"""
Load models from Hugging Face: folders and hub ids. load_weights() also loads our own checkpoints.

    model = GPT.from_pretrained('gpt2')
"""
import json
import os
import re

import torch

from data.chat import folder_template
from data.tokenizer import BYTE_CHARS, get_tokenizer
from engine.checkpoint import checkpoints_in, is_sharded, load_checkpoint, no_checkpoint
from engine.common import UserError, first_line, optional
from engine.families import ACTIVATIONS, FAMILIES, is_transposed, names_there
from model import GPT, ROPE_SCALING, GPTConfig

SUPPORTED = {  # keys of config.json without a counterpart here: supported values
    'quantization_config': (None,),
    'partial_rotary_factor': (None, 1),
    'scale_attn_weights': (True,),
    'scale_attn_by_inverse_layer_idx': (False,),
    'add_cross_attention': (False,),
}
SIZES = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'd_ff', 'n_kv_head')


def load_weights(name, block_size=None):
    """
    Load the checkpoint that init_from names: a run, a checkpoint file, a Hugging Face folder or a
    hub id.
    """
    check_weights_exist(name)
    if is_pretrained(name):
        return load_pretrained(name, block_size)
    return load_checkpoint(name)


def is_pretrained(name):
    """Return whether a name is a Hugging Face folder or, if nothing here has it, a hub id."""
    if os.path.exists(name):
        return os.path.exists(os.path.join(name, 'config.json'))
    gpt2 = r'(distil)?gpt2|gpt2-(medium|large|xl)'
    hub_id = re.fullmatch(rf'{gpt2}|[\w.-]+/[\w.-]+', name)
    return bool(hub_id) and not name.endswith('.pt')


def check_weights_exist(name):
    """Raise UserError if load_weights(name) would find nothing here and `name` is no hub id."""
    if is_pretrained(name):
        return
    if not os.path.exists(name):
        raise UserError(f"no checkpoint at '{name}', and it is neither a Hugging Face folder nor a "
                        'hub id such as gpt2')
    if os.path.isdir(name) and not is_sharded(name) and not checkpoints_in(name):
        raise UserError(no_checkpoint(os.path.join(name, 'ckpt.pt')))


def from_pretrained(name, dtype, overrides):
    """Implement GPT.from_pretrained; see there."""
    block_size = overrides.pop('block_size', None)
    ckpt = load_pretrained(name, block_size)
    ckpt['model_args'] |= overrides
    model = GPT.from_dict(ckpt).to(dtype)
    if block_size is not None:
        model.crop_block_size(block_size)
    return model


def load_pretrained(name, block_size=None):
    """
    Return a checkpoint dict like load_checkpoint's, from a Hugging Face folder or hub id, in the
    dtype of its files. block_size is the context that the caller wants, or None. UserError says
    what is missing, left over or unsupported.
    """
    folder = pretrained_folder(name)
    try:
        hf = read_object(folder, 'config.json')
        settings = read_settings(hf, block_size)
        state = read_state(folder, FAMILIES[hf['model_type']], settings)
        tokenizer, template = read_tokenizer(folder), folder_template(folder)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, OSError) as e:
        # a foreign file can be wrong in any way
        reason = f'it has no {e}' if isinstance(e, KeyError) else first_line(e)
        raise UserError(f"'{folder}' cannot be loaded as a model: {reason}") from e
    return dict(model=state, model_args=settings, path=folder, tokenizer=tokenizer,
                chat_template=template)


def pretrained_folder(name):
    """
    Return `name` if it is a folder; otherwise download that hub model once and return its folder.
    """
    if os.path.isdir(name):
        return name
    hub = optional('huggingface_hub', f"'{name}' is no folder, and Hugging Face's hub")
    try:
        return hub.snapshot_download(
            name, allow_patterns=['*.json', '*.jinja', '*.safetensors'],
            ignore_patterns=['*/*', 'consolidated*'])  # such files repeat the weights
    except Exception as e:  # the library has many errors, from a wrong name to no network
        raise UserError(f"'{name}' is no folder, and could not be downloaded from Hugging "
                        f"Face's hub: {type(e).__name__}: {first_line(e)[:200]}") from e


def read_object(folder, name):
    """Return the object in a folder's JSON file as a dict."""
    with open(os.path.join(folder, name), encoding='utf-8') as f:
        try:
            found = json.load(f)
        except (ValueError, RecursionError) as e:
            raise UserError(f'its {name} is not JSON: {first_line(e)}') from e
    if not isinstance(found, dict):
        raise UserError(f'its {name} is not a JSON object')
    return found


def read_settings(hf, block_size=None):
    """Translate a config.json into keys of GPTConfig. UserError names what is not supported."""
    require(hf, 'model_type', FAMILIES)
    family = FAMILIES[hf['model_type']]
    supported = SUPPORTED | {family.keys['activation']: (None, *ACTIVATIONS)}
    for key, values in supported.items():
        if key in hf:
            require(hf, key, values)

    settings = {key: values[0] for key, values in family.parts.items()} | family.defaults
    for ours, theirs in family.keys.items():
        if hf.get(theirs) is not None:
            settings[ours] = hf[theirs]
    check_sizes(settings, family)
    settings['activation'] = ACTIVATIONS[settings['activation']]
    if settings['ffn_type'] == 'swiglu' and settings['activation'] in ('gelu', 'gelu_tanh'):
        settings['ffn_type'] = 'geglu'
    if family.model_type == 'gpt2':
        return settings

    if hf.get('head_dim') not in (None, settings['n_embd'] / settings['n_head']):
        raise unsupported(f"head_dim={hf['head_dim']}", 'hidden_size / num_attention_heads')
    settings |= read_bias(hf)
    settings |= read_rope(hf, settings.get('rope_theta', 10000.0))
    window = sliding_window(hf)
    if window and (block_size or 0) > window:
        raise UserError(f'block_size={block_size} is beyond its sliding_window={window}, '
                        'and attention here is full')
    if window:  # attention within the window is full, as ours is
        settings['block_size'] = min(settings['block_size'], window)
    return settings


def unsupported(found, supported):
    return UserError(f'its config.json has {found}, but only {supported} is supported here')


def require(hf, key, values):
    if hf.get(key) not in values:
        supported = [str(value) for value in values if value is not None] or ['None']
        raise unsupported(f'{key}={hf.get(key)!r}', ', '.join(supported))


def check_sizes(settings, family):
    may_be_none = ('n_kv_head', 'd_ff') if family.model_type == 'gpt2' else ('n_kv_head',)
    for ours in SIZES:
        value, key = settings.get(ours), family.keys.get(ours)
        if value is None and ours in may_be_none:
            continue
        if value is None:
            raise UserError(f"its config.json has no '{key}'")
        if type(value) is not int or value < 1:
            raise UserError(f'its config.json has {key}={value!r}, which must be a positive int')


def read_bias(hf):
    """
    Return bias and qkv_bias. With attention_bias alone, the attention's output has a bias too;
    read_state refuses it unless it is zeros. Raise UserError if only the MLPs have biases.
    """
    kind = hf['model_type']
    if kind == 'starcoder2':
        return dict(bias=hf.get('use_bias', True))
    if kind in ('qwen2', 'mistral'):  # these classes do not read attention_bias
        return dict(bias=False)
    attention, mlp = hf.get('attention_bias', False), hf.get('mlp_bias', False)
    if mlp and not attention:
        raise unsupported('mlp_bias=True without attention_bias', 'both, neither or attention_bias')
    return dict(bias=mlp, qkv_bias=attention and not mlp)


def read_rope(hf, theta):
    """
    Return rope_theta and rope_scaling. Older files have them at the top level, newer ones in a
    dict.
    """
    key = 'rope_parameters' if 'rope_parameters' in hf else 'rope_scaling'
    rope = hf.get('rope_parameters') or hf.get('rope_scaling') or {}
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind not in ('default', 'llama3') or rope.get('partial_rotary_factor', 1) != 1:
        raise unsupported(f'{key}={rope}', 'rope_type default or llama3')
    scaling = {name: rope[name] for name in ROPE_SCALING} if kind == 'llama3' else None
    return dict(rope_theta=float(rope.get('rope_theta', theta)), rope_scaling=scaling)


def sliding_window(hf):
    """Return how many positions their attention sees, or None if it sees all."""
    kind = hf['model_type']
    if not hf.get('use_sliding_window', kind in ('mistral', 'starcoder2')):
        return None
    return hf.get('sliding_window', 4096 if kind == 'mistral' else None)


def read_state(folder, family, settings):
    """
    Read a folder's tensors into a state dict of GPT. Raise UserError if one is missing or left
    over.
    """
    wanted = GPT.without_data(GPTConfig(**settings)).state_dict()
    tied = settings['weight_tying']
    if tied:
        del wanted['lm_head.weight']
    theirs = read_tensors(folder, family, tied)
    state = {}
    for name, like in wanted.items():
        names = names_there(name, family)
        parts = [theirs.pop(n) for n in names]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if is_transposed(name, family):
            tensor = tensor.T.contiguous()
        if tensor.shape != like.shape:
            raise UserError(f'{names[0]} gives {tuple(tensor.shape)} where its config.json says '
                            f'{tuple(like.shape)}')
        state[name] = tensor
    left = sorted(name for name, t in theirs.items() if not name.endswith('.bias') or t.any())
    if left:  # biases of zeros were left out above
        more = ', ...' if len(left) > 3 else ''
        raise UserError(f"there is no place here for its tensors {', '.join(left[:3])}{more}")
    if tied:
        state['lm_head.weight'] = state['transformer.wte.weight']
    return state


def read_tensors(folder, family, tied):
    """Return {name: tensor} of a folder, without buffers that are not weights."""
    files = tensor_files(folder, 'model.safetensors') or tensor_files(folder, 'pytorch_model.bin')
    if not files:
        raise UserError('it has no model.safetensors and no pytorch_model.bin')
    tensors = {}
    for path in files:
        tensors |= read_tensor_file(path)
    # RoPE's frequencies, and causal masks in old GPT-2 files
    buffers = ('.rotary_emb.inv_freq', '.attn.bias', '.attn.masked_bias')
    if family.model_type == 'gpt2':  # the hub's own GPT-2 files lack the prefix
        prefixes = ('transformer.', 'lm_head.')
        tensors = {name if name.startswith(prefixes) else f'transformer.{name}': t
                   for name, t in tensors.items()}
    if tied:
        tensors.pop('lm_head.weight', None)
    return {name: t for name, t in tensors.items() if not name.endswith(buffers)}


def tensor_files(folder, name):
    """Return the paths of that file or of the shards in its index; [] if there is neither."""
    index = f'{name}.index.json'
    if os.path.exists(os.path.join(folder, index)):
        shards = set(read_object(folder, index)['weight_map'].values())
        return [os.path.join(folder, os.path.basename(shard)) for shard in sorted(shards)]
    path = os.path.join(folder, name)
    return [path] if os.path.exists(path) else []


def read_tensor_file(path):
    if path.endswith('.safetensors'):
        read = optional('safetensors.torch', 'to read safetensors').load_file
    else:
        def read(path):  # refuses a pickle of anything but tensors
            return torch.load(path, map_location='cpu', weights_only=True)
    try:
        return read(path)
    except Exception as e:  # safetensors, pickle and zip each have their own errors
        raise UserError(f"'{path}' cannot be read: {first_line(e)}") from e


def read_tokenizer(folder):
    """
    Return the spec of a folder's tokenizer, for get_tokenizer, or None if there is no
    tokenizer.json.
    """
    path = os.path.join(folder, 'tokenizer.json')
    if not os.path.exists(path):
        return None
    about = {}
    if os.path.exists(os.path.join(folder, 'tokenizer_config.json')):
        about = read_object(folder, 'tokenizer_config.json')
    if 'plaingpt' in about:  # we exported it
        return about['plaingpt']
    vocab = read_object(folder, 'tokenizer.json').get('model', {}).get('vocab')
    if is_gpt2_vocabulary(vocab):  # tiktoken's version is faster
        return {'name': 'gpt2'}
    eot = about.get('eos_token')
    with open(path, encoding='utf-8') as f:
        text = f.read()
    return dict(name='huggingface', json=text, eot=eot['content'] if isinstance(eot, dict) else eot)


def is_gpt2_vocabulary(vocab):
    if not isinstance(vocab, dict) or len(vocab) != 50257:
        return False
    words = get_tokenizer('gpt2').table[:-1]  # the last one is <|endoftext|>
    written = [''.join(BYTE_CHARS[byte] for byte in word) for word in words]
    return all(vocab.get(word) == i for i, word in enumerate(written))
