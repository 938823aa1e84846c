"""Conversations: data/prepare.py --chat, chat templates, the loss mask, packing: python -m pytest tests/test_chat.py"""
import itertools
import json

import numpy as np
import pytest
import torch

from conftest import (
    BYTE,
    checkpoint,
    command,
    llama3_json,
    llama_json,
    losses,
    one_line,
    refused,
    run_logs,
    some_text,
    succeeded,
    tokenizer_named,
    train,
)
from data.chat import (
    CHATML,
    conversation_ids,
    end_of_turn,
    folder_template,
    messages_of,
    render,
    reply_prompt,
    stored_ids,
    with_separator,
)
from data.folder import read_meta, write_dataset
from data.loader import Loader
from data.packing import pack
from data.tokenizer import get_tokenizer, tokenizer_from_file, train_bpe
from engine.evaluate import loss_and_error
from engine.huggingface import load_pretrained
from engine.startup_report import count_tokens
from model import GPT, GPTConfig

T = 48  # block_size

TALK = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Who wrote Faust?'},
        {'role': 'assistant', 'content': 'Goethe\ndid.'}, {'role': 'user', 'content': 'Sure? Où ça, 漢?'},
        {'role': 'assistant', 'content': 'Yes é 漢'}]


# formats

@pytest.mark.parametrize('row', [
    {'messages': TALK[1:3]},
    {'conversations': [{'from': 'human', 'value': 'Who wrote Faust?'}, {'from': 'gpt', 'value': 'Goethe\ndid.'}]},
    {'instruction': 'Who wrote Faust?', 'input': '', 'output': 'Goethe\ndid.'},
], ids=lambda row: next(iter(row)))
def test_every_format_gives_the_same_messages(row):
    """ShareGPT names its roles otherwise, and Alpaca has none."""
    assert messages_of(row) == TALK[1:3]


USER, REPLY = TALK[1:3]
BAD = [
    ([1], 'none of the keys'),
    ({'text': 'a'}, 'none of the keys'),
    ({'messages': 'Hello'}, 'messages must be a list'),
    ({'messages': ['Hello']}, 'messages[0] must be a dict'),
    ({'messages': []}, 'out of order (none)'),
    ({'messages': [USER]}, 'no reply of the assistant'),
    ({'messages': [{'role': 'system', 'content': 'Be brief.'}, USER]}, 'no reply of the assistant'),
    ({'messages': [REPLY, USER]}, 'out of order (assistant, user)'),
    ({'messages': [USER, USER, REPLY]}, 'out of order'),
    ({'messages': [USER, {'role': 'tool', 'content': '4'}]}, "not 'tool'"),
    ({'messages': [USER, {'role': 'assistant'}]}, "messages[1] has no 'content'"),
    ({'messages': [USER, {'role': 'assistant', 'content': ' '}]}, 'assistant without text'),
    ({'messages': [{'role': 'user', 'content': ['a']}, REPLY]}, 'messages[0].content must be a text'),
    ({'messages': [{'role': ['user'], 'content': 'a'}, REPLY]}, "not ['user']"),
    ({'instruction': 'Say so.', 'input': ''}, "it has no 'output'"),
    ({'instruction': 'Say so.', 'output': ''}, 'assistant without text'),
    ({'instruction': 3, 'output': 'a'}, 'instruction must be a text'),
]


@pytest.mark.parametrize('row, words', BAD, ids=lambda value: value if isinstance(value, str) else '')
def test_a_bad_conversation_is_one_line(row, words):
    """A TypeError would end the preparation of a million good lines."""
    with pytest.raises(ValueError) as e:
        messages_of(row)
    one_line(e.value, words)


# ids and masks

@pytest.mark.parametrize('name', ['byte', 'gpt2', 'bpe', 'llama', 'llama 3'])
def test_chatml_learns_replies_and_their_ends(name):
    """The mask is a place off where a character is several tokens, or the model never learns to stop."""
    tokenizer = tokenizer_named(name)
    template, separator = with_separator(CHATML, tokenizer)
    ids, mask = conversation_ids(TALK, tokenizer, template)
    learned = tokenizer.decode_bytes(ids[mask])
    assert learned.replace(b' ', b'') == 'Goethe\ndid.<|im_end|>Yesé漢<|im_end|>'.encode()
    assert ids[0] == separator == tokenizer.eot and (ids == separator).sum() == 1 and not mask[0]
    prompt = reply_prompt(TALK[:4], tokenizer, template)
    assert ids[:len(prompt)].tolist() == prompt and mask[len(prompt)] and not mask[len(prompt) - 1]
    assert end_of_turn(template) == '<|im_end|>'
    stored = stored_ids({'messages': TALK}, tokenizer, template)
    assert (np.maximum(stored, ~stored) == ids).all() and ((stored >= 0) == mask).all()


