"""What must stay true: python -m pytest tests/test_config.py"""
import functools
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from configurator import configure, read_block
from engine.cost import LiveBytes, meta_model
from model import (
    GPT,
    PRESETS,
    REGISTRY,
    GPTConfig,
)
from test_model import ROOT

# config/: the override files and the pages

CONFIGS = sorted(p.name for p in (ROOT / 'config').glob('*.py') if not p.name.startswith('ablate_'))  # which test_compare.py builds
FULL = [n for n in CONFIGS if n.startswith('full_')]
PAGES = sorted(p.name for p in (ROOT / 'config').glob('*.md'))
NUMBER = re.compile(r'\d{1,3}(?:,\d{3})+')


def config_of(args):
    """(config, given) of a command line such as 'config/full_gpt2_124m.py --bias=True'."""
    return configure(str(ROOT / 'train.py'), argv=[a if a.startswith('--') else str(ROOT / a) for a in args.split()])


@functools.cache
def built(args):
    return meta_model(config_of(args)[0])


def count(args):
    return built(args).get_num_params(False)


@pytest.mark.parametrize('name', CONFIGS)
def test_first_line_of_a_config_states_its_parameters(name):
    """A size in a comment outlives the sizes below it."""
    first = (ROOT / 'config' / name).read_text().splitlines()[0]
    assert re.match(r'# .*?: ([\d,]+) parameters', first)[1] == f"{count('config/' + name):,}"


@pytest.mark.parametrize('args, n', [
    ('config/full_gpt2_124m.py', 124_373_760), ('config/full_gpt2_124m.py --bias=True --vocab_size=50257', 124_439_808),
    ('config/full_llama_124m.py', 123_587_328), ('config/full_llama_124m.py --weight_tying=False', 162_220_800),
    ('config/full_team_124m.py', 123_587_328), ('config/full_gpt2_1.36b.py', 1_357_565_184), ('config/full_llama_1.36b.py', 1_357_860_096),
    ('config/full_llama_1.36b.py --vocab_size=50304', 1_442_204_928), ('config/preset_gpt2_owt.py', 124_373_760)])
def test_known_sizes(args, n):
    """The files say these numbers; OpenAI's own is among them."""
    assert count(args) == n
    assert f'{n:,}' in (ROOT / args.split()[0]).read_text()


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_sets_known_keys_and_trains_whole_batches(name):
    config, given = config_of('config/' + name)  # leaves with status 2 for an unknown key or a wrong type
    assert {'dataset', 'out_dir', 'gradient_accumulation_steps'} <= given.keys()
    assert config['warmup_iters'] < config['max_iters'] == config['lr_decay_iters'] and config['min_lr'] < config['learning_rate']
    text = (ROOT / 'config' / name).read_text()
    for b, t, a, product in re.findall(r'(\d+) sequences x (\d+) tokens x (\d+) = ([\d,]+) tokens', text):
        assert (int(b), int(t), int(a)) == (config['batch_size'], config['block_size'], config['gradient_accumulation_steps'])
        assert f'{int(b) * int(t) * int(a):,}' == product
    for n in re.findall(r'max_iters = \d+  # (\d+) billion tokens', text):
        assert round(config['max_iters'] * config['batch_size'] * config['block_size'] * config['gradient_accumulation_steps'] / 1e9) == int(n)
    if '20 tokens a parameter' in text:
        tokens = config['max_iters'] * config['batch_size'] * config['block_size'] * config['gradient_accumulation_steps']
        assert 20 <= tokens / count('config/' + name) < 20.5


@pytest.mark.parametrize('name', FULL)
def test_full_configs_are_the_same_model_on_any_data_set_and_split_over_8_processes(name):
    config, given = config_of('config/' + name)
    assert 'vocab_size' in given and config['vocab_size'] is not None
    assert config['gradient_accumulation_steps'] % 8 == 0
    assert config['dataset'] == 'pystdlib'  # runs without a download


def test_out_dirs_are_not_shared():
    """A long run must not be overwritten by another config's; nanoGPT's two Shakespeare runs share a folder there too."""
    dirs = [config_of('config/' + n)[0]['out_dir'] for n in CONFIGS if n != 'preset_shakespeare_char_cpu.py']
    assert len(dirs) == len(set(dirs))


def test_full_custom_shows_every_key_and_every_choice():
    """It promises every choice: a new key of train.py, part or preset belongs into it."""
    _, given = config_of('config/full_custom.py')
    assert given.keys() == read_block(str(ROOT / 'train.py')).keys()
    lines = {line.split(' = ')[0]: line for line in (ROOT / 'config/full_custom.py').read_text().splitlines() if ' = ' in line}
    for key, parts in {**REGISTRY, 'arch_preset': PRESETS}.items():
        for part in parts:
            assert re.search(rf'\b{part}\b', lines[key]), f'{key} does not show {part}'


