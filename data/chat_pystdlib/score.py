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
from engine.common import show_error
from engine.statistics import mean_and_error, t_quantile
from model import GPT

EVERY = 3  # asks one question in three
AT_A_TIME = 64


def answers(ckpt, questions):
    """Return a model's likeliest answer to each question."""
    model, template, found = GPT.from_dict(ckpt), ckpt.get('chat_template'), []
    tokenizer = find_tokenizer(ckpt, model.config.vocab_size)
    stop = end_of_turn(template) if template else '\n'
    for i in range(0, len(questions), AT_A_TIME):
        prompts = [reply_prompt([{'role': 'user', 'content': question}], tokenizer, template)
                   if template else tokenizer.encode(f'{question}\n')
                   for question in questions[i:i + AT_A_TIME]]
        longest = max(map(len, prompts))
        padding = torch.tensor([longest - len(ids) for ids in prompts])
        padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
        room = max(1, model.config.block_size - longest)
        rows = model.generate(padded, room, temperature=0, left_padding=padding)[:, longest:]
        found += [tokenizer.decode(ids).split(stop)[0] for ids in rows.tolist()]
    return found


def main():
    sys.excepthook = show_error
    asked = dict([*conversations()['val'].items()][::EVERY])
    print(f'{len(asked)} questions')
    for path in sys.argv[1:]:
        said = answers(load_checkpoint(path), [*asked])
        mean, error, df = mean_and_error([a == b for a, b in zip(said, asked.values())])
        print(f'{path:24} {100 * mean:5.1f} ± {100 * t_quantile(0.95, df) * error:.1f} % right')


if __name__ == '__main__':
    main()
