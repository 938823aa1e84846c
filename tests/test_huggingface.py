"""Weights from and to Hugging Face and ONNX: python -m pytest tests/test_huggingface.py"""
import json
from dataclasses import dataclass

import pytest
import torch

from configurator import configure
from conftest import ROOT, command, missing, one_line, refused, some_text, tokenizer_named
from data.tokenizer import get_tokenizer
from engine.checkpoint import load_checkpoint
from engine.describe import export_checkpoint
from engine.huggingface import load_pretrained
from model import ATTENTION_BACKEND, GPT, PRESETS, GPTConfig

TINY = dict(block_size=16, vocab_size=64, n_layer=2, n_head=4, n_embd=32, attention_chunk_size=5)
V, T, B = TINY['vocab_size'], TINY['block_size'], 3
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)
ENDS = dict(bos_token_id=0, eos_token_id=0)
GPT2_SIZES = dict(vocab_size=V, n_positions=T, n_embd=32, n_layer=2, n_head=4) | ENDS
LLAMA_SIZES = dict(
    vocab_size=V, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=T) | ENDS
GPT2_WIDE = dict(tie_word_embeddings=False, n_inner=40, activation_function='gelu', layer_norm_epsilon=1e-3)
LLAMA3_ROPE = LLAMA3 | dict(rope_type='llama3', rope_theta=500.0)
THEIRS = {  # name: (class, settings)
    'gpt2': ('GPT2', GPT2_SIZES),
    'gpt2 untied, wide, exact gelu': ('GPT2', GPT2_SIZES | GPT2_WIDE),
    'llama': ('Llama', LLAMA_SIZES),
    'llama gqa': ('Llama', LLAMA_SIZES | dict(num_key_value_heads=2)),
    'llama mqa tied': ('Llama', LLAMA_SIZES | dict(num_key_value_heads=1, tie_word_embeddings=True)),
    'llama 3': ('Llama', LLAMA_SIZES | dict(rope_parameters=LLAMA3_ROPE, rms_norm_eps=1e-3)),
    'llama biased': ('Llama', LLAMA_SIZES | dict(attention_bias=True, mlp_bias=True)),
    'mistral': ('Mistral', LLAMA_SIZES | dict(num_key_value_heads=2, sliding_window=None)),
    'qwen2': ('Qwen2', LLAMA_SIZES | dict(num_key_value_heads=2)),
    'qwen3': ('Qwen3', LLAMA_SIZES | dict(num_key_value_heads=2, head_dim=8)),
    'arcee': ('Arcee', LLAMA_SIZES),
    'starcoder2': ('Starcoder2', LLAMA_SIZES | dict(num_key_value_heads=2)),
}


def build(**settings):
    torch.manual_seed(1)
    return GPT(GPTConfig(**TINY | settings))


def ids(*shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(0))


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, check_dtype=False)


