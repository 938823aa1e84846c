"""Text to token ids and back. The 'tokenizer' entry of a data set's meta.json, such as {"name": "byte"}, says which."""
import json
import os
import sys
from pathlib import Path

import numpy as np

from data.loader import read_meta


class Tokenizer:
    """What the kinds share. A kind sets name, vocab_size, table (the bytes of every id), special (ids that stand for no
    text), eot (the id that ends a text, or None), spec (the plain dict that get_tokenizer turns back into it), and defines
    encode(text) -> list of ids, where a special token written out, such as <|endoftext|>, becomes its id."""
    eot, special = None, frozenset()

    def encode_corpus(self, text, continued=False):
        """(n,) ids of text in which special tokens are only text. continued: it goes on where another piece of text ended."""
        return np.array(self.encode(text), np.int64)

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
        """UTF-8 bytes an id stands for, (vocab_size,) int64, 0 for special ids: a loss over their sum is in nats a byte of text."""
        return np.array([len(b) * (i not in self.special) for i, b in enumerate(self.table)])


class Byte(Tokenizer):
    """UTF-8 bytes as ids. NUL ends a text, since text files do not contain it."""
    name, vocab_size, eot, special, spec = 'byte', 256, 0, {0}, {'name': 'byte'}
    table = [bytes([i]) for i in range(256)]

    def __init__(self, spec):
        pass

    def encode(self, text):
        return list(text.encode('utf-8'))

    def encode_corpus(self, text, continued=False):
        return np.frombuffer(text.encode('utf-8'), np.uint8)


class Char(Tokenizer):
    """One id a character of spec['chars'], a str or a list of single characters, in their order."""
    name = 'char'

    def __init__(self, spec):
        chars = spec.get('chars') or []
        if not chars or len(set(chars)) != len(chars) or any(not isinstance(c, str) or len(c) != 1 for c in chars):
            raise ValueError(f"tokenizer char needs 'chars', each of its characters once, not {chars!r:.60}")
        self.chars = ''.join(chars)
        self.vocab_size, self.table = len(chars), [c.encode('utf-8') for c in chars]
        self.spec = {'name': 'char', 'chars': self.chars}
        self.ids = np.full(0x110000, -1, np.int32)  # of every code point
        self.ids[[ord(c) for c in chars]] = np.arange(len(chars))

    def encode_corpus(self, text, continued=False):
        """ValueError for a character that the vocabulary lacks."""
        ids = self.ids[np.frombuffer(text.encode('utf-32-le'), '<u4')]
        if (ids < 0).any():
            raise ValueError(f'character {text[np.argmax(ids < 0)]!r} is not in the vocabulary, which has {self.chars!r:.200}')
        return ids

    def encode(self, text):
        return self.encode_corpus(text).tolist()


class Tiktoken(Tokenizer):
    """OpenAI's encodings, by tiktoken's names: gpt2, r50k_base, cl100k_base, o200k_base, ..."""
    def __init__(self, spec):
        import tiktoken
        self.name, self.spec = spec['name'], {'name': spec['name']}
        try:
            self.encoding = tiktoken.get_encoding(self.name)
        except (OSError, ValueError) as e:  # ValueError: a download that does not have the expected hash
            raise ValueError(f"tiktoken could not download the encoding {self.name} ({type(e).__name__}): go online once, or point "
                             'TIKTOKEN_CACHE_DIR at the cache of a machine that did') from None
        special = {token: self.encoding.encode_single_token(token) for token in self.encoding.special_tokens_set}
        self.vocab_size, self.eot, self.special = self.encoding.n_vocab, special.get('<|endoftext|>'), set(special.values())
        self.table = [b''] * self.vocab_size  # some ids between the special ones stand for nothing
        for token in [*self.encoding.token_byte_values(), *(token.encode() for token in special)]:
            self.table[self.encoding.encode_single_token(token)] = token

    def encode(self, text):
        return self.encoding.encode(text, allowed_special='all')

    def encode_corpus(self, text, continued=False):
        return self.encoding.encode_to_numpy(text, disallowed_special=())


END_OF_TEXT = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '<|im_end|>')  # as those who train tokenizers name it
SPACE = '\u2581'  # how SentencePiece's kind writes one


# GPT-2's way to write bytes as characters: printable ones as they are, the others as the characters from 256 on
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_CHARS = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}


