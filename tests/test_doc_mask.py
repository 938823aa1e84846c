"""doc_mask: documents packed into one sequence do not see each other, in any backend, with a cache or in training."""
import shutil

import pytest
import torch

from conftest import BYTE, checkpoint, command, losses, refused, succeeded, train
from data.folder import write_dataset
from model import GPT, GPTConfig

DOC = dict(block_size=48, vocab_size=60, n_layer=2, n_head=4, n_embd=32, attention_chunk_size=7)
FLEX = DOC | dict(block_size=200, n_embd=64)


def gradients_and_logits(model, forward, idx, autocast=False):
    """The logits and all gradients of one training step by `forward`, the model or the compiled model."""
    model.zero_grad()
    with torch.autocast('cpu', enabled=autocast):
        logits, loss = forward(idx, idx.roll(-1, 1), all_logits=True)
    loss.backward()
    return [logits.detach().float(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize('position_encoding', ['rope', 'none'])
@pytest.mark.parametrize('backend', ['sdpa', 'manual', 'chunked'])
def test_packed_documents_have_the_logits_of_documents_alone(backend, position_encoding):
    """One key too many, and a page learns from the unrelated page before it; or all rows have the first row's mask."""
    torch.manual_seed(0)
    shape = DOC | dict(position_encoding=position_encoding, n_kv_head=2)
    model = GPT(GPTConfig(**shape, attention_backend=backend, doc_mask_token=0))
    idx = torch.randint(1, 60, (3, 48))
    starts = [[0, 9, 10, 30], [0, 47], [0]]
    for row, places in enumerate(starts):
        idx[row, places[1:]] = 0
    logits, *gradients = gradients_and_logits(model, model, idx)
    assert all(gradient.isfinite().all() for gradient in gradients)
    plain = GPT(GPTConfig(**shape))
    plain.load_state_dict(model.state_dict())
    for row, places in enumerate(starts):
        for start, end in zip(places, [*places[1:], 48]):
            alone = plain(idx[row:row + 1, start:end], all_logits=True)[0]
            torch.testing.assert_close(logits[row, start:end], alone[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain(idx, all_logits=True)[0][0, 12], logits[0, 12], atol=1e-3)


@pytest.mark.parametrize('options', [
    {},
    {'n_kv_head': 1},
    {'position_encoding': 'rope', 'n_kv_head': 2},
    {'qk_norm': True, 'activation_checkpointing': True},
], ids=['custom', 'mqa', 'rope-gqa', 'qk_norm-checkpointing'])
def test_flex_attention_is_the_dense_mask(options, monkeypatch):
    """
    Flex attention, which only GPUs use, masks other keys. Here a CPU is made to use it: torch merely
    refuses to promise gradients there, and its plain path has them.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(**FLEX | options, doc_mask_token=0)).train()
    idx = torch.randint(1, 60, (3, 200))
    idx[0, [9, 10, 130]] = idx[1, 199] = 0
    dense, dense16 = (gradients_and_logits(model, model, idx, autocast) for autocast in (False, True))
    monkeypatch.setattr(model, 'can_use_flex', lambda device_type: True)
    monkeypatch.setattr('torch.nn.attention.flex_attention._validate_device', lambda *tensors: None)
    taken = []

    def backend(graph, inputs):
        taken.append(any('flex_attention' in getattr(m, 'code', '') for m in graph.modules()))
        return graph.forward
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(gradients_and_logits(model, compiled, idx), dense, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients_and_logits(model, compiled, idx, True), dense16, atol=2e-2, rtol=2e-2)
    assert taken == [True, True]
    torch.compiler.reset()


@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
def test_flex_attention_by_torchs_own_compiler_is_the_dense_mask(monkeypatch):
    """Without .contiguous(), torch's compiler has given wrong logits here."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**FLEX, position_encoding='rope', n_kv_head=2, doc_mask_token=0)).train()
    idx = torch.randint(1, 60, (3, 200))
    idx[0, [9, 10, 130]] = idx[1, 199] = 0
    dense = model(idx, all_logits=True)[0]
    documents = idx[:1].split([9, 1, 120, 70], dim=1)
    alone = torch.cat([model(document, all_logits=True)[0] for document in documents], dim=1)
    torch.testing.assert_close(dense[:1], alone, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(model, 'can_use_flex', lambda device_type: True)
    monkeypatch.setattr('torch.nn.attention.flex_attention._validate_device', lambda *tensors: None)
    with torch.no_grad():
        flex = torch.compile(model)(idx, all_logits=True)[0]
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_flex_attention_on_a_gpu_is_the_dense_mask():
    """Flex attention's own kernel masks other keys."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**FLEX, position_encoding='rope', n_kv_head=2, doc_mask_token=0)).cuda().train()
    idx = torch.randint(0, 60, (3, 200), device='cuda')
    assert model.can_use_flex('cuda')
    dense, flex = (gradients_and_logits(model, forward, idx) for forward in (model, torch.compile(model)))
    torch.testing.assert_close(flex, dense, atol=1e-3, rtol=1e-2)


def test_doc_mask_holds_with_a_cache_too():
    """Keys before the end of a text are still in the cache, and are attended to."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**DOC, doc_mask_token=0)).eval()
    idx = torch.randint(1, 60, (2, 48))
    idx[0, [5, 20, 21]], idx[1, 30] = 0, 0
    with torch.no_grad():
        whole, cache, parts = model(idx, all_logits=True)[0], model.new_cache(2, 48), []
        for start, end in [(0, 3), (3, 20), (20, 21), (21, 22), (22, 47), (47, 48)]:
            parts.append(model(idx[:, start:end], cache=cache, all_logits=True)[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
    texts = [list(model.stream(idx[:, :40], 20, seed=1, slide=4, use_cache=use_cache)) for use_cache in (True, False)]
    assert torch.equal(torch.stack(texts[0]), torch.stack(texts[1]))


def test_token_shift_stays_within_a_document():
    """The token that opens a document would still see the last token of the one before, or in pieces another."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**DOC | dict(position_encoding='none'), doc_mask_token=0, token_shift=True)).eval()
    torch.nn.init.ones_(model.transformer.shift.weight)
    idx = torch.randint(1, 60, (1, 48))
    idx[0, [5, 20, 21]] = 0
    with torch.no_grad():
        whole, cache = model(idx, all_logits=True)[0], model.new_cache(1, 48)
        alone = [model(text, all_logits=True)[0] for text in idx.split([5, 15, 1, 27], dim=1)]
        pieces = [model(piece, cache=cache, all_logits=True)[0] for piece in idx.split([3, 17, 1, 1, 26], dim=1)]
    for parts in alone, pieces:
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)


def test_doc_mask_trains_and_is_in_the_checkpoint(tmp_path):
    """The flag has no effect on training, or sampling does not know of it."""
    write_dataset(tmp_path / 'docs', {split: b'a short text\0' * 200 for split in ('train', 'val')}, BYTE)
    masked, again, plain = tmp_path / 'masked', tmp_path / 'again', tmp_path / 'plain'
    for out_dir, flag in (masked, True), (again, True), (plain, False):
        done = train(tmp_path / 'docs', out_dir, f'--doc_mask={flag}', '--max_iters=5', '--verbose=True')
        succeeded(done)
        assert ('doc_mask by a dense mask' in done.stdout) == flag
        assert checkpoint(out_dir)['model_args']['doc_mask_token'] == (0 if flag else None)
    assert losses(masked) == losses(again) != losses(plain)
    succeeded(command('sample.py', f'--out_dir={masked}', '--num_samples=1', '--max_new_tokens=30', '--stop=False'))


def test_doc_mask_needs_an_end_of_text(tmp_path):
    """Characters have no end of text, so a mask by it does nothing."""
    meta = {'vocab_size': 2, 'tokenizer': {'name': 'char', 'chars': 'ab'}}
    write_dataset(tmp_path / 'chars', {split: b'\0\1' * 99 for split in ('train', 'val')}, meta)
    refused(train(tmp_path / 'chars', tmp_path / 'out', '--doc_mask=True'), 'doc_mask', 'end-of-text')
