"""Data sets that are downloaded: python -m pytest tests/test_recipes.py"""
import http.server
import json
import re
import threading
import zlib
from types import SimpleNamespace

import pytest

from conftest import (
    DOCUMENTS,
    ROOT,
    command,
    ids_of,
    llama_json,
    llmc_shard,
    one_line,
    refused,
    shards,
)
from data import prepare as preparing
from data.folder import prepare_facts, read_meta
from data.loader import Loader
from data.source import download
from data.tokenizer import get_tokenizer
from engine.common import UserError
from tests.warm import HANGS

T = 8  # block_size of the loader tests


# the recipes, with files of the same format from a folder and from a hub on this machine

def packed_lines(first, last):
    zstandard = pytest.importorskip('zstandard')
    rows = [{'text': text, 'meta': {'redpajama_set_name': 'RedPajamaC4'}} for text in DOCUMENTS[first:last]]
    return zstandard.ZstdCompressor().compress(b''.join(json.dumps(row).encode() + b'\n' for row in rows))


def parquet(first, last, folder):
    pyarrow, library = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    library.write_table(pyarrow.table({'text': DOCUMENTS[first:last]}), folder / 'part')
    return (folder / 'part').read_bytes()


def sample_of(recipe, folder):
    """Small files as the data set of a recipe has them: {name: bytes}."""
    folder.mkdir(exist_ok=True)
    if recipe == 'slimpajama_627b':
        return {
            'README.md': b'no data',
            'train/chunk1/example_train_0.jsonl.zst': packed_lines(0, 20),
            'train/chunk1/example_train_1.jsonl.zst': packed_lines(20, 30),
            'train/chunk2/example_train_0.jsonl.zst': packed_lines(30, 50),
            'validation/chunk1/example_holdout_0.jsonl.zst': packed_lines(50, 60),
        }
    if recipe == 'openwebtext':
        return {
            'README.md': b'no data',
            'plain_text/train-00000-of-00003.parquet': parquet(0, 20, folder),
            'plain_text/train-00001-of-00003.parquet': parquet(20, 40, folder),
            'plain_text/train-00002-of-00003.parquet': parquet(40, 60, folder),
        }
    return {
        'data/train-00000-of-00002-ab2b.parquet': parquet(0, 20, folder),
        'data/train-00001-of-00002-cd3c.parquet': parquet(20, 50, folder),
        'data/validation-00000-of-00001-869c.parquet': parquet(50, 60, folder),
        'data/test-00000-of-00001-9a.parquet': parquet(0, 9, folder),
    }


RECIPES = ['openwebtext', 'slimpajama_627b', 'slimpajama_6b', 'tinystories']


class Hub(http.server.BaseHTTPRequestHandler):
    """
    As much of Hugging Face as huggingface_hub asks for. files are {name: bytes}, fetched counts
    downloads, and names in broken are answered with 403 (a 500 would be tried again for half a minute).
    """
    protocol_version = 'HTTP/1.1'
    files, fetched, broken = {}, [], set()
    commit = 'c0ffee' * 6 + 'abcd'

    def do_GET(self):
        path = self.path.split('?')[0]
        status, headers = 200, {'X-Repo-Commit': self.commit}
        name = path.split('/resolve/')[-1].split('/', 1)[-1]
        if '/resolve/' in path and name in self.files and name not in self.broken:
            body = self.files[name]
            headers |= {'ETag': f'"{zlib.crc32(body)}"', 'Accept-Ranges': 'bytes'}
            wanted = re.match(r'bytes=(\d+)-', self.headers.get('Range', ''))
            if wanted and int(wanted[1]):
                first, size = int(wanted[1]), len(body)
                status, body = 206, body[first:]
                headers['Content-Range'] = f'bytes {first}-{size - 1}/{size}'
            if self.command == 'GET':
                self.fetched.append(name)
        elif '/tree/' in path:
            folder = {'type': 'directory', 'path': 'data', 'oid': '0'}
            body = json.dumps([folder, *map(self.entry, self.files)]).encode()
        elif path.startswith('/api/datasets/') and '/resolve/' not in path:
            repo = path.removeprefix('/api/datasets/')
            body = json.dumps({'id': repo, 'sha': self.commit, 'tags': [], 'siblings': []}).encode()
        else:
            status, body = 403 if name in self.broken else 404, b'{}'
        self.answer(status, headers, body)

    do_HEAD = do_GET

    def entry(self, name):
        data = self.files[name]
        return {'type': 'file', 'path': name, 'size': len(data), 'oid': str(zlib.crc32(data))}

    def answer(self, status, headers, body):
        self.send_response(status)
        headers |= {'Content-Type': 'application/json', 'Content-Length': len(body)}
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    """Environment variables that lead huggingface_hub to Hub."""
    pytest.importorskip('huggingface_hub')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Hub.fetched, Hub.broken = [], set()
        yield {'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'HF_HOME': str(tmp_path / 'home'),
               'no_proxy': '*', 'HF_HUB_DISABLE_XET': '1',
               'HF_HUB_ETAG_TIMEOUT': str(HANGS), 'HF_HUB_DOWNLOAD_TIMEOUT': str(HANGS)}
        server.shutdown()


