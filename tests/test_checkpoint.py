"""Checkpoints: what they hold, where they come from, and which files are refused."""
import math
import os
import pickle
import random
import struct
import zipfile
from dataclasses import asdict, make_dataclass
from pathlib import Path

import pytest
import torch

from conftest import one_line
from engine.checked_file import read_file, save_checked
from engine.checkpoint import (
    Pieces,
    State,
    load_checkpoint,
    newest_checkpoint,
    numbered_checkpoints,
    read_facts,
    restore_optimizer,
    restore_tensors,
)
from engine.common import UserError, create, remove, replacing
from engine.describe import params_by_part
from engine.parallel import Parallel
from engine.run_folder import RunFolder
from model import GPT, POSITION_ENCODING, GPTConfig
from test_model import B, Reference, T, close, gradients, ids, shaken

NANOGPT_ARGS = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, bias=False, vocab_size=64, dropout=0.0)


def nanogpt_checkpoint(path, prefix='_orig_mod.', bias=False, extra=(), **changes):
    """Save what nanoGPT's train.py saves, without our model: names and shapes are those of its model.py."""
    generator, C, state = torch.Generator().manual_seed(0), 32, {}

    def add(name, *shape):
        state[f'{name}.weight'] = 0.3 * torch.randn(shape, generator=generator)
        if bias and name not in ('transformer.wte', 'transformer.wpe'):
            state[f'{name}.bias'] = 0.3 * torch.randn(shape[0], generator=generator)
    add('transformer.wte', 64, C)
    add('transformer.wpe', 16, C)
    for i in range(2):
        for name, *shape in (
                ('ln_1', C),
                ('attn.c_attn', 3 * C, C),
                ('attn.c_proj', C, C),
                ('ln_2', C),
                ('mlp.c_fc', 4 * C, C),
                ('mlp.c_proj', C, 4 * C)):
            add(f'transformer.h.{i}.{name}', *shape)
    add('transformer.ln_f', C)
    state['lm_head.weight'] = state['transformer.wte.weight']
    ckpt = dict(
        model={prefix + k: v for k, v in (state | dict(extra)).items()}, optimizer={'state': {}, 'param_groups': []},
        model_args=dict(NANOGPT_ARGS, bias=bias), iter_num=7, best_val_loss=torch.tensor(1.5),
        config={'out_dir': 'out', 'dataset': 'x'})
    torch.save(ckpt | changes, path)
    return state


def refused(path, *parts):
    with pytest.raises(ValueError) as e:
        GPT.from_checkpoint(path)
    one_line(e.value, path, *parts)
    return str(e.value)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('prefix', ['_orig_mod.', ''])
def test_a_nanogpt_checkpoint_is_the_same_model_here(tmp_path, prefix, bias):
    """With other defaults than nanoGPT's its checkpoints would load as another model."""
    state = nanogpt_checkpoint(tmp_path / 'ckpt.pt', prefix, bias)
    c = GPTConfig(**dict(NANOGPT_ARGS, bias=bias), normalization='layernorm', activation='gelu',
                  position_encoding='learned_absolute', norm_position='pre', ffn_type='standard', weight_tying=True)
    expected = Reference(state, c).logits(ids(B, T))
    for path in (tmp_path, str(tmp_path), tmp_path / 'ckpt.pt'):
        model = GPT.from_checkpoint(path)
        assert not model.training and all(p.requires_grad for p in model.parameters())
        assert model.lm_head.weight is model.transformer.wte.weight
        close(model(ids(B, T), all_logits=True)[0].double(), expected, 1e-4)
    ckpt = load_checkpoint(tmp_path)
    assert ckpt['config'] == {'out_dir': 'out', 'dataset': 'x'}
    assert State.from_dict(ckpt) == State(iter_num=7, best_val_loss=1.5, last_eval_iter=7)


def test_a_nanogpt_checkpoint_with_its_mask_buffers_loads(tmp_path):
    """Without fused attention nanoGPT registers the causal mask as attn.bias, which its checkpoints then hold."""
    mask = torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16)
    masks = {f'transformer.h.{i}.attn.bias': mask for i in range(2)}
    state = nanogpt_checkpoint(tmp_path / 'ckpt.pt', extra=masks)
    logits = GPT.from_checkpoint(tmp_path)(ids(B, T), all_logits=True)[0]
    close(logits.double(), Reference(state, GPTConfig(**NANOGPT_ARGS)).logits(ids(B, T)), 1e-4)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), 'w')


