"""
Weights from and to other people's formats: Hugging Face's transformers (folders and the hub's ids), and ONNX. Nobody who trains and
samples needs to read this. model.py calls it: GPT.from_pretrained, model.save_pretrained, and

    python model.py --ckpt=out --export=hf_dir
    python model.py --ckpt=out --export=model.onnx
"""
import contextlib
import glob
import io
import json
import logging
import math
import os
import re
import sys
import tempfile
import warnings

import torch
import torch.nn as nn

from data.tokenizer import BYTE_CHARS, find_tokenizer, get_tokenizer, to_hugging_face
from engine.checkpoint import load_checkpoint, model_of
from engine.common import first_line, optional
from model import ATTENTION_BACKEND, GPT, REGISTRY, ROPE_SCALING, GPTConfig

# The classes of transformers, by the model_type in their config.json, and the parts that they stand for here
RMS, LAYER, ROPE = ('rmsnorm',), ('layernorm', 'layernorm_nobias'), ('rope',)
FAMILIES = {
    'gpt2': dict(normalization=LAYER, position_encoding=('learned_absolute',), ffn_type=('standard',), qk_norm=(False,)),
    'llama': dict(normalization=RMS, position_encoding=ROPE, ffn_type=('swiglu',), qk_norm=(False,), qkv_bias=(False,)),
    'qwen2': dict(normalization=RMS, position_encoding=ROPE, ffn_type=('swiglu',), qk_norm=(False,), qkv_bias=(True,), bias=(False,)),
    'qwen3': dict(normalization=RMS, position_encoding=ROPE, ffn_type=('swiglu',), qk_norm=(True,), qkv_bias=(False,), bias=(False,)),
    'arcee': dict(normalization=RMS, position_encoding=ROPE, ffn_type=('standard',), qk_norm=(False,), qkv_bias=(False,)),
    'starcoder2': dict(normalization=LAYER, position_encoding=ROPE, ffn_type=('standard',), qk_norm=(False,)),
    'mistral': dict(normalization=RMS, position_encoding=ROPE, ffn_type=('swiglu',), qk_norm=(False,), qkv_bias=(False,), bias=(False,)),
}
# What their keys are called, and what they are where a config.json leaves them out
GPT2_KEYS = dict(block_size='n_positions', vocab_size='vocab_size', n_layer='n_layer', n_head='n_head', n_embd='n_embd', d_ff='n_inner',
                 norm_eps='layer_norm_epsilon', activation='activation_function', weight_tying='tie_word_embeddings')
LLAMA_KEYS = dict(block_size='max_position_embeddings', vocab_size='vocab_size', n_layer='num_hidden_layers', n_head='num_attention_heads',
                  n_embd='hidden_size', d_ff='intermediate_size', n_kv_head='num_key_value_heads', norm_eps='rms_norm_eps', activation='hidden_act',
                  weight_tying='tie_word_embeddings', rope_theta='rope_theta')
KEYS = {kind: LLAMA_KEYS for kind in FAMILIES} | {'gpt2': GPT2_KEYS, 'starcoder2': LLAMA_KEYS | dict(norm_eps='norm_epsilon')}
DEFAULTS = {kind: dict(norm_eps=1e-6, activation='silu', weight_tying=False) for kind in FAMILIES} | {
    'gpt2': dict(activation='gelu_new', bias=True, weight_tying=True), 'arcee': dict(activation='relu2', weight_tying=False),
    'starcoder2': dict(activation='gelu_pytorch_tanh', bias=True, weight_tying=True)}
ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu', 'silu': 'silu', 'swish': 'silu', 'relu': 'relu',
               'leaky_relu': 'leaky_relu', 'relu2': 'relu_squared'}
# GPT-2's tensors have our names, and its matrices are (in, out). Of the others, one or several lie above each other in one of ours.
CONV1D = tuple(f'{name}.weight' for name in ('c_attn', 'c_proj', 'c_fc'))
NAMES = {'transformer.wte': ['model.embed_tokens'], 'transformer.ln_f': ['model.norm'], 'lm_head': ['lm_head'], 'ln_1': ['input_layernorm'],
         'ln_2': ['post_attention_layernorm'], 'attn.c_attn': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
         'attn.c_proj': ['self_attn.o_proj'], 'attn.q_norm': ['self_attn.q_norm'], 'attn.k_norm': ['self_attn.k_norm'],
         'mlp.c_fc': ['mlp.gate_proj', 'mlp.up_proj'], 'mlp.c_proj': ['mlp.down_proj']}