def write_sample(recipe, folder):
    """The files of sample_of on disk; returns the flags that name them as input."""
    Hub.files = sample_of(recipe, folder)
    flags = []
    for name, data in sorted(Hub.files.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        if 'train' in name:
            flags.append(f'--input={folder / name}')
        elif 'validation' in name:
            flags.append(f'--val_input={folder / name}')
    return flags


@pytest.mark.parametrize('recipe', RECIPES)
def test_recipes_fetch_resume_and_read_local_samples_alike(prepare, tmp_path, hub, recipe):
    """A download that ends after a day should not begin again, and the hub's files are read as local ones."""
    script, flags = f'data/{recipe}/prepare.py', ['--tokenizer=byte', '--val_fraction=0.1']
    out, local = tmp_path / 'out', tmp_path / 'local'
    given = write_sample(recipe, tmp_path / 'sample')
    done = prepare(script, *flags, f'--out_dir={local}', *given)
    assert done.returncode == 0, done.stderr
    wanted = [name for name in sorted(Hub.files) if re.search('train[-_]|validation', name)]
    Hub.broken = {wanted[1]}
    done = command(script, *flags, f'--out_dir={out}', env=hub)
    refused(done, 'prepare.py: ', 'Hugging Face', '--input=PATH', 'resume')
    assert 'GB to download' in done.stdout and 'of disk' in done.stdout and not shards(out)
    assert wanted[0] in Hub.fetched and wanted[1] not in Hub.fetched
    Hub.broken = set()
    done = command(script, *flags, f'--out_dir={out}', env=hub)
    assert done.returncode == 0, done.stderr
    assert sorted(Hub.fetched) == wanted  # each once
    assert shards(out) == shards(local)
    assert {path.name for path in out.iterdir()} == {'meta.json', *shards(out)}
    text = {split: bytes(ids_of(out, split)) for split in ('train', 'val')}
    documents = [document.encode() + b'\0' for document in DOCUMENTS]
    if recipe != 'openwebtext':  # its val is drawn from the rest
        assert text == {'train': b''.join(documents[:50]), 'val': b''.join(documents[50:])}
    assert len(text['train']) + len(text['val']) == sum(map(len, documents))


@pytest.mark.parametrize('part, begun', [
    (None, 'unfinished'),
    ((1, 2), 'parts/1-of-2/unfinished'),
    ((1, 2), 'parts/1-of-2/meta.json'),
    ((1, 2), 'meta.json'),
])
def test_what_has_begun_needs_no_more_disk(tmp_path, monkeypatch, part, begun):
    """A part that is requeued when its own files fill the disk is refused."""
    args = SimpleNamespace(tokenizer='byte', input=[], out_dir=tmp_path / 'out', part=part, join=None)
    runs = []
    monkeypatch.setattr(preparing, 'hub_files', lambda repo, splits: 4 * [SimpleNamespace(size=10 ** 9)])
    monkeypatch.setattr(preparing.shutil, 'disk_usage', lambda path: SimpleNamespace(free=0))
    monkeypatch.setattr(preparing, 'prepare', lambda *args: runs.append(args))

    def run():
        preparing.prepare_from_hub(args, 'repo', {None: '*'}, tokens=10 ** 9, download_mb=4000)
    with pytest.raises(UserError, match='--out_dir takes another disk'):
        run()
    path = tmp_path / 'out' / begun
    path.parent.mkdir(parents=True)
    path.touch()
    run()
    assert len(runs) == 1


def test_recipes_take_llamas_tokenizer(prepare, tmp_path):
    """SlimPajama is mostly trained on with LLaMA's."""
    pytest.importorskip('tokenizers')
    (tmp_path / 'tokenizer.json').write_text(llama_json())
    (tmp_path / 'a.jsonl.zst').write_bytes(packed_lines(0, 20))
    done = prepare('data/slimpajama_627b/prepare.py', f'--input={tmp_path / "a.jsonl.zst"}', '--val_fraction=0.2',
                   f'--tokenizer={tmp_path}', f'--out_dir={tmp_path / "out"}')
    assert done.returncode == 0, done.stderr
    tokenizer = get_tokenizer(read_meta(tmp_path / 'out')['tokenizer'])
    ids = ids_of(tmp_path / 'out', 'train')
    first = tokenizer.decode(ids[:ids.index(tokenizer.eot)])
    assert first in DOCUMENTS[:2] and ids.count(tokenizer.eot) == 16


def test_ready_made_shards_are_fetched_as_they_are(prepare, tmp_path, hub):
    """llm.c's shards need no tokenizer; a cut one must not get a name."""
    Hub.files = {f'fineweb_train_{n:06d}.bin': llmc_shard(100 + n) for n in range(1, 5)}
    Hub.files['fineweb_val_000000.bin'] = llmc_shard(90)
    script, out = 'data/fineweb10B/prepare.py', tmp_path / 'out'
    Hub.broken = {'fineweb_train_000002.bin'}
    refused(command(script, '--shards=3', f'--out_dir={out}', env=hub), 'prepare.py: ', 'Hugging Face')
    assert not shards(out)
    Hub.broken = set()
    done = command(script, '--shards=3', f'--out_dir={out}', env=hub)
    assert done.returncode == 0, done.stderr
    assert sorted(Hub.fetched) == sorted(name for name in Hub.files if '4' not in name)
    train = [f'train_{n:06d}.bin' for n in (1, 2, 3)]
    assert {path.name for path in out.iterdir()} == {'meta.json', 'val_000000.bin', *train}
    assert read_meta(out)['files']['train_000002.bin']['tokens'] == 102
    assert Loader(out, 'train', T).n_tokens == 306
    folder = tmp_path / 'folder'
    folder.mkdir()
    for name, data in Hub.files.items():
        (folder / name).write_bytes(data)
    flags = '--shards=3', f'--input={folder}'
    assert prepare(script, *flags, f'--out_dir={tmp_path / "copy"}').returncode == 0
    assert shards(tmp_path / 'copy') == shards(out)
    (folder / 'fineweb_train_000002.bin').write_bytes(llmc_shard(102)[:-2])
    refused(prepare(script, *flags, f'--out_dir={tmp_path / "cut"}'), 'fineweb_train_000002.bin')
    assert not shards(tmp_path / 'cut')


@pytest.mark.parametrize('name', [*RECIPES, 'fineweb10B'])
def test_recipes_say_what_they_take(prepare, name):
    """train.py prints the size of a download instead of starting it, and the page of flags says both sizes."""
    facts = prepare_facts(ROOT / 'data' / name / 'prepare.py')
    done = prepare(f'data/{name}/prepare.py', '--help')
    assert done.returncode == 0 and 'GB' in done.stdout and facts['about'] in done.stdout
    assert facts['download_mb'] > 1000 and facts['vocab_size'] == 50257
    done = command('train.py', f'--dataset={name}', '--device=cpu', f'--out_dir=/nonexistent/{name}')
    refused(done, f"{facts['download_mb'] / 1000:.3g} GB", f'python data/{name}/prepare.py', '--dataset=pystdlib')


@pytest.mark.parametrize('name', [*RECIPES, 'fineweb10B', 'shakespeare'])
def test_ids_that_would_not_fit_are_noticed_before_the_download(name):
    """full_llama_1.36b.py asked for 895 GB of ids up to 50,256, which its vocabulary of 32,000 refused afterwards."""
    flags = f'--dataset={name}', '--vocab_size=32000', '--device=cpu', f'--out_dir=/nonexistent/{name}'
    done = command('train.py', *flags)
    refused(done, '50,257', 'vocab_size=32000', '--vocab_size=50304')
    takes_tokenizer = '--tokenizer' in command(f'data/{name}/prepare.py', '--help').stdout
    assert ('--tokenizer=PATH/tokenizer.json' in done.stderr) == takes_tokenizer


OWN_FLAGS = '''"""Chapters of a book."""
import sys
sys.path.insert(0, %r)
from data.prepare import prepare_from_hub, recipe_parser
needs_flags = '--book=NAME'
parser = recipe_parser(__file__, __doc__)
parser.add_argument('--book', required=True)
args = parser.parse_args()
prepare_from_hub(args, 'none', {None: f'{args.book}/*'}, tokens=1, download_mb=1)
'''


def test_a_recipe_may_need_flags_of_its_own(prepare, tmp_path):
    """Its script says which are missing; prepare_facts tells train.py before it runs."""
    script = tmp_path / 'prepare.py'
    script.write_text(OWN_FLAGS % str(ROOT))
    assert prepare_facts(script)['needs_flags'] == '--book=NAME'
    assert prepare_facts(ROOT / 'data/tinystories/prepare.py')['needs_flags'] == ''
    refused(prepare(script), 'prepare.py: ', '--book')
    (tmp_path / 'a.jsonl').write_text('{"text": "one"}\n' * 20)
    assert prepare(script, '--book=a', f'--input={tmp_path / "a.jsonl"}', '--tokenizer=byte').returncode == 0
    assert len(ids_of(tmp_path, 'train')) == 18 * 4


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if 'short' in self.path or 'whole' in self.path else 404)
        self.send_header('Content-Length', '9' if 'short' in self.path else '5')
        self.end_headers()
        self.wfile.write(b'hello')

    def log_message(self, *args):
        pass


def test_a_failed_download_leaves_no_file(tmp_path, monkeypatch):
    """nanoGPT writes a 404 page to input.txt and trains on it."""
    monkeypatch.setenv('no_proxy', '*')
    path = tmp_path / 'input.txt'
    with http.server.HTTPServer(('127.0.0.1', 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}'
        for name, says in [('missing', '404'), ('short', 'IncompleteRead')]:
            with pytest.raises(ValueError) as e:
                download(f'{url}/{name}', path)
            one_line(e.value, url, says, '--input=FILE')
        assert list(tmp_path.iterdir()) == []
        download(f'{url}/whole', path)
        download(f'{url}/missing', path)  # there already, so nothing is fetched
        server.shutdown()
    assert path.read_bytes() == b'hello'
