"""The server: a shared batch, OpenAI's protocol, clients that leave: python -m pytest tests/test_serve.py"""
import asyncio
import contextlib
import http.client
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from conftest import ROOT, command, one_line, refused, wait_until
from data.chat import CHATML, end_of_turn, reply_prompt, with_separator
from data.tokenizer import get_tokenizer
from engine.attention_map import attention_weights
from engine.batching import Batcher, Request
from engine.continuation import Continuation
from model import GPT, GPTConfig
from tests.warm import HANGS

TINY = dict(n_layer=2, n_head=4, n_embd=32, block_size=64, vocab_size=256)
MODELS = {
    'gpt2': dict(),
    'llama': dict(position_encoding='rope', ffn_type='swiglu', normalization='rmsnorm', n_kv_head=2),
    'documents': dict(position_encoding='rope', doc_mask_token=7),
    'token_shift': dict(position_encoding='rope', doc_mask_token=7, token_shift=True),
    'no positions': dict(position_encoding='none', attention_backend='manual'),
}
BYTE = get_tokenizer('byte')


def model_of(name):
    """A model with random weights that are large enough for its text to depend on the prompt."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY, **MODELS[name])).eval()
    for p in model.parameters():
        p.data.mul_(4 if p.dim() > 1 else 1)
    return model


def request_of(ids, max_new_tokens, stop_strings=(), **sampling):
    return Request(ids, Continuation(BYTE, max_new_tokens, stop_strings=stop_strings), **sampling)


def alone(model, ids, n, **kwargs):
    """The ids that the model writes after others without a server."""
    return model.generate(torch.tensor([ids]), n, **kwargs)[0, len(ids):].tolist()


def run_all(batcher, requests, rng):
    """Let requests come at random moments, and step until all are done. Returns the sizes of the batches."""
    coming, sizes = list(requests), set()
    while coming or batcher.waiting or batcher.requests:
        for _ in range(min(len(coming), rng.choice([0, 0, 1, 2]))):
            batcher.waiting.append(coming.pop())
        batcher.step()
        sizes.add(len(batcher.requests))
    return sizes


@pytest.mark.parametrize('name', MODELS)
def test_a_request_gets_the_text_that_it_gets_alone(name):
    """Rows that join, leave or move put keys of another row, another position or padding into a row's context."""
    model, rng = model_of(name), random.Random(name)
    prompts = [[rng.randrange(20) for _ in range(rng.choice([1, 1, 2, 5, 30, 60]))] for _ in range(24)]
    requests = [request_of(ids, rng.randint(1, 64 - len(ids)), temperature=0) for ids in prompts]
    assert run_all(Batcher(model, max_rows=4), requests, rng) == {0, 1, 2, 3, 4}
    for ids, request in zip(prompts, requests):
        assert request.reply.finish == 'length'
        assert request.reply.ids == alone(model, ids, request.reply.max_new_tokens, temperature=0)


