"""Distillation: the loss, the teachers that fit, and runs with one: python -m pytest tests/test_distill.py"""
import ast
import shutil

import pytest
import torch
from torch.nn import functional as F

from configurator import configure
from conftest import (
    ROOT,
    assert_equal_states,
    checkpoint,
    copy_run,
    losses,
    losses_from,
    refused,
    run_logs,
    succeeded,
    train,
    train_mode,
)
from data.chat import CHATML, conversation_ids, messages_of, with_separator
from data.chat_pystdlib.prepare import LONGEST, in_twos, questions
from data.tokenizer import get_tokenizer
from engine.checks import check_settings
from engine.common import UserError
from engine.distill import Distillation
from engine.parallel import Parallel
from model import GPT, GPTConfig, LinearCrossEntropy, cap_logits, linear_cross_entropy
from test_model import close, gradients, ids, loss_inputs, shaken

N, C, V = 40, 16, 50
SETTINGS = dict(distill_weight=0.3, distill_temperature=2.0, eval_only=False, dataset='text', dtype='float32')
BYTE = {'name': 'byte'}


def soft_loss(weight=0.3, temperature=2.0, softcap=0.0, n_ids=V, dtype=torch.float32):
    """A Distillation without a teacher, with random hidden states (N, 24) and a random head; and its loss_of_rows."""
    found = object.__new__(Distillation)
    vars(found).update(w=weight, T=temperature, softcap=softcap, head=(0.3 * torch.randn(n_ids, 24)).to(dtype))
    found.hidden = torch.randn(N, 24).to(dtype)
    return found, lambda *rows: found.losses(found.hidden, *rows)


def by_definition(x, weight, targets, teacher, softcap):
    """The loss on full logits in float64, by torch's own functions."""
    cap = lambda z, softcap: cap_logits(z, softcap) if softcap else z
    w, T, n_ids, seen = teacher.w, teacher.T, len(teacher.head), targets >= 0
    student = cap(x.double() @ weight.double().T, softcap)
    theirs = cap(teacher.hidden.double() @ teacher.head.double().T, teacher.softcap)
    student_soft, their_soft = (F.log_softmax(z[:, :n_ids] / T, dim=-1) for z in (student, theirs))
    kl = F.kl_div(student_soft, their_soft, reduction='none', log_target=True).sum(-1)[seen].mean()
    return (1 - w) * F.cross_entropy(student, targets, ignore_index=-1) + w * T ** 2 * kl


@pytest.mark.parametrize('chunk, softmax_rows', [(1, 1), (7, 3), (40, 40), (None, None)])  # None: as the model calls it
@pytest.mark.parametrize('case', [
    dict(),
    dict(softcap=2.0),
    dict(weight=1.0, temperature=1.0),
    dict(temperature=5.0, n_ids=47),  # the student's vocabulary is padded
])
@pytest.mark.parametrize('softcap', [0.0, 2.0])
def test_the_loss_is_that_of_full_logits(chunk, softmax_rows, case, softcap):
    """The rows of another chunk, a softcap or T^2 without its derivative, ignored rows that learn."""
    torch.manual_seed(0)
    x, weight, targets = loss_inputs(N, C, V)
    targets[3:9] = -1
    teacher, loss_of_rows = soft_loss(**case)
    expected = by_definition(x, weight, targets, teacher, softcap)
    expected_grads = torch.autograd.grad(expected * 3, (x, weight))
    if chunk is None:
        loss = linear_cross_entropy(x, weight, targets, softcap, loss_of_rows=loss_of_rows)
    else:
        args = softcap, torch.float32, chunk, softmax_rows, True, 'mean', loss_of_rows
        loss = LinearCrossEntropy.apply(x, weight, targets, *args)
    close(loss.double(), expected.detach())
    for grad, expected_grad in zip(torch.autograd.grad(loss * 3, (x, weight)), expected_grads):
        close(grad, expected_grad)


