"""config/: the override files, and the pages, whose every figure is computed again."""
import functools
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from configurator import configure, read_block
from conftest import ROOT
from data.folder import prepare_facts
from engine.cost import LiveBytes
from engine.describe import meta_model, params_by_part
from model import GPT, PRESETS, REGISTRY, GPTConfig

# test_compare.py builds the ablations
CONFIGS = sorted(p.name for p in (ROOT / 'config').glob('*.py') if not p.name.startswith('ablate_'))
FULL = [name for name in CONFIGS if name.startswith('full_')]
PAGES = sorted(p.name for p in (ROOT / 'config').glob('*.md'))


def text_of(name):
    return (ROOT / 'config' / name).read_text()


def config_of(args):
    """(config, given) of a command line such as 'config/full_gpt2_124m.py --bias=True'."""
    argv = [arg if arg.startswith('--') else str(ROOT / arg) for arg in args.split()]
    return configure(str(ROOT / 'train.py'), argv=argv)


@functools.cache
def built(args):
    return meta_model(config_of(args)[0])


def count(args):
    return built(args).get_num_params(False)


@pytest.mark.parametrize('name', CONFIGS)
def test_first_line_of_a_config_states_its_parameters(name):
    """A size in a comment outlives the sizes below it."""
    stated = re.match(r'# .*?: ([\d,]+) parameters', text_of(name))[1]
    assert stated == f"{count('config/' + name):,}"


@pytest.mark.parametrize('args, n', [
    ('config/full_gpt2_124m.py', 124_373_760),
    ('config/full_gpt2_124m.py --bias=True --vocab_size=50257', 124_439_808),
    ('config/full_llama_124m.py', 123_587_328),
    ('config/full_llama_124m.py --weight_tying=False', 162_220_800),
    ('config/full_team_124m.py', 123_587_328),
    ('config/full_gpt2_1.36b.py', 1_357_565_184),
    ('config/full_llama_1.36b.py', 1_357_860_096),
    ('config/full_llama_1.36b.py --vocab_size=50304', 1_442_204_928),
    ('config/preset_gpt2_owt.py', 124_373_760),
])
def test_known_sizes(args, n):
    """The files say these numbers; OpenAI's own is among them."""
    assert count(args) == n
    assert f'{n:,}' in (ROOT / args.split()[0]).read_text()


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_does_not_fix_a_width_that_follows_from_others(name):
    """d_ff = 2048 in full_llama_124m.py: with --ffn_type=standard it had 19 million parameters fewer."""
    d_ff = built('config/' + name).config.d_ff
    assert d_ff is None or count('config/' + name) != count(f'config/{name} --d_ff=None')


def test_another_ffn_type_costs_as_much():
    llama = 'config/full_llama_124m.py'
    assert count(f'{llama} --ffn_type=standard') == count(f'{llama} --ffn_type=geglu') == count(llama)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_sets_known_keys_and_trains_whole_batches(name):
    """Token counts in comments must follow from the settings."""
    config, given = config_of('config/' + name)  # UserError for an unknown key or a wrong type
    assert {'dataset', 'out_dir', 'gradient_accumulation_steps'} <= given.keys()
    assert config['warmup_iters'] < config['max_iters'] and config['lr_decay_iters'] is None
    assert config['min_lr'] < config['learning_rate']
    batch = config['batch_size'], config['block_size'], config['gradient_accumulation_steps']
    tokens_per_iter = batch[0] * batch[1] * batch[2]
    for *factors, product in re.findall(r'(\d+) sequences x (\d+) tokens x (\d+) = ([\d,]+) tokens', text_of(name)):
        assert tuple(map(int, factors)) == batch
        assert product == f'{tokens_per_iter:,}'
    tokens = config['max_iters'] * tokens_per_iter
    for billions in re.findall(r'max_iters = \d+  # (\d+) billion tokens', text_of(name)):
        assert round(tokens / 1e9) == int(billions)
    if '20 tokens per parameter' in text_of(name):
        assert 20 <= tokens / count('config/' + name) < 20.5


