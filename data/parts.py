"""
Prepare a data set on several machines. Each runs --part=K/N, which encodes one Nth of the files
into OUT/parts/K-of-N. Then --join=N copies the ids into the shards that a single command would have
written, with the same meta.json.

Which documents are val depends on how many come before them, which a part does not know. So it
writes the ids of all of its documents in their order, ids_00000.bin and so on, and an ENTRY about
each of them to index_00000.bin. The join divides them.
"""
import os
import shutil
from contextlib import suppress

import numpy as np

from data.encode import ENTRY, SPLITS, Encoded, in_order
from data.folder import DTYPES, read_meta
from data.preparation import Position, Preparation, say
from data.shards import crc32
from data.tokenizer import get_tokenizer
from engine.common import UserError

TOKENS = 2**21  # that the join copies at a time, roughly


def files_of(part, n_files):
    """Return (first, end): the numbers of the files of part (K, N)."""
    number, n_parts = part
    if n_files < n_parts:
        raise UserError(f'--part={number}/{n_parts} gives each part a share of the files, and the '
                        f'input has {n_files}: use at most {n_files} parts, or split the files')
    return n_files * (number - 1) // n_parts, n_files * number // n_parts


def folder_of(data_dir, number, n_parts):
    return data_dir / 'parts' / f'{number}-of-{n_parts}'


def identity_of(identity, number, n_parts):
    return f'{identity} part {number}/{n_parts}'


def remove_if_empty(folder):
    with suppress(OSError):  # it is not empty, or another part has just removed it
        folder.rmdir()


def note_other_parts(folder, n_parts):
    """Print a NOTE on parts that --join=n_parts does not use."""
    others = sorted(path.name for path in folder.glob('*-of-*')
                    if not path.name.endswith(f'-of-{n_parts}'))
    if others:
        say(f'NOTE: {folder} also holds {", ".join(others):.200}, which --join={n_parts} does not '
            'use: remove what is not needed')


class Part(Preparation):
    """Encode part (K, N) of a data set. The settings and a new tokenizer come from all files."""
    streams = 'ids', 'index'

    def __init__(self, sources, data_dir, *args, part, **kwargs):
        super().__init__(sources, folder_of(data_dir, *part), *args, **kwargs)
        self.part, self.joined_dir, self.joined_identity = part, data_dir, self.identity
        self.identity = identity_of(self.identity, *part)
        first, self.end = files_of(part, len(sources))
        before = sum(source.size for source in sources[:first])
        self.start = Position(first, 0, 0, before)
        self.span = max(1, sum(source.size for source in sources[first:self.end]))

    def run(self, overwrite=False):
        if read_meta(self.joined_dir).get('prepared_from') == self.joined_identity:
            say(f'{self.joined_dir} is already joined of all parts of this input with these '
                'settings: nothing to do')
        else:
            super().run(overwrite)

    def clean_up(self):
        super().clean_up()
        remove_if_empty(self.data_dir.parent)
        remove_if_empty(self.joined_dir)

    def split_of(self, document):
        return None  # until the join

    def dtype_of(self, name, tokenizer):
        return ENTRY if name == 'index' else super().dtype_of(name, tokenizer)

    def encoded(self, tokenizer, start):
        settings = tokenizer.spec, self.field, self.bad_bytes, self.chat.get('chat_template')
        batches = self.batches(start, self.end)
        return in_order('encode_undivided', batches, self.processes, settings)

    def report(self, meta):
        number, n_parts = self.part
        say(f'part {number} of {n_parts}: {meta["documents"]["ids"]:,} documents in '
            f'{self.end - self.start.source:,} files, {meta["bytes"]["ids"] / 1e6:,.1f} MB of text '
            f'in {self.data_dir}; when all parts are there, --join={n_parts} makes the data set')
        note_other_parts(self.data_dir.parent, n_parts)


