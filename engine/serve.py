"""
A server with OpenAI's protocol, and a page for a person: python sample.py --serve=8000

    /v1/completions, /v1/chat/completions, /v1/models   for OpenAI's clients, whole or streamed
    /, /attention                                       the page, and the picture that it shows
"""
import asyncio
import errno
import io
import json
import secrets
import socket
import time
import uuid
from pathlib import Path

import fastapi
import torch
import uvicorn
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import AliasChoices, BaseModel, Field
from starlette.exceptions import HTTPException

from data.chat import check_turns, end_of_turn, reply_prompt
from data.tokenizer import prompt_ids
from engine.attention_map import attention_weights, draw_attention
from engine.batching import Batcher, Request
from engine.common import UserError, first_line
from engine.continuation import Continuation
from model import divides_logits

MAP_TOKENS = 128  # at the end of a text, whose attention is drawn


class Body(BaseModel):
    """What clients send. Other keys are ignored. None: as the server's settings say."""
    prompt: str = ''
    messages: list[dict[str, str]] = []
    max_tokens: int | None = Field(
        None, ge=1, validation_alias=AliasChoices('max_tokens', 'max_completion_tokens'))
    temperature: float | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2 ** 63)
    stop: str | list[str] | None = None
    stream: bool = False


def listen(host, port):
    """Return a socket that listens. UserError if another program listens on that port."""
    try:
        return socket.create_server((host, port))
    except OSError as e:
        if e.errno != errno.EADDRINUSE:
            raise
        raise UserError(f'port {port} is in use: take another one, such as '
                        f'--serve={port + 1}') from e


class Server:
    """A model for requests. `ends` are ids that end a text, `settings` are those of sample.py."""
    def __init__(self, name, model, tokenizer, template, ends, settings):
        self.name, self.model, self.tokenizer, self.template = name, model, tokenizer, template
        self.ends, self.settings = ends, settings
        self.turn_end = end_of_turn(template) if template else ''
        self.batcher = Batcher(model, settings['max_batch'])
        self.uvicorn = uvicorn.Server(uvicorn.Config(make_app(self), log_level='warning',
                                                     timeout_graceful_shutdown=2))

    def run(self, listener):
        """Serve on a socket until Ctrl-C."""
        self.uvicorn.run(sockets=[listener])

    async def check_headers(self, http: fastapi.Request):
        key = self.settings['api_key']
        sent = http.headers.get('authorization', '').removeprefix('Bearer ')
        right = secrets.compare_digest(sent.encode(), key.encode())
        if key and not right and http.url.path != '/':
            raise HTTPException(401, 'the API key is missing or wrong')
        if int(http.headers.get('content-length', 0)) > 1000 * self.model.config.block_size:
            raise HTTPException(413, 'the request is far longer than block_size')

    async def answer(self, body, http):
        """Return the response to a Body: an object, or a stream of them."""
        request = self.make_request(body)
        batcher, max_queue = self.batcher, self.settings['max_queue']
        if len(batcher.requests) + len(batcher.waiting) >= batcher.max_rows + max_queue:
            raise HTTPException(429, f'{max_queue} requests are waiting: try again later')
        batcher.submit(request)
        pieces = self.pieces(request, http)
        head = {'id': uuid.uuid4().hex, 'created': int(time.time()), 'model': self.name,
                'object': 'chat.completion' if body.messages else 'text_completion'}
        if body.stream:
            events = stream_events(head, body, request, pieces)
            return StreamingResponse(events, media_type='text/event-stream')
        async for _ in pieces:
            pass
        part = {'text': request.reply.text}
        if body.messages:
            part = {'message': {'role': 'assistant', 'content': request.reply.text}}
        return head | choice(part, request.reply.finish) | usage(request)

    def make_request(self, body):
        """Return the Request of a Body. Raise UserError if it cannot be served."""
        default, block_size = self.settings, self.model.config.block_size
        names = 'temperature', 'top_p', 'min_p', 'repetition_penalty'
        sampling = {name: default[name] for name in names}
        sampling |= body.model_dump(include={'temperature', 'top_p', 'seed'}, exclude_none=True)
        if not divides_logits(sampling['temperature']):
            raise UserError('temperature must be 0, or from 0.001 to 1000000')
        ids, least = self.ids_of(body), body.max_tokens or 1  # tokens of the reply
        if len(ids) + least > block_size:
            raise UserError(f'a prompt of {len(ids)} tokens and max_tokens={least} exceed '
                            f'block_size={block_size}')
        n_tokens = min(body.max_tokens or default['max_new_tokens'], block_size - len(ids))
        reply = Continuation(self.tokenizer, n_tokens, self.ends,
                             body.stop or default['stop_strings'],
                             self.turn_end if body.messages else '')
        return Request(ids, reply, top_k=default['top_k'] or None, **sampling)

    def ids_of(self, body):
        """Return the ids of a prompt, or of messages and the beginning of a reply."""
        if not body.messages:
            return prompt_ids(body.prompt, self.tokenizer, self.model.config.vocab_size)
        if self.template is None:
            raise UserError('the model was not trained on conversations: use /v1/completions, or '
                            'untick chat on the page')
        try:
            check_turns(body.messages)
        except UserError as e:
            raise UserError(f'the conversation {e}') from None
        return reply_prompt(body.messages, self.tokenizer, self.template)

    async def pieces(self, request, http):
        """Yield the text of a request as it grows, until it ends or the client has left."""
        deadline = time.monotonic() + self.settings['timeout']
        try:
            while not await http.is_disconnected():
                if time.monotonic() > deadline:
                    raise HTTPException(503, f"not finished after {self.settings['timeout']:g} s")
                if self.uvicorn.should_exit:
                    raise HTTPException(503, 'the server is stopping')
                try:
                    piece = await asyncio.wait_for(request.arrived.get(), timeout=0.5)
                except TimeoutError:
                    continue  # look again whether the client is there
                if isinstance(piece, Exception):
                    raise HTTPException(500, f'the server failed: {first_line(piece)}')
                if piece is None:
                    return
                yield piece
        finally:
            request.cancelled = True

    async def draw(self, body: Body):
        """Return a picture of each head's attention in a text."""
        ids = self.ids_of(body)[-min(MAP_TOKENS, self.model.config.block_size):]
        idx = torch.tensor([ids], device=next(self.model.parameters()).device)
        layers = await self.batcher.call(attention_weights, self.model, idx)
        maps, tokens = torch.cat(layers).cpu().numpy(), [self.tokenizer.decode([i]) for i in ids]
        picture = io.BytesIO()
        await asyncio.to_thread(draw_attention, maps, tokens, picture)
        return Response(picture.getvalue(), media_type='image/png')