@pytest.mark.parametrize('name', FULL)
def test_full_configs_are_the_same_model_on_any_data_set_and_split_over_8_processes(name):
    config, given = config_of('config/' + name)
    assert 'vocab_size' in given and config['vocab_size'] is not None
    assert config['gradient_accumulation_steps'] % 8 == 0


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_names_data_of_its_size(name):
    """A model of 124M and more trained on 12 MB of bytes, thousands of epochs, without a word."""
    facts = prepare_facts(ROOT / 'data' / config_of('config/' + name)[0]['dataset'] / 'prepare.py')
    assert (facts['download_mb'] > 10_000) == (count('config/' + name) > 120e6)


def test_out_dirs_are_not_shared():
    """A long run must not be overwritten by another config's; nanoGPT's two Shakespeare runs share one."""
    names = [name for name in CONFIGS if name != 'preset_shakespeare_char_cpu.py']
    folders = [config_of('config/' + name)[0]['out_dir'] for name in names]
    assert len(folders) == len(set(folders))


def test_full_custom_shows_every_key_and_every_choice():
    """It promises every choice: a new key of train.py, part or preset belongs into it."""
    _, given = config_of('config/full_custom.py')
    assert given.keys() == read_block(str(ROOT / 'train.py')).keys()
    # each setting with the comment lines above it
    settings = re.findall(r'((?:^#.*\n)*)^(\w+) = (.*)', text_of('full_custom.py'), flags=re.M)
    shown = {key: above + rest for above, key, rest in settings}
    for key, parts in {**REGISTRY, 'arch_preset': PRESETS}.items():
        for part in parts:
            assert re.search(rf'\b{part}\b', shown[key]), f'{key} does not show {part}'


def test_team_and_llama_124m_differ_in_name_only():
    (team, _), (llama, _) = config_of('config/full_team_124m.py'), config_of('config/full_llama_124m.py')
    assert {key for key in team if team[key] != llama[key]} == {'arch_preset', 'out_dir'}


@pytest.mark.parametrize('name', ['preset_shakespeare_char.py', 'preset_shakespeare_char_cpu.py', 'preset_gpt2_owt.py'])
def test_nanogpts_presets_are_nanogpts_models(name):
    c = built('config/' + name).config
    assert (c.activation, c.normalization, c.position_encoding) == ('gelu', 'layernorm', 'learned_absolute')
    assert (c.norm_position, c.bias, c.weight_tying) == ('pre', False, True)


# The pages: each figure of a table follows from the table's own formula, or from the model in its column's title.

def tables(page):
    """[(header cells, [row cells])] of a markdown page."""
    found, inside = [], False
    for line in text_of(page).splitlines():
        cells = [cell.strip() for cell in line.split('|')[1:-1]]
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
    return dict(
        T=c.block_size, C=c.n_embd, L=c.n_layer, V=c.vocab_size, H=c.n_head, K=c.n_kv_head or c.n_head,
        D=c.n_embd // c.n_head, F=model.transformer.h[0].mlp.c_proj.in_features,
        N=model.get_num_params(False), training=model.flops_per_token())


def written(x):
    return f'{x:,.0f}' if x == int(x) or abs(x) >= 1000 else f'{x:.1f}'


def formula_tables(page):
    return [table for table in tables(page) if len(table[0]) > 2 and table[0][1].startswith('formula')]


TOTALS = {
    'parameters': lambda model: model.get_num_params(False),
    'forward': lambda model: model.flops_per_token() / 3,
    'training, full': lambda model: model.flops_per_token(),
    'training, causal': lambda model: model.flops_per_token(causal=True),
}