def test_the_draws_of_a_request_depend_on_its_seed_alone():
    """One generator for the batch makes a request's text depend on the others."""
    model = model_of('llama')
    sampling = dict(temperature=0.9, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    first, second, third = (request_of([1, 2, 3], 30, seed=seed, **sampling) for seed in (1, 2, 1))
    run_all(Batcher(model, max_rows=3), [first, second, third], random.Random(0))
    assert first.reply.ids == third.reply.ids != second.reply.ids
    assert second.reply.ids == alone(model, [1, 2, 3], 30, seed=2, **sampling)


def test_a_cancelled_request_leaves_its_row():
    """A request whose client had left was continued to its end."""
    batcher = Batcher(model_of('gpt2'), max_rows=2)
    cancelled, other = request_of([1], 50), request_of([1, 2], 50)
    batcher.waiting += [cancelled, other]
    batcher.step()
    cancelled.cancelled = True
    batcher.step()
    assert batcher.requests == [other] and len(other.cache[0].k) == 1
    assert len(cancelled.reply.ids) == 1 and len(other.reply.ids) == 2


def test_a_client_that_leaves_the_queue_frees_its_place():
    """Requests whose clients had left filled the queue, and were read when their turn came."""
    async def serve():
        batcher = Batcher(model_of('gpt2'), max_rows=1)
        first, left, other = request_of([1], 20), request_of([1], 20), request_of([1], 2)
        for request in first, left, other:
            batcher.submit(request)
        await first.arrived.get()
        left.cancelled = True
        await first.arrived.get()
        await first.arrived.get()
        assert batcher.waiting == [other]
        await batcher.task
        return first, left, other
    first, left, other = asyncio.run(serve())
    assert [len(request.reply.ids) for request in (first, left, other)] == [20, 0, 2]


def test_logits_that_are_not_finite_end_only_their_own_request(monkeypatch):
    """One row with NaN failed every request of the batch."""
    model = model_of('gpt2')
    forward = model.forward

    def fails(idx, **kwargs):
        logits, loss = forward(idx, **kwargs)
        logits[idx[:, -1] == 99] = math.nan
        return logits, loss
    monkeypatch.setattr(model, 'forward', fails)
    broken, other = request_of([99], 5), request_of([1], 5)

    async def serve():
        batcher = Batcher(model, max_rows=2)
        for request in other, broken:
            batcher.submit(request)
        await batcher.task
    asyncio.run(serve())
    assert 'not finite' in str(broken.arrived.get_nowait()) and len(other.reply.ids) == 5


# over HTTP

for library in 'fastapi', 'uvicorn', 'openai', 'httpx':
    pytest.importorskip(library)
import httpx
import openai

from engine.serve import Server

SETTINGS = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, max_new_tokens=2000,
                stop_strings='', api_key='secret', max_batch=8, max_queue=100, timeout=1000.0)


@pytest.fixture(scope='module')
def server():
    """A model that takes seconds for its longest text, in a server with a key. `url` is its address."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | dict(block_size=4096, position_encoding='rope'))).eval()
    template, _ = with_separator(CHATML, BYTE)
    server = Server('tiny', model, BYTE, template, set(), dict(SETTINGS))
    listener = socket.create_server(('127.0.0.1', 0))
    server.url = f'http://127.0.0.1:{listener.getsockname()[1]}'
    threading.Thread(target=server.run, args=(listener,), daemon=True).start()
    return server


def client_of(server):
    return openai.OpenAI(base_url=f'{server.url}/v1', api_key='secret', max_retries=0, timeout=HANGS)


def post(server, path, body, key='secret'):
    return httpx.post(server.url + path, json=body, headers={'authorization': f'Bearer {key}'}, timeout=HANGS)


def send(url, body):
    """Send a request for a text with the key of `server`. Returns the connection, on which the answer will come."""
    connection = http.client.HTTPConnection(url.split('/')[2], timeout=HANGS)
    headers = {'authorization': 'Bearer secret', 'content-type': 'application/json'}
    connection.request('POST', '/v1/completions', json.dumps(body), headers)
    return connection


def free_port():
    """A port that the kernel gives to nobody else before it is used, since it does not draw from these."""
    for port in range(20000 + 10 * os.getpid() % 10000, 32000):
        with contextlib.suppress(OSError), socket.create_server(('127.0.0.1', port)):
            return port


def text_alone(server, ids, n, stop_strings=()):
    """The text that the model writes after ids without a server."""
    sample = Continuation(BYTE, n, stop_strings=stop_strings)
    for token in alone(server.model, ids, n, temperature=0):
        sample.push(token)
    return sample.text


def test_fifty_clients_at_once_get_their_own_text(server):
    """Text of one client in the answer to another, or characters that are lost between events."""
    client = client_of(server)

    def ask(i):
        n, prompt = 5 + i % 7, f'prompt {i} é' * (1 + i % 3)
        options = dict(model='tiny', prompt=prompt, max_tokens=n)
        if i % 2:
            return client.completions.create(**options).choices[0].text
        events = list(client.completions.create(**options, stream=True))
        assert events[-1].usage.completion_tokens == n and events[-1].choices[0].finish_reason == 'length'
        return ''.join(event.choices[0].text for event in events)
    with ThreadPoolExecutor(50) as pool:
        texts = list(pool.map(ask, range(50)))
    for i, text in enumerate(texts):
        prompt = f'prompt {i} é' * (1 + i % 3)
        assert text == text_alone(server, server.tokenizer.encode(prompt), 5 + i % 7), i


@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('fails, words', [
    (lambda *args, **kwargs: 1 / 0, 'division by zero'),
    (lambda *args, **kwargs: (torch.full((1, 1, 256), math.nan), None), 'logits of the model are not finite'),
], ids=['error', 'NaN'])
def test_an_error_ends_its_requests_and_not_the_server(server, monkeypatch, fails, words, stream):
    """The batch's thread died, and all later requests waited for ever; or NaN became a token."""
    def ask(**options):
        return client_of(server).completions.create(model='tiny', prompt='a', max_tokens=3, **options)
    with monkeypatch.context() as context, pytest.raises(openai.APIError, match=words):
        context.setattr(server.model, 'forward', fails)
        list(ask(stream=stream))
    assert ask().usage.completion_tokens == 3