@pytest.mark.parametrize('place', ['model', 'model_args', 'config', 'alone', 'no zip'])
def test_a_malicious_checkpoint_does_not_run(tmp_path, place):
    """Unpickling runs code: with weights_only=False a downloaded checkpoint could do anything."""
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
    """torch.load does not notice a flipped bit, and the model would be slightly wrong from then on."""
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


# checksums

def save(path, content):
    with create(path) as f:
        save_checked(content, f)


@pytest.fixture
def small(tmp_path):
    """(path, content) of a checkpoint of ours with two tensors, one of them tied."""
    head, norm = torch.randn(5, 3), torch.randn(4)
    model = {'lm_head.weight': head, 'norm': norm, 'wte.weight': head}
    content = dict(model=model, model_args={'n_layer': 1}, iter_num=3)
    save(tmp_path / 'ckpt.pt', content)
    return tmp_path / 'ckpt.pt', content


def zip_headers(path):
    """
    (bytes of the central directory's entry and the local header of the first tensor, those of all
    others and of the end records): positions in a file that torch.save wrote.
    """
    data, first, others = path.read_bytes(), [], []
    with zipfile.ZipFile(path) as z:
        entry_at = z.start_dir
        for entry in z.infolist():
            headers = first if entry.filename.endswith('/data/0') else others
            name, extra = struct.unpack_from('<HH', data, entry.header_offset + 26)
            headers += range(entry.header_offset, entry.header_offset + 30 + name + extra)
            name, extra = struct.unpack_from('<HH', data, entry_at + 28)
            headers += range(entry_at, entry_at + 46 + name + extra)
            entry_at += 46 + name + extra
    return first, [*others, *range(entry_at, len(data))]


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize('mmap', [False, True])
@pytest.mark.parametrize('share', [0.02, pytest.param(1, marks=pytest.mark.soak)])
def test_a_flipped_bit_in_the_zip_headers_is_noticed_or_harmless(small, share, mmap):
    """
    Bit 4 of byte 38 of a tensor's entry in the central directory marks it as a folder: its CRC was right, and
    torch.load returned whatever was in memory. Parts of sharded checkpoints are read with mmap.
    """
    path, content = small
    whole, (first, others) = path.read_bytes(), zip_headers(path)
    assert len(first) > 100 and len(others) > 500
    chosen = first + random.Random(0).sample(others, int(share * len(others)))
    noticed = 0
    for i in chosen:
        for bit in range(8):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1:])
            try:
                assert equal(read_file(path, mmap=mmap), content), f'bit {bit} of byte {i}'
            except UserError as e:
                one_line(e, path)
                noticed += 1
    assert noticed > 100


def test_the_tensors_have_checksums_of_their_own(small):
    """Those of the zip file are of no use if torch.load reads other bytes than they cover."""
    path, content = small
    damaged = torch.load(path, weights_only=True)
    assert list(damaged['checksums']) == ['model/lm_head.weight', 'model/norm']  # a tied tensor has one
    damaged['model']['norm'][1] += 1
    torch.save(damaged, path)
    with pytest.raises(UserError, match="'model/norm' does not match its checksum"):
        load_checkpoint(path)
    del damaged['checksums']  # as in one of an earlier version
    torch.save(damaged, path)
    assert equal(load_checkpoint(path)['model'], damaged['model'])


def test_a_missing_checkpoint_is_refused_by_name(tmp_path):
    """A FileNotFoundError would be a traceback for a typing error."""
    refused(tmp_path / 'nonesuch.pt')
    refused(tmp_path / 'nonesuch' / 'ckpt.pt')
    refused(tmp_path, 'ckpt.pt')


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    """With ignored keys, missing ones or wrong shapes, a partly random model would load without an error."""
    path = tmp_path / 'ckpt.pt'
    for content in ([1, 2], {'model': 1, 'model_args': {}}, {'weights': {}}, torch.zeros(3)):
        torch.save(content, path)
        refused(path)
    for weight in ('no tensor', torch.zeros(64, 32, dtype=torch.int64)):
        nanogpt_checkpoint(path, extra={'lm_head.weight': weight})
        refused(path)


