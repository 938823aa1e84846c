"""
Generate text from a trained model and print it token by token.

    python sample.py --out_dir=out
    python sample.py --out_dir=out --start="def main(" --num_samples=3 --temperature=0.7
    python sample.py --out_dir=out --start=FILE:prompt.txt
    python sample.py --out_dir=out --prompts=prompts.txt    # one per line, continued together
    python sample.py --out_dir=out --prompts=prompts.txt --json=True    # a line of JSON per sample
    python sample.py --out_dir=out --num_beams=4 --max_new_tokens=50    # beam search
    python sample.py --out_dir=out --interactive=True
    python sample.py --out_dir=out --chat=True              # talk to a model of conversations
    python sample.py --out_dir=out --serve=8000             # for a browser and OpenAI's clients
    python sample.py --init_from=gpt2
    python sample.py --out_dir=out --metrics=True           # compare samples with real text
    python sample.py --out_dir=out --attention=map.png      # picture of each head's attention
"""
import itertools
import os
import sys
from json import dumps
from typing import Literal

os.environ.setdefault('GOMP_SPINCOUNT', '10000')  # before torch is imported, as in train.py
import torch

from configurator import (
    Fraction,
    LogitScale,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
    configure,
)
from data.chat import end_of_turn, newest_turns
from data.tokenizer import Ids, find_tokenizer, prompt_ids, tokenizer_by_name
from engine.attention_map import attention_weights, draw_attention
from engine.beam import beam_search
from engine.checkpoint import load_checkpoint
from engine.common import UserError, printable, reader_may_exit, user_errors
from engine.continuation import Continuation
from engine.cost import check_sampling_fits
from engine.fast_linear import can_compile, prepare_to_generate, stored_bytes
from engine.huggingface import load_weights
from engine.machine import pick_device
from engine.sample_settings import check_settings, read_prompts
from engine.text_metrics import compare_with_real_text
from model import GPT

# ------------------------------------------------------------------------------------------------
# settings; each comment is the line of --help
out_dir = 'out'  # a run's folder (its ckpt.pt), or a checkpoint file such as out/ckpt_best.pt
init_from = 'resume'  # from out_dir; or another run's, a Hugging Face folder, a hub id such as gpt2
start = '\n'  # the prompt, or FILE:prompt.txt; <|endoftext|> is that token; empty: only that token
prompts = ''  # instead of start: a file with one prompt per line, all continued in one batch
num_samples: PositiveInt = 10  # per prompt, drawn in one batch; prompts, interactive, beams: 1
max_new_tokens: NonNegativeInt = 500  # tokens per sample
temperature: LogitScale = 0.8  # 1.0: the model's probabilities; lower: safer; 0: likeliest
top_k: NonNegativeInt = 200  # draw from this many likeliest tokens; 0: from all
top_p: Share = 1.0  # draw from the likeliest tokens that reach this probability; 1.0: all
min_p: Fraction = 0.0  # drop tokens below this share of the likeliest one's probability
repetition_penalty: PositiveFloat = 1.0  # above 1.0: tokens that have occurred become less likely
num_beams: PositiveInt = 1  # above 1: beam search of this width, which draws nothing
length_penalty: NonNegativeFloat = 1.0  # of beams: higher favours longer ones; see docs/generate.md
tokenizer = ''  # instead of the checkpoint's: gpt2, byte, a tokenizer.json, a data set's folder
stop = True  # end a sample where the model says end of text
stop_strings: str | list = ''  # end a sample before this text, or before one of ['this', 'that']
slide: PositiveInt = 1  # past block_size the window moves this far; 1: as nanoGPT; more: faster
seed: Seed = 1337  # the same seed, the same text
interactive = False  # ask for prompt after prompt, until Ctrl-D
chat = False  # talk turn by turn, until Ctrl-D, to a model trained on conversations
json = False  # print one line of JSON per sample, for programs
metrics = False  # also print diversity, repetition, perplexity of samples and val (needs scipy)
attention = ''  # instead of samples: a file such as map.png for each head's attention to the prompt
device = 'auto'  # cuda, mps or cpu
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of weights; auto: the fastest
quantize: Literal['', 'int8'] = ''  # int8: Linears at half the memory of 16 bits
raw = False  # print control characters, such as a terminal's escapes, instead of escaping them
compile = False  # on a CPU, for one sample at a time: faster, after ten seconds of compiling
# server
serve: NonNegativeInt = 0  # port of a server for browsers and OpenAI's clients; 0: none
host = '127.0.0.1'  # address to listen on; 0.0.0.0: other machines reach it
api_key = ''  # the key that clients have to send; empty: none
max_batch: PositiveInt = 16  # requests that are continued together
max_queue: NonNegativeInt = 64  # requests that may wait besides; more are refused
timeout: PositiveFloat = 300.0  # seconds until a request is given up
config, given = configure(__file__)
globals().update(config)
# ------------------------------------------------------------------------------------------------