@pytest.mark.parametrize('page, table', [(page, i) for page in PAGES for i in range(len(formula_tables(page)))])
def test_figures_of_a_page_follow_from_their_formulas(page, table):
    header, rows = formula_tables(page)[table]
    for i, title in enumerate(header[2:], start=2):
        model = built(title.strip('`')) if title.startswith('`') else None
        known, total = symbols(model) if model else {'n': int(title)}, 0
        for row in rows:
            if row[0] in TOTALS:
                assert row[i] == written(TOTALS[row[0]](model)), row
                assert row[1] != 'the sum' or row[i] == written(total), row
            elif row[i] != '0' or model is None:  # 0: this model lacks the part, or the sum would not be right
                value = eval(row[1].strip('`'), {}, known)
                total += value
                assert row[i] == written(value), row


@pytest.mark.parametrize('config', ['full_gpt2_124m', 'full_llama_124m', 'full_gpt2_1.36b', 'full_llama_1.36b'])
def test_parameter_formulas_are_right_part_by_part(config):
    """Two wrong parts can make a right sum."""
    sums = {}
    for header, rows in formula_tables('PARAMETER_FORMULAS.md')[1:3]:
        column = header.index(f'`config/{config}.py`')
        for row in rows:
            key = header[0], re.split('[,:]', row[0])[0]
            sums[key] = sums.get(key, 0) + int(row[column].replace(',', ''))
    model = built(f'config/{config}.py')
    parameters = {'norms': 'norm scales', 'ffn': 'FFN'}
    parameters |= {name: name for name in ('token embeddings', 'position embeddings', 'attention', 'head')}
    flops = {'attention scores': 'attention scores and values', 'ffn': 'FFN'}
    flops |= {name: name for name in ('attention projections', 'head')}
    counted = {name: sums['part', row] for name, row in parameters.items()}
    assert {name: n for name, n in counted.items() if n} == params_by_part(model)
    counted = {name: sums['forward, per token', row] for name, row in flops.items()}
    assert counted == model.flops_by_part()


def test_torch_counts_the_flops_that_the_formulas_give():
    for args in ('config/full_gpt2_124m.py', 'config/full_llama_124m.py --n_kv_head=4'):
        with FlopCounterMode(display=False) as counter:
            built(args)(torch.zeros(1, 1024, dtype=torch.long, device='meta'), all_logits=True)
        assert counter.get_total_flops() == 1024 * built(args).flops_per_token() / 3


def bytes_left_by_forward(settings, batch_size, dtype):
    with FakeTensorMode(), LiveBytes() as live:
        model = GPT(GPTConfig.from_settings(settings))
        idx, before = torch.zeros(batch_size, 1024, dtype=torch.long), live.now
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
            loss = model(idx, idx)[1]  # alive while the bytes are read
        left = live.now - before
        del loss
    return left


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('preset', ['gpt2', 'llama'])
def test_activations_are_those_of_the_formulas(preset, dtype):
    """A part that keeps one more tensor, or a formula that was made up: bytes for backward, of one sequence more."""
    settings = dict(arch_preset=preset, block_size=1024, vocab_size=512, n_layer=3, n_head=4, n_embd=128, d_ff=384)
    known = dict(L=3, C=128, F=384, H=4)
    found = [rows for header, rows in formula_tables('PARAMETER_FORMULAS.md') if header[0] == 'bytes per token']
    formulas = {row[0]: row[1].strip('`') for rows in found for row in rows}
    for checkpointing, name in ((False, f'{preset}, {dtype}'), (True, f'{preset}, activation checkpointing')):
        settings['activation_checkpointing'] = checkpointing
        one, two = (bytes_left_by_forward(settings, batch_size, dtype) for batch_size in (1, 2))
        assert two - one == pytest.approx(1024 * eval(formulas[name], {}, known), rel=0.01), name