@pytest.mark.parametrize('args, part', [
    ({'n_embd': 64}, 'size mismatch'),
    ({'vocab_size': 65}, 'size mismatch'),
    ({'n_layer': 3}, 'Missing key'),
    ({'n_layer': 1}, 'Unexpected key'),
    ({'n_wings': 2}, 'n_wings'),
    ({'n_head': 0}, 'n_head'),
    ({'n_head': 'x'}, 'n_head'),
    ({'activation': 'nonesuch'}, 'nonesuch'),
    ({'dropout': 'x'}, ''),
])
def test_model_args_that_do_not_fit_the_weights_are_refused(tmp_path, args, part):
    """A model of another shape could take some of the weights and leave the others random."""
    nanogpt_checkpoint(tmp_path / 'ckpt.pt', model_args=NANOGPT_ARGS | args)
    refused(tmp_path / 'ckpt.pt', part)


# foreign and hostile structure

DEEP = []
for _ in range(100):
    DEEP = [DEEP]
FOREIGN = [
    ('iter_num', [1]),
    ('iter_num', -5),
    ('iter_num', 10 ** 30),
    ('iter_num', None),
    ('best_val_loss', None),
    ('best_val_loss', math.nan),
    ('best_val_loss', torch.zeros(2)),
    ('config', [1]),
    ('config', {'batch_size': 'many'}),
    ('config', {'gradient_accumulation_steps': 0}),
    ('config', {'optimizer': DEEP}),
    ('tokenizer', [1]),
    ('tokenizer', {'name': 7}),
    ('losses', {'val': 3}),
    ('train_seconds', 'long'),
    ('train_seconds', 10 ** 30),
    ('train_seconds', math.nan),
    ('optimizer', DEEP),
    ('optimizer', {'state': [], 'param_groups': []}),
    ('optimizer', {'state': {}, 'param_groups': [{'params': 'all'}]}),
    ('model', {1: torch.zeros(3)}),
    ('model_args', {'n_layer': 10 ** 7}),
    ('model_args', {'n_layer': '2'}),
    ('checksums', [1]),
]


@pytest.mark.parametrize('field, value', FOREIGN, ids=[f'{i}-{field}' for i, (field, _) in enumerate(FOREIGN)])
def test_a_field_of_another_type_is_named(tmp_path, field, value):
    """A traceback, a model of ten million layers that is built for hours, or a run at iteration -5."""
    path = tmp_path / 'ckpt.pt'
    nanogpt_checkpoint(path, **{field: value})
    if field != 'best_val_loss' or not isinstance(value, torch.Tensor):
        refused(path, field)
    refused(path)
    if field not in ('optimizer', 'model', 'model_args', 'checksums'):  # --eval_only reads these first
        with pytest.raises(UserError) as e:
            read_facts(path)
        one_line(e.value, path)


@pytest.mark.parametrize('weight', [
    torch.full((64, 32), math.nan),
    torch.zeros(64, 32).to_sparse(),
    torch.zeros(64, 32, device='meta'),
    torch.zeros(64, 32, dtype=torch.complex64),
], ids=['nan', 'sparse', 'meta', 'complex'])
@pytest.mark.filterwarnings('ignore')
def test_weights_that_are_not_finite_dense_floats_are_refused(tmp_path, weight):
    """A model of NaN sampled the first id for ever, and other kinds of tensors were a traceback."""
    nanogpt_checkpoint(tmp_path / 'ckpt.pt', extra={'lm_head.weight': weight})
    refused(tmp_path / 'ckpt.pt', "model/_orig_mod.lm_head.weight'")


def test_a_buffer_of_integers_and_a_strided_tensor_are_loaded(tmp_path):
    """A part with a counter as a buffer saved checkpoints that were refused afterwards."""
    extra = {'transformer.calls': torch.tensor(3), 'lm_head.scale': torch.arange(20.)[::2]}
    nanogpt_checkpoint(tmp_path / 'ckpt.pt', extra=extra)
    with replacing(tmp_path / 'again.pt') as f:
        save_checked(load_checkpoint(str(tmp_path / 'ckpt.pt')), f)
    again = load_checkpoint(tmp_path / 'again.pt')['model']
    for name, tensor in extra.items():
        assert torch.equal(again[next(key for key in again if key.endswith(name))], tensor)


@pytest.mark.parametrize('key, moment', [
    ('exp_avg', torch.zeros(3)),
    ('exp_avg', torch.zeros(())),
    ('exp_avg', 7),
    ('exp_avg', math.nan * torch.zeros(64, 32)),
    ('exp_avg_sq', torch.zeros(64, 32, dtype=torch.int64)),
    ('step', torch.zeros(3)),
    ('step', torch.tensor(math.inf)),
    ('step', None),
])
def test_moments_that_do_not_fit_are_refused(tmp_path, key, moment):
    """torch takes moments of any shape from a checkpoint, and the first step of the resumed run is a traceback."""
    model, idx = shaken(), ids(B, T)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    model(idx, idx)[1].backward()
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved['state'][0]['exp_avg'].shape == (64, 32)
    ckpt = dict(optimizer=saved, path='ckpt.pt')
    restore_optimizer(optimizer, 'adamw', ckpt, Parallel())
    saved['state'][0] = saved['state'][0] | {key: moment}
    with pytest.raises(UserError) as e:
        restore_optimizer(optimizer, 'adamw', ckpt, Parallel())
    one_line(e.value, 'ckpt.pt', 'optimizer.state.0')


