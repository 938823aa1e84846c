"""
Convert text to token ids and back. The entry 'tokenizer' of a data set's meta.json, such as
{"name": "byte"}, says which tokenizer made its ids; get_tokenizer() constructs it from that.
"""
import json
import os
import sys
from pathlib import Path

import numpy as np

from data.folder import HERE, TOKENIZER, read_meta
from engine.common import UserError, optional
from engine.schema import check, read_json


class Tokenizer:
    """
    The interface of all kinds. A kind sets
        name
        vocab_size
        table    the bytes of every id
        special  the ids that stand for no text
        eot      the id that ends a text, or None
        spec     the plain dict from which get_tokenizer makes it again
    and defines encode(text) -> list of ids, which turns a special token written out in the text,
    such as <|endoftext|>, into its id.
    """
    eot, special = None, frozenset()

    def encode_corpus(self, text, continued=False):
        """
        Return the ids (n,) of a text in which special tokens are ordinary text. With `continued`,
        the text continues an earlier piece.
        """
        return np.array(self.encode(text), np.int64)

    def encode_with_places(self, text):
        """Return (ids, [(first, end)]): the ids of a text, and the characters of each id in it."""
        ids = self.encode(text)
        lengths = np.array([len(self.table[i]) for i in ids], int)
        ends = lengths.cumsum()  # in bytes
        # the number of the character of each byte: 10xxxxxx continues one
        character = np.cumsum(np.frombuffer(text.encode(), np.uint8) & 0xC0 != 0x80) - 1
        return ids, list(zip(character[ends - lengths], character[ends - 1] + 1))

    def decode_bytes(self, ids):
        """
        Return the bytes of ids, which may end inside a character. Raise UserError for an unknown
        id.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                problem = f'id {i} is outside 0..{self.vocab_size - 1} of tokenizer {self.name}'
                raise UserError(f'{problem}: sample below its vocab_size')
        return b''.join(self.table[i] for i in ids)

    def decode(self, ids):
        """Return the text of ids, with U+FFFD where the bytes are not UTF-8."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def token_bytes(self):
        """
        Return the UTF-8 bytes per id, (vocab_size,) int64, 0 for special ids. A loss divided by
        their sum is in nats per byte of text.
        """
        return np.array([0 if i in self.special else len(b) for i, b in enumerate(self.table)])


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
    """One id per character of spec['chars'], a str or a list of characters, in their order."""
    name = 'char'

    def __init__(self, spec):
        chars = spec.get('chars') or []
        single = all(isinstance(c, str) and len(c) == 1 for c in chars)
        if not chars or not single or len(set(chars)) != len(chars):
            needed = "tokenizer char needs 'chars', each of its characters once"
            remedy = 'name the folder of a data set that has them'
            raise UserError(f'{needed}, not {chars!r:.60}: {remedy}')
        self.chars = ''.join(chars)
        self.vocab_size, self.table = len(chars), [c.encode('utf-8') for c in chars]
        self.spec = {'name': 'char', 'chars': self.chars}
        self.id_of = np.full(0x110000, -1, np.int32)  # for every code point
        self.id_of[[ord(c) for c in chars]] = np.arange(len(chars))

    def encode_corpus(self, text, continued=False):
        """
        Return the ids (n,) of a text. Raise UserError for a character that is not in the
        vocabulary.
        """
        ids = self.id_of[np.frombuffer(text.encode('utf-32-le'), '<u4')]
        if (ids < 0).any():
            unknown = text[np.argmax(ids < 0)]
            message = f'character {unknown!r} is not in the vocabulary, which has'
            raise UserError(f'{message} {self.chars!r:.200}')
        return ids

    def encode(self, text):
        return self.encode_corpus(text).tolist()


