"""
Export a model: a folder for Hugging Face transformers, or ONNX.

    model.save_pretrained('hf_dir')
    python model.py --ckpt=out --export=hf_dir
    python model.py --ckpt=out --export=model.onnx
"""
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import warnings

import torch
import torch.nn as nn

from data.tokenizer import find_tokenizer, to_hugging_face
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
from model import ATTENTION_BACKEND


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
# ONNX

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