class Join(Preparation):
    """Make a data set of its parts. The bytes are those of a Preparation without parts."""

    def __init__(self, sources, data_dir, *args, n_parts, **kwargs):
        files_of((n_parts, n_parts), len(sources))  # refuses more parts than files
        super().__init__(sources, data_dir, *args, **kwargs)
        self.folders = [folder_of(data_dir, number, n_parts) for number in range(1, n_parts + 1)]
        self.identities = [identity_of(self.identity, number, n_parts)
                           for number in range(1, n_parts + 1)]

    def run(self, overwrite=False):
        super().run(overwrite)
        parts = self.data_dir / 'parts'
        removed = parts / 'removed'  # so that a kill leaves no half of a part under its name
        for folder, identity in zip(self.folders, self.identities):
            if read_meta(folder).get('prepared_from') == identity:
                shutil.rmtree(removed, ignore_errors=True)
                os.replace(folder, removed)
        shutil.rmtree(removed, ignore_errors=True)
        note_other_parts(parts, len(self.folders))
        remove_if_empty(parts)

    def make(self):
        n_parts = len(self.folders)
        self.metas = [self.read_part(number, n_parts) for number in range(1, n_parts + 1)]
        self.tokenizer = get_tokenizer(self.metas[0]['tokenizer'])
        self.span = max(1, sum(meta['bytes']['ids'] for meta in self.metas))
        return super().make()

    def begin(self):
        say(f'checking the files of {len(self.folders)} parts')
        for folder, meta in zip(self.folders, self.metas):
            for name, entry in meta['files'].items():
                stat = (folder / name).stat()
                if crc32(folder / name, stat.st_size, stat.st_mtime_ns) != entry['crc32']:
                    raise UserError(f'{folder / name} does not match its checksum: copy it again, '
                                    f'or remove {folder} and prepare this part again')
        return super().begin()

    def read_part(self, number, n_parts):
        """Return the meta.json of a part. Raise UserError if it cannot be joined."""
        folder, flag = self.folders[number - 1], f'--part={number}/{n_parts}'
        meta = read_meta(folder)
        if not meta:
            state = 'unfinished' if (folder / 'unfinished').exists() else 'missing'
            raise UserError(f'part {number} of {n_parts} is {state} in {folder}: run the same '
                            f'command with {flag} instead of --join={n_parts}')
        if meta.get('prepared_from') != self.identities[number - 1]:
            raise UserError(f'{folder} was prepared from another input or with other settings: '
                            f'give the same flags here, or prepare it again with {flag} '
                            '--overwrite')
        for name in meta['files']:
            if not (folder / name).exists():
                raise UserError(f'{folder / name} is missing: copy it again, or run the same '
                                f'command with {flag} instead of --join={n_parts}')
        return meta

    def encoded(self, tokenizer, start):
        documents, read = start.documents, start.read
        for number in range(start.source, len(self.folders)):
            folder, meta = self.folders[number], self.metas[number]
            index = Stream(folder, meta, 'index', ENTRY)
            ids = Stream(folder, meta, 'ids', DTYPES[meta['dtype']])
            item = start.items if number == start.source else 0
            token = int(index.read(0, item)['tokens'].sum())
            while len(entries := index.read(item, 10**4)):
                n_items = max(1, (entries['tokens'].cumsum() <= TOKENS).sum())
                entries = entries[:n_items]
                n_tokens = int(entries['tokens'].sum())
                divided = self.divide(entries, ids.read(token, n_tokens), documents, number + 1)
                item, token = item + int(n_items), token + n_tokens
                documents += int(entries['ends'].sum())
                read += int(entries['text_bytes'].sum())
                yield divided, Position(number, item, documents, read)

    def divide(self, entries, ids, documents, part):
        """
        Return {split: Encoded} of items given by their entries (n,) and all their ids, where
        `documents` come before the first one.
        """
        ends = entries['ends'].astype(int)
        numbers = documents + ends.cumsum() - ends
        splits = [self.split_of(number) if split == b'' else split.decode()
                  for split, number in zip(entries['split'].tolist(), numbers.tolist())]
        divided = {}
        for split in SPLITS:
            chosen = np.array(splits) == split
            own = entries[chosen]
            skipped = [f'part {part}, document {number + 1}, was skipped there'
                       for number in numbers[chosen][own['skipped']].tolist()]
            divided[split] = Encoded(
                ids[np.repeat(chosen, entries['tokens'])].tobytes(),
                int((own['ends'] & (own['text_bytes'] > 0)).sum()),
                int(own['text_bytes'].sum()), tuple(skipped))
        return divided


class Stream:
    """What a part wrote to the shards of one name, as one array."""

    def __init__(self, folder, meta, name, dtype):
        self.shards = [np.memmap(folder / file, dtype, 'r') for file in meta['files']
                       if file.startswith(name)]
        self.dtype = dtype

    def read(self, first, n):
        """Return entries `first` to `first + n - 1`, fewer at the end."""
        found, before = [np.empty(0, self.dtype)], 0
        for shard in self.shards:
            low, high = max(0, first - before), max(0, first + n - before)
            found.append(shard[low:high])
            before += len(shard)
        return np.concatenate(found)
