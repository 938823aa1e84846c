"""Tokenizers: python -m pytest tests/test_tokenizer.py"""
import json

import pytest
import torch

from conftest import (
    TEXTS,
    llama3_json,
    llama_json,
    one_line,
    some_text,
    tokenizer_named,
)
from data.documents import cut_before
from data.tokenizer import find_tokenizer, get_tokenizer, tokenizer_from_file, train_bpe
from engine.common import UserError

KINDS = ['byte', 'char', 'gpt2', 'bpe', 'byte-level of llama 3', 'llama', 'llama metaspace']


@pytest.mark.parametrize('name', KINDS)
def test_tokenizers_round_trip(name):
    """Splitting text anywhere but between characters, or in another order, loses it on the way back."""
    tokenizer = tokenizer_named(name)
    again = get_tokenizer(json.loads(json.dumps(tokenizer.spec)))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert isinstance(ids, list) and all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text and tokenizer.decode(torch.tensor(ids)) == text
        prefix = b' ' if name.startswith('llama') and text else b''
        assert b''.join(tokenizer.decode_bytes([i]) for i in ids) == prefix + text.encode('utf-8')
        assert again.encode(text) == ids == tokenizer.encode_corpus(text).tolist()
        same, places = tokenizer.encode_with_places(text)
        assert same == ids and set(range(len(text))) <= {at for place in places for at in range(*place)}
        for i, (first, end) in zip(ids, places):
            assert tokenizer.decode_bytes([i]).removeprefix(prefix) in text[first:end].encode(), (text, i)
        n_bytes = tokenizer.token_bytes()
        assert n_bytes.shape == (tokenizer.vocab_size,)
        assert n_bytes[ids].sum() == len(prefix + text.encode('utf-8')) - ids.count(tokenizer.eot)
    for i in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f'id {i} '):
            tokenizer.decode([i])


def test_gpt2_ids_are_tiktokens():
    """Another split or another vocabulary would make pretrained weights useless."""
    tokenizer, tiktoken = tokenizer_named('gpt2'), pytest.importorskip('tiktoken')
    for text in TEXTS:
        assert tokenizer.encode(text) == tiktoken.get_encoding('gpt2').encode_ordinary(text)
    assert tokenizer.encode('a<|endoftext|>') == [64, 50256]
    assert tokenizer.eot == 50256 and tokenizer.vocab_size == 50257


def test_any_encoding_of_tiktokens_is_read(monkeypatch):
    """cl100k_base has ids between its special tokens that stand for nothing, and more than one special token."""
    registry = pytest.importorskip('tiktoken.registry')
    ranks = {bytes([b]): b for b in range(256)} | {b'ab': 256}
    if registry.ENCODING_CONSTRUCTORS is None:
        registry._find_constructors()
    encoding = dict(name='holes', pat_str=r'\w+|\W+', mergeable_ranks=ranks,
                    special_tokens={'<|endoftext|>': 260, '<|fim|>': 262})
    monkeypatch.setitem(registry.ENCODING_CONSTRUCTORS, 'holes', lambda: encoding)
    tokenizer = get_tokenizer({'name': 'holes'})
    assert tokenizer.vocab_size == 263 and tokenizer.eot == 260
    assert tokenizer.table[256:] == [b'ab', b'', b'', b'', b'<|endoftext|>', b'', b'<|fim|>']
    assert tokenizer.encode('ab<|fim|>') == [256, 262]
    assert tokenizer.token_bytes()[255:].tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
    corpus = tokenizer.encode_corpus('ab<|fim|>')
    assert tokenizer.decode(corpus) == 'ab<|fim|>' and 262 not in corpus


@pytest.mark.parametrize('name', ['bpe', 'byte-level of llama 3', 'llama', 'llama metaspace'])
def test_ids_of_a_tokenizer_json_are_the_librarys(name):
    """Easily left out: normalizers, the space before a text, bytes outside the vocabulary."""
    tokenizer, tokenizers = tokenizer_named(name), pytest.importorskip('tokenizers')
    reader = tokenizers.Tokenizer.from_str(tokenizer.spec['json'])
    eot = {'bpe': '<|endoftext|>', 'byte-level of llama 3': '<|end_of_text|>'}.get(name, '</s>')
    assert tokenizer.spec['eot'] == eot and tokenizer.eot == reader.token_to_id(eot)
    assert tokenizer.vocab_size == reader.get_vocab_size()
    for text in TEXTS + [' the mat', '  the', "12345 I'LL\n\n  go.\n", f'the{eot} end']:
        ids = reader.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == reader.decode(ids, skip_special_tokens=False)
    corpus = tokenizer.encode_corpus(f'the{eot} end').tolist()
    assert tokenizer.eot not in corpus and tokenizer.decode(corpus) == f'the{eot} end'
    assert tokenizer.encode(f'the{eot}')[-1] == tokenizer.eot
    assert tokenizer.token_bytes()[tokenizer.eot] == 0
    reader.enable_truncation(3)
    reader.enable_padding(length=9)
    again = get_tokenizer({'name': 'huggingface', 'json': reader.to_str()})
    assert again.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])


