"""The command line of the scripts themselves: --help, and what `python model.py` prints."""
import math
import re
import subprocess
import sys

import pytest
import torch
from test_checkpoint import nanogpt_checkpoint
from test_config import CONFIGS
from test_configurator import refusal

from configurator import RANGES, configure, read_block
from conftest import ROOT, checkpoint, command, refused
from engine.common import UserError
from engine.cost import memory_estimate
from engine.help import COMMON
from engine.hints import OTHER_NAMES, WITH_ADVICE, suggest_key
from model import SIZES, GPTConfig
from tests.warm import HANGS


def test_train_help_lists_every_key_of_its_block():
    """A setting without a comment, or one that --help does not know."""
    result = command('train.py', '--help=all')
    assert result.returncode == 0 and result.stderr == ''
    block = (ROOT / 'train.py').read_text().split('config, given = configure')[0]
    settings = re.findall(r'^[a-z]\w*(?:: .+?)? = ', block, flags=re.M)
    keys = re.findall(r'^([a-z]\w*)(?:: .+?)? = .+?  # (.+)$', block, flags=re.M)
    assert len(keys) == len(settings) > 50, 'a setting without a comment'
    words = ' '.join(result.stdout.split())
    for key, comment in keys:
        assert re.search(rf'--{key}=\S+ {re.escape(comment)}( |$)', words), key


def test_help_without_a_group_is_short():
    """A new setting in no group is in every --help; a COMMON setting that was renamed is in none."""
    block = read_block(str(ROOT / 'train.py'))
    assert set(COMMON) <= block.keys() and all(setting.group for setting in block.values())
    assert 15 <= len(COMMON) <= 20


def test_other_names_lead_to_settings_that_exist():
    """A hint that leads to a setting that was renamed, or that claims a name which is itself a setting."""
    blocks = [read_block(str(ROOT / script)) for script in ('train.py', 'sample.py')]
    assert all(any(ours in block for block in blocks) for ours in OTHER_NAMES)
    for block in blocks:
        names = ' '.join(others for ours, others in OTHER_NAMES.items() if ours in block).split()
        assert len(names) == len(set(names)) and not block.keys() & set(names)
    for name, advice in WITH_ADVICE.items():
        assert name in OTHER_NAMES[re.match(r'\w+', advice)[0]].split()


@pytest.mark.parametrize('script, name, ours', [
    ('train.py', 'context_length', 'block_size'),
    ('train.py', 'd_model', 'n_embd'),
    ('train.py', 'hidden_size', 'n_embd'),
    ('train.py', 'num_layers', 'n_layer'),
    ('train.py', 'max_steps', 'max_iters'),
    ('train.py', 'lr', 'learning_rate'),
    ('train.py', 'lr_max', 'learning_rate'),
    ('train.py', 'use_gradient_checkpointing', 'activation_checkpointing'),
    ('train.py', 'resume_from', 'init_from=resume, with the out_dir of the run'),
    ('sample.py', 'prompt', 'start'),
])
def test_a_common_name_has_the_right_hint(script, name, ours):
    """--use_gradient_checkpointing=True was answered with sharded_checkpoint, and --lr=1e-3 with --help."""
    with pytest.raises(UserError, match=f"unknown key '{name}' on the command line; use {ours}$"):
        configure(str(ROOT / script), argv=[f'--{name}=1'])


def test_the_names_in_the_docs_have_a_hint_at_ours():
    """The table of other trainers' names in docs/from-nanogpt.md, and a hint that says something else."""
    block = read_block(str(ROOT / 'train.py'))
    rows = (ROOT / 'docs/from-nanogpt.md').read_text().split('## Names')[1].splitlines()
    for row in rows:
        first, _, others = row.removeprefix('|').partition('|')
        ours = re.findall('`(.+?)`', first)
        for name in re.findall('`(.+?)`', others):
            hint = suggest_key(name, block)
            right = any(f"'{key}'?" in hint or re.match(f'; use {key}(,|$)', hint) for key in ours)
            assert name in block or right, (name, hint)
    assert len(rows) > 10


@pytest.mark.parametrize('script, flags', [
    ('train.py', ['--init_from=resume', '--dataset=nonesuch']),
    ('train.py', ['--init_from=resume', '--eval_only=True']),
    ('sample.py', []),
])
def test_a_missing_checkpoint_is_said_first_and_the_others_are_listed(tmp_path, script, flags):
    """The answer to --init_from=resume --out_dir=nope was that OpenWebText is not prepared."""
    for path in ('out-a/ckpt.pt', 'out-b/ckpt_best.pt', 'out-c/ckpt_sharded', 'notes/text.txt'):
        (tmp_path / path).mkdir(parents=True)
    done = command(ROOT / script, *flags, '--out_dir=nope', cwd=tmp_path)
    refused(done, "no checkpoint at 'nope'; the folders here that have one: out-a, out-b, out-c")


SCRIPTS = 'train.py', 'sample.py', 'bench.py', 'compare.py', 'engine/describe.py'


@pytest.mark.parametrize('script', SCRIPTS)
def test_defaults_are_in_their_ranges(script):
    """Only the values that somebody sets are checked."""
    for name, setting in read_block(str(ROOT / script)).items():
        assert setting.comment, name
        if setting.range and isinstance(setting.default, (int, float)):
            assert RANGES[setting.range][1](setting.default), name