class HuggingFace(Tokenizer):
    """A tokenizer.json of Hugging Face, whose text spec['json'] is, so that it goes wherever its ids go; spec['eot'] names the
    token that ends a text. Byte-level BPE (GPT-2, LLaMA 3), or SentencePiece's kind (LLaMA 2), which has bytes as <0xNN> and puts a
    space before a text, which decode() takes away again.

    ValueError for a file that is none, and for one whose decoder cannot give back the bytes of a single token."""
    name = 'huggingface'

    def __init__(self, spec):
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError:
            raise ValueError('a tokenizer.json is read by the library tokenizers: pip install tokenizers') from None
        try:
            config = json.loads(spec['json'])
            self.reader, self.corpus_reader = Reader.from_str(spec['json']), Reader.from_str(spec['json'])
            self.continuing_reader = Reader.from_str(json.dumps(_without_prefix(config)))
        except Exception as e:  # the library raises nothing narrower
            raise ValueError(f"not a tokenizer.json of Hugging Face ({e!r:.100}): give the file of that name from a model's folder") from None
        for reader in (self.reader, self.corpus_reader, self.continuing_reader):  # some files still have what a batch was once cut and filled to
            reader.no_truncation()
            reader.no_padding()
        self.corpus_reader.encode_special_tokens = self.continuing_reader.encode_special_tokens = True
        added, vocab, decoder = self.reader.get_added_tokens_decoder(), self.reader.get_vocab(with_added_tokens=True), json.dumps(config.get('decoder'))
        self.vocab_size = max(vocab.values()) + 1
        name = next((name for name in (spec.get('eot'), *END_OF_TEXT) if name in vocab), None)
        self.eot = vocab.get(name)
        self.special = {i for i, token in added.items() if token.special or i == self.eot}
        self.spec = {'name': 'huggingface', 'json': spec['json'], 'eot': name}
        self.table = [b''] * self.vocab_size
        byte_of = {c: b for b, c in BYTE_CHARS.items()}
        if '"ByteLevel"' not in decoder and '"Metaspace"' not in decoder and '"Replace"' not in decoder:
            raise ValueError(f'this tokenizer.json has the decoder {decoder:.60}, which cannot give back the text: take one that is byte-level, or writes '
                             f'spaces as {SPACE}')
        for token, i in vocab.items():
            if i in added:
                self.table[i] = token.encode('utf-8')
            elif '"ByteLevel"' in decoder:
                self.table[i] = bytes(map(byte_of.get, token)) if byte_of.keys() >= {*token} else token.encode('utf-8')  # as the library has it
            elif len(token) == 6 and token.startswith('<0x') and '"ByteFallback"' in decoder:
                self.table[i] = bytes([int(token[3:5], 16)])
            else:
                self.table[i] = token.replace(SPACE, ' ').encode('utf-8')
        self.prefixed = self.decode_bytes(self.encode('a')) == b' a'

    def encode(self, text):
        return self.reader.encode(text, add_special_tokens=False).ids

    def encode_corpus(self, text, continued=False):
        reader = self.continuing_reader if continued else self.corpus_reader
        return np.array(reader.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int64)  # fast: without the place of each token

    def decode(self, ids):
        text = super().decode(ids)
        return text[1:] if self.prefixed and text.startswith(' ') else text


def _without_prefix(part):
    """A tokenizer.json's object, or a part of it, that puts no space before the text."""
    if isinstance(part, list):
        return [_without_prefix(p) for p in part if not (isinstance(p, dict) and p.get('type') == 'Prepend')]
    if not isinstance(part, dict):
        return part
    part = {k: None if isinstance(v, dict) and v.get('type') == 'Prepend' else v if k == 'model' else _without_prefix(v) for k, v in part.items()}
    if part.get('type') == 'Metaspace':
        part['prepend_scheme'] = 'never'
    if 'add_prefix_space' in part:
        part['add_prefix_space'] = False
    return part


TOKENIZERS = {cls.name: cls for cls in (Byte, Char, HuggingFace)}


def get_tokenizer(spec):
    """The tokenizer that spec describes, a dict with a name or the name alone. ValueError lists the names there are."""
    spec = {'name': spec} if isinstance(spec, str) else spec
    name = spec.get('name') if isinstance(spec, dict) else spec
    if name in TOKENIZERS and (name != 'huggingface' or 'json' in spec):
        return TOKENIZERS[name](spec)
    import tiktoken
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f'unknown tokenizer {name!r}, use byte, char, {", ".join(tiktoken.list_encoding_names())}, the path of a tokenizer.json, or in '
                         'data/prepare.py bpe')
    return Tiktoken(spec)


def tokenizer_from_file(path):
    """The HuggingFace tokenizer of a tokenizer.json, or of a folder with one; a tokenizer_config.json beside it says which token ends a text."""
    path = Path(path)
    path = path / 'tokenizer.json' if path.is_dir() else path
    try:
        text, beside, eot = path.read_text(encoding='utf-8'), path.with_name('tokenizer_config.json'), None
        if beside.exists():
            eot = json.loads(beside.read_text(encoding='utf-8')).get('eos_token')
    except UnicodeDecodeError:
        raise ValueError(f'{path} is not a tokenizer.json of Hugging Face') from None
    try:
        return get_tokenizer({'name': 'huggingface', 'json': text, 'eot': eot.get('content') if isinstance(eot, dict) else eot})
    except ValueError as e:
        raise ValueError(f'{path}: {e}') from None


def train_bpe(texts, vocab_size):
    """A byte-level BPE of vocab_size ids, <|endoftext|> among them, trained on an iterator of texts by the library tokenizers."""
    if vocab_size < 257:
        raise ValueError(f'vocab_size is {vocab_size}: a byte-level BPE has at least 256 bytes and <|endoftext|>, 257')
    try:
        import tokenizers
    except ImportError:
        raise ValueError('a BPE is trained by the library tokenizers: pip install tokenizers') from None
    reader, byte_level = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers.ByteLevel
    reader.pre_tokenizer, reader.decoder = byte_level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    reader.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=['<|endoftext|>'], initial_alphabet=byte_level.alphabet(), show_progress=False))
    return get_tokenizer({'name': 'huggingface', 'json': reader.to_str(), 'eot': '<|endoftext|>'})


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
