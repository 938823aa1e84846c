"""
Load and export models in other formats: Hugging Face transformers (folders and hub ids) and ONNX.
load_weights() also loads our own checkpoints.

    model = GPT.from_pretrained('gpt2')
    model.save_pretrained('hf_dir')
    python model.py --ckpt=out --export=hf_dir
    python model.py --ckpt=out --export=model.onnx
"""
import contextlib
import io
import json
import logging
import os
import re
import sys
import tempfile
import warnings

import torch
import torch.nn as nn

from data.chat import folder_template
from data.tokenizer import BYTE_CHARS, find_tokenizer, get_tokenizer, to_hugging_face
from engine.checkpoint import checkpoints_in, is_sharded, load_checkpoint, no_checkpoint
from engine.common import UserError, first_line, optional
from engine.families import (
    ACTIVATIONS,
    FAMILIES,
    family_of,
    is_transposed,
    module_of,
    names_there,
)
from engine.model_card import model_card
from model import ATTENTION_BACKEND, GPT, ROPE_SCALING, GPTConfig

# ------------------------------------------------------------------------------------------------
# load

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


# ------------------------------------------------------------------------------------------------
# export a folder

def config_json(model):
    """Return the config.json of a model as a dict."""
    c, family = model.config, family_of(model.config)
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == c.activation)
    hf = {theirs: getattr(c, ours) for ours, theirs in family.keys.items()}
    hf['model_type'] = family.model_type
    hf['architectures'] = [family.architecture]
    hf[family.keys['activation']] = activation
    hf[family.keys['d_ff']] = model.transformer.h[0].mlp.c_proj.in_features
    if family.model_type == 'gpt2':
        return hf | dict(resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout)
    if c.rope_scaling:
        hf['rope_scaling'] = c.rope_scaling | {'rope_type': 'llama3'}
    return hf | dict(
        num_key_value_heads=c.kv_heads,
        head_dim=c.n_embd // c.n_head,
        sliding_window=None,
        attention_bias=c.bias or c.qkv_bias,
        mlp_bias=c.bias,
        use_bias=c.bias,
    )


def tensors_there(model, family):
    """Return {name: tensor} of a model as that family's class names and lays them out."""
    c, state = model.config, model.state_dict()
    if c.weight_tying:
        del state['lm_head.weight']
    # the classes that we export to have a bias for the attention's output if q, k and v have one
    biased = (*family.biased, 'attn.c_proj') if c.qkv_bias else family.biased
    for name, weight in list(state.items()):
        if name.endswith('.weight') and module_of(name, family) in biased:
            bias = name.removesuffix('weight') + 'bias'
            state.setdefault(bias, weight.new_zeros(len(weight)))

    tensors = {}
    for name, tensor in state.items():
        if is_transposed(name, family):
            tensor = tensor.T
        names = names_there(name, family)
        for theirs, part in zip(names, split_rows(tensor, names, c)):
            tensors[theirs] = part.contiguous()
    return tensors


def split_rows(tensor, names, c):
    """Divide the rows of our tensor among theirs of those names."""
    if len(names) == 3:
        return tensor.split([n * c.head_dim for n in (c.n_head, c.kv_heads, c.kv_heads)])
    return tensor.chunk(len(names))  # gate and up


def save_pretrained(model, folder, ckpt):
    """Implement GPT.save_pretrained; see there."""
    hf = config_json(model)
    if model.config.doc_mask_token is not None:
        print('NOTE: this format cannot express doc_mask: in a window of several '
              'documents, transformers gives different logits', file=sys.stderr)
    vocab_size = model.config.vocab_size
    tokenizer = find_tokenizer(ckpt, vocab_size) if ckpt else None
    if tokenizer and tokenizer.vocab_size > vocab_size:
        tokenizer = None  # transformers would look up ids that the model lacks
    texts = config_files(model, hf, tokenizer)
    if tokenizer and ckpt.get('chat_template'):
        texts['chat_template.jinja'] = ckpt['chat_template']
    texts['README.md'] = model_card(model, ckpt or {}, hf['architectures'][0], tokenizer)
    tensors = tensors_there(model, FAMILIES[hf['model_type']])
    write_folder(folder, tensors, 'model.safetensors', texts)


