"""Write token ids to shards, files of equal length that can be cut back after a kill."""
import os
import zlib


class Shards:
    """
    The shards of one split, to append to: train_00000.bin and so on if `name` is train. `record`
    describes the existing ones: a dict of documents, bytes (of text), skipped (documents left out)
    and shards, [{'tokens': ..., 'crc32': ...}].
    """

    def __init__(self, folder, name, dtype, tokens_per_shard, record):
        self.folder, self.name = folder, name
        self.width, self.tokens_per_shard = dtype.itemsize, tokens_per_shard
        self.documents, self.text_bytes = record['documents'], record['bytes']
        self.skipped = record['skipped']
        self.shards = [dict(shard) for shard in record['shards']]
        self.file = None

    def record(self):
        """Return a copy of the record; only the last shard can still change."""
        shards = self.shards[:-1] + [dict(shard) for shard in self.shards[-1:]]
        return {'documents': self.documents, 'bytes': self.text_bytes, 'skipped': self.skipped,
                'shards': shards}

    def path(self, number):
        return self.folder / f'{self.name}_{number:05d}.bin'

    def tokens(self):
        return sum(shard['tokens'] for shard in self.shards)

    def cut_back(self):
        """
        Remove what was written after the record. Raise ValueError if a file is shorter than it
        says.
        """
        for number, shard in enumerate(self.shards):
            size = shard['tokens'] * self.width
            if self.path(number).stat().st_size < size:
                raise ValueError(f'{self.path(number)} is shorter than it was')
            os.truncate(self.path(number), size)
        for path in self.folder.glob(f'{self.name}_*.bin'):
            if int(path.stem[-5:]) >= len(self.shards):
                path.unlink()

    def append(self, encoded):
        """
        Write ids at the end, over as many shards as they take. Return whether a shard is full now.
        """
        self.documents += encoded.documents
        self.text_bytes += encoded.text_bytes
        self.skipped += len(encoded.skipped)
        ids, filled = memoryview(encoded.ids), False
        while len(ids):
            if not self.shards or self.shards[-1]['tokens'] == self.tokens_per_shard:
                self.shards.append({'tokens': 0, 'crc32': 0})
            room = self.tokens_per_shard - self.shards[-1]['tokens']
            self.write(ids[:room * self.width])
            ids = ids[room * self.width:]
            if self.shards[-1]['tokens'] == self.tokens_per_shard:
                self.close()
                filled = True
        return filled

    def write(self, ids):
        """Write ids to the last shard."""
        if self.file is None:
            self.file = open(self.path(len(self.shards) - 1), 'ab')
        self.file.write(ids)
        last = self.shards[-1]
        last['tokens'] += len(ids) // self.width
        last['crc32'] = zlib.crc32(ids, last['crc32'])

    def join_short_tail(self):
        """
        Append a short last shard to the previous one, because a shard shorter than a window cannot
        be used. Its file stays, so that this can be done again after a kill.
        """
        if len(self.shards) > 1 and self.shards[-1]['tokens'] < self.tokens_per_shard // 10:
            self.close()
            tail = self.path(len(self.shards) - 1).read_bytes()
            self.shards.pop()
            self.write(tail)
        self.close()

    def sync(self):
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self):
        if self.file:
            self.sync()
            self.file.close()
            self.file = None

    def listed(self):
        """Return {file name: shard}, as in meta.json."""
        return {self.path(number).name: shard for number, shard in enumerate(self.shards)}