MLP_NAMES = {'arcee': {'mlp.c_fc': ['mlp.up_proj']}, 'starcoder2': {'mlp.c_fc': ['mlp.c_fc'], 'mlp.c_proj': ['mlp.c_proj']}}


def names_in_hf(ours, kind):
    """The tensors of Hugging Face's class that lie, one above the other, in our tensor of that name."""
    if kind == 'gpt2':
        return [ours]
    module, _, what = ours.rpartition('.')
    names = NAMES | MLP_NAMES.get(kind, {})
    part = next(part for part in names if module.endswith(part))
    return [f"{module.removesuffix(part).replace('transformer.h', 'model.layers')}{theirs}.{what}" for theirs in names[part]]


# ---------------------------------------------------------------------------------------------------------------------
# in

def pretrained_folder(name):
    """The folder of a Hugging Face model: name, if it is one, or else that of the hub's id, downloaded once. ValueError if there is neither."""
    if os.path.isdir(name):
        return name
    hub = optional('huggingface_hub', f"'{name}' is no folder, and Hugging Face's hub")
    try:
        return hub.snapshot_download(name, allow_patterns=['*.json', '*.safetensors'], ignore_patterns=['*/*', 'consolidated*'])  # the same weights twice
    except Exception as e:  # the library has many, from a wrong name to no network
        raise ValueError(f"'{name}' is no folder, and from Hugging Face's hub it could not be had: {type(e).__name__}: {first_line(e)[:200]}") from e


def read_object(folder, name):
    """The dict in a JSON file of a folder. ValueError names the file."""
    with open(os.path.join(folder, name), encoding='utf-8') as f:
        try:
            found = json.load(f)
        except (ValueError, RecursionError) as e:
            raise ValueError(f'its {name} is not JSON: {first_line(e)}') from e
    if not isinstance(found, dict):
        raise ValueError(f'its {name} is not a JSON object')
    return found


def read_tensors(folder):
    """{name: tensor} of a folder's safetensors, one file or several; pickled ones are read as far as they hold nothing but tensors."""
    for name in ('model.safetensors', 'pytorch_model.bin'):
        path, index, tensors = os.path.join(folder, name), os.path.join(folder, name + '.index.json'), {}
        try:
            files = [name] * os.path.exists(path)
            if os.path.exists(index):
                files = sorted({os.path.basename(file) for file in read_object(folder, name + '.index.json')['weight_map'].values()})
            for path in (os.path.join(folder, file) for file in files):
                tensors |= (torch.load(path, map_location='cpu', weights_only=True) if name.endswith('.bin') else
                            optional('safetensors.torch', 'to read safetensors').load_file(path))
        except Exception as e:  # safetensors, pickle, zip and json each have their own
            raise ValueError(f"'{path}' cannot be read: {first_line(e)}") from e
        if tensors:
            return tensors
    raise ValueError('it has no model.safetensors and no pytorch_model.bin')