def write_folder(folder, tensors, tensor_file, texts):
    """
    Write {name: tensor} as safetensors, and {file name: text}, to a new folder. It is renamed into
    place once it is complete.
    """
    save_file = optional('safetensors.torch', 'to write safetensors').save_file
    folder = os.path.normpath(folder)
    if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise UserError(f"'{folder}' already exists: choose another name, or remove it first")
    try:
        with folder_beside(folder) as temporary:
            complete = os.path.join(temporary, 'complete')
            os.mkdir(complete)  # readable by others, unlike the temporary folder
            save_file(tensors, os.path.join(complete, tensor_file), metadata={'format': 'pt'})
            for name, text in texts.items():
                with open(os.path.join(complete, name), 'w', encoding='utf-8') as f:
                    f.write(text)
            os.replace(complete, folder)
    except Exception as e:  # safetensors raises its own type for a full disk
        raise OSError(f"'{folder}' could not be written: {first_line(e)}") from e


def config_files(model, hf, tokenizer):
    """Return {file name: text} for the JSON files beside the weights."""
    c = model.config
    eot = tokenizer.eot if tokenizer else None
    ends = dict(bos_token_id=eot, eos_token_id=eot)
    dtype = str(model.lm_head.weight.dtype).removeprefix('torch.')
    generation = dict(ends)
    if c.unpadded_vocab_size and c.unpadded_vocab_size < c.vocab_size:
        generation['suppress_tokens'] = list(range(c.unpadded_vocab_size, c.vocab_size))
    files = {'config.json': hf | ends | dict(dtype=dtype), 'generation_config.json': generation}
    if tokenizer:
        about = files['tokenizer_config.json'] = dict(
            tokenizer_class='PreTrainedTokenizerFast',
            model_max_length=c.block_size,
            clean_up_tokenization_spaces=False,
            eos_token=None if eot is None else tokenizer.table[eot].decode(),
        )
        if 'json' not in tokenizer.spec:
            about['plaingpt'] = tokenizer.spec
    texts = {name: json.dumps(content, indent=2, ensure_ascii=False)
             for name, content in files.items()}
    if tokenizer:
        texts['tokenizer.json'] = to_hugging_face(tokenizer)
    return texts


def folder_beside(path):
    """Return a context that makes a temporary folder beside `path` and removes it at the end."""
    parent = os.path.dirname(path) or '.'
    os.makedirs(parent, exist_ok=True)
    prefix = f'{os.path.basename(path)}.'
    return tempfile.TemporaryDirectory(prefix=prefix, suffix='.tmp', dir=parent)


# ------------------------------------------------------------------------------------------------
# export ONNX

class Logits(nn.Module):
    """The function to export as ONNX: ids (B, T) -> logits (B, T, V)."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, all_logits=True)[0]


def save_onnx(model, path):
    """
    Write a model with its weights as ONNX: ids (B, T) int64 -> logits (B, T, V) float32. It takes
    any batch size and any length up to block_size.
    """
    if os.path.exists(path):
        raise UserError(f"'{path}' already exists: choose another name, or remove it first")
    optional('onnxscript', 'to write ONNX')
    program = onnx_program(model)
    too_large = model.get_num_params(False) > 4e8  # one file can hold 2 GB
    try:
        with folder_beside(path) as temporary:
            name = os.path.basename(path)
            program.save(os.path.join(temporary, name), external_data=too_large)
            for name in sorted(os.listdir(temporary), reverse=True):  # the data file comes first
                target = os.path.join(os.path.dirname(path), name)
                os.replace(os.path.join(temporary, name), target)
    except OSError as e:
        raise OSError(f"'{path}' could not be written: {first_line(e)}") from e


def onnx_program(model):
    for module in model.modules():
        if hasattr(module, 'attend'):
            # the fused kernels branch on the number of queries, which the export leaves open
            module.attend = ATTENTION_BACKEND['manual']
    block_size = model.config.block_size
    example = torch.zeros(2, min(block_size, 8), dtype=torch.long)
    shape = {0: torch.export.Dim('batch')}
    if block_size > 1:  # torch has no dimension of one possible size
        shape[1] = torch.export.Dim('length', max=block_size)
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)  # it warns that torchvision is missing
    quiet = contextlib.redirect_stdout(io.StringIO())
    with warnings.catch_warnings(), quiet, torch.no_grad():
        warnings.simplefilter('ignore')
        try:
            return torch.onnx.export(
                Logits(model).eval(), (example,), dynamo=True, verbose=False,
                input_names=['ids'], output_names=['logits'], dynamic_shapes={'ids': shape})
        except Exception as e:  # it has no common type for what it cannot trace
            reason = first_line(e.__cause__ or e)[:200]
            raise UserError(f'torch.onnx cannot export this model: {reason}') from e