def shake(model):
    """Make every parameter of a model matter: at initialisation biases are 0 and gains 1."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope='module')
def theirs():
    """A function name, changes -> a model of transformers. Each is made once."""
    transformers = pytest.importorskip('transformers')
    made = {}

    def make(name, **changes):
        key = name, *sorted(changes.items())
        if key not in made:
            cls, settings = THEIRS[name]
            config = getattr(transformers, f'{cls}Config')(**settings | changes)
            head = 'LMHeadModel' if cls == 'GPT2' else 'ForCausalLM'
            torch.manual_seed(0)
            made[key] = shake(getattr(transformers, cls + head)(config))
        return made[key]
    return make


@torch.no_grad()
def same_logits(ours, hf):
    for length in (1, 7, T):
        close(ours(ids(B, length), all_logits=True)[0], hf(ids(B, length)).logits)


# in

@pytest.mark.parametrize('shards', [{}, {'max_shard_size': '10KB'}], ids=['one file', 'shards'])
@pytest.mark.parametrize('name', THEIRS)
def test_pretrained_logits_are_those_of_transformers(tmp_path, theirs, name, shards):
    """The other RoPE layout, a transposed matrix, gate and up swapped or another GELU load, and talk nonsense."""
    hf = theirs(name)
    hf.save_pretrained(tmp_path, **shards)
    assert len(list(tmp_path.glob('*.safetensors'))) > 1 or not shards
    ours = GPT.from_pretrained(tmp_path, dropout=0.1)
    assert ours.config.dropout == 0.1 and not ours.training
    assert ours.get_num_params(False) == sum(p.numel() for p in hf.parameters())
    same_logits(ours, hf)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), 'w')


def test_the_hubs_own_gpt2_files_load(tmp_path, theirs):
    """They lack the prefix transformer. and hold causal masks; older ones are pickles."""
    hf = theirs('gpt2')
    hf.save_pretrained(tmp_path)
    (tmp_path / 'model.safetensors').unlink()
    state = {k.removeprefix('transformer.'): v for k, v in hf.state_dict().items() if k != 'lm_head.weight'}
    state['h.0.attn.bias'] = torch.ones(1, 1, T, T)
    torch.save(state, tmp_path / 'pytorch_model.bin')
    same_logits(GPT.from_pretrained(tmp_path), hf)
    short = GPT.from_pretrained(tmp_path, block_size=8)
    assert short.config.block_size == 8
    close(short(ids(B, 8))[0], hf(ids(B, 8)).logits[:, -1:])
    torch.save(state | {'x': Evil(tmp_path / 'marker')}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(ValueError) as e:
        GPT.from_pretrained(tmp_path)
    one_line(e.value, 'pytorch_model.bin')
    assert not (tmp_path / 'marker').exists()


@pytest.mark.parametrize('name, changes, parts', [
    ('gpt2', dict(model_type='bloom'), ["model_type='bloom'", 'llama']),
    ('gpt2', dict(activation_function='mish'), ["activation_function='mish'", 'gelu_new']),
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), ['scale_attn_by_inverse_layer_idx=True']),
    ('gpt2', dict(n_embd=None), ["'n_embd'"]),
    ('gpt2', dict(n_layer=3), ["'transformer.h.2.ln_1.weight'"]),
    ('gpt2', dict(n_layer=1), ['transformer.h.1.', 'no place']),
    ('gpt2', dict(n_inner=64), ['mlp.c_fc', '(64, 32)']),
    ('gpt2', dict(n_head='four'), ['n_head']),
    ('gpt2', dict(quantization_config={'bits': 4}), ['quantization_config']),
    ('llama', dict(num_attention_heads=0), ['num_attention_heads=0']),
    ('llama', dict(rope_parameters={'rope_type': 'yarn', 'factor': 2}), ['rope_parameters', 'yarn', 'llama3']),
    ('llama', dict(head_dim=16), ['head_dim=16']),
    ('llama', dict(mlp_bias=True), ['mlp_bias=True', 'attention_bias']),
], ids=str)
def test_a_setting_without_a_counterpart_is_refused_by_its_key(tmp_path, theirs, name, changes, parts):
    """A model that loads as another one."""
    theirs(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError) as e:
        GPT.from_pretrained(tmp_path)
    one_line(e.value, tmp_path, *parts)


def test_a_bias_of_the_attentions_output_must_be_zeros(tmp_path, theirs):
    """qkv_bias is attention_bias without that one; it cannot just be left out."""
    hf = theirs('llama', attention_bias=True)
    hf.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as e:
        GPT.from_pretrained(tmp_path)
    one_line(e.value, 'model.layers.0.self_attn.o_proj.bias', 'no place')
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.o_proj.bias.zero_()
    hf.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.qkv_bias and not ours.config.bias
    same_logits(ours, hf)


def test_a_sliding_window_limits_the_context(tmp_path, theirs):
    """Within the window attention is full; beyond it, it would see too much."""
    hf = theirs('mistral', sliding_window=8)
    hf.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.block_size == 8
    close(ours(ids(B, 8), all_logits=True)[0], hf(ids(B, 8)).logits)
    with pytest.raises(ValueError) as e:
        GPT.from_pretrained(tmp_path, block_size=T)
    one_line(e.value, 'sliding_window=8', f'block_size={T}')


@pytest.mark.parametrize('content', [b'', b'not safetensors at all', b'[]'])
def test_damaged_pretrained_files_are_refused(tmp_path, theirs, content):
    theirs('llama').save_pretrained(tmp_path)
    for name in ('model.safetensors', 'config.json'):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as e:
            GPT.from_pretrained(tmp_path)
        one_line(e.value, tmp_path, name)


@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
@pytest.mark.parametrize('name, parts', [
    ('gpt2', ['gpt2', 'hub']), ('nowhere', ['nowhere', 'gpt2']), ('some/where', ['some/where', 'hub'])])
def test_without_the_hub_an_id_is_one_line(tmp_path, script, name, parts):
    flags = [f'--init_from={name}', f'--out_dir={tmp_path}/out', '--device=cpu']
    flags += ['--dataset=pystdlib'] if script == 'train.py' else []
    offline = {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)}
    refused(command(script, *flags, env=offline), *parts)
    assert not (tmp_path / 'out').exists()


# out

QUICK_TEST = configure(str(ROOT / 'train.py'), argv=[str(ROOT / 'config/preset_quick_test.py')])[0]
QUICK_TEST_PARTS = {
    key: QUICK_TEST[key] for key in ('arch_preset', 'qk_norm', 'zero_init_residual', *PRESETS['custom'])}
GPT2_UNUSUAL = dict(
    weight_tying=False, d_ff=40, activation='leaky_relu', normalization='layernorm_nobias', norm_eps=1e-3)
LLAMA3_UNUSUAL = dict(
    n_kv_head=1, bias=True, weight_tying=True, activation='gelu_tanh', rope_theta=500.0, rope_scaling=LLAMA3)
ARCEE = dict(normalization='rmsnorm', position_encoding='rope', activation='relu_squared', bias=False)
OURS = {  # name: (the class that it becomes, settings)
    'nanogpt': ('GPT2', dict(bias=False)),
    'gpt2': ('GPT2', dict(arch_preset='gpt2')),
    'gpt2 untied': ('GPT2', dict(arch_preset='gpt2') | GPT2_UNUSUAL),
    'gpt2 qkv': ('GPT2', dict(bias=False, qkv_bias=True)),
    'llama': ('Llama', dict(arch_preset='llama', n_kv_head=2)),
    'llama 3': ('Llama', dict(arch_preset='llama') | LLAMA3_UNUSUAL),
    'llama qkv': ('Llama', dict(arch_preset='llama', qkv_bias=True, n_kv_head=2)),
    'geglu': ('Llama', dict(arch_preset='llama', ffn_type='geglu')),
    'qwen3': ('Qwen3', dict(arch_preset='llama', qk_norm=True, n_kv_head=2)),
    'qwen3 qkv': ('Qwen3', dict(arch_preset='llama', qk_norm=True, qkv_bias=True)),
    'quick test': ('Qwen3', QUICK_TEST_PARTS),
    'arcee': ('Arcee', ARCEE),
    'arcee qkv': ('Arcee', ARCEE | dict(qkv_bias=True)),
    'hybrid': ('Starcoder2', dict(arch_preset='hybrid')),
    'hybrid biased': ('Starcoder2', dict(arch_preset='hybrid', bias=True, n_kv_head=1)),
}


@pytest.mark.parametrize('name', OURS)
def test_exported_logits_are_those_of_transformers(tmp_path, name):
    """Otherwise serving and evaluation would see another model than the one that was trained."""
    transformers = pytest.importorskip('transformers')
    cls, settings = OURS[name]
    ours = shake(GPT(GPTConfig.from_settings(TINY | settings)))
    ours.save_pretrained(tmp_path / 'hf')
    hf, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf', output_loading_info=True)
    assert type(hf).__name__.startswith(cls) and not any(report.values()), report
    same_logits(ours, hf.eval())
    back = GPT.from_pretrained(tmp_path / 'hf')
    assert torch.equal(back(ids(B, T), all_logits=True)[0], ours(ids(B, T), all_logits=True)[0])
    gate = {'gelu': 'geglu', 'gelu_tanh': 'geglu'}.get(ours.config.activation, 'swiglu')
    assert back.config.ffn_type in ('standard', gate)


@pytest.mark.parametrize('settings, parts', [
    (dict(arch_preset='llama', norm_position='post', logit_softcap=3.0),
     ['norm_position=post', 'logit_softcap=3.0', 'llama']),
    (dict(position_encoding='none'), ['position_encoding=none']),
    (dict(arch_preset='gpt2', n_kv_head=2), ['n_kv_head=2', 'gpt2']),
    (dict(arch_preset='hybrid', qk_norm=True), ['qk_norm=True']),
    (dict(arch_preset='hybrid', qkv_bias=True, n_kv_head=2), ['normalization=layernorm', 'arcee']),
    (dict(arch_preset='modern'), ['logit_softcap=15.0', 'ffn_type=standard', 'qwen3']),
], ids=str)
def test_a_mix_that_transformers_has_no_class_for_is_refused_by_part(tmp_path, settings, parts):
    with pytest.raises(ValueError) as e:
        GPT(GPTConfig.from_settings(TINY | settings)).save_pretrained(tmp_path / 'hf')
    one_line(e.value, *parts)
    assert not list(tmp_path.iterdir())


@dataclass
class Windowed(GPTConfig):
    """A config with a key that export has not heard of."""
    attention_window: int = 0


def test_a_key_that_export_does_not_know_is_refused_unless_at_its_default(tmp_path):
    """A new key left silently, and what was served was another model."""
    GPT(Windowed(**TINY)).save_pretrained(tmp_path / 'default')
    with pytest.raises(ValueError) as e:
        GPT(Windowed(**TINY, attention_window=8)).save_pretrained(tmp_path / 'hf')
    one_line(e.value, 'attention_window=8')
    assert not (tmp_path / 'hf').exists()


def test_an_attention_without_softmax_is_not_exported(tmp_path, monkeypatch):
    """transformers would compute softmax attention with weights that were trained for something else."""
    monkeypatch.setitem(ATTENTION_BACKEND, 'linear', ATTENTION_BACKEND['manual'])
    with pytest.raises(ValueError) as e:
        GPT(GPTConfig(**TINY, attention_backend='linear')).save_pretrained(tmp_path / 'hf')
    one_line(e.value, 'attention_backend=linear')
    GPT(GPTConfig(**TINY, attention_backend='chunked')).save_pretrained(tmp_path / 'hf')


def test_a_tensor_that_export_does_not_know_is_refused(tmp_path):
    """A new part's parameter was written under a name that transformers ignores."""
    model = build()
    model.transformer.h[0].attn.sink = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError) as e:
        model.save_pretrained(tmp_path / 'hf')
    one_line(e.value, 'transformer.h.0.attn.sink.weight', 'GPT2LMHeadModel')
    assert not list(tmp_path.iterdir())