class Ids(Tokenizer):
    """Ids written as numbers, for a model whose tokenizer is unknown."""
    name = 'ids'

    def __init__(self, spec):
        self.vocab_size, self.spec = spec['vocab_size'], spec
        self.id_of = {str(i): i for i in range(self.vocab_size)}
        self.table = [f' {word}'.encode() for word in self.id_of]

    def encode(self, text):
        words = text.split() or ['0']  # a blank text is the default of --start
        for word in words:
            if word not in self.id_of:
                problem = f'{word!r:.60} is no id in 0..{self.vocab_size - 1}'
                remedy = "give ids, such as --start='1 2', or name the tokenizer with --tokenizer"
                raise UserError(f'{problem}, and the tokenizer is unknown: {remedy}')
        return [self.id_of[word] for word in words]


class Tiktoken(Tokenizer):
    """OpenAI's encodings by tiktoken's names: gpt2, r50k_base, cl100k_base, o200k_base, ..."""

    def __init__(self, spec):
        self.name, self.spec = spec['name'], {'name': spec['name']}
        tiktoken = optional('tiktoken', f'tokenizer {self.name}')
        try:
            self.encoding = tiktoken.get_encoding(self.name)
        except (OSError, ValueError) as e:  # ValueError: the download has the wrong hash
            problem = f'tiktoken could not download the encoding {self.name} ({type(e).__name__})'
            remedy = 'point TIKTOKEN_CACHE_DIR at the cache of a machine that did'
            raise UserError(f'{problem}: go online once, or {remedy}') from None
        id_of = self.encoding.encode_single_token
        special = {token: id_of(token) for token in self.encoding.special_tokens_set}
        self.vocab_size = self.encoding.n_vocab
        self.eot, self.special = special.get('<|endoftext|>'), set(special.values())
        self.table = [b''] * self.vocab_size  # some ids between the special ones are unused
        for token in self.encoding.token_byte_values():
            self.table[id_of(token)] = token
        for token, i in special.items():
            self.table[i] = token.encode()

    def encode(self, text):
        return self.encoding.encode(text, allowed_special='all')

    def encode_corpus(self, text, continued=False):
        return self.encoding.encode_to_numpy(text, disallowed_special=())


# ------------------------------------------------------------------------------------------------
# tokenizer.json files

# common names of the end-of-text token
END_OF_TEXT = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '<|im_end|>')
SPACE = '\u2581'  # the character that SentencePiece's kind writes for a space

# GPT-2 writes bytes as characters: printable ones as they are, the others from U+0100 on
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
UNPRINTABLE = sorted(set(range(256)) - set(PRINTABLE))
BYTE_CHARS = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(UNPRINTABLE)}
CHAR_BYTES = {c: b for b, c in BYTE_CHARS.items()}