def test_the_temperature_keeps_the_size_of_the_gradient():
    """Without T^2 the teacher would count less, the higher the temperature (Hinton et al. 2015, section 2)."""
    torch.manual_seed(0)
    x, weight, targets = loss_inputs(N, C, V)
    teacher, loss_of_rows = soft_loss(weight=1.0)
    norms = []
    for teacher.T in (50.0, 100.0):
        loss = linear_cross_entropy(x, weight, targets, loss_of_rows=loss_of_rows)
        norms.append(torch.autograd.grad(loss, x)[0].norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


def test_under_bfloat16_autocast_the_loss_is_near_that_of_float32():
    """The softmax or the KL is in bfloat16, or the teacher's weights have another dtype than its states."""
    torch.manual_seed(0)
    x, weight, targets = loss_inputs(N, C, V, scale=0.3)
    teacher, loss_of_rows = soft_loss(dtype=torch.bfloat16)
    expected = by_definition(x, weight, targets, teacher, 0.0)
    expected_grads = torch.autograd.grad(expected, (x, weight))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets, loss_of_rows=loss_of_rows)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=0.02)
    for grad, expected_grad in zip(torch.autograd.grad(loss, (x, weight)), expected_grads):
        assert (grad - expected_grad).norm() < 0.05 * expected_grad.norm()


@pytest.mark.skipif(not shutil.which('c++'), reason='needs a C++ compiler')
def test_compiled_it_has_the_same_gradients():
    """torch.compile of torch 2.13 makes wrong code if softmax_losses() overwrites logits that the KL also reads."""
    torch.manual_seed(0)
    x, weight, targets = loss_inputs(N, C, V)
    teacher, _ = soft_loss()

    def loss(x, hidden):
        return linear_cross_entropy(x, weight, targets, loss_of_rows=lambda *rows: teacher.losses(hidden, *rows))

    expected = torch.autograd.grad(loss(x, teacher.hidden), (x, weight))
    found = torch.autograd.grad(torch.compile(loss)(x, teacher.hidden), (x, weight))
    torch.compiler.reset()
    for grad, expected_grad in zip(found, expected):
        close(grad, expected_grad)


# the teacher of a run

def distillation(teacher, student, tokenizer=BYTE, **settings):
    """The Distillation of a run whose model has the config `student`."""
    settings = SETTINGS | dict(teacher=str(teacher)) | settings
    return Distillation(settings, student, tokenizer and get_tokenizer(tokenizer), torch.device('cpu'))


def saved(model, folder, tokenizer=BYTE):
    """A folder with the model as a checkpoint."""
    folder.mkdir()
    torch.save(dict(model=model.state_dict(), model_args=vars(model.config), tokenizer=tokenizer), folder / 'ckpt.pt')
    return folder


@pytest.mark.parametrize('parts', [{}, dict(logit_softcap=3.0, weight_tying=True), dict(weight_tying=False)])
def test_a_teacher_that_is_the_student_adds_nothing(parts, tmp_path):
    """The hidden states lack the last norm, the softcap is applied twice or never, or the teacher has dropout."""
    student = shaken(**parts)
    path = saved(shaken(dropout=0.5, **parts), tmp_path / 'teacher')
    idx, targets = ids(2, student.config.block_size), ids(2, student.config.block_size, seed=1)
    only_kl = distillation(path, student.config, distill_weight=1.0).loss_of_rows(idx)
    loss = student(idx, targets, loss_of_rows=only_kl)[1]
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert max(p.grad.abs().max() for p in student.parameters()) < 1e-5
    plain = gradients(shaken(**parts), idx, targets)
    assert max(grad.abs().max() for grad in plain[1].values()) > 1e-3


@pytest.mark.parametrize('teacher, student, tokenizer, words', [
    (dict(block_size=8), dict(block_size=9), BYTE, 'reads at most 8 tokens: --block_size=8 or less'),
    (dict(), dict(), {'name': 'char', 'chars': 'ab'}, "not have the tokenizer of data set 'text'"),
    (dict(), dict(), None, "not have the tokenizer of data set 'text'"),
])
def test_a_teacher_that_does_not_fit_is_refused(teacher, student, tokenizer, words, tmp_path):
    """Ids that mean something else to the teacher, or an error from deep inside its embedding."""
    sizes = dict(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=256)
    path = saved(GPT(GPTConfig(**sizes | teacher)), tmp_path / 'teacher')
    with pytest.raises(UserError, match=words):
        distillation(path, GPTConfig(**sizes | student), tokenizer)