def settings_of(hf):
    """(the keys of GPTConfig that a config.json, a dict, stands for, its sliding window or None). ValueError names the first key that is not held here."""
    kind = hf.get('model_type')
    keys, rope = KEYS.get(kind, {}), hf.get('rope_parameters') or hf.get('rope_scaling') or {}
    rope_type = rope.get('rope_type', rope.get('type', 'default'))
    held = {'model_type': FAMILIES, 'quantization_config': (None,), keys.get('activation'): (None, *ACTIVATIONS), 'partial_rotary_factor': (None, 1),
            'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,), 'add_cross_attention': (False,)}
    for key, values in held.items():
        if key in hf and hf[key] not in values or key == 'model_type' and kind not in FAMILIES:
            raise ValueError(f"its config.json has {key}={hf.get(key)!r}, which is not held here, only {', '.join(str(v) for v in values if v is not None)}")
    if rope_type not in ('default', 'llama3') or rope.get('partial_rotary_factor', 1) != 1:
        raise ValueError(f"its config.json has {'rope_parameters' if 'rope_parameters' in hf else 'rope_scaling'}={rope}, which is not held here, "
                         'only rope_type default and llama3')
    settings = {key: values[0] for key, values in FAMILIES[kind].items()} | DEFAULTS[kind]
    settings |= {ours: hf[key] for ours, key in keys.items() if hf.get(key) is not None}
    for ours in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd') + ('d_ff',) * (kind != 'gpt2'):
        hf[keys[ours]]  # or KeyError
    for ours in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'd_ff', 'n_kv_head'):
        if ours in settings and not (type(settings[ours]) is int and settings[ours] > 0):
            raise ValueError(f'its config.json has {keys[ours]}={settings[ours]!r}, which is not a whole number above 0')
    settings['activation'] = ACTIVATIONS[settings['activation']]
    if kind == 'gpt2':
        return settings, None
    if hf.get('head_dim') not in (None, settings['n_embd'] / settings['n_head']):
        raise ValueError(f"its config.json has head_dim={hf['head_dim']}, which is not held here, only hidden_size / num_attention_heads")
    if kind == 'starcoder2':
        settings['bias'] = hf.get('use_bias', True)
    elif kind in ('llama', 'arcee'):
        settings['bias'] = hf.get('attention_bias', False)
    if kind != 'starcoder2' and (hf.get('mlp_bias', False) != settings.get('bias', False) or kind == 'qwen3' and hf.get('attention_bias')):
        raise ValueError(f"its config.json has attention_bias={hf.get('attention_bias')} and mlp_bias={hf.get('mlp_bias')}, which is not held here, "
                         'only both or none')
    settings['rope_theta'] = float(rope.get('rope_theta', settings.get('rope_theta', 10000.0)))
    settings['rope_scaling'] = {key: rope[key] for key in ROPE_SCALING} if rope_type == 'llama3' else None
    window = hf.get('sliding_window', 4096 if kind == 'mistral' else None) if hf.get('use_sliding_window', kind in ('mistral', 'starcoder2')) else None
    settings['block_size'] = min(settings['block_size'], window or math.inf)  # up to the window attention is full
    return settings, window


def tokenizer_of(folder):
    """The spec of the tokenizer in a Hugging Face folder, by its own name where it is ours or GPT-2's; None if there is no tokenizer.json."""
    path, settings = os.path.join(folder, 'tokenizer.json'), os.path.join(folder, 'tokenizer_config.json')
    if not os.path.exists(path):
        return None
    about = {}
    if os.path.exists(settings):
        about = read_object(folder, 'tokenizer_config.json')
    if 'plaingpt' in about:
        return about['plaingpt']
    with open(path, encoding='utf-8') as f:
        spec = dict(name='huggingface', json=f.read(), eot=about.get('eos_token'))
    spec['eot'] = spec['eot']['content'] if isinstance(spec['eot'], dict) else spec['eot']
    vocab = read_object(folder, 'tokenizer.json').get('model', {}).get('vocab')
    if isinstance(vocab, dict) and len(vocab) == 50257:  # as many as GPT-2's
        table = get_tokenizer('gpt2').table
        if all(vocab.get(''.join(map(BYTE_CHARS.get, token))) == i for i, token in enumerate(table[:-1])):
            return {'name': 'gpt2'}
    return spec


def load_pretrained(name, block_size=None):
    """
    A checkpoint dict like load_checkpoint's, of the Hugging Face model in a folder or of a hub id, in its own dtype. block_size: the context it is
    wanted for, if that is known. ValueError says what is missing, left over or not held here.
    """
    folder = pretrained_folder(name)
    try:
        hf = read_object(folder, 'config.json')
        settings, window = settings_of(hf)
        kind, tied = hf['model_type'], settings['weight_tying']
        if window and (block_size or 0) > window:
            raise ValueError(f'block_size={block_size} is beyond its sliding_window={window}, and attention here is full')
        with torch.device('meta'):
            wanted = GPT(GPTConfig(**settings)).state_dict()
        theirs = read_tensors(folder)
        if kind == 'gpt2':  # the hub's own files lack the prefix, and old ones hold causal masks
            theirs = {k if k.startswith(('transformer.', 'lm_head.')) else f'transformer.{k}': v
                      for k, v in theirs.items() if not k.endswith(('.attn.bias', '.attn.masked_bias'))}
        theirs = {k: v for k, v in theirs.items() if not k.endswith('.rotary_emb.inv_freq') and not (k == 'lm_head.weight' and tied)}
        state = {}
        for ours in [n for n in wanted if n != 'lm_head.weight' or not tied]:
            names = names_in_hf(ours, kind)
            parts = [theirs.pop(n) for n in names]
            state[ours] = torch.cat(parts) if len(parts) > 1 else parts[0].T.contiguous() if kind == 'gpt2' and ours.endswith(CONV1D) else parts[0]
            if state[ours].shape != wanted[ours].shape:
                raise ValueError(f'{names[0]} gives {tuple(state[ours].shape)} where its config.json says {tuple(wanted[ours].shape)}')
        theirs = {k: v for k, v in theirs.items() if not k.endswith('.bias') or v.any()}  # a bias of zeros is none
        if theirs:
            raise ValueError(f"there is no place here for its tensors {', '.join(sorted(theirs)[:3])}" + ', ...' * (len(theirs) > 3))
        tokenizer = tokenizer_of(folder)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, OSError) as e:
        raise ValueError(f"'{folder}' is not a model we can hold: " + (f'it has no {e}' if isinstance(e, KeyError) else first_line(e))) from e
    if tied:
        state['lm_head.weight'] = state['transformer.wte.weight']
    return dict(model=state, model_args=settings, path=folder, tokenizer=tokenizer)