class HuggingFace(Tokenizer):
    """
    A tokenizer.json of Hugging Face. spec['json'] is the text of the file, so it is stored wherever
    its ids are; spec['eot'] names the token that ends a text. The file is a byte-level BPE (GPT-2,
    LLaMA 3) or of SentencePiece's kind (LLaMA 2), which has bytes as <0xNN> and puts a space before
    a text; decode() removes that space.

    Raise UserError for any other file, and for one that cannot give back the bytes of a single
    token.
    """
    name = 'huggingface'

    def __init__(self, spec):
        self.read_json(spec['json'])
        added = self.reader.get_added_tokens_decoder()
        vocab = self.reader.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        names = [name for name in (spec.get('eot'), *END_OF_TEXT) if name in vocab]
        eot_name = names[0] if names else None
        self.eot = vocab.get(eot_name)
        self.special = {i for i, token in added.items() if token.special or i == self.eot}
        self.spec = {'name': 'huggingface', 'json': spec['json'], 'eot': eot_name}
        decoder = json.dumps(json.loads(spec['json']).get('decoder'))
        if not any(kind in decoder for kind in ('"ByteLevel"', '"Metaspace"', '"Replace"')):
            problem = f'the decoder {decoder:.60}, which cannot give back the text'
            remedy = f'take one that is byte-level, or writes spaces as {SPACE}'
            raise UserError(f'this tokenizer.json has {problem}: {remedy}')
        self.table = [b''] * self.vocab_size
        for token, i in vocab.items():
            self.table[i] = token.encode('utf-8') if i in added else bytes_of(token, decoder)
        self.prefixed = self.decode_bytes(self.encode('a')) == b' a'

    def read_json(self, text):
        """
        Make three readers: for prompts, for a corpus, and for a text that continues an earlier
        piece.
        """
        read = optional('tokenizers', 'a tokenizer.json').Tokenizer.from_str
        try:
            self.reader, self.corpus_reader = read(text), read(text)
            self.continuing_reader = read(json.dumps(without_prefix(json.loads(text))))
        except Exception as e:  # the library raises no narrower type
            problem = f'not a tokenizer.json of Hugging Face ({e!r:.100})'
            remedy = "give the file of that name from a model's folder"
            raise UserError(f'{problem}: {remedy}') from None
        for reader in (self.reader, self.corpus_reader, self.continuing_reader):
            reader.no_truncation()  # some files contain the settings of a batch
            reader.no_padding()
        self.corpus_reader.encode_special_tokens = True
        self.continuing_reader.encode_special_tokens = True

    def encode(self, text):
        return self.reader.encode(text, add_special_tokens=False).ids

    def encode_with_places(self, text):
        encoding = self.reader.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_corpus(self, text, continued=False):
        reader = self.continuing_reader if continued else self.corpus_reader
        # fast: it does not compute the tokens' offsets
        [encoding] = reader.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, np.int64)

    def decode(self, ids):
        text = super().decode(ids)
        return text.removeprefix(' ') if self.prefixed else text


def bytes_of(token, decoder):
    """
    Return the bytes of an ordinary token, as the decoder of its tokenizer.json gives them back.
    """
    if '"ByteLevel"' in decoder:
        if all(c in CHAR_BYTES for c in token):
            return bytes(CHAR_BYTES[c] for c in token)
        return token.encode('utf-8')  # added to the vocabulary by hand
    if '"ByteFallback"' in decoder and len(token) == 6 and token.startswith('<0x'):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, ' ').encode('utf-8')


def without_prefix(part):
    """
    Return a copy of a tokenizer.json's object, or of a part, that puts no space before the text.
    """
    is_prepend = lambda p: isinstance(p, dict) and p.get('type') == 'Prepend'
    if isinstance(part, list):
        return [without_prefix(p) for p in part if not is_prepend(p)]
    if not isinstance(part, dict):
        return part
    copy = {}
    for key, value in part.items():
        if key == 'model':  # the vocabulary is large and not affected
            copy[key] = value
        else:
            copy[key] = None if is_prepend(value) else without_prefix(value)
    if copy.get('type') == 'Metaspace':
        copy['prepend_scheme'] = 'never'
    if 'add_prefix_space' in copy:
        copy['add_prefix_space'] = False
    return copy


# ------------------------------------------------------------------------------------------------
# finding and making tokenizers

TOKENIZERS = {cls.name: cls for cls in (Byte, Char, HuggingFace)}
GPT2_VOCAB_SIZES = range(50257, 50305)  # GPT-2's ids, padded to at most nanoGPT's 50304


def get_tokenizer(spec):
    """Return the tokenizer for a spec, or for a name alone. UserError lists the known names."""
    if isinstance(spec, str):
        spec = {'name': spec}
    try:
        check(spec, TOKENIZER, 'tokenizer')
    except ValueError as e:
        raise UserError(str(e)) from None
    name = spec['name']
    if name in TOKENIZERS and (name != 'huggingface' or 'json' in spec):
        return TOKENIZERS[name](spec)
    encodings = optional('tiktoken', f'tokenizer {name!r}').list_encoding_names()
    if name not in encodings:
        choices = f'byte, char, {", ".join(encodings)}, the path of a tokenizer.json'
        raise UserError(f'unknown tokenizer {name!r}, use {choices}, or in data/prepare.py bpe')
    return Tiktoken(spec)