@pytest.mark.parametrize('setting, value, status, words', [
    ('max_queue', -8, 429, 'try again later'),
    ('timeout', 0.0, 503, 'not finished'),
])
def test_limits_are_told_in_time(server, monkeypatch, setting, value, status, words):
    """A queue that grows without end, or a request that waits for ever."""
    monkeypatch.setitem(server.settings, setting, value)
    with pytest.raises(openai.APIStatusError, match=words) as e:
        client_of(server).completions.create(model='tiny', prompt='a', max_tokens=3)
    assert e.value.status_code == status


@pytest.mark.parametrize('stream', [False, True])
def test_a_conversation_is_answered_in_the_models_template(server, stream):
    """Messages that are joined as plain text, or a reply that goes on after the end of its turn."""
    messages = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Who wrote Faust?'}]
    ids, end = reply_prompt(messages, BYTE, server.template), end_of_turn(server.template)
    assert end == '<|im_end|>'
    answer = client_of(server).chat.completions.create(model='tiny', messages=messages, max_tokens=20, stream=stream)
    if stream:
        text = ''.join(event.choices[0].delta.content for event in answer)
    else:
        text = answer.choices[0].message.content
    assert text == text_alone(server, ids, 20, [end])


def test_the_template_is_asked_for_its_end_once(server, monkeypatch):
    """Each request rendered the example again that tells what ends a turn."""
    monkeypatch.setattr('engine.serve.end_of_turn', lambda template: 1 / 0)
    messages = [{'role': 'user', 'content': 'Who wrote Faust?'}]
    assert client_of(server).chat.completions.create(model='tiny', messages=messages, max_tokens=1).usage


def test_a_reply_ends_where_its_turn_does(server, monkeypatch):
    """A reply that shows the template's end of turn, and goes on with what the user might say."""
    said = iter(b'Goethe.<|im_end|>\n<|im_start|>user')
    monkeypatch.setattr('engine.batching.sample_token', lambda *args, **kwargs: torch.tensor([next(said)]))
    messages = [{'role': 'user', 'content': 'Who wrote Faust?'}]
    answer = client_of(server).chat.completions.create(model='tiny', messages=messages, max_tokens=50)
    assert answer.choices[0].message.content == 'Goethe.' and answer.choices[0].finish_reason == 'stop'


