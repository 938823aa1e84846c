"""
Generate text from a trained model and print it token by token.

    python sample.py --out_dir=out
    python sample.py --out_dir=out --start="def main(" --num_samples=3 --temperature=0.7
    python sample.py --out_dir=out --start=FILE:prompt.txt
    python sample.py --out_dir=out --prompts=prompts.txt    # one per line, continued together
    python sample.py --out_dir=out --interactive=True
    python sample.py --init_from=gpt2
    python sample.py --out_dir=out --metrics=True           # compare samples with real text
    python sample.py --out_dir=out --attention=map.png      # picture of each head's attention
"""
import codecs
import itertools
import sys
from typing import Literal

import torch

from configurator import LogitScale, NonNegativeInt, PositiveInt, Seed, Share, configure
from data.tokenizer import Ids, find_tokenizer, prompt_ids, tokenizer_by_name
from engine.attention_map import attention_weights, draw_attention
from engine.checkpoint import load_checkpoint
from engine.common import UserError, optional, printable, reader_may_exit, user_errors
from engine.cost import check_sampling_fits
from engine.fast_linear import prepare_to_generate, stored_bytes
from engine.huggingface import load_weights
from engine.machine import pick_device
from engine.text_metrics import measure, metrics_table, real_texts
from model import GPT

# ------------------------------------------------------------------------------------------------
# settings; each comment is the line of --help
out_dir = 'out'  # a run's folder (its ckpt.pt), or a checkpoint file such as out/ckpt_best.pt
init_from = 'resume'  # from out_dir; or another run's, a Hugging Face folder, a hub id such as gpt2
start = '\n'  # the prompt, or FILE:prompt.txt; <|endoftext|> is that token; empty: only that token
prompts = ''  # instead of start: a file with one prompt per line, all continued in one batch
num_samples: PositiveInt = 10  # per prompt, drawn in one batch; prompts and interactive: 1
max_new_tokens: NonNegativeInt = 500  # tokens per sample
temperature: LogitScale = 0.8  # 1.0: the model's probabilities; lower: safer; 0: likeliest
top_k: NonNegativeInt = 200  # draw from this many likeliest tokens; 0: from all
top_p: Share = 1.0  # draw from the likeliest tokens that reach this probability; 1.0: all
tokenizer = ''  # instead of the checkpoint's: gpt2, byte, a tokenizer.json, a data set's folder
stop = True  # end a sample where the model says end of text
slide: PositiveInt = 1  # past block_size the window moves this far; 1: as nanoGPT; more: faster
seed: Seed = 1337  # the same seed, the same text
interactive = False  # ask for prompt after prompt, until Ctrl-D
metrics = False  # also print diversity, repetition, perplexity of samples and val (needs scipy)
attention = ''  # instead of samples: a file such as map.png for each head's attention to the prompt
device = 'auto'  # cuda, mps or cpu
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of weights; auto: the fastest
quantize: Literal['', 'int8'] = ''  # int8: Linears at half the memory of 16 bits
raw = False  # print control characters, such as a terminal's escapes, instead of escaping them
compile = False  # nanoGPT's key; does nothing: generation has a KV cache instead
config, given = configure(__file__)
globals().update(config)
# ------------------------------------------------------------------------------------------------

if metrics and max_new_tokens == 0:
    raise UserError('--metrics needs samples: --max_new_tokens of 1 or more, not 0')
if attention and not attention.endswith(('.png', '.jpg', '.pdf', '.svg')):
    raise UserError(f"--attention='{attention}' must end in .png, .jpg, .pdf or .svg")
if attention and (metrics or interactive):
    raise UserError('--attention draws instead of sampling: leave out --metrics and --interactive')
if attention:
    optional('matplotlib', '--attention')
if metrics:
    optional('scipy', '--metrics')
if prompts and (metrics or interactive or attention or 'start' in given):
    raise UserError('--prompts continues the lines of a file: leave out --start, --metrics, '
                    '--attention and --interactive')
if (prompts or interactive) and 'num_samples' not in given:
    num_samples = 1


