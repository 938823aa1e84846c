"""What must stay true: python -m pytest tests/test_doc_mask.py"""
import shutil

import pytest
import torch

from conftest import BYTE, checkpoint, command, losses, refused, train
from data.loader import write_dataset
from model import GPT, GPTConfig

DOC = dict(block_size=48, vocab_size=60, n_layer=2, n_head=4, n_embd=32, attention_chunk_size=7)


@pytest.mark.parametrize('position_encoding', ['rope', 'none'])
@pytest.mark.parametrize('backend', ['sdpa', 'manual', 'chunked'])
def test_packed_documents_have_the_logits_of_documents_alone(backend, position_encoding):
    """One key too many and a page learns from the unrelated page before it; the mask must also hold in every row of its own."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**DOC, attention_backend=backend, position_encoding=position_encoding, n_kv_head=2, doc_mask_token=0))
    idx = torch.randint(1, 60, (3, 48))
    starts = [[0, 9, 10, 30], [0, 47], [0]]
    for row, places in enumerate(starts):
        idx[row, places[1:]] = 0
    logits, loss = model(idx, idx.roll(-1, 1), all_logits=True)
    assert all(torch.isfinite(p.grad).all() for p in (loss.backward(), model.parameters())[1])
    plain = GPT(GPTConfig(**DOC, position_encoding=position_encoding, n_kv_head=2))
    plain.load_state_dict(model.state_dict())
    for row, places in enumerate(starts):
        for start, end in zip(places, [*places[1:], 48]):
            alone = plain(idx[row:row + 1, start:end], all_logits=True)[0]
            torch.testing.assert_close(logits[row, start:end], alone[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain(idx, all_logits=True)[0][0, 12], logits[0, 12], atol=1e-3)


@pytest.mark.parametrize('options', [{}, {'n_kv_head': 1}, {'position_encoding': 'rope', 'n_kv_head': 2}, {'qk_norm': True, 'activation_checkpointing': True}],
                         ids=['custom', 'mqa', 'rope-gqa', 'qk_norm-checkpointing'])
def test_flex_attention_is_the_dense_mask(options, monkeypatch):
    """A GPU takes it, and here it is made to be taken: torch only checks that no gradient is wanted on a CPU, and its plain path has one."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**DOC | dict(block_size=200, n_embd=64) | options, doc_mask_token=0)).train()
    idx = torch.randint(1, 60, (3, 200))
    idx[0, [9, 10, 130]] = idx[1, 199] = 0

    def run(forward, autocast=False):
        model.zero_grad()
        with torch.autocast('cpu', enabled=autocast):
            logits, loss = forward(idx, idx.roll(-1, 1), all_logits=True)
        loss.backward()
        return [logits.detach().float(), *(p.grad for p in model.parameters())]
    dense, dense16 = run(model), run(model, True)
    taken = []
    monkeypatch.setattr(model, 'takes_flex', lambda device_type: True)
    monkeypatch.setattr('torch.nn.attention.flex_attention._validate_device', lambda *tensors: None)

    def backend(graph, inputs):
        taken.append(any('flex_attention' in getattr(m, 'code', '') for m in graph.modules()))
        return graph.forward
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(run(compiled), dense, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run(compiled, True), dense16, atol=2e-2, rtol=2e-2)
    assert taken == [True, True]
    if 'position_encoding' in options:
        alone = torch.cat([model(part, all_logits=True)[0] for part in idx[:1].split([9, 1, 120, 70], dim=1)], dim=1)
        torch.testing.assert_close(dense[0][:1], alone, atol=1e-5, rtol=1e-4)
    if 'position_encoding' in options and shutil.which('g++'):  # torch's own compiler, which without .contiguous() has given wrong logits here
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(model)(idx, all_logits=True)[0], dense[0], atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_flex_attention_on_a_gpu_is_the_dense_mask():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**DOC | dict(block_size=200, n_embd=64, position_encoding='rope', n_kv_head=2), doc_mask_token=0)).cuda().train()
    idx = torch.randint(0, 60, (3, 200), device='cuda')
    results = []
    for forward in (model, torch.compile(model)):
        model.zero_grad()
        logits, loss = forward(idx, idx.roll(-1, 1), all_logits=True)
        loss.backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    assert model.takes_flex('cuda')
    torch.testing.assert_close(results[1], results[0], atol=1e-3, rtol=1e-2)


def test_doc_mask_holds_with_a_cache_too():
    """Keys before the end of a text are still in the cache."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**DOC, doc_mask_token=0)).eval()
    idx = torch.randint(1, 60, (2, 48))
    idx[0, [5, 20, 21]], idx[1, 30] = 0, 0
    with torch.no_grad():
        whole, cache, parts = model(idx, all_logits=True)[0], model.new_cache(2, 48), []
        for start, end in [(0, 3), (3, 20), (20, 21), (21, 22), (22, 47), (47, 48)]:
            parts.append(model(idx[:, start:end], cache=cache, all_logits=True)[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
    a, b = (list(model.stream(idx[:, :40], 20, seed=1, slide=4, use_cache=use_cache)) for use_cache in (True, False))
    assert torch.equal(torch.stack(a), torch.stack(b))


def test_doc_mask_trains_and_says_what_it_needs(text_set, tmp_path):
    """Characters have no end of text, so a mask by it would do nothing."""
    write_dataset(tmp_path / 'docs', {split: b'a short text\0' * 200 for split in ('train', 'val')}, BYTE)
    for folder, flag in [('a', True), ('b', False), ('c', True)]:
        done = train(tmp_path / 'docs', tmp_path / folder, f'--doc_mask={flag}', '--max_iters=5')
        assert done.returncode == 0 and ('doc_mask by a dense mask' in done.stdout) == flag, done.stderr
    assert losses(tmp_path / 'a') == losses(tmp_path / 'c') != losses(tmp_path / 'b')
    assert checkpoint(tmp_path / 'a')['model_args']['doc_mask_token'] == 0 and checkpoint(tmp_path / 'b')['model_args']['doc_mask_token'] is None
    assert command('sample.py', f'--out_dir={tmp_path / "a"}', '--num_samples=1', '--max_new_tokens=30', '--stop=False').returncode == 0
    write_dataset(tmp_path / 'chars', {split: b'\0\1' * 99 for split in ('train', 'val')}, {'vocab_size': 2, 'tokenizer': {'name': 'char', 'chars': 'ab'}})
    refused(train(tmp_path / 'chars', tmp_path / 'd', '--doc_mask=True'), 'doc_mask', 'end-of-text')


