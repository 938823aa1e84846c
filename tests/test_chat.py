"""Conversations: data/prepare.py --chat, chat templates, the loss mask, packing: python -m pytest tests/test_chat.py"""
import json

import numpy as np
import pytest

from conftest import llama3_json, llama_json, one_line, some_text, tokenizer_named
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
from data.tokenizer import get_tokenizer, tokenizer_from_file, train_bpe

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
    ({'messages': [USER]}, 'out of order (user)'),
    ({'messages': [REPLY, USER]}, 'out of order (assistant, user)'),
    ({'messages': [USER, USER, REPLY]}, 'out of order'),
    ({'messages': [USER, {'role': 'tool', 'content': '4'}]}, "not 'tool'"),
    ({'messages': [USER, {'role': 'assistant'}]}, "messages[1] has no 'content'"),
    ({'messages': [USER, {'role': 'assistant', 'content': ' '}]}, 'assistant without text'),
    ({'messages': [{'role': 'user', 'content': ['a']}, REPLY]}, 'messages[0].content must be a text'),
    ({'messages': [{'role': ['user'], 'content': 'a'}, REPLY]}, "not ['user']"),
    ({'instruction': 'Say so.', 'input': ''}, 'assistant without text'),
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
    ('{% if %}', 'refused by the chat template'),
    ("{{ raise_exception('no system message') }}", 'no system message'),
    ('{{ messages[0].content + 1 }}', 'refused by the chat template'),
    ('{{ messages[-1].content }}', 'rewrites earlier turns'),
    ("{{ ''.__class__.__mro__ }}", 'refused by the chat template'),
])
def test_a_template_that_fails_is_one_line(text, words):
    with pytest.raises(ValueError) as e:
        render(TALK, text)
    one_line(e.value, words)
    with pytest.raises(ValueError, match='a short example'):
        with_separator(text, get_tokenizer('byte'))


def test_content_that_spells_the_separator_is_refused():
    """A user's end-of-text token hides the question from the reply."""
    byte = get_tokenizer('byte')
    template, _ = with_separator(CHATML, byte)
    with pytest.raises(ValueError, match='token that separates'):
        stored_ids({'instruction': 'a\0b', 'output': 'c'}, byte, template)
    with pytest.raises(ValueError, match='no special token'):
        with_separator(CHATML, tokenizer_named('char'))
