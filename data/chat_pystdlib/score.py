"""
Ask models about functions that they were not trained on, and print the share of answers that are
right to the last character, with a 95 % interval. It needs scipy.

    python data/chat_pystdlib/score.py out-chat-pystdlib out-quick-test

A model without a chat template gets the question as plain text and answers on the next line.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root

import torch

from data.chat import end_of_turn, reply_prompt
from data.chat_pystdlib.prepare import conversations
from data.tokenizer import find_tokenizer
from engine.checkpoint import load_checkpoint
from engine.common import optional, show_error
from engine.statistics import mean_and_error, t_quantile
from model import GPT


def answer(model, tokenizer, template, question):
    """Return the model's likeliest answer."""
    prompt, stop = tokenizer.encode(f'{question}\n'), '\n'
    if template:
        prompt = reply_prompt([{'role': 'user', 'content': question}], tokenizer, template)
        stop = end_of_turn(template)
    room = max(1, min(64, model.config.block_size - len(prompt)))
    ids = model.generate(torch.tensor([prompt]), room, temperature=0)[0, len(prompt):]
    return tokenizer.decode(ids).split(stop)[0]


sys.excepthook = show_error
optional('scipy', 'a confidence interval')  # before minutes of questions, not after them
asked = [*conversations()['val'].items()][::6]
print(f'{len(asked)} questions')
for path in sys.argv[1:]:
    ckpt = load_checkpoint(path)
    model, template = GPT.from_dict(ckpt), ckpt.get('chat_template')
    tokenizer = find_tokenizer(ckpt, model.config.vocab_size)
    right = []
    for question, text in asked:
        right.append(answer(model, tokenizer, template, question) == text)
        if len(right) % 20 == 0:
            print(f'{path}: {len(right)} of {len(asked)} questions', file=sys.stderr)
    mean, error, df = mean_and_error(right)
    print(f'{path:24} {100 * mean:5.1f} ± {100 * t_quantile(0.95, df) * error:.1f} % right')