def prompt_ids(prompt, tokenizer, vocab_size):
    """
    Return the ids of a prompt, at least one. An empty prompt is the end-of-text token. Raise
    UserError if the prompt has no ids, or ids that a model of vocab_size does not have.
    """
    if prompt:
        ids = tokenizer.encode(prompt)
    elif tokenizer.eot is not None:
        ids = [tokenizer.eot]
    else:
        raise UserError('an empty prompt needs a tokenizer with an end-of-text token; '
                        'give it some text')
    if not ids:
        raise UserError(f'the prompt {prompt!r:.60} has no tokens; give it some text')
    if max(ids) >= vocab_size:
        raise UserError(f'the prompt has token {max(ids)}, but the model has only {vocab_size} ids')
    return ids


def tokenizer_by_name(name):
    """
    Return the tokenizer of a name such as gpt2, of a tokenizer.json, or of a folder that has one or
    is a data set.
    """
    if os.path.exists(name):
        return tokenizer_from_file(name)
    if '/' in name or name.endswith('.json'):
        raise UserError(f'--tokenizer={name}: no such file')
    return get_tokenizer(name)


def tokenizer_from_file(path):
    """
    Return the tokenizer of a tokenizer.json, or of a folder that has one or is a data set. A
    tokenizer_config.json beside it names the token that ends a text.
    """
    path = Path(path)
    if path.is_dir() and not (path / 'tokenizer.json').exists():
        meta = read_meta(path)
        if 'tokenizer' not in meta:
            raise UserError(f'{path} has no tokenizer.json, and no meta.json with a tokenizer')
        return get_tokenizer(meta['tokenizer'])
    path = path / 'tokenizer.json' if path.is_dir() else path
    settings, eot = path.with_name('tokenizer_config.json'), None
    try:
        text = path.read_text(encoding='utf-8')
        if settings.exists():
            eot = read_json(settings, dict).get('eos_token')
    except UnicodeDecodeError:
        raise UserError(f'{path} is not a tokenizer.json of Hugging Face') from None
    eot = eot.get('content') if isinstance(eot, dict) else eot
    try:
        return get_tokenizer({'name': 'huggingface', 'json': text, 'eot': eot})
    except UserError as e:
        raise UserError(f'{path}: {e}') from None


def train_bpe(texts, vocab_size):
    """
    Train a byte-level BPE of vocab_size ids, <|endoftext|> among them, on an iterable of texts.
    """
    if vocab_size < 257:
        smallest = 'a byte-level BPE has at least 257 ids, 256 bytes and <|endoftext|>'
        raise UserError(f'vocab_size is {vocab_size}: {smallest}')
    library = optional('tokenizers', 'training a BPE')
    byte_level = library.pre_tokenizers.ByteLevel
    reader = library.Tokenizer(library.models.BPE())
    reader.pre_tokenizer = byte_level(add_prefix_space=False)
    reader.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=['<|endoftext|>'],
        initial_alphabet=byte_level.alphabet(), show_progress=False)
    reader.train_from_iterator(texts, trainer)
    found = reader.get_vocab_size()
    if found < vocab_size:
        print(f'NOTE: the BPE has {found} ids instead of vocab_size={vocab_size}, because the text '
              'has no more pairs to merge', file=sys.stderr)
    return get_tokenizer({'name': 'huggingface', 'json': reader.to_str(), 'eot': '<|endoftext|>'})


