"""
Write conversations as ids, with a mask of the ids that a model learns: the assistant's replies.

A conversation is a list of messages, {'role': 'system', 'user' or 'assistant', 'content': text}. A
chat template, a str of Jinja as in Hugging Face's folders, writes it as text. CHATML, the default:

    <|im_start|>user
    Who wrote Faust?<|im_end|>
    <|im_start|>assistant
    Goethe.<|im_end|>

In a data set each conversation begins with a special token that occurs nowhere else in it. As the
model's doc_mask_token, this separator keeps the conversations of a packed window apart.
"""
import functools
import json
import re
from pathlib import Path

import jinja2
import jinja2.sandbox
import numpy as np

from engine.common import UserError, first_line
from engine.schema import check, read_json

CHATML = (  # transformers takes its mask from {% generation %}
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
ROLES = {'system': 'system', 'user': 'user', 'assistant': 'assistant',
         'human': 'user', 'gpt': 'assistant'}  # the last two are ShareGPT's
FORMATS = {
    'messages': {'messages': [{'role': tuple(ROLES), 'content': str}]},
    'conversations': {'conversations': [{'from': tuple(ROLES), 'value': str}]},
    'instruction': {'instruction': str, 'input?': (str, None), 'output': str},
}
EXAMPLE = [{'role': 'user', 'content': 'Hello'}, {'role': 'assistant', 'content': 'Goodbye'}]


# UserErrors about a conversation begin with a verb, because they follow "FILE, entry 8,".
def messages_of(row):
    """
    Return the messages of a JSON object in the format of OpenAI {'messages': [{'role',
    'content'}]}, ShareGPT {'conversations': [{'from', 'value'}]} or Alpaca {'instruction', 'input',
    'output'}.
    """
    kind = next((key for key in FORMATS if isinstance(row, dict) and key in row), None)
    if kind is None:
        raise UserError(f"has none of the keys {', '.join(FORMATS)}")
    try:
        check(row, FORMATS[kind])
    except ValueError as e:
        raise UserError(f'is no conversation: {e}') from None
    if kind == 'instruction':
        question = '\n\n'.join(filter(None, (row['instruction'], row.get('input'))))
        pairs = [('user', question), ('assistant', row['output'])]
    else:
        role, content = FORMATS[kind][kind][0]
        pairs = [(ROLES[turn[role]], turn[content]) for turn in row[kind]]
    messages = [{'role': role, 'content': content} for role, content in pairs]
    check_turns(messages)
    if all(message['role'] != 'assistant' for message in messages):
        raise UserError('has no reply of the assistant')
    for message in messages:
        if not message['content'].strip():
            raise UserError(f"has a message of the {message['role']} without text")
    return messages


def check_turns(messages):
    """Raise UserError unless user and assistant take turns, perhaps after a system message."""
    roles = [message.get('role') for message in messages]
    turns = roles[1:] if roles[:1] == ['system'] else roles
    if not turns or turns != (['user', 'assistant'] * len(turns))[:len(turns)]:
        order = ', '.join(map(str, roles)) or 'none'
        raise UserError(f'has roles out of order ({order:.80}): user and assistant take turns')


def conversation_ids(messages, tokenizer, template):
    """
    Return (ids, mask), (n,) arrays: the ids of a conversation, and whether the model learns each of
    them. It learns what the assistant says, and what ends its turn.
    """
    text, spans = render(messages, template)
    ids, places = tokenizer.encode_with_places(text)
    starts, ends = np.array(places).reshape(-1, 2).T
    mask = np.zeros(len(ids), bool)
    for first, end in spans:
        mask |= (starts < end) & (ends > first)
    return np.array(ids), mask


def reply_prompt(messages, tokenizer, template):
    """Return the list of ids of a conversation and of the beginning of the assistant's reply."""
    return tokenizer.encode(write(messages, template, reply=True))


def newest_turns(messages, tokenizer, template, block_size, max_new_tokens):
    """
    Return (number of the oldest messages that are left out, ids). The ids are the reply_prompt() of
    the others, and leave room for a reply of max_new_tokens or an eighth of block_size. Messages
    are those of user and assistant in turn; the last is the user's.
    """
    for n_left_out in range(0, len(messages), 2):
        ids = reply_prompt(messages[n_left_out:], tokenizer, template)
        if len(ids) <= block_size - min(max_new_tokens, block_size // 8):
            break
    if len(ids) >= block_size:
        raise UserError(f'the message has {len(ids)} tokens with the template around it, which '
                        f'leaves no room for a reply in block_size={block_size}: shorten it')
    return n_left_out, ids


def end_of_turn(template):
    """Return the text that ends a reply, such as <|im_end|>."""
    text, [(_, end)] = render(EXAMPLE, template)
    return text[:end].rpartition(EXAMPLE[-1]['content'])[2]


def render(messages, template):
    """
    Return (text, [(first, end)]): a conversation as text, and where in it the assistant speaks. A
    reply is what the template adds to the conversation before it and to the beginning of its turn,
    without white space at the end.
    """
    text, spans = write(messages, template), []
    for n, message in enumerate(messages):
        if message['role'] == 'assistant':
            before = write(messages[:n], template, reply=True)
            after = write(messages[:n + 1], template).rstrip()
            if not (text.startswith(after) and after.startswith(before)):
                raise UserError('the chat template rewrites earlier turns: keep one reply per '
                                'conversation, or edit the template')
            spans.append((len(before), len(after)))
    return text, spans


def write(messages, template, reply=False):
    """Return a conversation as text; with `reply`, also the beginning of the assistant's turn."""
    try:
        return compile_template(template).render(
            messages=messages, add_generation_prompt=reply, tools=None, documents=None)
    except Exception as e:  # a foreign template can fail in any way
        raise UserError(f'the chat template refuses the conversation: {first_line(e)}') from None


@functools.cache
def compile_template(text):
    """Compile a Jinja template in a sandbox, with what transformers adds to Jinja."""
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    sandbox.filters['tojson'] = functools.partial(json.dumps, ensure_ascii=False)
    sandbox.globals['raise_exception'] = raise_exception
    # render() finds replies without {% generation %}; a comment trims white space as it does
    return sandbox.from_string(
        re.sub(r'\{%(-?)\s*(?:end)?generation\s*(-?)%\}', r'{#\1 \2#}', text))


def folder_template(path):
    """Return the chat template of a Hugging Face folder or of its tokenizer.json, or None."""
    folder = Path(path).parent if Path(path).name == 'tokenizer.json' else Path(path)
    settings, file = folder / 'tokenizer_config.json', folder / 'chat_template.jinja'
    about = read_json(settings, dict) if settings.exists() else {}
    text = about.get('chat_template')
    if file.exists():
        text = file.read_text(encoding='utf-8', errors='replace')
    kind = [{'name': str, 'template': str}] if isinstance(text, list) else (str, None)
    try:
        check(text, kind, 'chat_template')
    except ValueError as e:
        raise UserError(f"'{settings}' cannot be used: {e}") from None
    if isinstance(text, list):  # several templates with names
        text = {entry['name']: entry['template'] for entry in text}.get('default')
    for key in ('bos_token', 'eos_token'):
        word = about.get(key) or ''
        if text and key in text:
            word = json.dumps(word.get('content', '') if isinstance(word, dict) else word)
            text = f'{{% set {key} = {word} %}}\n{text}'
    return text


def with_separator(template, tokenizer):
    """
    Return (template, separator): the id with which each conversation begins, and the template that
    writes it, changed only if it does not begin with such a token.
    """
    special = sorted(tokenizer.special, key=lambda i: (i != tokenizer.eot, i))
    ids = conversation_ids(EXAMPLE * 2, tokenizer, template)[0].tolist() if special else []
    if not end_of_turn(template):
        raise UserError('the chat template writes nothing after a reply, so that a model would not '
                        'learn to end it: add {{ eos_token }} there')
    if ids and ids[0] in special and ids.count(ids[0]) == 1:
        return template, ids[0]
    unused = [i for i in special if i not in ids]
    if not unused:
        raise UserError(f'tokenizer {tokenizer.name} has no special token that could separate '
                        'conversations: use another, such as byte or gpt2')
    word = json.dumps(tokenizer.table[unused[0]].decode())
    return f'{{{{ {word} }}}}{{# begins every conversation #}}\n{template}', unused[0]


def stored_ids(row, tokenizer, template):
    """
    Return the ids (n,) of a JSON object's conversation as a data set stores them: ~id, which is
    negative, where the model only reads the id.
    """
    ids, mask = conversation_ids(messages_of(row), tokenizer, template)
    if (ids[1:] == ids[0]).any():
        word = tokenizer.table[ids[0]].decode()
        raise UserError(f'contains {word!r}, the token that separates conversations')
    return np.where(mask, ids, ~ids)