def test_a_byte_level_token_may_have_other_characters():
    """A token that was put into the vocabulary by hand is not written in GPT-2's characters for bytes."""
    tokenizers = pytest.importorskip('tokenizers')
    config = json.loads(llama3_json())
    config['model']['vocab'] |= {'a \u2581': 400, '\u4e2d': 401}
    tokenizer = get_tokenizer({'name': 'huggingface', 'json': json.dumps(config)})
    reader = tokenizers.Tokenizer.from_str(json.dumps(config))
    for i, text in [(400, 'a \u2581'), (401, '\u4e2d')]:
        assert tokenizer.decode([i]) == reader.decode([i]) == text


def test_what_is_no_tokenizer_json_is_one_line(tmp_path):
    """The library's own errors are of no class of its own."""
    tokenizers = pytest.importorskip('tokenizers')
    lossy = tokenizers.Tokenizer(tokenizers.models.WordPiece({'[UNK]': 0}))
    lossy.decoder = tokenizers.decoders.WordPiece()
    broken = 'not a tokenizer.json'
    for text, says in [('{}', broken), ('no', broken), (lossy.to_str(), 'cannot give back the text')]:
        (tmp_path / 'tokenizer.json').write_text(text)
        with pytest.raises(ValueError) as e:
            tokenizer_from_file(tmp_path)
        one_line(e.value, tmp_path / 'tokenizer.json', says)
    (tmp_path / 'tokenizer.json').write_text(llama_json())
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": {"content": "<s>"}}')
    assert tokenizer_from_file(tmp_path).eot == tokenizer_from_file(tmp_path / 'tokenizer.json').eot == 1


@pytest.mark.parametrize('name', KINDS)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(name, monkeypatch):
    """A word cut in two has other tokens; a space before each piece would be in the decoded text."""
    tokenizer = tokenizer_named(name if name != 'char' else 'byte')
    text = 'The cat sat on the mat.\nIn the end,\n\n    all is well: 漢字 naïve\n' * 40
    text += 'x' * 700 + '漢' * 300 + '  \n' * 90 + 'the end\r\nof it' * 99
    rest, ids = text.encode(), []
    while rest:
        end = cut_before(rest, 500) if len(rest) > 500 else len(rest)
        assert 0 < end <= 500
        piece, continued = rest[:end].decode(), len(rest) < len(text.encode())
        ids, rest = ids + tokenizer.encode_corpus(piece, continued).tolist(), rest[end:]
    assert tokenizer.decode(ids) == text
    ordinary = text[:text.index('xxx')]
    first = len(tokenizer.encode_corpus(ordinary[:2000]))
    assert ids[:first - 5] == tokenizer.encode_corpus(text).tolist()[:first - 5]


def test_code_is_cut_near_the_place_that_was_asked_for():
    """A tenth of a file of code that is asked for as val could become half of it: lines in it are indented."""
    text = b'def f():\n' + b'    if x and y:\n\n        return x + y\n' * 5000
    end = len(text) * 9 // 10
    assert end - 50 < cut_before(text, end) <= end


def test_invalid_utf8_becomes_a_replacement_character():
    """A model can sample half a character; that must not end the program."""
    assert get_tokenizer('byte').decode([104, 255, 105]) == 'h\ufffdi'


@pytest.mark.parametrize('spec', [{}, None, 7, {'name': [1]}, {'name': 'huggingface', 'json': {}}])
def test_a_spec_of_another_shape_is_one_line(spec):
    """A list as the name was a traceback."""
    with pytest.raises(UserError) as e:
        get_tokenizer(spec)
    one_line(e.value, 'tokenizer')


@pytest.mark.parametrize('spec', ['bpe', {'name': 'bpe'}, 'huggingface'])
def test_unknown_tokenizers_list_the_choices(spec):
    """A bare KeyError does not say what there is."""
    with pytest.raises(ValueError, match='byte, char, gpt2, .*cl100k_base.* tokenizer.json'):
        get_tokenizer(spec)


def test_a_character_outside_the_vocabulary_is_named():
    """nanoGPT ends in a KeyError."""
    with pytest.raises(ValueError, match=r"character '€' .*'abc'"):
        get_tokenizer({'name': 'char', 'chars': 'abc'}).encode('a€')
    for chars in ('', 'aa', ['ab'], None):
        with pytest.raises(ValueError, match='chars'):
            get_tokenizer({'name': 'char', 'chars': chars})


@pytest.mark.parametrize('vocab_size', [65, 256, 50256, 50305, 100277])
def test_another_vocabulary_does_not_suggest_gpt2(vocab_size):
    """A checkpoint that names no tokenizer was taken as GPT-2's, and a model of 65 ids sampled plausible nonsense."""
    assert find_tokenizer({'config': {}}, vocab_size) is None


@pytest.mark.parametrize('vocab_size', [50257, 50304])
def test_gpt2s_vocabulary_suggests_gpt2(vocab_size, capsys):
    """nanoGPT's checkpoints name no tokenizer, and most have GPT-2's ids, padded to 50,304."""
    tokenizer_named('gpt2')  # skips without tiktoken's file
    assert find_tokenizer({'config': {}}, vocab_size).name == 'gpt2'
    one_line(capsys.readouterr().err, "assumes GPT-2's")


def test_a_bpe_of_fewer_ids_than_asked_for_is_noted(capsys):
    """--vocab_size=600 made 285 ids without a word."""
    pytest.importorskip('tokenizers')
    assert train_bpe(['the cat sat on the mat'], 600).vocab_size < 300
    one_line(capsys.readouterr().err, 'vocab_size=600', 'ids')
    assert train_bpe([some_text()], 400).vocab_size == 400
    assert capsys.readouterr().err == ''
