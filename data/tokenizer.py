"""Text to token ids and back. The 'tokenizer' entry of a data set's meta.json, such as {"name": "byte"}, says which."""
import json
import os
import sys

import numpy as np

from data.loader import read_meta


class Tokenizer:
    """What the kinds share. A kind sets name, vocab_size, table (the bytes of every id), eot (the id that ends a text, or
    None), spec (the plain dict that get_tokenizer turns back into it), and defines encode(text) -> list of ids."""
    eot = None

    def decode_bytes(self, ids):
        """The bytes that ids stand for, not always whole characters. ValueError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f'id {i} is outside 0..{self.vocab_size - 1} of tokenizer {self.name}: sample below its vocab_size')
        return b''.join(self.table[i] for i in ids)

    def decode(self, ids):
        """The text that ids stand for, with U+FFFD where the bytes are not UTF-8."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def token_bytes(self):
        """UTF-8 bytes an id stands for, (vocab_size,) int64, 0 for eot: a loss over their sum is in nats a byte of text."""
        return np.array([len(b) * (i != self.eot) for i, b in enumerate(self.table)])


class Byte(Tokenizer):
    """UTF-8 bytes as ids. NUL ends a text, since text files do not contain it."""
    name, vocab_size, eot, spec = 'byte', 256, 0, {'name': 'byte'}
    table = [bytes([i]) for i in range(256)]

    def __init__(self, spec):
        pass

    def encode(self, text):
        return list(text.encode('utf-8'))


class Char(Tokenizer):
    """One id a character of spec['chars'], a str or a list of single characters, in their order."""
    name = 'char'

    def __init__(self, spec):
        chars = spec.get('chars') or []
        self.ids = {c: i for i, c in enumerate(chars)}
        if not chars or len(self.ids) != len(chars) or any(not isinstance(c, str) or len(c) != 1 for c in chars):
            raise ValueError(f"tokenizer char needs 'chars', each of its characters once, not {chars!r:.60}")
        self.chars = ''.join(chars)
        self.vocab_size, self.table = len(chars), [c.encode('utf-8') for c in chars]
        self.spec = {'name': 'char', 'chars': self.chars}

    def encode(self, text):
        """ValueError for a character that the vocabulary lacks."""
        for c in text:
            if c not in self.ids:
                raise ValueError(f'character {c!r} is not in the vocabulary, which has {self.chars!r:.200}')
        return [self.ids[c] for c in text]


class GPT2(Tokenizer):
    """GPT-2's byte pair encoding, from tiktoken; the literal <|endoftext|> in a text becomes eot."""
    name, eot, spec = 'gpt2', 50256, {'name': 'gpt2'}

    def __init__(self, spec):
        import tiktoken
        try:
            self.encoding = tiktoken.get_encoding('gpt2')
        except (OSError, ValueError) as e:  # ValueError: a download that does not have the expected hash
            raise ValueError(f"tiktoken could not download GPT-2's encoding ({type(e).__name__}): go online once, or point "
                             'TIKTOKEN_CACHE_DIR at the cache of a machine that did') from None
        self.vocab_size = self.encoding.n_vocab
        self.table = [self.encoding.decode_single_token_bytes(i) for i in range(self.vocab_size)]

    def encode(self, text):
        return self.encoding.encode(text, allowed_special='all')


# GPT-2's way to write bytes as characters: printable ones as they are, the others as the characters from 256 on
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_CHARS = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}


class HuggingFace(Tokenizer):
    """A byte-level tokenizer.json of Hugging Face, whose text spec['json'] is; spec['eot'] names the token that ends a text."""
    name = 'huggingface'

    def __init__(self, spec):
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError:
            raise ValueError('a tokenizer.json is read by the library tokenizers: pip install tokenizers') from None
        self.spec, self.reader = spec, Reader.from_str(spec['json'])
        vocab, added = self.reader.get_vocab(), {t.content for t in self.reader.get_added_tokens_decoder().values()}
        self.vocab_size, self.eot = max(vocab.values()) + 1, vocab.get(spec.get('eot'))
        if '"ByteLevel"' not in json.dumps(json.loads(spec['json']).get('decoder')):
            raise ValueError('this tokenizer.json is not byte-level')
        self.table, byte_of = [b''] * self.vocab_size, {c: b for b, c in BYTE_CHARS.items()}
        for token, i in vocab.items():
            self.table[i] = token.encode('utf-8') if token in added else bytes(byte_of[c] for c in token)

    def encode(self, text):
        return self.reader.encode(text, add_special_tokens=False).ids