async def stream_events(head, body, request, pieces):
    """Yield a server-sent event for each piece of the text, and one for its end."""
    def chunk(text, finish=None):
        part = {'delta': {'content': text}} if body.messages else {'text': text}
        return head | choice(part, finish)

    try:
        if body.messages:
            head['object'] += '.chunk'
            yield event(head | choice({'delta': {'role': 'assistant', 'content': ''}}))
        async for piece in pieces:
            yield event(chunk(piece))
        yield event(chunk('', request.reply.finish) | usage(request))
    except HTTPException as e:
        yield event(error_body(e.status_code, e.detail))
    yield 'data: [DONE]\n\n'


def event(data):
    return f'data: {json.dumps(data)}\n\n'


def choice(part, finish=None):
    return {'choices': [{'index': 0, **part, 'finish_reason': finish, 'logprobs': None}]}


def usage(request):
    total, reply = len(request.ids), len(request.reply.ids)
    return {'usage': {'prompt_tokens': total - reply, 'completion_tokens': reply,
                      'total_tokens': total}}


def error_body(status, message):
    kind = 'invalid_request_error' if status < 500 else 'server_error'
    return {'error': {'message': message, 'type': kind, 'param': None, 'code': None}}


def refuse(http, error):
    """Return the response to an exception, in OpenAI's shape."""
    if isinstance(error, RequestValidationError):
        mistake = error.errors()[0]
        message = '.'.join(map(str, mistake['loc'])) + f": {mistake['msg']}"
        return JSONResponse(error_body(400, message), 400)
    status = getattr(error, 'status_code', 400)
    return JSONResponse(error_body(status, getattr(error, 'detail', str(error))), status)


def make_app(server):
    """Return the FastAPI app of a Server."""
    mistakes = HTTPException, RequestValidationError, UserError, UnicodeEncodeError
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None,
                          dependencies=[fastapi.Depends(server.check_headers)],
                          exception_handlers=dict.fromkeys(mistakes, refuse))

    @app.get('/')
    def page():
        return FileResponse(Path(__file__).with_name('page.html'))

    @app.get('/v1/models')
    def models():
        model = {'id': server.name, 'object': 'model', 'created': 0, 'owned_by': 'plainGPT'}
        settings, block_size = server.settings, server.model.config.block_size
        for_page = {'chat': server.template is not None, 'temperature': settings['temperature'],
                    'top_p': settings['top_p'], 'block_size': block_size,
                    'max_tokens': min(settings['max_new_tokens'], block_size // 2)}
        return {'object': 'list', 'data': [model | for_page]}

    @app.post('/v1/completions')
    async def completions(body: Body, http: fastapi.Request):
        body.messages = []  # they belong to a chat
        return await server.answer(body, http)

    @app.post('/v1/chat/completions')
    async def chat_completions(body: Body, http: fastapi.Request):
        if not body.messages or body.messages[-1].get('role') != 'user':
            raise UserError('the last of messages must be one of the user')
        return await server.answer(body, http)

    app.post('/attention')(server.draw)
    return app