# tokenizer and model card

TEXTS = [
    'def main(argv):\n    return 0\n',
    "it's I'll  3 444 don't   \n\n x  ",
    'ünïcödé 日本語 🤖👩‍👩‍👧 \u0300Ā',
    ' \r\n\t',
    '\x01\x7f\xa0\xad',
    'a',
    'caf\u00e9 cafe\u0301 12345 678',
    '   three spaces and one at the end ',
]


def saved_checkpoint(folder, model, **facts):
    folder.mkdir(exist_ok=True)
    torch.save(dict(model=model.state_dict(), model_args=vars(model.config)) | facts, folder / 'ckpt.pt')


def gpt2_tokenizer():
    """Skips where tiktoken has neither a cache nor a network."""
    try:
        return get_tokenizer('gpt2')
    except ValueError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize('name', ['byte', 'gpt2', 'char'])
def test_an_exported_tokenizer_gives_the_same_ids(tmp_path, name):
    """A server whose tokenizer splits otherwise feeds the model what it never saw."""
    transformers = pytest.importorskip('transformers')
    chars = ''.join(sorted(set(''.join(TEXTS))))
    tokenizer = gpt2_tokenizer() if name == 'gpt2' else get_tokenizer(dict(name=name, chars=chars))
    vocab_size = 50304 if name == 'gpt2' else 256
    model = build(vocab_size=vocab_size, unpadded_vocab_size=tokenizer.vocab_size)
    run, exported = tmp_path / 'run', tmp_path / 'hf'
    saved_checkpoint(run, model, tokenizer=tokenizer.spec)
    done = command('model.py', f'--ckpt={run}', f'--export={exported}')
    assert done.returncode == 0, done.stderr

    hf = transformers.AutoTokenizer.from_pretrained(exported)
    end = [] if tokenizer.eot is None else [tokenizer.table[tokenizer.eot].decode() + 'a']
    for text in TEXTS + end:
        assert hf(text)['input_ids'] == tokenizer.encode(text)
        assert hf.decode(tokenizer.encode(text)) == text
    assert hf.eos_token_id == tokenizer.eot
    generation = json.loads((exported / 'generation_config.json').read_text())
    assert generation.get('suppress_tokens', []) == list(range(tokenizer.vocab_size, vocab_size))
    assert load_pretrained(str(exported))['tokenizer'] == tokenizer.spec

    flags = ['--num_samples=1', '--max_new_tokens=5', '--device=cpu', '--dtype=float32', '--start=a']
    a, b = (command('sample.py', source, *flags) for source in (f'--out_dir={run}', f'--init_from={exported}'))
    assert a.stdout and a.stdout == b.stdout, a.stderr + b.stderr


QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+")


def qwen_json(bos):
    """A tokenizer.json as Qwen2 has it: NFC, single digits, byte-level. With `bos`, a token starts each text."""
    library = pytest.importorskip('tokenizers')
    reader = library.Tokenizer(library.models.BPE())
    reader.normalizer = library.normalizers.NFC()
    byte_level = library.pre_tokenizers.ByteLevel
    words = library.pre_tokenizers.Split(library.Regex(QWEN_WORDS), 'isolated')
    reader.pre_tokenizer = library.pre_tokenizers.Sequence([words, byte_level(False, use_regex=False)])
    reader.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=400, special_tokens=['<|endoftext|>', '<s>'], initial_alphabet=byte_level.alphabet(),
        show_progress=False)
    reader.train_from_iterator([some_text()], trainer)
    if bos:
        template = library.processors.TemplateProcessing
        reader.post_processor = template(single='<s> $A', special_tokens=[('<s>', 1)])
    return reader.to_str()


def tokenizer_of_kind(kind):
    if kind == 'char':
        return get_tokenizer(dict(name='char', chars=sorted(set(''.join(TEXTS)))))
    if kind.startswith('qwen'):
        return get_tokenizer(dict(name='huggingface', json=qwen_json(kind == 'qwen with <s>')))
    return tokenizer_named(kind)