def test_team_and_llama_124m_differ_in_name_only():
    (team, _), (llama, _) = config_of('config/full_team_124m.py'), config_of('config/full_llama_124m.py')
    assert {k for k in team if team[k] != llama[k]} == {'arch_preset', 'out_dir'}


@pytest.mark.parametrize('name', ['preset_shakespeare_char.py', 'preset_shakespeare_char_cpu.py', 'preset_gpt2_owt.py'])
def test_nanogpts_presets_are_nanogpts_models(name):
    c = built('config/' + name).config
    assert (c.activation, c.bias, c.normalization, c.position_encoding, c.norm_position, c.weight_tying) == ('gelu', False, 'layernorm', 'learned_absolute', 'pre', True)


# the pages: whatever stands in a table is recomputed from the table's own formula, or from the model in its column's title

def tables(page):
    """[(header cells, [row cells])] of a markdown page."""
    found, inside = [], False
    for line in (ROOT / 'config' / page).read_text().splitlines():
        cells = [c.strip() for c in line.split('|')[1:-1]]
        if not line.startswith('|'):
            inside = False
        elif not inside:
            found.append((cells, []))
            inside = True
        elif not set(cells) <= {'---'}:
            found[-1][1].append(cells)
    return found


def symbols(model):
    c = model.config
    return dict(T=c.block_size, C=c.n_embd, L=c.n_layer, V=c.vocab_size, H=c.n_head, K=c.n_kv_head or c.n_head, D=c.n_embd // c.n_head,
                F=model.transformer.h[0].mlp.c_proj.in_features, N=model.get_num_params(False), training=model.flops_per_token())


def written(x):
    return f'{x:,.0f}' if x == int(x) or abs(x) >= 1000 else f'{x:.1f}'


def formula_tables(page):
    return [t for t in tables(page) if len(t[0]) > 2 and t[0][1].startswith('formula')]


TOTALS = {'parameters': lambda m: m.get_num_params(False), 'forward': lambda m: m.flops_per_token() / 3,
          'training, full': lambda m: m.flops_per_token(), 'training, causal': lambda m: m.flops_per_token(causal=True)}


@pytest.mark.parametrize('page, table', [(p, i) for p in PAGES for i in range(len(formula_tables(p)))])
def test_figures_of_a_page_follow_from_their_formulas(page, table):
    header, rows = formula_tables(page)[table]
    for i, title in enumerate(header[2:], start=2):
        model = built(title.strip('`')) if title.startswith('`') else None
        known, total = symbols(model) if model else {'n': int(title)}, 0
        for row in rows:
            if row[0] in TOTALS:
                assert row[i] == written(TOTALS[row[0]](model)), row
                assert row[1] != 'the sum' or row[i] == written(total), row
            elif row[i] != '0' or model is None:  # 0: this model has no such part, and the sum would show if it had
                value = eval(row[1].strip('`'), {}, known)
                total += value
                assert row[i] == written(value), row


@pytest.mark.parametrize('config', ['full_gpt2_124m', 'full_llama_124m', 'full_gpt2_1.36b', 'full_llama_1.36b'])
def test_parameter_formulas_are_right_part_by_part(config):
    """Two wrong parts can make a right sum."""
    model, sums = built(f'config/{config}.py'), {}
    for header, rows in formula_tables('PARAMETER_FORMULAS.md')[1:3]:
        for row in rows:
            key = header[0], re.split('[,:]', row[0])[0]
            sums[key] = sums.get(key, 0) + int(row[header.index(f'`config/{config}.py`')].replace(',', ''))
    part = lambda name: sums['part', name]
    assert {k: v for k, v in {'token embeddings': part('token embeddings'), 'position embeddings': part('position embeddings'), 'norms': part('norm scales'),
                              'attention': part('attention'), 'ffn': part('FFN'), 'head': part('head')}.items() if v} == model.params_by_part()
    part = lambda name: sums['forward, a token', name]
    assert {'attention projections': part('attention projections'), 'attention scores': part('attention scores and values'),
            'ffn': part('FFN'), 'head': part('head')} == model.flops_by_part()