def load_weights(name, block_size=None):
    """The checkpoint dict that init_from names: another run's folder or file, or what load_pretrained takes."""
    pretrained = os.path.exists(os.path.join(name, 'config.json')) if os.path.exists(name) else \
        re.fullmatch(r'(distil)?gpt2|gpt2-(medium|large|xl)|[\w.-]+/[\w.-]+', name) and not name.endswith('.pt')
    if not pretrained and not os.path.exists(name):
        raise ValueError(f"no checkpoint at '{name}', and it is neither 'resume', a Hugging Face folder nor a hub id such as gpt2")
    return load_pretrained(name, block_size) if pretrained else load_checkpoint(name)


def from_pretrained(name, dtype, overrides):
    """GPT.from_pretrained, which has the words."""
    block_size = overrides.pop('block_size', None)
    ckpt = load_pretrained(name, block_size)
    ckpt['model_args'] |= overrides
    model = model_of(ckpt).to(dtype)
    if block_size is not None:
        model.crop_block_size(block_size)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# out

def config_json(model):
    """The config.json (a dict) that says what a model is. ValueError names the parts that Hugging Face has no class for."""
    c, names = model.config, {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    has = vars(c) | dict(qkv_bias=c.qkv_bias and not c.bias)
    both = dict(activation=names, norm_position=('pre',), logit_softcap=(0.0,))
    misfits = {kind: [f'{key}={has[key]}' for key, values in (both | parts).items() if has[key] not in values] for kind, parts in FAMILIES.items()}
    if c.n_kv_head not in (None, c.n_head):
        misfits['gpt2'].append(f'n_kv_head={c.n_kv_head}')
    kind = min(misfits, key=lambda kind: len(misfits[kind]))
    if misfits[kind]:
        raise ValueError(f"Hugging Face's transformers has no class for this mix: the nearest, {kind}, is without {', '.join(misfits[kind])}")
    hf = {theirs: getattr(c, ours) for ours, theirs in KEYS[kind].items()}
    hf |= {KEYS[kind]['activation']: names[c.activation], KEYS[kind]['d_ff']: model.transformer.h[0].mlp.c_proj.in_features,
           'model_type': kind, 'architectures': [dict(gpt2='GPT2LMHeadModel').get(kind, f'{kind.capitalize()}ForCausalLM')]}
    if kind == 'gpt2':
        return hf | dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), c.dropout)
    return hf | dict(num_key_value_heads=c.n_kv_head or c.n_head, head_dim=c.n_embd // c.n_head, sliding_window=None,
                     rope_scaling=c.rope_scaling and c.rope_scaling | {'rope_type': 'llama3'}, attention_bias=c.bias, mlp_bias=c.bias, use_bias=c.bias)