# set-up: what is asked for
check_settings(config, given)
if serve:
    from engine.serve import Server, listen  # it imports libraries that only a server needs
    listener = listen(host, serve)  # now, because loading the model may take a while
if (prompts or interactive or chat or num_beams > 1) and 'num_samples' not in given:
    num_samples = 1
starts = read_prompts(start, prompts)
if tokenizer:
    tokenizer = tokenizer_by_name(tokenizer)

# set-up: the model and its tokenizer
device, _ = pick_device(device, dtype)
ckpt = load_checkpoint(out_dir) if init_from == 'resume' else load_weights(init_from)
with user_errors():
    model = GPT.from_dict(ckpt)
if not all(p.isfinite().all() for p in model.parameters()):
    raise UserError(f"{ckpt['path']} has weights that are not finite: take an earlier checkpoint")
if not tokenizer:
    tokenizer = find_tokenizer(ckpt, model.config.vocab_size)
if tokenizer is None:
    tokenizer = Ids({'name': 'ids', 'vocab_size': model.config.vocab_size})
    print('the checkpoint names no tokenizer, so text is shown as ids; name one with --tokenizer: '
          "gpt2, byte, a tokenizer.json, or a data set's folder", file=sys.stderr)
# nanoGPT's checkpoints do not say how much of the vocabulary is padding
known = min(tokenizer.vocab_size, model.config.vocab_size)
model.config.unpadded_vocab_size = min(model.config.unpadded_vocab_size or known, known)
n_params = model.get_num_params(non_embedding=False)
rows = max_batch if serve else max(num_beams, num_samples * len(starts))
compiled = compile and can_compile(device, rows) and not (serve or attention)
ends = {tokenizer.eot} - {None} if stop else set()  # ids that end a sample
template = ckpt.get('chat_template')
if chat and template is None:
    raise UserError(f"{ckpt['path']} has no chat template: make a model that has one by training "
                    'on a data set of data/prepare.py --chat=FILE.jsonl')
if compiled:
    print('compiling a step (ten seconds or so) ...', file=sys.stderr)
weights, dtype, trial = prepare_to_generate(model, device, dtype, quantize, rows, compiled)


def say(text, end='\n', file=None):
    """Print a text, on stdout by default. Its control characters are escaped unless --raw=True."""
    print(text if raw else printable(text), end=end, file=file, flush=True)


megabytes = stored_bytes(model) / 1e6
iteration = f", iteration {ckpt['iter_num']}" if 'iter_num' in ckpt else ''
note = ', compiled' if compiled else ''
if compile and not compiled:
    note = '; compile=True is ignored: it is for one sample on a CPU'
say(f"{ckpt['path']}: {n_params:,} parameters, {megabytes:,.1f} MB as {weights}"
    f'{iteration}, {device} {dtype}, seed {seed}{note}', file=sys.stderr)
if trial:
    say(trial, file=sys.stderr)


# generation

def stream_text(rows, samples):
    """
    Continue rows of ids, and push their tokens to the samples, which are Continuations. Yield the
    first sample's text piece by piece.
    """
    longest, n_tokens = max(map(len, rows)), samples[0].max_new_tokens
    padding = [longest - len(row) for row in rows]
    padded = [[0] * n + row for n, row in zip(padding, rows)]
    check_sampling_fits(model, len(rows), longest, n_tokens, device)
    steps = model.stream(torch.tensor(padded, device=device), n_tokens, temperature, top_k or None,
                         top_p, seed, slide=slide, left_padding=torch.tensor(padding), min_p=min_p,
                         repetition_penalty=repetition_penalty)
    with user_errors():  # the stream checks its arguments
        for step in steps:
            pieces = [sample.push(token) for sample, token in zip(samples, step.tolist())]
            yield pieces[0]
            if all(sample.finish for sample in samples):
                return