def test_flags_on_the_gpt2_page_give_the_sizes_beside_them():
    rows = next(rows for header, rows in tables('ARCH_GPT2.md') if header[-1] == 'parameters')
    assert len(rows) == 5
    for _, args, n in rows:
        assert n == f"{count(args.strip('`')):,}", args
    bare = built(rows[3][1].strip('`'))
    assert isinstance(bare.transformer.ln_f, torch.nn.Identity)


@pytest.mark.parametrize('page, args', [
    ('ARCH_GPT2.md', 'config/full_gpt2_124m.py --bias=True'),
    ('ARCH_LLAMA.md', 'config/full_llama_124m.py --n_kv_head=4'),
])
def test_state_dict_names_and_shapes_on_the_pages(page, args):
    model = built(args)
    rows = next(rows for header, rows in tables(page) if header[:2] == ['name', 'shape'])
    listed = {row[0].strip('`').format(i=0): eval(row[1].strip('`'), {}, symbols(model)) for row in rows}
    state = model.state_dict()
    assert listed == {name: tuple(state[name].shape) for name in state if not re.search(r'\.h\.[1-9]', name)}


def test_figures_in_the_pages_prose():
    """A figure in a sentence is computed once more; no other figure with a thousands separator stands in one."""
    gpt2, llama = built('config/full_gpt2_124m.py'), built('config/full_llama_124m.py')
    s = symbols(gpt2)
    positions = s['T'] * s['C']
    nanogpt_flops = 6 * gpt2.get_num_params() + 12 * s['L'] * s['H'] * s['D'] * s['T']
    too_many = nanogpt_flops - int(gpt2.flops_per_token())
    expected = {'ARCH_GPT2.md': [], 'ARCH_LLAMA.md': [positions], 'PARAMETER_FORMULAS.md': [too_many]}
    for page in PAGES:
        prose = ' '.join(line for line in text_of(page).splitlines() if not line.startswith('|'))
        assert re.findall(r'\d{1,3}(?:,\d{3})+', prose) == [f'{n:,}' for n in expected[page]], page
    assert gpt2.get_num_params(False) - llama.get_num_params(False) == positions

    full, causal = gpt2.flops_per_token(), gpt2.flops_per_token(causal=True)
    formulas = text_of('PARAMETER_FORMULAS.md')
    assert f'{full / 1e9:.3f} GFLOP per token in full, {causal / 1e9:.3f} causal' in formulas
    assert f'{full / causal:.3f} times that of causal counting' in formulas
    page = text_of('ARCH_LLAMA.md')
    assert '3 x 768 x 2048 = 2 x 768 x 3072' in page and 3 * 768 * symbols(llama)['F'] == 2 * 768 * s['F']
    wide = built('config/full_llama_1.36b.py').config.d_ff
    usual = symbols(built('config/full_llama_1.36b.py --d_ff=None'))['F']
    assert f'gives {wide}, more than its {usual}' in page


def test_formulas_in_the_pages_sentences():
    """The parameters that biases, post-norm and qk_norm add, and how close gelu_tanh is to gelu."""
    L, C, F, H, K, D = (symbols(built('config/full_gpt2_124m.py'))[name] for name in 'LCFHKD')
    gpt2, llama = 'config/full_gpt2_124m.py', 'config/full_llama_124m.py'
    biases = L * ((H + 2 * K) * D + C) + L * (F + C) + (2 * L + 1) * C
    assert count(f'{gpt2} --bias=True') - count(gpt2) == biases
    grouped = f'{llama} --n_kv_head=4'
    gated_biases = L * ((H + 2 * 4) * D + C) + L * (2 * 2048 + C)
    assert count(f'{grouped} --bias=True') - count(f'{grouped} --bias=False') == gated_biases
    assert count(f'{llama} --qk_norm=True') - count(llama) == 2 * L * D
    assert count(gpt2) - count(f'{gpt2} --norm_position=post') == C
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    activations = REGISTRY['activation']
    assert (activations['gelu'](x) - activations['gelu_tanh'](x)).abs().max() < 0.0005