def tensors_out(model, kind):
    """{name: tensor} as the class of that model_type has them."""
    c, state, out = model.config, model.state_dict(), {}
    D, K = c.n_embd // c.n_head, c.n_kv_head or c.n_head
    biased = {'gpt2': ('ln_1', 'ln_2', 'ln_f', 'c_attn', 'c_fc', 'c_proj'), 'starcoder2': ('ln_1', 'ln_2', 'ln_f')}.get(kind, ())  # always there
    for name, weight in [(k, w) for k, w in state.items() if k.endswith('.weight') and k.split('.')[-2] in biased]:
        state.setdefault(name.replace('.weight', '.bias'), weight.new_zeros(len(weight)))
    for ours, t in state.items():
        names = names_in_hf(ours, kind)
        rows = {1: [len(t)], 2: [len(t) // 2] * 2, 3: [c.n_head * D, K * D, K * D]}[len(names)]
        if not (ours == 'lm_head.weight' and c.weight_tying):
            out |= {n: (part.T if kind == 'gpt2' and ours.endswith(CONV1D) else part).contiguous() for n, part in zip(names, t.split(rows))}
    return out


def run_logs(ckpt):
    """What lies beside a checkpoint as run_*.json, a list of dicts, oldest first."""
    logs = []
    for path in sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(ckpt.get('path', ''))), 'run_*.json'))):
        with contextlib.suppress(OSError, ValueError), open(path, encoding='utf-8') as f:
            logs.append(json.load(f))
    return logs


def history(ckpt, logs):
    """(tokens that a checkpoint has seen, the init_from that it began with), or (None, None): its own config knows only the last of several runs."""
    trained, at, tokens = ckpt.get('config') or {}, ckpt.get('iter_num'), 0
    sizes = [trained.get(key) for key in ('batch_size', 'gradient_accumulation_steps', 'block_size')]
    if at is not None and None not in sizes and trained.get('init_from', 'resume') not in ('resume', 'auto'):
        return at * math.prod(sizes), trained['init_from']
    for log in reversed(logs if at else []):
        end = log.get('summary', {}).get('iter_num', 0)
        start = end - log.get('summary', {}).get('iterations', 0)
        if start < at <= end:  # it may have gone further than the checkpoint that the next one began with
            tokens, at = tokens + (at - start) * log['startup_info']['tokens_per_iter'], start
            if at == 0:
                return tokens, log['config']['init_from']
    return None, None


def model_card(model, ckpt, hf, tokenizer):
    """README.md of an exported model, from its checkpoint and the logs of the runs that led to it; what they do not say is left out."""
    c, trained, logs = model.config, ckpt.get('config') or {}, run_logs(ckpt)
    hardware = logs[-1].get('startup_info', {}).get('device') if logs and trained else None
    rows = {'architecture': f"{hf['architectures'][0]}: {c.n_layer} layers, width {c.n_embd}, {c.n_head} heads, {c.n_kv_head or c.n_head} key/value heads, "
                            f"{', '.join(str(getattr(c, kind)) for kind in REGISTRY if kind != 'attention_backend')}, {'biases' if c.bias else 'no biases'}",
            'parameters': f'{model.get_num_params(False):,}, non-embedding {model.get_num_params():,}', 'context': f'{c.block_size} tokens',
            'vocabulary': f'{c.vocab_size} ids' + (f', of which {c.unpadded_vocab_size} in use' if c.unpadded_vocab_size else ''),
            'tokenizer': tokenizer and tokenizer.name, 'data set': trained.get('dataset')}
    tokens, began = history(ckpt, logs)
    if tokens is not None:
        after = f', after the weights of {began}' * (began not in ('scratch', 'resume', 'auto'))
        rows['tokens seen'] = f"{tokens:,} in {ckpt['iter_num']:,} iterations{after}"
    for split, losses in (ckpt.get('losses') or {}).items():
        per_byte = f", {losses['bits_per_byte']:.4f} bits per byte of text" if 'bits_per_byte' in losses else ''
        rows[f'{split} loss'] = f"{losses['loss']:.4f} nats a token{per_byte}" + \
            f", the mean over at most {trained['eval_iters'] * trained['batch_size']:,} windows of {c.block_size} tokens, always the same"
    rows |= {'hardware': hardware, 'software': f"plainGPT, torch {ckpt.get('torch_version', torch.__version__)}"}
    table = ['| | |', '| --- | --- |', *(f'| {key} | {value} |' for key, value in rows.items() if value)]
    title = '# A GPT' + f" trained on {rows['data set']}" * bool(trained)
    inside = '' if c.doc_mask_token is None else (' It was trained with attention inside a document, which this format cannot say: behind an end-of-text '
                                                 'token transformers gives other logits than plainGPT, so give it one document at a time.')
    return '\n'.join(['---', 'library_name: transformers', 'pipeline_tag: text-generation', '---', '', title, '', *table, '', '## Limits', '',
                      f'A plain language model: it continues a text, of which it sees the last {c.block_size} tokens. Nothing about it has been measured '
                      'beyond the losses above; what is false or foul in its training text can come out again.' + inside, ''])


