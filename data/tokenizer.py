"""Text to token ids and back. The 'tokenizer' entry of a data set's meta.json, such as {"name": "byte"}, says which."""
import numpy as np


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


TOKENIZERS = {cls.name: cls for cls in (Byte, Char, GPT2)}


def get_tokenizer(spec):
    """The tokenizer that spec describes, a dict with a name or the name alone. ValueError lists the names there are."""
    spec = {'name': spec} if isinstance(spec, str) else spec
    name = spec.get('name') if isinstance(spec, dict) else spec
    if name not in TOKENIZERS:
        raise ValueError(f'unknown tokenizer {name!r}, use one of {", ".join(TOKENIZERS)}')
    return TOKENIZERS[name](spec)
