"""
Distillation (https://arxiv.org/abs/1503.02531): a model, the student, also learns from a teacher's
predictions. Its loss is (1 - w) cross-entropy + w T^2 KL(teacher || student), where the logits of
the KL divergence are divided by T. Its gradient is then about T^2 times smaller, hence the factor.
"""
import torch

from data.tokenizer import find_tokenizer
from engine.common import UserError, user_errors
from engine.huggingface import load_weights
from model import GPT, cap_logits


class Distillation:
    """The frozen teacher of a run, in the dtype of its forward passes, and the loss with it."""
    def __init__(self, config, student, tokenizer, device):
        name = config['teacher']
        self.w, self.T = config['distill_weight'], config['distill_temperature']
        ckpt = load_weights(name, student.block_size)
        with user_errors():
            teacher = GPT.from_dict(ckpt).requires_grad_(False)
        theirs = find_tokenizer(ckpt, teacher.config.vocab_size)
        if not (tokenizer and theirs and tokenizer.table == theirs.table):
            raise UserError(f"teacher '{name}' does not have the tokenizer of data set "
                            f"'{config['dataset']}', so its ids mean something else")
        if teacher.config.block_size < student.block_size:
            raise UserError(f"teacher '{name}' reads at most {teacher.config.block_size} tokens: "
                            f'--block_size={teacher.config.block_size} or less')
        self.flops_per_token = sum(teacher.flops_by_part(student.block_size).values())  # forward
        self.teacher = teacher.to(device, getattr(torch, config['dtype']))
        # without head and softcap, the teacher returns the hidden states that they would get
        self.head = teacher.lm_head.weight[:student.unpadded_vocab_size]
        teacher.lm_head = torch.nn.Identity()
        self.softcap, teacher.config.logit_softcap = teacher.config.logit_softcap, 0.0
        teacher.config.doc_mask_token = student.doc_mask_token

    @torch.no_grad()
    def loss_of_rows(self, X):
        """Return what replaces softmax_losses() in the student's loss on ids X (B, T)."""
        hidden = self.teacher(X, all_logits=True)[0].flatten(0, 1).to(self.head.dtype)
        return lambda *rows: self.losses(hidden, *rows)

    def losses(self, hidden, first, logits, targets, softcap, need_grad):
        """Return what softmax_losses() does, for the rows from `first` on and the mixed loss."""
        w, T, n_ids, seen = self.w, self.T, len(self.head), targets >= 0
        student, targets = capped(logits, softcap), targets.clamp(min=0)
        teacher = capped(hidden[first:first + len(logits)] @ self.head.T, self.softcap)
        hard = student.log_softmax(-1)
        soft, their_soft = (student[:, :n_ids] / T).log_softmax(-1), (teacher / T).log_softmax(-1)
        kl = (their_soft.exp() * (their_soft - soft)).sum(-1, keepdim=True)
        if need_grad:
            one_hot = torch.zeros_like(hard).scatter_(1, targets, 1.0)
            grad = (1 - w) * (hard.exp() - one_hot)
            grad[:, :n_ids] += w * T * (soft.exp() - their_soft.exp())
            logits.copy_(grad * (1 - (student / softcap).square()) if softcap else grad)
        return ((w - 1) * hard.gather(1, targets) + w * T ** 2 * kl) * seen


def capped(logits, softcap):
    return cap_logits(logits.float(), softcap) if softcap else logits.float()