def find_tokenizer(ckpt, vocab_size):
    """
    Return the tokenizer that a checkpoint names. nanoGPT's checkpoints name none; use that of their
    data set, or GPT-2's if the model has as many ids. None: it is unknown.
    """
    if ckpt.get('tokenizer'):
        return get_tokenizer(ckpt['tokenizer'])
    dataset = (ckpt.get('config') or {}).get('dataset')
    if dataset is not None:
        if not is_folder_name(dataset):  # a checkpoint may not point to other folders
            checkpoint = f"checkpoint '{ckpt['path']}' names no tokenizer"
            problem = f'its data set, {dataset!r:.100}, is no name of a folder in data/'
            raise UserError(f'{checkpoint}, and {problem}; name one with sample.py --tokenizer=...')
        meta = read_meta(HERE / dataset)
        tokenizer = get_tokenizer(meta['tokenizer']) if 'tokenizer' in meta else None
        if tokenizer and tokenizer.vocab_size <= vocab_size:
            return tokenizer
    if vocab_size not in GPT2_VOCAB_SIZES:
        return None
    print("the checkpoint names no tokenizer, so this assumes GPT-2's", file=sys.stderr)
    return get_tokenizer('gpt2')


def is_folder_name(name):
    if not isinstance(name, str) or name in ('', '.', '..'):
        return False
    return os.path.basename(name) == name


# ------------------------------------------------------------------------------------------------
# writing tokenizer.json files

def to_hugging_face(tokenizer):
    """Return the text of a tokenizer.json that gives the same ids for the same text."""
    library = optional('tokenizers', 'writing a tokenizer.json')
    if 'json' in tokenizer.spec:
        result = library.Tokenizer.from_str(tokenizer.spec['json'])
        if not result.num_special_tokens_to_add(is_pair=False):
            return tokenizer.spec['json']
        result.post_processor = None  # it starts each text with a token that ours leaves out
    elif tokenizer.name == 'char':
        result = char_to_hugging_face(tokenizer, library)
    else:
        result = bpe_to_hugging_face(tokenizer, library)
    return result.to_str(pretty=True)


def char_to_hugging_face(tokenizer, library):
    vocab = {c: i for i, c in enumerate(tokenizer.chars)}
    # the unknown token is not in the vocabulary, so an unknown character is an error there as well
    model = library.models.WordLevel(vocab, unk_token='not in the vocabulary')
    result = library.Tokenizer(model)
    every_character = library.Regex(r'[\s\S]')
    result.pre_tokenizer = library.pre_tokenizers.Split(every_character, 'isolated')
    result.decoder = library.decoders.Fuse()
    return result


def bpe_to_hugging_face(tokenizer, library):
    """Return bytes, or one of tiktoken's encodings, as a byte-level BPE."""
    is_byte = tokenizer.name == 'byte'
    special = {'\0': 0} if is_byte else dict(tokenizer.encoding._special_tokens)
    words = {}
    for i, token in enumerate(tokenizer.table):
        if token and i not in special.values():
            words[token] = i
    written = {token: ''.join(BYTE_CHARS[b] for b in token) for token in words}
    vocab = {written[token]: i for token, i in words.items()} | special
    merges = [(written[left], written[right]) for left, right in merges_of(words)]
    result = library.Tokenizer(library.models.BPE(vocab, merges, ignore_merges=not is_byte))
    byte_level = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = [byte_level]
    if not is_byte:
        pattern = tokenizer.encoding._pat_str.replace('$', r'\z')  # $ there ends a line
        steps.insert(0, library.pre_tokenizers.Split(library.Regex(pattern), 'isolated'))
    result.pre_tokenizer = library.pre_tokenizers.Sequence(steps)
    result.decoder = library.decoders.ByteLevel()
    result.add_special_tokens([library.AddedToken(name, normalized=False) for name in special])
    return result


def merges_of(words):
    """
    Return the pairs of words that join to another, in the order in which tiktoken merges them.
    """
    pairs = []
    for word in words:
        splits = [(word[:k], word[k:]) for k in range(1, len(word))]
        pairs += [(left, right) for left, right in splits if left in words and right in words]
    return sorted(pairs, key=lambda p: (words[p[0] + p[1]], words[p[0]], words[p[1]]))