# As in Qwen 2.5, Llama 3 and Llama 2, shortened; {% generation %} is for the mask of transformers.
QWEN = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- elif not (message.role == 'system' and loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- if tools is not none %}{{- 'Environment: ipython' }}{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
LLAMA2 = ("{% for message in messages %}{% if message['role'] == 'assistant' %}"
          "{% generation %}{{ ' ' + message['content'] + eos_token }}{%- endgeneration -%}"
          "{% else %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}")
FOLDERS = {  # name: (template, special tokens, bos_token, eos_token, the separator)
    'chatml': (None, ['<|endoftext|>'], None, '<|endoftext|>', '<|endoftext|>'),
    'chatml tokens': (CHATML, ['<|endoftext|>', '<|im_start|>', '<|im_end|>'], None, '<|im_end|>', '<|endoftext|>'),
    'qwen': (QWEN, ['<|endoftext|>', '<|im_start|>', '<|im_end|>'], None, '<|im_end|>', '<|endoftext|>'),
    'llama 3': (LLAMA3, ['<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>',
                         '<|eot_id|>'], '<|begin_of_text|>', '<|eot_id|>', '<|begin_of_text|>'),
    'llama 2': (LLAMA2, [], '<s>', '</s>', '<unk>'),
}


@pytest.fixture
def folder(tmp_path, request):
    """A Hugging Face folder of FOLDERS without a model."""
    template, special, bos, eos, _ = FOLDERS[request.param]
    tokenizers = pytest.importorskip('tokenizers')
    if request.param == 'llama 2':
        text = llama_json()
    else:
        text = llama3_json() if request.param == 'llama 3' else train_bpe([some_text()], 400).spec['json']
        reader = tokenizers.Tokenizer.from_str(text)
        reader.add_special_tokens(special)
        text = reader.to_str()
    (tmp_path / 'tokenizer.json').write_text(text)
    about = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': {'content': eos, '__type': 'AddedToken'}}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(about | {'bos_token': bos}))
    if template:
        (tmp_path / 'chat_template.jinja').write_text(template)
    return tmp_path


@pytest.mark.parametrize('folder', FOLDERS, indirect=True)
def test_ids_and_masks_are_those_of_transformers(folder, request):
    """Masks are computed here from the text before each reply, and there from {% generation %}."""
    transformers = pytest.importorskip('transformers')
    *_, separator = FOLDERS[request.node.callspec.params['folder']]
    tokenizer, theirs = tokenizer_from_file(folder), transformers.AutoTokenizer.from_pretrained(folder)
    plain = folder_template(folder) or CHATML
    template, first = with_separator(plain, tokenizer)
    assert tokenizer.table[first].decode() == separator and with_separator(template, tokenizer) == (template, first)
    assert (template == plain) == (separator == '<|begin_of_text|>')
    talk = TALK[1:]
    for text in template, plain:
        expected = theirs.apply_chat_template(
            talk, chat_template=text, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = conversation_ids(talk, tokenizer, text)
        assert ids.tolist() == expected['input_ids']
        assert [int(learned) for learned in mask] == expected['assistant_masks']
        prompt = theirs.apply_chat_template(talk[:1], chat_template=text, add_generation_prompt=True)['input_ids']
        assert reply_prompt(talk[:1], tokenizer, text) == prompt
    assert ids[0] == first or template != plain


@pytest.mark.parametrize('text, words', [
    ('{% if %}', 'the chat template refuses'),
    ("{{ raise_exception('no system message') }}", 'no system message'),
    ('{{ messages[0].content + 1 }}', 'the chat template refuses'),
    ('{{ messages[-1].content }}', 'rewrites earlier turns'),
    ("{{ ''.__class__.__mro__ }}", 'the chat template refuses'),
])
def test_a_template_that_fails_is_one_line(text, words):
    with pytest.raises(ValueError) as e:
        render(TALK, text)
    one_line(e.value, words)
    with pytest.raises(ValueError, match=words):
        with_separator(text, get_tokenizer('byte'))


def test_a_template_without_an_end_is_refused():
    """A model that learns no end never stops, and every text begins with an end that is empty."""
    text = ('{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}'
            '{% if add_generation_prompt %}assistant: {% endif %}')
    with pytest.raises(ValueError, match='nothing after a reply'):
        with_separator(text, get_tokenizer('byte'))


def test_content_that_spells_the_separator_is_refused():
    """A user's end-of-text token hides the question from the reply."""
    byte = get_tokenizer('byte')
    template, _ = with_separator(CHATML, byte)
    with pytest.raises(ValueError, match='token that separates'):
        stored_ids({'instruction': 'a\0b', 'output': 'c'}, byte, template)
    with pytest.raises(ValueError, match='no special token'):
        with_separator(CHATML, tokenizer_named('char'))


# packing

def test_windows_hold_every_conversation_once():
    """Something is read twice, or never, or windows are half empty."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 65, 2000).tolist()
    windows = pack(lengths, 64)
    assert sorted(itertools.chain(*windows)) == list(range(2000))
    filled = [sum(lengths[i] for i in window) for window in windows]
    assert max(filled) <= 64 and sum(filled) > 0.98 * 64 * (len(windows) - 1)


def write_talks(folder, talks, n_train):
    """Write a data set of conversations, given as lists of stored ids, and return its folder."""
    template, separator = with_separator(CHATML, get_tokenizer('byte'))
    parts = {'train': talks[:n_train], 'val': talks[n_train:]}
    parts = {name: np.array([*itertools.chain(*part)]) for name, part in parts.items()}
    write_dataset(folder, parts, BYTE | {'chat_template': template, 'chat_separator': separator})
    return folder


def some_talks(n, seed=0):
    """n conversations, as they are stored, of a question and its answer in random ids; 0 separates them."""
    rng = np.random.default_rng(seed)
    made = []
    for asks, answers in rng.integers(1, 20, (n, 2)):
        ids = rng.integers(1, 256, asks + answers)
        made.append([-1, *~ids[:asks], *ids[asks:]])
    return made


@pytest.fixture(scope='module')
def talks(tmp_path_factory):
    return write_talks(tmp_path_factory.mktemp('talks'), some_talks(200), 180)


def model_for(**settings):
    torch.manual_seed(0)
    shape = dict(block_size=T, vocab_size=256, n_layer=2, n_head=4, n_embd=32, position_encoding='rope')
    return GPT(GPTConfig(**shape | settings, doc_mask_token=0))


def conversations_in(x, y):
    """Yield (x, y), (1, t) each, of each conversation in windows (B, T); padding is one of a single separator."""
    for row, targets in zip(x, y):
        starts = [*(row == 0).nonzero()[:, 0].tolist(), T]
        for start, end in itertools.pairwise(starts):
            yield row[None, start:end], targets[None, start:end]


@pytest.mark.parametrize('settings', [
    dict(attention_backend='sdpa'),
    dict(attention_backend='manual'),
    dict(attention_backend='chunked'),
    dict(token_shift=True),
], ids=lambda settings: next(iter(settings.values())))
def test_packed_windows_are_their_conversations_alone(talks, settings):
    """A conversation sees the one before it, or learns to open the one after it."""
    x, y = Loader(talks, 'train', T).batch(np.arange(8))
    assert ((x == 0).sum(1) > 1).any() and (y >= 0).any()
    model, alone = model_for(**settings), model_for(**settings)
    with torch.no_grad():
        for m in model, alone:  # the weights of token_shift begin at 0
            torch.manual_seed(1)
            [p.add_(torch.randn_like(p), alpha=0.02) for p in m.parameters()]
    loss = model(x, y)[1]
    loss.backward()
    total = 0
    for inputs, targets in conversations_in(x, y):
        part = alone(inputs, targets)[1] * (targets >= 0).sum() / (y >= 0).sum()
        part.backward()
        total += part.detach()
    torch.testing.assert_close(loss.detach(), total)
    for p, q in zip(model.parameters(), alone.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


def test_prompts_have_a_gradient_of_exactly_zero(talks):
    """The model learns to write questions."""
    model = model_for()
    x, y = Loader(talks, 'train', T).batch(np.arange(8))
    seen = []
    model.transformer.ln_f.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0]))
    model(x, y)[1].backward()
    gradient = seen[0].abs().sum(-1)
    assert (gradient[y < 0] == 0).all() and (gradient[y >= 0] > 0).all()


def test_windows_give_back_what_the_file_says(talks):
    """A mark is taken for a part of the id, or a target is one place off."""
    found, loader = [], Loader(talks, 'train', T, shuffle=False)
    x, y = loader.batch(np.arange(loader.n_windows))
    assert (x[:, 0] == 0).all() and (y[x == 0].max(), x.min(), y.min()) == (-1, 0, -1)
    last = torch.where(y[:, -1:] >= 0, y[:, -1:], 0)  # of T + 1 ids, the last is no input
    for row, targets in zip(torch.cat((x, last), dim=1).tolist(), y.tolist()):
        ids = [-1] + [i if i == target else ~i for i, target in zip(row[1:], targets)]
        for i in ids:
            found += [[]] if i == -1 else []
            found[-1].append(i)
    assert sorted(talk for talk in found if len(talk) > 1) == sorted(some_talks(200)[:180])


def test_a_conversation_longer_than_the_context_is_cut_and_counted(tmp_path):
    """It is lost, or the run ends because of it."""
    long = [-1, ~7, *[8] * 100]
    folder = write_talks(tmp_path, [*some_talks(30), long, *some_talks(6, seed=1)], 31)
    loader = Loader(folder, 'train', T, shuffle=False)
    assert loader.shards[0].n_cut == 1 and loader.batch([0])[1].tolist() == [[-1, *[8] * (T - 1)]]
    succeeded(train(folder, tmp_path / 'out', f'--block_size={T}', '--max_iters=1'),
              '31 conversations', '1 cut to block_size')
    refused(train(folder, tmp_path / 'no', '--block_size=1'), 'has a reply within block_size')


def test_an_id_past_the_vocabulary_is_found_in_the_file(tmp_path):
    """The offset was one in packed windows, where no file has it."""
    talks = [[max(~254, min(i, 254)) for i in talk] for talk in some_talks(100)]
    talks[40][1] = ~255
    folder = write_talks(tmp_path, talks, 90)
    loader = Loader(folder, 'train', T, vocab_size=255)
    at = sum(map(len, talks[:40])) + 1
    with pytest.raises(ValueError, match=f'train.bin: id 255 at token {at} is not below vocab_size 255'):
        loader.batch(np.arange(loader.n_windows))


def test_padding_is_not_counted_as_tokens(talks):
    """The start-up report counted what fills up the packed windows."""
    assert count_tokens(Loader(talks, 'train', T)) == sum(map(len, some_talks(200)[:180]))


@pytest.mark.parametrize('change, words', [
    ({'chat_separator': 1}, 'does not begin with a conversation'),
    ({'chat_separator': None}, 'chat_separator'),
    ({'chat_separator': -1}, 'chat_separator'),
    ({'dtype': 'uint32'}, 'conversations need both'),
    ({'chat_template': 3}, 'chat_template'),
    ({'vocab_size': 100}, 'is not below vocab_size'),
])
def test_a_damaged_data_set_of_conversations_is_one_line(tmp_path, change, words):
    write_talks(tmp_path, some_talks(40), 30)
    meta = json.loads((tmp_path / 'meta.json').read_text()) | change
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    with pytest.raises(ValueError) as e:
        Loader(tmp_path, 'train', T, vocab_size=meta['vocab_size']).batch(np.arange(9))
    one_line(e.value, words)


# preparing

def test_bad_lines_are_named_counted_and_left_out(prepare, tmp_path):
    """One broken line in a million ends the preparation, or is lost without a word."""
    lines = [json.dumps({'instruction': f'Say {n}.', 'output': f'{n}'}) for n in range(60)]
    lines[7], lines[9], lines[11] = '{"messages": [', json.dumps({'messages': [REPLY, USER]}), '"\xff"'
    lines[13:16] = [json.dumps({'instruction': 'a', 'output': text}) for text in ('\ud800', 'a\0', ' ')]
    file = tmp_path / 'talks.jsonl'
    file.write_bytes('\n'.join(lines).encode('latin-1'))
    flags = '--tokenizer=byte', f'--out={tmp_path}/out', '--val_fraction=0.1'
    done = prepare('data/prepare.py', f'--chat={file}', *flags)
    succeeded(done, 'entry 8, is not JSON', 'entry 10, has roles out of order', 'entry 12, is not UTF-8',
              'entry 14, is not UTF-8', 'entry 15, contains', 'skipped 6 in all')
    assert 'entry 16' not in done.stdout  # it is only counted
    meta = read_meta(tmp_path / 'out')
    assert with_separator(CHATML, get_tokenizer('byte')) == (meta['chat_template'], meta['chat_separator'])
    assert meta['dtype'] == 'int32' and sum(meta['documents'].values()) == 54
    x, y = Loader(tmp_path / 'out', 'train', 128, shuffle=False).batch([0])
    tokenizer = get_tokenizer(meta['tokenizer'])
    assert tokenizer.decode(x[0].tolist()).startswith('\0<|im_start|>user\nSay ')
    assert set(tokenizer.decode(y[y >= 0].tolist()).replace('<|im_end|>', ' ').split()) <= {str(n) for n in range(60)}


@pytest.mark.parametrize('flags, words', [
    (['--chat=talks.txt', '--tokenizer=byte'], '.jsonl'),
    (['--chat=talks.jsonl', '--tokenizer=char'], "base model's tokenizer"),
    (['--chat=talks.jsonl', '--input=talks.txt'], 'leave one of them out'),
    (['--chat=empty.jsonl', '--tokenizer=byte'], 'empty'),
    (['--chat=bad.jsonl', '--tokenizer=byte'], 'no train text'),
])
def test_wrong_flags_of_chat_are_one_line(prepare, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'talks.jsonl').write_text('{"instruction": "a", "output": "b"}\n' * 9)
    (tmp_path / 'talks.txt').write_text('text')
    (tmp_path / 'empty.jsonl').write_text('')
    (tmp_path / 'bad.jsonl').write_text('{\n' * 30)
    refused(prepare('data/prepare.py', *flags, '--out=./out'), words)


def test_parts_of_conversations_give_the_bytes_of_one_command(prepare, tmp_path):
    """Parts lose the template, or count what they skipped as documents."""
    for n in range(2):
        lines = [json.dumps({'instruction': f'Say {i}.', 'output': str(n)}) if i % 9 else '{' for i in range(50)]
        (tmp_path / f'{n}.jsonl').write_text('\n'.join(lines))
    files = [f'--chat={tmp_path}/{n}.jsonl' for n in range(2)]
    for out, *steps in ('whole', []), ('parts', ['--part=2/2'], ['--part=1/2'], ['--join=2']):
        for step in steps:
            done = prepare('data/prepare.py', *files, f'--out={tmp_path}/{out}', '--tokenizer=byte', *step)
            succeeded(done, 'skipped')
    for name in ('train_00000.bin', 'val_00000.bin', 'meta.json'):
        assert (tmp_path / 'whole' / name).read_bytes() == (tmp_path / 'parts' / name).read_bytes()


# training

def test_each_target_of_an_iteration_has_the_same_weight(talks, tmp_path):
    """Means of micro-batches with few and many targets are averaged, so their number changes the run."""
    divisions = {'8x1': (8, 1, 1), '1x8': (1, 8, 1), 'ddp': (2, 4, 2)}
    for name, (batch_size, steps, processes) in divisions.items():
        flags = f'--batch_size={batch_size}', f'--gradient_accumulation_steps={steps}', f'--block_size={T}'
        done = train(talks, tmp_path / name, *flags, '--dropout=0', '--max_iters=4', '--eval_interval=4',
                     f'--eval_iters={16 // batch_size}', processes=processes)
        succeeded(done)
    for name in '1x8', 'ddp':
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / '8x1'), rel=1e-5)
        ends = [run_logs(tmp_path / out)[0]['eval_steps'][-1]['val']['loss'] for out in ('8x1', name)]
        assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    meta, ckpt = read_meta(talks), checkpoint(tmp_path / 'ddp')
    assert (ckpt['chat_template'], ckpt['model_args']['doc_mask_token']) == (meta['chat_template'], 0)


def test_an_evaluation_is_the_mean_over_targets(talks, tmp_path):
    """Positions without a target dilute the loss, or windows with few count as much as those with many."""
    done = train(talks, tmp_path, f'--block_size={T}', '--max_iters=2', '--eval_iters=99', '--dropout=0')
    succeeded(done)
    model, loader = GPT.from_checkpoint(tmp_path), Loader(talks, 'val', T, seed=0, shift=False)
    x, y = loader.batch(np.arange(loader.n_windows))
    val = run_logs(tmp_path)[0]['eval_steps'][-1]['val']
    with torch.no_grad():
        loss, each = model(x, y)[1].item(), model(x, y, reduction='none')[1]
    assert val['loss'] == pytest.approx(loss, rel=1e-5)
    assert np.mean(val['window_losses']) == pytest.approx(loss, abs=1e-4)
    assert val['bits_per_byte'] == pytest.approx(loss / np.log(2), rel=1e-5)
    for part in val['by_position']:
        at = slice(part['first'], part['last'] + 1)
        assert part['loss'] == pytest.approx((each[:, at].sum() / (y[:, at] >= 0).sum()).item(), rel=1e-5)


def test_the_error_of_a_loss_per_target_is_that_of_a_ratio():
    """Windows with few and many targets look like a spread of the loss."""
    rng = np.random.default_rng(0)
    shares = rng.uniform(0.1, 1, (2000, 100))
    sums = shares * rng.normal(2, 1, (2000, 100))
    found = [loss_and_error(s, n, None) for s, n in zip(sums, shares)]
    means = [f['loss'] for f in found]
    np.testing.assert_allclose(means, sums.sum(1) / shares.sum(1))
    assert np.std(means) == pytest.approx(np.sqrt(np.mean([f['standard_error'] ** 2 for f in found])), rel=0.05)


def test_a_resumed_run_of_conversations_is_the_same(talks, tmp_path):
    """Windows are packed otherwise, or the mask is lost."""
    for name, *ends in ('whole', 6), ('twice', 3, 6):
        for end in ends:
            succeeded(train(talks, tmp_path / name, f'--block_size={T}', f'--max_iters={end}', '--lr_decay_iters=6',
                            '--init_from=auto'))
    whole, twice = (checkpoint(tmp_path / name)['model'] for name in ('whole', 'twice'))
    assert all(torch.equal(whole[key], twice[key]) for key in whole)


def test_a_base_model_learns_conversations_and_shows_one(talks, finished, tmp_path):
    """The base needs new ids, or samples begin with a line end that no conversation has."""
    done = train(talks, tmp_path / 'out', f'--init_from={finished[0]}', '--sample_interval=1')
    succeeded(done)
    assert 'WARNING' not in done.stdout
    ckpt = checkpoint(tmp_path / 'out')
    assert ckpt['model_args']['vocab_size'] == 256 and ckpt['chat_template'] == read_meta(talks)['chat_template']


def test_text_and_conversations_are_not_mixed(talks, text_set, tmp_path):
    refused(train(f'{talks}:0.5,{text_set}:0.5', tmp_path), 'chat templates')


def test_an_exported_chat_model_has_its_template(talks, tmp_path):
    """transformers cannot talk to it, or writes other ids."""
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('safetensors')
    done = train(talks, tmp_path / 'out', '--arch_preset=llama', '--max_iters=1', f'--block_size={T}')
    succeeded(done, f"next      python sample.py --out_dir={tmp_path / 'out'} --chat=True")
    succeeded(command('model.py', f"--ckpt={tmp_path / 'out'}", f"--export={tmp_path / 'hf'}"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    template = read_meta(talks)['chat_template']
    expected = conversation_ids(TALK, get_tokenizer('byte'), template)[0].tolist()
    assert theirs.apply_chat_template(TALK)['input_ids'] == expected
    assert load_pretrained(tmp_path / 'hf')['chat_template'] == template


def test_the_score_says_how_far_it_is(finished):
    """It printed nothing for minutes."""
    pytest.importorskip('scipy')
    done = command('data/chat_pystdlib/score.py', finished[0])
    succeeded(done, ' questions\n', '% right')
    assert f'{finished[0]}: 20 of ' in done.stderr and ' of ' not in done.stdout