TOKENIZERS = {cls.name: cls for cls in (Byte, Char, GPT2, HuggingFace)}


def get_tokenizer(spec):
    """The tokenizer that spec describes, a dict with a name or the name alone. ValueError lists the names there are."""
    spec = {'name': spec} if isinstance(spec, str) else spec
    name = spec.get('name') if isinstance(spec, dict) else spec
    if name not in TOKENIZERS:
        raise ValueError(f'unknown tokenizer {name!r}, use one of {", ".join(TOKENIZERS)}')
    return TOKENIZERS[name](spec)


def find_tokenizer(ckpt):
    """The tokenizer that a checkpoint names; for nanoGPT's, which name none, the one of its data set, else GPT-2's."""
    if ckpt.get('tokenizer'):
        return get_tokenizer(ckpt['tokenizer'])
    dataset = (ckpt.get('config') or {}).get('dataset')
    if dataset is not None:
        if not isinstance(dataset, str) or dataset in ('', '.', '..') or os.path.basename(dataset) != dataset:  # a checkpoint is no guide to other folders
            raise ValueError(f"checkpoint '{ckpt['path']}' names no tokenizer, and its data set, {dataset!r:.100}, is no name of a folder in data/: refused")
        meta = read_meta(os.path.join(os.path.dirname(os.path.abspath(__file__)), dataset))
        if 'tokenizer' in meta:
            return get_tokenizer(meta['tokenizer'])
    print('the checkpoint names no tokenizer, so this assumes GPT-2\'s', file=sys.stderr)
    return get_tokenizer('gpt2')


def to_hugging_face(tokenizer):
    """A tokenizer as one of the library `tokenizers`, which gives the same ids for the same text. ValueError without the library."""
    try:
        from tokenizers import AddedToken, Regex, Tokenizer as Library, decoders, models, pre_tokenizers
    except ImportError:
        raise ValueError('to write a tokenizer.json needs the library tokenizers: pip install tokenizers') from None
    if 'json' in tokenizer.spec:
        return Library.from_str(tokenizer.spec['json'])
    if tokenizer.name == 'char':  # a character outside the vocabulary is an error here as well
        library = Library(models.WordLevel({c: i for i, c in enumerate(tokenizer.chars)}, unk_token='not in the vocabulary'))
        library.pre_tokenizer, library.decoder = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated'), decoders.Fuse()
        return library
    special = {'\0': 0} if tokenizer.name == 'byte' else dict(tokenizer.encoding._special_tokens)
    words = {b: i for i, b in enumerate(tokenizer.table) if b and i not in special.values()}
    written = {b: ''.join(BYTE_CHARS[c] for c in b) for b in words}
    # the pairs that give each word, those first that tiktoken would merge first
    merges = sorted(((b[:k], b[k:]) for b in words for k in range(1, len(b)) if b[:k] in words and b[k:] in words),
                    key=lambda pair: (words[pair[0] + pair[1]], words[pair[0]], words[pair[1]]))
    library = Library(models.BPE({written[b]: i for b, i in words.items()} | special, [(written[a], written[b]) for a, b in merges],
                                 ignore_merges=tokenizer.name != 'byte'))
    pattern = '' if tokenizer.name == 'byte' else tokenizer.encoding._pat_str.replace('$', r'\z')  # there $ ends a line
    split = [pre_tokenizers.Split(Regex(pattern), 'isolated')] * bool(pattern)
    library.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return library
