"""
Text out of a trained model, as it comes.

    python sample.py --out_dir=out
    python sample.py --out_dir=out --start="def main(" --num_samples=3 --temperature=0.7
    python sample.py --out_dir=out --start=FILE:prompt.txt
    python sample.py --out_dir=out --interactive=True
    python sample.py --init_from=gpt2
"""
import codecs
import itertools
import os
import sys
from typing import Literal

import torch

from bridge import load_weights
from configurator import configure, fail
from data.tokenizer import find_tokenizer
from model import load_checkpoint, model_of, pick_device

# ---------------------------------------------------------------------------------------------------------------------
out_dir = 'out'  # a run's folder (its ckpt.pt), or a checkpoint file such as out/ckpt_best.pt
init_from = 'resume'  # from out_dir; or another run's out_dir, a folder that Hugging Face's save_pretrained wrote, or a hub id such as gpt2
start = '\n'  # the prompt, or FILE:prompt.txt; <|endoftext|> means that token; empty: from the end-of-text token
num_samples = 10  # samples, drawn together in one batch
max_new_tokens = 500  # tokens a sample
temperature = 0.8  # 1.0: the model's own probabilities, lower: safer, 0: always the likeliest token
top_k = 200  # draw from this many likeliest tokens; 0: from all
top_p = 1.0  # draw from the fewest likeliest tokens that together reach this probability; 1.0: from all
stop = True  # end a sample where the model says end of text
slide = 1  # past block_size, tokens the window moves at once: 1 as nanoGPT (slow, each token a whole forward), block_size // 2 fast
seed = 1337  # the same seed, the same text
interactive = False  # ask for prompt after prompt, until Ctrl-D
device = 'auto'  # cuda, mps or cpu
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of the weights
quantize: Literal['', 'int8'] = ''  # int8: weights of Linears in one byte each, the rest in dtype; half the memory, and slower for more than 4 samples at once
compile = False  # nanoGPT's key; generation has a KV cache instead and is not compiled
config, given = configure(__file__)
globals().update(config)
# ---------------------------------------------------------------------------------------------------------------------


def generate(prompt):
    """Print num_samples continuations: the first as its tokens come, the others after it. A character cut off at the end is left out."""
    ids = tokenizer.encode(prompt) if prompt else [tokenizer.eot] if tokenizer.eot is not None else []
    if not ids:
        raise ValueError('an empty --start needs a tokenizer with an end-of-text token; give it some text')
    bad = max(ids)
    if bad >= model.config.vocab_size:
        raise ValueError(f'the prompt has token {bad}, the model knows {model.config.vocab_size}')
    idx = torch.tensor([ids] * num_samples, device=device)
    eot, decoder = tokenizer.eot if stop else None, codecs.getincrementaldecoder('utf-8')
    rows, shown = [[] for _ in range(num_samples)], decoder('replace')
    steps = model.stream(idx, max_new_tokens, temperature, top_k or None, top_p, seed, eot, slide=slide)
    first = next(steps, None)  # arguments out of range show before anything is printed
    print(prompt, end='', flush=True)
    for step in itertools.chain([first] if first is not None else [], steps):
        for row, token in zip(rows, step.tolist()):
            if not (row and row[-1] == eot):
                row.append(token)
        if rows[0][-1] != eot:
            print(shown.decode(tokenizer.decode_bytes(rows[0][-1:])), end='', flush=True)
    print()
    for row in rows[1:]:
        print('---------------')
        print(prompt + decoder('replace').decode(tokenizer.decode_bytes([t for t in row if t != eot])))


sys.stdout.reconfigure(errors='replace')  # a sample may hold what this terminal cannot show
try:
    if num_samples < 1:
        raise ValueError(f'num_samples must be positive, not {num_samples}')
    device, dtype = pick_device(device, dtype)
    ckpt = load_checkpoint(out_dir) if init_from == 'resume' else load_weights(init_from)
    tokenizer = find_tokenizer(ckpt)
    model = model_of(ckpt)
    known = min(tokenizer.vocab_size, model.config.vocab_size)  # nanoGPT's checkpoints do not say how much of the vocabulary is padding
    model.config.unpadded_vocab_size = min(model.config.unpadded_vocab_size or known, known)
    n_params = model.get_num_params(False)
    model = (model.quantize_int8() if quantize else model).to(device, getattr(torch, dtype))
    megabytes = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()}) / 1e6
    if start.startswith('FILE:'):
        with open(start[5:], encoding='utf-8') as f:
            start = f.read()
    at = f", iteration {ckpt['iter_num']}" if 'iter_num' in ckpt else ''
    print(f"{ckpt['path']}: {n_params:,} parameters, {megabytes:,.1f} MB as {quantize or dtype}{at}, {device} {dtype}, seed {seed}" +
          ('; compile=True is ignored, see --help' if compile else ''), file=sys.stderr)
    if not interactive:
        generate(start)
    while interactive:
        try:
            generate(input('\n> '))
        except (EOFError, KeyboardInterrupt):
            break
        except ValueError as e:
            print(e, file=sys.stderr)
except BrokenPipeError:  # the reader, head say, has had enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
except (ValueError, OSError) as e:
    fail(str(e))
except KeyboardInterrupt:
    raise SystemExit(130)
