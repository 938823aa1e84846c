"""What must stay true: python -m pytest tests/test_checkpoint.py"""
import pickle

import pytest
import torch

from engine.checkpoint import load_checkpoint
from model import (
    GPT,
    POSITION_ENCODING,
    GPTConfig,
)
from test_model import (
    B,
    T,
    close,
    gradients,
    ids,
    one_line,
    reference_logits,
    shaken,
)

# checkpoints

NANOGPT_ARGS = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, bias=False, vocab_size=64, dropout=0.0)


def nanogpt_checkpoint(path, prefix='_orig_mod.', bias=False, extra=(), **changes):
    """What nanoGPT's train.py saves, written without our model: names and shapes from its model.py."""
    generator, C, state = torch.Generator().manual_seed(0), 32, {}

    def add(name, *shape):
        state[f'{name}.weight'] = 0.3 * torch.randn(shape, generator=generator)
        if bias and name not in ('transformer.wte', 'transformer.wpe'):
            state[f'{name}.bias'] = 0.3 * torch.randn(shape[0], generator=generator)
    add('transformer.wte', 64, C)
    add('transformer.wpe', 16, C)
    for i in range(2):
        for name, *shape in (('ln_1', C), ('attn.c_attn', 3 * C, C), ('attn.c_proj', C, C), ('ln_2', C), ('mlp.c_fc', 4 * C, C), ('mlp.c_proj', C, 4 * C)):
            add(f'transformer.h.{i}.{name}', *shape)
    add('transformer.ln_f', C)
    state['lm_head.weight'] = state['transformer.wte.weight']
    ckpt = dict(model={prefix + k: v for k, v in (state | dict(extra)).items()}, optimizer={'state': {}, 'param_groups': []},
                model_args=dict(NANOGPT_ARGS, bias=bias), iter_num=7, best_val_loss=torch.tensor(1.5), config={'out_dir': 'out', 'dataset': 'x'}) | changes
    torch.save(ckpt, path)
    return state


def refused(path, *parts):
    with pytest.raises(ValueError) as e:
        GPT.from_checkpoint(path)
    one_line(e, path, *parts)
    return str(e.value)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('prefix', ['_orig_mod.', ''])
def test_a_nanogpt_checkpoint_is_the_same_model_here(tmp_path, prefix, bias):
    """Defaults that are not nanoGPT's would make its checkpoints another model: the weights load either way."""
    state = nanogpt_checkpoint(tmp_path / 'ckpt.pt', prefix, bias)
    c = GPTConfig(**dict(NANOGPT_ARGS, bias=bias), normalization='layernorm', activation='gelu', position_encoding='learned_absolute',
                  norm_position='pre', ffn_type='standard', weight_tying=True)
    for path in (tmp_path, str(tmp_path), tmp_path / 'ckpt.pt'):
        model = GPT.from_checkpoint(path)
        assert not model.training and model.lm_head.weight is model.transformer.wte.weight and all(p.requires_grad for p in model.parameters())
        close(model(ids(B, T), all_logits=True)[0].double(), reference_logits(state, c, ids(B, T)), 1e-4)
    ckpt = load_checkpoint(tmp_path)
    assert (ckpt['iter_num'], ckpt['best_val_loss'], ckpt['config']) == (7, 1.5, {'out_dir': 'out', 'dataset': 'x'})


def test_a_nanogpt_checkpoint_with_its_mask_buffers_loads(tmp_path):
    """Where torch had no fused attention, nanoGPT registered the causal mask as attn.bias, and it is in its checkpoints."""
    mask = torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16)
    state = nanogpt_checkpoint(tmp_path / 'ckpt.pt', extra={f'transformer.h.{i}.attn.bias': mask for i in range(2)})
    close(GPT.from_checkpoint(tmp_path)(ids(B, T), all_logits=True)[0].double(), reference_logits(state, GPTConfig(**NANOGPT_ARGS), ids(B, T)), 1e-4)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), 'w')