def test_torch_counts_the_flops_that_the_formulas_give():
    for args in ('config/full_gpt2_124m.py', 'config/full_llama_124m.py --n_kv_head=4'):
        with FlopCounterMode(display=False) as counter:
            built(args)(torch.zeros(1, 1024, dtype=torch.long, device='meta'), all_logits=True)
        assert counter.get_total_flops() == 1024 * built(args).flops_per_token() / 3


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('preset', ['gpt2', 'llama'])
def test_activations_are_those_of_the_formulas(preset, dtype):
    """A part that keeps a tensor more, or a formula that was made up: bytes that forward leaves for backward, of one sequence more."""
    def left(checkpointing, batch_size):
        with FakeTensorMode(), LiveBytes() as live:
            model = GPT(GPTConfig.from_settings(dict(arch_preset=preset, **sizes, activation_checkpointing=checkpointing)))
            idx, before = torch.zeros(batch_size, 1024, dtype=torch.long), live.now
            with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
                loss = model(idx, idx)[1]
            return live.now - before
    sizes = dict(block_size=1024, vocab_size=512, n_layer=3, n_head=4, n_embd=128, d_ff=384)
    known = dict(L=3, C=128, F=384, H=4)
    rows = {row[0]: row[1].strip('`') for header, rows in formula_tables('PARAMETER_FORMULAS.md') if header[0] == 'bytes a token' for row in rows}
    for checkpointing, row in ((False, f'{preset}, {dtype}'), (True, f'{preset}, activation checkpointing')):
        assert left(checkpointing, 2) - left(checkpointing, 1) == pytest.approx(1024 * eval(rows[row], {}, known), rel=0.01), row


def test_flags_on_the_gpt2_page_give_the_sizes_beside_them():
    header, rows = next(t for t in tables('ARCH_GPT2.md') if t[0][-1] == 'parameters')
    assert len(rows) == 5
    for _, args, n in rows:
        assert n == f"{count(args.strip('`')):,}", args
    bare = built(rows[3][1].strip('`'))
    assert isinstance(bare.transformer.ln_f, torch.nn.Identity)


@pytest.mark.parametrize('page, args', [('ARCH_GPT2.md', 'config/full_gpt2_124m.py --bias=True'), ('ARCH_LLAMA.md', 'config/full_llama_124m.py --n_kv_head=4')])
def test_state_dict_names_and_shapes_on_the_pages(page, args):
    model = built(args)
    header, rows = next(t for t in tables(page) if t[0][:2] == ['name', 'shape'])
    listed = {row[0].strip('`').format(i=0): eval(row[1].strip('`'), {}, symbols(model)) for row in rows}
    assert listed == {k: tuple(v.shape) for k, v in model.state_dict().items() if not re.search(r'\.h\.[1-9]', k)}


def test_figures_in_the_pages_prose():
    """What stands in a sentence, computed once more; and no figure with a thousands separator stands anywhere that is not."""
    gpt2, biased, llama = (built(a) for a in ('config/full_gpt2_124m.py', 'config/full_gpt2_124m.py --bias=True', 'config/full_llama_124m.py'))
    s = symbols(gpt2)
    prose = {'ARCH_GPT2.md': [], 'ARCH_LLAMA.md': [f"{s['T'] * s['C']:,}"],
             'PARAMETER_FORMULAS.md': [f"{6 * gpt2.get_num_params() + 12 * s['L'] * s['H'] * s['D'] * s['T'] - int(gpt2.flops_per_token()):,}"]}
    for page in PAGES:
        in_prose = [n for line in (ROOT / 'config' / page).read_text().splitlines() if not line.startswith('|') for n in NUMBER.findall(line)]
        assert in_prose == prose[page], page
    assert gpt2.get_num_params(False) - llama.get_num_params(False) == s['T'] * s['C']
    formulas, llama_page = ((ROOT / 'config' / p).read_text() for p in ('PARAMETER_FORMULAS.md', 'ARCH_LLAMA.md'))
    full, causal = gpt2.flops_per_token(), gpt2.flops_per_token(causal=True)
    assert f'{full / 1e9:.3f} GFLOP a token to train in full, {causal / 1e9:.3f} causal' in formulas
    assert f'{full / causal:.3f} times that of causal counting' in formulas
    assert '3 x 768 x 2048 = 2 x 768 x 3072' in llama_page and 3 * 768 * symbols(llama)['F'] == 2 * 768 * s['F']
    wide = built('config/full_llama_1.36b.py')
    assert f"gives {wide.config.d_ff}, more than its {built('config/full_llama_1.36b.py --d_ff=None').transformer.h[0].mlp.c_proj.in_features}" in llama_page
    # the formulas in sentences: what biases, post-norm and qk_norm add
    L, C, F, H, K, D = (s[k] for k in 'LCFHKD')
    assert biased.get_num_params() - gpt2.get_num_params() == L * ((H + 2 * K) * D + C) + L * (F + C) + (2 * L + 1) * C
    gated = [count(f'config/full_llama_124m.py --n_kv_head=4 --bias={b}') for b in (False, True)]
    assert gated[1] - gated[0] == L * ((H + 2 * 4) * D + C) + L * (2 * 2048 + C)
    assert count('config/full_llama_124m.py --qk_norm=True') - count('config/full_llama_124m.py') == 2 * L * D
    assert count('config/full_gpt2_124m.py') - count('config/full_gpt2_124m.py --norm_position=post') == C
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    assert (REGISTRY['activation']['gelu'](x) - REGISTRY['activation']['gelu_tanh'](x)).abs().max() < 0.0005