def read_prompt_file(path):
    try:
        with open(path, encoding='utf-8') as f:
            return f.read()
    except OSError as e:
        raise UserError(f"the prompt file '{path}' cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"the prompt file '{path}' is not text in UTF-8: {e.reason}") from e


starts = [start]
if start.startswith('FILE:'):
    starts = [read_prompt_file(start.removeprefix('FILE:'))]
if prompts:
    starts = [line for line in read_prompt_file(prompts).split('\n') if line.strip()]
    if not starts:
        raise UserError(f"the prompt file '{prompts}' is empty; write one prompt per line")
if tokenizer:
    tokenizer = tokenizer_by_name(tokenizer)

def say(text, end='\n', file=None):
    """Print a text, on stdout by default. Its control characters are escaped unless --raw=True."""
    print(text if raw else printable(text), end=end, file=file, flush=True)


# the model
device, _ = pick_device(device, dtype)
ckpt = load_checkpoint(out_dir) if init_from == 'resume' else load_weights(init_from)
with user_errors():
    model = GPT.from_dict(ckpt)
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
weights, dtype, trial = prepare_to_generate(
    model, device, dtype, quantize, rows=num_samples * len(starts))

megabytes = stored_bytes(model) / 1e6
iteration = f", iteration {ckpt['iter_num']}" if 'iter_num' in ckpt else ''
ignored = '; compile=True is ignored, see --help' if compile else ''
say(f"{ckpt['path']}: {n_params:,} parameters, {megabytes:,.1f} MB as {weights}"
    f'{iteration}, {device} {dtype}, seed {seed}{ignored}', file=sys.stderr)
if trial:
    say(trial, file=sys.stderr)


def generate(starts):
    """
    Print num_samples continuations of each prompt, the first one token by token, and the metrics. A
    character that is cut off at the end is left out.
    """
    starts = [prompt for prompt in starts for _ in range(num_samples)]
    ids = [prompt_ids(prompt, tokenizer, model.config.vocab_size) for prompt in starts]
    longest = max(map(len, ids))
    padding = [longest - len(row) for row in ids]
    padded = [[0] * n + row for n, row in zip(padding, ids)]
    eot = tokenizer.eot if stop else None
    check_sampling_fits(model.config, len(ids), longest, max_new_tokens, device,
                        model.cache_dtype().itemsize)
    new_decoder = codecs.getincrementaldecoder('utf-8')
    steps = model.stream(torch.tensor(padded, device=device), max_new_tokens, temperature,
                         top_k or None, top_p, seed, eot, slide=slide,
                         left_padding=torch.tensor(padding))
    with user_errors():  # the stream checks its arguments before its first step
        first_step = list(itertools.islice(steps, 1))

    rows = [[] for _ in ids]
    shown = new_decoder('replace')
    say(starts[0], end='')
    for step in itertools.chain(first_step, steps):
        for row, token in zip(rows, step.tolist()):
            if not row or row[-1] != eot:
                row.append(token)
        if rows[0][-1] != eot:
            text = shown.decode(tokenizer.decode_bytes(rows[0][-1:]))
            say(text, end='')
    print()
    for prompt, row in zip(starts[1:], rows[1:]):
        tokens = [token for token in row if token != eot]
        text = new_decoder('replace').decode(tokenizer.decode_bytes(tokens))
        say(f'---------------\n{prompt}{text}')
    if metrics:
        print(f'---------------\n{compare_with_real_text(ids[0], rows)}')


def compare_with_real_text(prompt, rows):
    """Return a table of metrics of the samples, and of as many real texts of as many tokens."""
    samples = [prompt + row for row in rows]
    columns = {f'{len(samples)} samples': measure(model, tokenizer, samples, len(prompt))}
    lengths = [len(ids) for ids in samples]
    try:
        real = real_texts(ckpt, model, tokenizer, lengths, seed)
        columns[f'{len(real)} of real text'] = measure(model, tokenizer, real, len(prompt))
    except UserError as e:
        say(f'no real text to compare the samples with: {e}', file=sys.stderr)
    return metrics_table(columns)


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
    while True:
        try:
            generate([input('\n> ')])
        except (EOFError, KeyboardInterrupt):
            return
        except UserError as e:
            say(str(e), file=sys.stderr)


sys.stdout.reconfigure(errors='replace')  # samples may not fit its encoding
with reader_may_exit():
    if attention:
        draw(starts[0])
    elif interactive:
        ask()
    else:
        generate(starts)