@pytest.mark.parametrize('script', SCRIPTS)
def test_every_number_has_a_range(script):
    """--norm_eps=18446744073709551616 and --temperature=1e308 were accepted, since their keys had no range."""
    for name, setting in read_block(str(ROOT / script)).items():
        numeric = {int, float} & {setting.kind, *setting.choices()}
        assert bool(setting.range) == bool(numeric), name


def test_no_range_holds_what_overflows():
    for name, (_, inside) in RANGES.items():
        assert not any(map(inside, (math.nan, math.inf, -math.inf, 1e308, -1))), name


MODELS = dict(n_layer=1, n_head=1, n_embd=2, vocab_size=8, block_size=4)


def accepts(key, value):
    try:
        return bool(GPTConfig(**MODELS | {key: value}))
    except ValueError as e:
        assert key in str(e)
        return False


@pytest.mark.parametrize('key', ['norm_eps', 'rope_theta', 'logit_softcap', 'dropout', *SIZES])
def test_the_ranges_of_the_settings_are_those_of_the_model(key):
    """A setting that train.py accepts and GPTConfig refuses, or the other way round in a checkpoint."""
    setting = read_block(str(ROOT / 'train.py'))[key]
    one = 1 if setting.kind is int else 1.0
    values = [-one, 0 * one, one, 1000 * one, 1001 * one, 2 ** 24 * one, (2 ** 24 + 1) * one]
    values += [] if setting.kind is int else [1e-40, 1e-30, 1e-4, 1e-3, 1e6, 1e30, 1e31, math.nan]
    for value in values:
        if not (key in ('n_head', 'n_kv_head') and value > 1):  # they must divide n_embd and n_head
            assert accepts(key, value) == RANGES[setting.range][1](value), (key, value)


@pytest.mark.parametrize('script, parts', [
    ('train.py', ['n_layer', 'n_embd', 'GiB of memory']),
    ('bench.py', ['n_layer', 'n_embd', 'GiB of memory']),
])
def test_weights_beyond_the_memory_are_refused_before_they_are_built(tmp_path, text_set, script, parts):
    """--n_embd=1000000 ended with the allocator's text, if the machine survived the attempt."""
    flags = '--n_embd=1000000 --n_head=2 --n_layer=1000 --block_size=16 --device=cpu --peak_tflops=1'.split()
    refused(command(script, f'--dataset={text_set}', f'--out_dir={tmp_path}/out', *flags), *parts)


def test_a_micro_batch_beyond_any_device_is_refused():
    """`python model.py --batch_size=2147483647` took hours: it ran the loss chunk by chunk, on tensors without data."""
    config = GPTConfig(**MODELS)
    with pytest.raises(UserError, match='batch_size'):
        memory_estimate(config, 2 ** 23, 'float32', torch.device('cpu'))


def test_model_describes_a_config_without_holding_it():
    """1.36 billion float32 are 5.4 GB, which a laptop need not have to read a table."""
    code = ("import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, '.'); "
            "runpy.run_path('model.py', run_name='__main__'); "
            "from engine.machine import memory, torch; print('peak', memory(torch.device('cpu'))['peak'])")
    argv = [sys.executable, '-c', code, 'model.py', 'config/full_llama_1.36b.py']
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 0, result.stderr
    matrices = 1_357_860_096 - 32000 * 2304 - (2 * 18 + 1) * 2304
    flops = 3 * (2 * matrices + 4 * 2048 * 2304 * 18)  # 2 per weight of a matrix, scores against 2048 keys
    causal = flops - 3 * 2 * 2048 * 2304 * 18
    for pattern in (r'total +1,357,860,096\n', r'n_layer +18\n', r'normalization +rmsnorm\n', r'vocab_size +32000\n',
                    rf'training, 3 x forward +{flops:,} +{causal:,}\n'):
        assert re.search(pattern, result.stdout), pattern
    if sys.platform == 'linux':
        assert int(result.stdout.split('peak ')[1]) < 2e9


def test_model_lists_every_config_with_its_counts():
    """A config file that does not build is found by whoever runs it."""
    result = command('model.py', '--list=True')
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines()[1:]}
    assert rows.keys() == set(CONFIGS)
    assert '1,357,860,096' in rows['full_llama_1.36b.py']


@pytest.mark.parametrize('flag, parts', [
    ('--ckpt=missing', ["no checkpoint at 'missing'"]),
    ('--n_layer=0', ['n_layer', '0']),
    ('--n_head=5', ['n_head', '5']),
    ('--activation=nonesuch', ['nonesuch', 'gelu_tanh']),
    ('--n_layers=3', ["'n_layers'", "'n_layer'"]),
])
def test_model_says_what_is_wrong_in_one_line(flag, parts):
    """A traceback for a typing error."""
    refusal(command('model.py', flag), *parts)


def test_model_inspects_a_checkpoint(tmp_path):
    """Which model is this file? Its sizes, how far it got, and the settings that made it."""
    nanogpt_checkpoint(tmp_path / 'ckpt.pt')
    result = command('model.py', f'--ckpt={tmp_path}')
    assert result.returncode == 0, result.stderr
    matrices = 64 * 32 + 16 * 32 + 2 * 12 * 32 * 32
    for pattern in (rf'total +{matrices + 5 * 32:,}\n', r'iterations +7\n', r"best val loss .*1\.5", r"dataset +'x'\n",
                    re.escape(str(tmp_path))):
        assert re.search(pattern, result.stdout), pattern
    rewritten = checkpoint(tmp_path) | dict(best_val_loss=torch.inf)
    torch.save(rewritten, tmp_path / 'ckpt.pt')
    assert 'best val loss            no evaluation yet' in command('model.py', f'--ckpt={tmp_path}').stdout