@pytest.mark.parametrize('kind', [
    'byte', 'char', 'bpe', 'gpt2', 'llama', 'llama metaspace', 'byte-level of llama 3', 'qwen', 'qwen with <s>'])
def test_each_exported_class_reads_each_tokenizer_as_we_do(tmp_path, kind):
    """Beside a Qwen2, AutoTokenizer splits text in Qwen's way: spaces and newlines vanished, digits had other ids."""
    transformers = pytest.importorskip('transformers')
    tokenizer = tokenizer_of_kind(kind)
    for name in ('gpt2', 'llama', 'llama qkv', 'qwen3', 'arcee', 'hybrid'):
        settings = TINY | OURS[name][1] | dict(vocab_size=tokenizer.vocab_size)
        GPT(GPTConfig.from_settings(settings)).save_pretrained(tmp_path / name, dict(tokenizer=tokenizer.spec))
        hf = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert hf(text)['input_ids'] == ids, (name, text)
            assert hf.decode(ids) == tokenizer.decode(ids), (name, text)
        assert hf.eos_token_id == tokenizer.eot, name


BOOKS = dict(
    dataset='books', batch_size=4, gradient_accumulation_steps=2, block_size=16, eval_iters=5, init_from='scratch')


def test_the_model_card_gives_the_facts_of_the_checkpoint(tmp_path):
    losses = dict(val=dict(loss=1.25, bits_per_byte=2.5))
    saved_checkpoint(tmp_path / 'run', build(), iter_num=30, tokenizer=None, torch_version='2.9', losses=losses,
                     config=BOOKS)
    log = dict(config=BOOKS, startup_info=dict(device='cuda (H200) x 8', tokens_per_iter=128),
               summary=dict(iterations=30, iter_num=30))
    (tmp_path / 'run/run_20260101_000000.json').write_text(json.dumps(log))
    done = command('model.py', f'--ckpt={tmp_path}/run', f'--export={tmp_path}/hf')
    assert done.returncode == 0 and 'without a tokenizer' in done.stderr, done.stderr
    assert not (tmp_path / 'hf/tokenizer.json').exists()
    card = (tmp_path / 'hf/README.md').read_text()
    for text in ('trained on books', '3,840 in 30 iterations |', '1.2500 nats per token, 2.5000 bits per byte',
                 'at most 20 windows of 16', 'cuda (H200) x 8', 'torch 2.9', f'{build().get_num_params(False):,}',
                 'GPT2LMHeadModel: 2 layers, width 32', '## Limits'):
        assert text in card, text