def test_a_hugging_face_folder_teaches(tmp_path):
    """Its tokenizer.json is compared with that of the data set by the text of a file instead of by ids."""
    pytest.importorskip('safetensors')
    pytest.importorskip('tokenizers')
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=256))
    model.save_pretrained(tmp_path / 'hf', dict(tokenizer=BYTE))
    idx, targets = ids(2, 8), ids(2, 8, seed=1)
    only_kl = distillation(tmp_path / 'hf', model.config, distill_weight=1.0).loss_of_rows(idx)
    assert abs(model(idx, targets, loss_of_rows=only_kl)[1].item()) < 1e-5


def test_a_teacher_that_is_missing_is_said_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ['--out_dir=o', '--teacher=out-typo']
    with pytest.raises(UserError, match="no checkpoint at 'out-typo'"):
        check_settings(*configure(str(ROOT / 'train.py'), argv=argv), Parallel())


# runs with a teacher

@pytest.fixture(scope='module')
def distilled(text_set, finished, tmp_path_factory):
    """(out_dir, console) of a run of 20 iterations whose teacher is `finished`."""
    out_dir = tmp_path_factory.mktemp('distilled') / 'out'
    done = train(text_set, out_dir, f'--teacher={finished[0]}', '--save_interval=10', '--verbose=True')
    succeeded(done)
    return out_dir, done.stdout


def test_a_run_counts_its_teacher_and_evaluates_its_own_loss(distilled, finished):
    """The expected time forgets the teacher, or an evaluation mixes its loss in."""
    out_dir, console = distilled
    assert 'cannot estimate' not in console
    (plain, *_), (run,) = run_logs(finished[0]), run_logs(out_dir)
    assert run['startup_info']['flops_per_token'] == pytest.approx(4 / 3 * plain['startup_info']['flops_per_token'])
    first, second = (log['eval_steps'][0]['val']['loss'] for log in (plain, run))
    assert first == second  # of the same new model
    assert losses(out_dir)[0] != losses(finished[0])[0]


def test_a_distilled_run_resumes_bit_for_bit(text_set, finished, distilled, tmp_path):
    half = copy_run(distilled[0], tmp_path / 'half', 'ckpt_prev.pt')
    succeeded(train(text_set, half, '--init_from=resume', f'--teacher={finished[0]}'))
    assert_equal_states(checkpoint(distilled[0]), checkpoint(half))
    assert losses(half) == losses_from(distilled[0], 10)


def test_another_tokenizer_is_refused(text_set, finished, tmp_path):
    teacher = saved(GPT(GPTConfig(n_layer=1, n_embd=12)), tmp_path / 'other', {'name': 'char', 'chars': 'abc'})
    refused(train(text_set, tmp_path / 'out', f'--teacher={teacher}'), 'does not have the tokenizer')


@pytest.mark.parametrize('mode', ['ddp', 'zero1', 'fsdp'])
def test_every_mode_distils_as_one_process(text_set, finished, tmp_path, mode):
    """The teacher is on another device, or the processes' means differ from that of one."""
    for name in ('one', mode):
        succeeded(train_mode(name, text_set, tmp_path / name, f'--teacher={finished[0]}', '--max_iters=5'))
    one, other = losses(tmp_path / 'one'), losses(tmp_path / mode)
    assert other == pytest.approx(one, rel=1e-5) and len(one) == 5


# the recipe of a chat about signatures

def test_questions_of_the_chat_recipe():
    """self counts as an argument, a default is another argument's, or a conversation is cut at block_size."""
    source = "def wrap(self, text, width=70): pass\ndef _hidden(a): pass\ndef any_number(*args): pass"
    found = [questions('textwrap', f) for f in ast.parse(source).body]
    shown = 'textwrap.wrap(self, text, width=70)'
    assert {q.removeprefix(f'{shown} '): a for q, a in found[0].items() if 'Argument' not in q} == {
        'Module?': 'textwrap', 'How many arguments?': '2', 'Default of width?': '70'}
    assert found[0].items() & {(f'{shown} Argument 1?', 'text'), (f'{shown} Argument 2?', 'width')}
    assert found[1:] == [{}, {}]
    template, _ = with_separator(CHATML, get_tokenizer('byte'))
    talk, = in_twos({'q' * (LONGEST - 9): 'a' * 9, 'r' * (LONGEST - 9): 'b' * 9})
    messages = messages_of(talk)
    assert len(messages) == 4 and len(conversation_ids(messages, get_tokenizer('byte'), template)[0]) <= 257