def test_the_moments_of_a_parameter_without_dimensions_are_restored():
    """The step count has its shape: such a run, with one scale per norm, could never be resumed."""
    scale = torch.nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.AdamW([scale])
    scale.square().backward()
    optimizer.step()
    fresh = torch.optim.AdamW([scale])
    ckpt = dict(optimizer=optimizer.state_dict(), path='ckpt.pt')
    restore_optimizer(fresh, 'adamw', ckpt, Parallel())
    assert fresh.state[scale]['exp_avg'] == optimizer.state[scale]['exp_avg'] != 0


@pytest.mark.parametrize('numbers', [[2], range(28)])
def test_moments_without_a_step_count_are_refused(numbers):
    """The optimizer would end with KeyError: 'step', at once or in its first step."""
    model, idx = shaken(), ids(B, T)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    model(idx, idx)[1].backward()
    optimizer.step()
    saved = optimizer.state_dict()
    assert len(saved['state']) == 28
    for number in numbers:
        del saved['state'][number]['step']
    with pytest.raises(UserError) as e:
        restore_optimizer(optimizer, 'adamw', dict(optimizer=saved, path='ckpt.pt'), Parallel())
    one_line(e.value, 'ckpt.pt', 'step')


# state: facts and sets of tensors

def test_an_evaluation_counts_once_and_only_on_the_runs_own_windows():
    """A resume at an evaluation would count it twice, and patience would end the run too early."""
    state = State(iter_num=10)
    assert state.add_evaluation({'val': {'loss': 2.0}}) and state.best_val_loss == 2.0
    assert not state.add_evaluation({'val': {'loss': 2.0}}) and state.stale_evals == 0  # the same one again
    state.iter_num = 20
    assert not state.add_evaluation({'val': {'loss': 3.0}}) and state.stale_evals == 1
    state.iter_num = 30
    assert not state.add_evaluation({'val': {'loss': 1.0}}, count=False)
    assert (state.best_val_loss, state.losses) == (2.0, {'val': {'loss': 1.0}})


def test_a_fact_that_is_added_to_the_state_is_restored():
    """A list of fields by hand would save a new one and reset it at each resume."""
    Longer = make_dataclass('Longer', [('n_restarts', int, 0)], bases=(State,))
    before = Longer(iter_num=3, stale_evals=2, train_seconds=1.5, n_restarts=4)
    assert Longer.from_dict(asdict(before)) == before


@pytest.mark.parametrize('first, n', [(0, 10), (3, 4), (2, 0), (9, 1), (0, 4)])
def test_pieces_give_any_rows_of_a_tensor(first, n):
    """Rows taken from the wrong process's piece would resume FSDP with shuffled moments."""
    whole = torch.arange(20).view(10, 2)
    pieces = Pieces(whole.shape)
    for start, end in ((7, 10), (0, 4), (4, 7), (10, 10)):
        pieces.parts.append((start, whole[start:end]))
    assert torch.equal(pieces.rows(first, n), whole[first:first + n]) and torch.equal(pieces.whole(), whole)
    del pieces.parts[2]
    with pytest.raises(ValueError, match='missing'):
        pieces.whole()


@pytest.mark.parametrize('sharded', [False, True])
def test_every_set_of_tensors_is_saved_and_restored(tmp_path, sharded):
    """An EMA of the weights that is saved and not read back would start again from nothing at each resume."""
    model, idx = shaken(), ids(B, T)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    model(idx, idx)[1].backward()
    optimizer.step()
    parallel, ema = Parallel(), {name: torch.randn_like(p) for name, p in model.named_parameters()}
    folder = RunFolder(str(tmp_path), sharded, parallel)
    moments, groups = parallel.moments(optimizer)
    sets = {'model': model.state_dict(keep_vars=True), 'optimizer': moments, 'ema': ema}
    facts = dict(model_args=vars(model.config), iter_num=1)
    folder.save(sets, groups, facts, [folder.best], print)
    ckpt = load_checkpoint(tmp_path, moments=False)
    restored = {name: torch.zeros_like(t) for name, t in ema.items()}
    restore_tensors({'ema': restored}, ckpt, parallel)
    assert all(torch.equal(restored[name], t) for name, t in ema.items())
    again = GPT.from_dict(ckpt)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    fresh = again.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    restore_optimizer(fresh, 'adamw', ckpt, parallel)
    assert all(torch.equal(a, b) for a, b in zip(parallel.moments(fresh)[0].values(), moments.values()))
    with pytest.raises(UserError, match="'swa'"):
        restore_tensors({'swa': restored}, ckpt, parallel)
    with pytest.raises(UserError, match='adamw.*lion'):
        restore_optimizer(fresh, 'lion', ckpt, parallel)