def test_the_model_card_leaves_out_facts_that_nobody_gave(tmp_path, capsys):
    build().save_pretrained(tmp_path / 'bare')
    bare = (tmp_path / 'bare/README.md').read_text()
    assert not [text for text in ('trained on', 'tokens seen', 'hardware', 'None') if text in bare]
    assert 'doc_mask' not in capsys.readouterr().err
    build(doc_mask_token=0).save_pretrained(tmp_path / 'masked')
    assert 'doc_mask' in capsys.readouterr().err
    assert 'one document at a time' in (tmp_path / 'masked/README.md').read_text()


def test_the_model_card_counts_the_tokens_of_all_runs_or_none(tmp_path):
    """After a resume the checkpoint's config is that of the last run: another batch, not where the weights are from."""
    run = tmp_path / 'run'
    saved_checkpoint(run, build(), iter_num=30, config=BOOKS | dict(init_from='auto'))
    for day, (first, last, per_iter, init_from) in enumerate([(0, 15, 64, 'gpt2'), (10, 40, 128, 'auto')], 1):
        log = dict(
            config=dict(init_from=init_from),
            startup_info=dict(tokens_per_iter=per_iter, device='cpu'),
            summary=dict(iter_num=last, iterations=last - first))
        (run / f'run_2026010{day}_000000.json').write_text(json.dumps(log))
    ckpt = load_checkpoint(str(run))
    build().save_pretrained(tmp_path / 'hf', ckpt)
    assert '3,200 in 30 iterations, after the weights of gpt2' in (tmp_path / 'hf/README.md').read_text()
    (run / 'run_20260101_000000.json').write_text('{"cut')
    build().save_pretrained(tmp_path / 'unknown', ckpt)
    assert 'tokens seen' not in (tmp_path / 'unknown/README.md').read_text()