def folder_beside(path):
    """A context: a folder beside path with a name that was nobody's, removed at the end."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=os.path.basename(path) + '.', suffix='.tmp', dir=os.path.dirname(path) or '.')


def save_pretrained(model, folder, ckpt):
    """GPT.save_pretrained: written beside the folder, which is renamed when it is whole."""
    hf, save_file, folder = config_json(model), optional('safetensors.torch', 'to write safetensors').save_file, os.path.normpath(folder)
    if os.path.exists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise ValueError(f"'{folder}' is there already: another name, or remove it first")
    if model.config.doc_mask_token is not None:
        print('NOTE: doc_mask is lost in this format: across documents in one window transformers gives other logits', file=sys.stderr)
    tokenizer = find_tokenizer(ckpt) if ckpt else None
    if tokenizer and tokenizer.vocab_size > model.config.vocab_size:  # which a checkpoint that names none does not say
        tokenizer = None
    eot, known = getattr(tokenizer, 'eot', None), model.config.unpadded_vocab_size or model.config.vocab_size
    ends = dict(bos_token_id=eot, eos_token_id=eot)
    texts = {'config.json': hf | ends | dict(dtype=str(model.lm_head.weight.dtype).removeprefix('torch.')),
             'generation_config.json': ends | ({'suppress_tokens': [*range(known, model.config.vocab_size)]} if known < model.config.vocab_size else {})}
    if tokenizer:
        texts['tokenizer.json'] = tokenizer.spec.get('json') or to_hugging_face(tokenizer).to_str(pretty=True)
        texts['tokenizer_config.json'] = dict(
            tokenizer_class='PreTrainedTokenizerFast', model_max_length=model.config.block_size, clean_up_tokenization_spaces=False,
            eos_token=None if eot is None else tokenizer.table[eot].decode()) | ({} if 'json' in tokenizer.spec else dict(plaingpt=tokenizer.spec))
    texts['README.md'] = model_card(model, ckpt or {}, hf, tokenizer)
    try:
        with folder_beside(folder) as temporary:
            whole = os.path.join(temporary, 'whole')  # with the access that mkdir gives, while the one around it is closed to others
            os.mkdir(whole)
            save_file(tensors_out(model, hf['model_type']), os.path.join(whole, 'model.safetensors'), metadata={'format': 'pt'})
            for name, content in texts.items():
                with open(os.path.join(whole, name), 'w', encoding='utf-8') as f:
                    f.write(content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False))
            os.replace(whole, folder)
    except Exception as e:  # safetensors has an error of its own for a full disk
        raise OSError(f"'{folder}' could not be written: {first_line(e)}") from e


class Logits(nn.Module):
    """What the ONNX file computes: ids (B, T) -> logits (B, T, V)."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, all_logits=True)[0]


def save_onnx(model, path):
    """Write the model, weights included, for any batch and any length up to block_size: ids (B, T) int64 -> logits (B, T, V) float32."""
    if os.path.exists(path):
        raise ValueError(f"'{path}' is there already: another name, or remove it first")
    optional('onnxscript', 'to write ONNX')
    for module in model.modules():
        if hasattr(module, 'attend'):
            module.attend = ATTENTION_BACKEND['manual']  # the fused one wants to know by now whether there is one query or more
    shape = {0: torch.export.Dim('batch'), 1: torch.export.Dim('length', max=model.config.block_size)}
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)  # torchvision is not installed, and the like
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter('ignore')
        try:
            program = torch.onnx.export(Logits(model).eval(), (torch.zeros(2, min(model.config.block_size, 8), dtype=torch.long),), dynamo=True, verbose=False,
                                        input_names=['ids'], output_names=['logits'], dynamic_shapes={'ids': shape})
        except Exception as e:  # of a part that its exporter cannot follow
            raise ValueError(f'torch.onnx cannot export this model: {first_line(e.__cause__ or e)[:200]}') from e
    try:
        with folder_beside(path) as temporary:
            program.save(os.path.join(temporary, os.path.basename(path)), external_data=model.get_num_params(False) > 4e8)  # a file of its own may have 2 GB
            for name in sorted(os.listdir(temporary), reverse=True):  # the data first
                os.replace(os.path.join(temporary, name), os.path.join(os.path.dirname(path), name))
    except OSError as e:
        raise OSError(f"'{path}' could not be written: {first_line(e)}") from e