def test_clients_that_vanish_free_their_rows(server, monkeypatch):
    """A request whose client has left was continued to its end, and the others waited for it."""
    requests, submit = [], server.batcher.submit
    monkeypatch.setattr(server.batcher, 'submit', lambda request: (requests.append(request), submit(request)))
    body = {'prompt': 'a', 'max_tokens': 4000}
    for stream in 4 * [True] + 4 * [False]:  # these leave in the middle of the text; the others never get a byte
        n, connection = len(requests), send(server.url, body | {'stream': stream})
        if stream:
            answer = connection.getresponse()
            assert answer.readline()
            answer.close()
        wait_until(lambda n=n: len(requests) > n)
        connection.close()
    wait_until(lambda: not (server.batcher.requests or server.batcher.waiting))
    assert len(requests) == 8 and all(request.reply.finish is None for request in requests)


LONG = 'a' * 5000
CHAT = '/v1/chat/completions'


@pytest.mark.parametrize('path, body, status, words', [
    ('/v1/completions', '{"prompt": ', 400, ['JSON decode error']),
    ('/v1/completions', '', 400, ['body: ']),
    ('/v1/completions', '[' * 10000, 400, []),
    ('/v1/completions', '{"prompt": "\\ud800"}', 400, ['surrogates']),
    ('/v1/completions', {'prompt': ['a', 'b']}, 400, ['prompt', 'string']),
    ('/v1/completions', {'prompt': LONG}, 400, ['5000 tokens', 'block_size=4096']),
    ('/v1/completions', {'prompt': 'a', 'max_tokens': 4096}, 400, ['max_tokens=4096', 'block_size=4096']),
    ('/v1/completions', {'prompt': 'a', 'max_tokens': 0}, 400, ['max_tokens']),
    ('/v1/completions', {'prompt': 'a', 'temperature': 1e-30}, 400, ['temperature']),
    ('/v1/completions', '{"prompt": "a", "temperature": NaN}', 400, ['temperature']),
    ('/v1/completions', {'prompt': LONG, 'temperature': -1}, 400, ['temperature']),  # the page shortens long ones
    ('/v1/completions', {'prompt': 'a' * 5_000_000}, 413, ['block_size']),
    (CHAT, {'messages': []}, 400, ['last of messages']),
    (CHAT, {'messages': [{'content': 'a'}]}, 400, ['last of messages']),
    (CHAT, {'messages': [{'role': 'bogus', 'content': 'a'}]}, 400, ['last of messages']),
    (CHAT, {'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]}, 400,
     ['last of messages']),
    (CHAT, {'messages': [{'role': 'user', 'content': 'a'}] * 2}, 400, ['the conversation has roles', 'user, user']),
    (CHAT, {'messages': [{'role': 'user'}]}, 400, ['chat template', 'content']),
    (CHAT, {'messages': [{'role': 'user', 'content': 3}]}, 400, ['messages.0.content', 'string']),
    (CHAT, {'messages': [{'role': 'user', 'content': LONG}]}, 400, ['tokens', 'block_size=4096']),
    ('/nowhere', {}, 404, ['Not Found']),
])
def test_mistakes_have_openais_shape(server, path, body, status, words):
    """A traceback, an HTML page or FastAPI's own shape, which OpenAI's clients cannot show."""
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {'authorization': 'Bearer secret', 'content-type': 'application/json'}
    answer = httpx.post(server.url + path, content=content, headers=headers, timeout=HANGS)
    assert answer.status_code == status
    one_line(answer.json()['error']['message'], *words)


def test_completions_ignore_messages(server):
    """A chat in place of a text, for a client that sends both."""
    body = {'prompt': 'ab', 'messages': [{'role': 'bogus', 'content': 'x'}], 'max_tokens': 1}
    answer = post(server, '/v1/completions', body)
    assert answer.json()['object'] == 'text_completion' and answer.json()['usage']['prompt_tokens'] == 2


def test_the_key_is_asked_for(server):
    """A key that is not checked, or only on some paths; or a page that nobody can open without it."""
    for path in '/v1/completions', CHAT, '/attention':
        answer = post(server, path, {}, key='wrong')
        assert answer.status_code == 401 and 'API key' in answer.json()['error']['message']
    assert httpx.get(f'{server.url}/v1/models', timeout=HANGS).status_code == 401
    [model] = client_of(server).models.list()
    assert (model.id, model.block_size, model.max_tokens) == ('tiny', 4096, 2000)  # the page reads them
    page = httpx.get(server.url, timeout=HANGS)
    assert page.status_code == 200 and '</script>' in page.text
    assert '<link rel="icon" href="data:,">' in page.text, 'browsers ask for favicon.ico'
    assert '//' not in page.text.replace('// ', ''), 'a resource from elsewhere'
    assert 'access-control-allow-origin' not in page.headers


def test_the_map_is_of_the_text(server, monkeypatch):
    """A map of another text, or of one without the template that the model has read."""
    pytest.importorskip('matplotlib')
    drawn = []
    monkeypatch.setattr('engine.serve.draw_attention', lambda maps, tokens, file: drawn.append((maps, tokens)))
    messages = [{'role': 'user', 'content': 'Faust?'}, {'role': 'assistant', 'content': 'Goethe'}]
    for body in {'prompt': 'Faust'}, {'messages': messages}:
        answer = post(server, '/attention', body)
        assert answer.status_code == 200 and answer.headers['content-type'] == 'image/png'
    expected = torch.cat(attention_weights(server.model, torch.tensor([list(b'Faust')])))
    assert drawn[0][1] == list('Faust') and torch.allclose(torch.tensor(drawn[0][0]), expected)
    assert ''.join(drawn[1][1]).endswith('Faust?<|im_end|>\n<|im_start|>assistant\nGoethe<|im_end|>\n'
                                         '<|im_start|>assistant\n')


@pytest.fixture
def long_texts(tmp_path):
    """sample.py with a model that takes minutes for its longest text, and its address."""
    model = GPT(GPTConfig(**TINY | dict(block_size=20000, position_encoding='rope')))
    torch.save({'model': model.state_dict(), 'model_args': vars(model.config), 'tokenizer': BYTE.spec},
               tmp_path / 'ckpt.pt')
    port = free_port()
    flags = f'--out_dir={tmp_path}', '--device=cpu', f'--serve={port}', '--max_new_tokens=19000', '--stop=False'
    process = subprocess.Popen([sys.executable, 'sample.py', *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert any(f'127.0.0.1:{port}/v1' in line for line in process.stderr)
    yield process, f'http://127.0.0.1:{port}/v1/completions'
    process.kill()


def test_ctrl_c_answers_open_requests(long_texts):
    """Tracebacks of CancelledError, and plain text that OpenAI's clients cannot read."""
    process, url = long_texts
    whole = send(url, {'prompt': 'a'})
    stream = send(url, {'prompt': 'a', 'stream': True}).getresponse()
    assert stream.readline()  # so the server has read both
    process.send_signal(signal.SIGINT)
    assert b'the server is stopping' in stream.read()
    answer = whole.getresponse()
    assert answer.status == 503 and 'error' in json.load(answer)
    process.wait(HANGS)
    assert 'Traceback' not in process.stderr.read()


def test_sample_py_serves_until_ctrl_c(finished):
    """Settings that do not reach the server, or a server that a signal does not end."""
    port = free_port()
    with socket.create_server(('127.0.0.1', port)):
        refused(command('sample.py', f'--out_dir={finished[0]}', f'--serve={port}'), 'in use', f'--serve={port + 1}')
    flags = f'--out_dir={finished[0]}', '--device=cpu', f'--serve={port}', '--max_new_tokens=7'
    process = subprocess.Popen([sys.executable, 'sample.py', *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert any(f'127.0.0.1:{port}/v1' in line for line in process.stderr)
        answer = httpx.post(f'http://127.0.0.1:{port}/v1/completions', json={'prompt': 'line 7'}, timeout=HANGS)
        assert answer.json()['usage']['completion_tokens'] == 7
        process.send_signal(signal.SIGINT)
        process.wait(HANGS)
    finally:
        process.kill()
    assert 'Traceback' not in process.stderr.read()