@pytest.mark.parametrize('sharded', [False, True])
def test_saving_writes_nothing_through_a_link(tmp_path, sharded):
    """A link planted under a temporary name, through which a file of another folder was overwritten."""
    file, folder, out_dir = tmp_path / 'file', tmp_path / 'folder', tmp_path / 'out'
    file.write_text('keep')
    folder.mkdir()
    out_dir.mkdir()
    names = ('ckpt_sharded', 'ckpt_sharded_prev', 'ckpt_sharded_best') if sharded else \
        ('ckpt.pt', 'ckpt_prev.pt', 'ckpt_best.pt')
    run = RunFolder(str(out_dir), sharded, Parallel())
    for it in (1, 2):
        for name in names:
            os.symlink(folder if sharded else file, out_dir / f'{name}.tmp')
        sets = {'model': dict(shaken().state_dict(keep_vars=True)), 'optimizer': {}}
        run.save(sets, [], dict(model_args={}, iter_num=it), [run.best], print)
        for name in names:
            (out_dir / f'{name}.tmp').unlink(missing_ok=True)
    assert [load_checkpoint(out_dir / name)['iter_num'] for name in names] == [2, 1, 2]
    assert file.read_text() == 'keep' and not list(folder.iterdir())


@pytest.mark.parametrize('sharded', [False, True])
def test_kept_checkpoints_are_links_that_a_kill_or_a_new_run_cannot_confuse(tmp_path, sharded):
    """They take the space twice, are lost by a kill in the first save, or stay beside another run's."""
    def saved(run, *iters):
        for it in iters:
            sets = {'model': dict(shaken().state_dict(keep_vars=True)), 'optimizer': {}}
            facts = dict(model_args={}, iter_num=it)
            run.save(sets, [], facts, [run.numbered(it)], print)
        return run
    run = saved(RunFolder(str(tmp_path), sharded, Parallel()), 5, 10)
    names = numbered_checkpoints(tmp_path)
    assert [load_checkpoint(tmp_path / name)['iter_num'] for name in names] == [5, 10]
    kept, newest = Path(run.numbered(10)), Path(run.newest)
    assert (kept / 'info.pt').samefile(newest / 'info.pt') if sharded else kept.samefile(newest)
    for path in (run.newest, run.previous):  # as if the first save had been killed between its two renames
        remove(path)
    assert newest_checkpoint(tmp_path) == str(kept) and run.used() == names
    saved(RunFolder(str(tmp_path), sharded, Parallel()), 3)
    assert numbered_checkpoints(tmp_path) == [os.path.basename(run.numbered(3))]


# context length

@pytest.mark.parametrize('position', POSITION_ENCODING)
def test_cropping_keeps_what_the_model_says_within_the_shorter_context(position):
    """Positions must stay the same ones, and a longer sequence is refused from then on."""
    model, idx = shaken(position_encoding=position), ids(B, T)
    before = model(idx[:, :6], all_logits=True)[0]
    model.crop_block_size(6)
    assert torch.equal(model(idx[:, :6], all_logits=True)[0], before)
    assert model.config.block_size == 6 and model.generate(idx[:, :3], 10, seed=1).shape == (B, 13)
    with pytest.raises(ValueError, match='block_size is 6'):
        model(idx)
    gradients(model, ids(B, 6), ids(B, 6))
    if position == 'learned_absolute':
        assert params_by_part(model)['position embeddings'] == 6 * 32
        with pytest.raises(ValueError, match='block_size 7'):
            model.crop_block_size(7)


@pytest.mark.parametrize('block_size', [0, -1])
def test_cropping_to_nothing_is_refused(block_size):
    """-1 would cut off one position, as slices do, and every later error would be about something else."""
    with pytest.raises(ValueError, match='block_size'):
        shaken().crop_block_size(block_size)