def generate(starts):
    """Print num_samples continuations of each prompt, the first as it grows, and the metrics."""
    starts = [prompt for prompt in starts for _ in range(num_samples)]
    rows = [prompt_ids(prompt, tokenizer, model.config.vocab_size) for prompt in starts]
    samples = [Continuation(tokenizer, max_new_tokens, ends, stop_strings) for _ in rows]
    text = starts[0]  # shown with the first piece, when no mistake has been found
    for piece in itertools.chain(stream_text(rows, samples), ['\n']):
        if not json:
            say(text + piece, end='')
        text = ''
    for i, (prompt, sample) in enumerate(zip(starts, samples)):
        if i or json:
            write(i, prompt, sample)
    if metrics:
        texts = [rows[0] + sample.ids for sample in samples]
        table, note = compare_with_real_text(ckpt, model, tokenizer, texts, len(rows[0]), seed)
        if note:
            say(note, file=sys.stderr)
        print(f'---------------\n{table}')


def search(starts):
    """Print the num_samples best continuations of each prompt that beam search finds."""
    numbers = itertools.count()
    for prompt in starts:
        ids = prompt_ids(prompt, tokenizer, model.config.vocab_size)
        check_sampling_fits(model, 2 * num_beams, len(ids), max_new_tokens, device,
                            'num_beams or max_new_tokens')
        beams = beam_search(model, ids, max_new_tokens, num_beams, length_penalty, ends)
        for score, new_ids in beams[:num_samples]:
            sample = Continuation(tokenizer, max_new_tokens, ends, stop_strings)
            for token in new_ids:
                sample.push(token)
            write(next(numbers), prompt, sample, score=round(score, 4))


def write(i, prompt, sample, **numbers):
    """Print sample i: as a line of JSON with the numbers, or as text, with dashes in between."""
    if json:
        facts = dict(prompt=prompt, text=sample.text, tokens=len(sample.ids),
                     finish_reason=sample.finish)
        print(dumps(facts | numbers), flush=True)
    else:
        say(('---------------\n' if i else '') + prompt + sample.text)


def draw(prompt):
    """Draw each head's attention over the prompt into the file `attention`."""
    ids = prompt_ids(prompt, tokenizer, model.config.vocab_size)
    with user_errors():
        layers = attention_weights(model, torch.tensor([ids], device=device))  # (1, H, T, T) each
    maps = torch.cat(layers).cpu().numpy()
    draw_attention(maps, [tokenizer.decode([i]) for i in ids], attention)
    say(f'{attention}: {maps.shape[0]} layers x {maps.shape[1]} heads over {len(ids)} tokens')


def ask():
    """Answer one prompt after another. A mistake in one does not end the session."""
    messages = []  # of a chat
    while True:
        try:
            text = input('\n> ')
            if chat:
                reply(messages, text)
            else:
                print_samples([text])
        except (EOFError, KeyboardInterrupt):
            return
        except UserError as e:
            say(str(e), file=sys.stderr)


def reply(messages, text):
    """
    Print the reply to a text of the user, and add both to the messages. The oldest turns are
    forgotten when the conversation no longer fits into block_size.
    """
    turn, block_size = [{'role': 'user', 'content': text}], model.config.block_size
    n_forgotten, ids = newest_turns(
        messages + turn, tokenizer, template, block_size, max_new_tokens)
    if n_forgotten:
        say('(the model no longer sees the oldest turns)', file=sys.stderr)
    del messages[:n_forgotten]
    n_tokens = min(max_new_tokens, block_size - len(ids))
    sample = Continuation(tokenizer, n_tokens, ends, stop_strings, end_of_turn(template))
    for piece in stream_text([ids], [sample]):
        say(piece, end='')
    print()
    messages += turn + [{'role': 'assistant', 'content': sample.text}]


# the mode that is asked for
sys.stdout.reconfigure(errors='replace')  # samples may not fit its encoding
print_samples = search if num_beams > 1 else generate
with reader_may_exit():
    if attention:
        draw(starts[0])
    elif interactive or chat:
        ask()
    elif serve:
        check_sampling_fits(model, max_batch, model.config.block_size, 0, device, 'max_batch')
        say(f'http://{host}:{serve} is a page, and http://{host}:{serve}/v1 the base_url of '
            "OpenAI's clients; Ctrl-C ends the server", file=sys.stderr)
        name = out_dir if init_from == 'resume' else init_from
        Server(name, model, tokenizer, template, ends, config).run(listener)
    else:
        print_samples(starts)