# files

def test_an_export_never_replaces_anything(tmp_path):
    saved_checkpoint(tmp_path / 'run', build(), tokenizer={'name': 'byte'})
    for folder in ('hf', 'new.tmp', 'plain'):
        (tmp_path / folder).mkdir()
    (tmp_path / 'hf/notes').write_text('mine')
    build(vocab_size=256).save_pretrained(tmp_path / 'new')
    assert (tmp_path / 'new').stat().st_mode == (tmp_path / 'plain').stat().st_mode

    onnx = tmp_path / 'plain/model.onnx'
    onnx.write_text('mine')
    ckpt = f'--ckpt={tmp_path}/run'
    refused(command('model.py', ckpt, f'--export={tmp_path}/hf'), 'hf', 'another name')
    refused(command('model.py', ckpt, f'--export={onnx}'), 'model.onnx', 'another name')
    refused(command('model.py', f'--export={tmp_path}/other'), '--ckpt')
    assert onnx.read_text() == 'mine' and len(list((tmp_path / 'hf').iterdir())) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ['hf', 'new', 'new.tmp', 'plain', 'run']


def test_an_unknown_extension_is_no_folder(tmp_path):
    """--export=x.foo made a folder of that name."""
    saved_checkpoint(tmp_path / 'run', build(), tokenizer=None)
    for name in ('x.foo', 'x.ONNX', 'x.safetensors'):
        with pytest.raises(ValueError) as e:
            export_checkpoint(str(tmp_path / 'run'), str(tmp_path / name), 'auto')
        one_line(e.value, tmp_path / name, 'extension', '.onnx', 'folder')
    for name in ('llama-1.36b', 'x.foo/'):
        export_checkpoint(str(tmp_path / 'run'), f'{tmp_path}/{name}', 'auto')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['llama-1.36b', 'run', 'x.foo']


@pytest.mark.parametrize('settings', [
    dict(bias=False), dict(arch_preset='modern', n_kv_head=2), dict(block_size=1)], ids=str)
def test_onnx_gives_our_logits_at_any_batch_and_length(tmp_path, capfd, settings):
    """An exporter that fixes the length it was shown, drops the mask at it, or fails where there is only one."""
    pytest.importorskip('onnxscript')
    runtime = pytest.importorskip('onnxruntime')
    ours = GPT(GPTConfig.from_settings(TINY | settings)).eval()
    saved_checkpoint(tmp_path / 'run', ours)
    export_checkpoint(str(tmp_path / 'run'), str(tmp_path / 'model.onnx'), 'auto')
    assert capfd.readouterr().err == ''
    session = runtime.InferenceSession(str(tmp_path / 'model.onnx'))
    shapes = [(1, 1), (1, 7), (B, 1), (B, 7), (2, T)]
    for shape in [shape for shape in shapes if shape[1] <= ours.config.block_size]:
        logits, = session.run(None, {'ids': ids(*shape).numpy()})
        close(torch.from_numpy(logits), ours(ids(*shape), all_logits=True)[0].detach())
    assert sorted(path.name for path in tmp_path.iterdir()) == ['model.onnx', 'run']


@pytest.mark.parametrize('flag, library', [
    ('--export=hf', 'safetensors'), ('--export=x.onnx', 'onnxscript'), ('--export=hf', 'tokenizers')])
def test_a_missing_library_is_named(tmp_path, flag, library):
    saved_checkpoint(tmp_path / 'run', build(vocab_size=256), tokenizer={'name': 'byte'})
    done = command(ROOT / 'model.py', '--ckpt=run', flag, cwd=tmp_path, before=missing(library))
    refused(done, f'pip install {library}')
    assert not (tmp_path / 'hf').exists() and not (tmp_path / 'x.onnx').exists()