@pytest.mark.parametrize('place', ['model', 'model_args', 'config', 'alone', 'no zip'])
def test_a_malicious_checkpoint_does_not_run(tmp_path, place):
    """Unpickling is running code; a fallback to weights_only=False would give a downloaded checkpoint the machine."""
    path, marker = tmp_path / 'ckpt.pt', tmp_path / 'was_here'
    if place == 'alone':
        torch.save(Evil(marker), path)
    elif place == 'no zip':
        path.write_bytes(pickle.dumps(Evil(marker)))
    else:
        nanogpt_checkpoint(path, **{place: {'key': Evil(marker)}})
    refused(path)
    assert not marker.exists()
    if place == 'no zip':
        pickle.loads(path.read_bytes()).close()
    else:
        torch.load(path, weights_only=False)
    assert marker.exists(), 'the trap has to work'


def test_a_damaged_checkpoint_is_refused(tmp_path):
    """torch.load reads a file with a flipped bit without a word, and the model is a little off for ever."""
    path = tmp_path / 'ckpt.pt'
    state = nanogpt_checkpoint(path)
    whole = path.read_bytes()
    tensor = state['transformer.h.1.mlp.c_fc.weight'].numpy().tobytes()
    middle = whole.index(tensor) + len(tensor) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:])
    assert torch.load(path, weights_only=True)['iter_num'] == 7, 'torch alone does not notice'
    refused(path, 'checksum')
    for size in (0, 1, 100, middle, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path)
    path.write_bytes(b'not a checkpoint at all')
    refused(path)
    path.write_bytes(whole)
    GPT.from_checkpoint(path)


def test_a_missing_checkpoint_is_refused_by_name(tmp_path):
    """FileNotFoundError would be a traceback for a typing error."""
    refused(tmp_path / 'nonesuch.pt')
    refused(tmp_path / 'nonesuch' / 'ckpt.pt')
    refused(tmp_path, 'ckpt.pt')


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    """Ignored keys, missing ones and wrong shapes: a model that is partly random would load without a word."""
    path = tmp_path / 'ckpt.pt'
    for content in ([1, 2], {'model': 1, 'model_args': {}}, {'weights': {}}, torch.zeros(3)):
        torch.save(content, path)
        refused(path)
    for args, part in (({'n_embd': 64}, 'size mismatch'), ({'vocab_size': 65}, 'size mismatch'), ({'n_layer': 3}, 'Missing key'), ({'n_layer': 1}, 'Unexpected key'),
                       ({'n_wings': 2}, 'n_wings'), ({'n_head': 0}, 'n_head'), ({'n_head': 'x'}, 'n_head'), ({'activation': 'nonesuch'}, 'nonesuch'), ({'dropout': 'x'}, '')):
        nanogpt_checkpoint(path, model_args=NANOGPT_ARGS | args)
        refused(path, part)
    nanogpt_checkpoint(path, extra={'lm_head.weight': 'no tensor'})
    refused(path)
    nanogpt_checkpoint(path, extra={'lm_head.weight': torch.zeros(64, 32, dtype=torch.int64)})
    refused(path)


@pytest.mark.parametrize('position', POSITION_ENCODING)
def test_cropping_keeps_what_the_model_says_within_the_shorter_context(position):
    """Fewer positions, the same ones: and the longer sequence is refused from then on."""
    model, idx = shaken(position_encoding=position), ids(B, T)
    before = model(idx[:, :6], all_logits=True)[0]
    model.crop_block_size(6)
    assert torch.equal(model(idx[:, :6], all_logits=True)[0], before)
    assert model.config.block_size == 6 and model.generate(idx[:, :3], 10, seed=1).shape == (B, 13)
    with pytest.raises(ValueError, match='block_size is 6'):
        model(idx)
    gradients(model, ids(B, 6), ids(B, 6))
    if position == 'learned_absolute':
        assert model.params_by_part()['position embeddings'] == 6 * 32
        with pytest.raises(ValueError, match='block_size 7'):
            model.crop_block_size(7)


@pytest.mark.parametrize('block_size', [0, -1])
def test_cropping_to_nothing_is_refused(block_size):
    """-1 would cut one position off by the rules of slices, and every later error would be about something else."""
    with pytest.raises(ValueError, match='block_size'):
        shaken().crop_block_size(block_size)


