"""What must stay true: python -m pytest tests/test_recipes.py"""
import http.server
import json
import re
import threading
import zlib

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
from data.loader import Loader, prepare_facts, read_meta
from data.source import download
from data.tokenizer import get_tokenizer

T = 8  # block_size of the loader tests


# data: the recipes, with files of the same format from a folder and from a hub on this machine

def sample_of(recipe, folder):
    """Small files as the data set of a recipe has them: {name: bytes}."""
    folder.mkdir(exist_ok=True)
    if recipe == 'slimpajama_627b':
        zstandard = pytest.importorskip('zstandard')
        part = lambda first, last: zstandard.ZstdCompressor().compress(b''.join(json.dumps(
            {'text': text, 'meta': {'redpajama_set_name': 'RedPajamaC4'}}).encode() + b'\n' for text in DOCUMENTS[first:last]))
        return {'train/chunk1/example_train_0.jsonl.zst': part(0, 20), 'train/chunk1/example_train_1.jsonl.zst': part(20, 30),
                'train/chunk2/example_train_0.jsonl.zst': part(30, 50), 'validation/chunk1/example_holdout_0.jsonl.zst': part(50, 60), 'README.md': b'no data'}
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')

    def part(first, last):
        parquet.write_table(pyarrow.table({'text': DOCUMENTS[first:last]}), folder / 'part')
        return (folder / 'part').read_bytes()
    if recipe == 'openwebtext':
        return {'README.md': b'no data', **{f'plain_text/train-0000{n}-of-00003.parquet': part(20 * n, 20 * n + 20) for n in range(3)}}
    return {'data/train-00000-of-00002-ab2b.parquet': part(0, 20), 'data/train-00001-of-00002-cd3c.parquet': part(20, 50),
            'data/validation-00000-of-00001-869c.parquet': part(50, 60), 'data/test-00000-of-00001-9a.parquet': part(0, 9)}


RECIPES = ['openwebtext', 'slimpajama_627b', 'slimpajama_6b', 'tinystories']


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of Hugging Face as huggingface_hub asks for; files are {name: bytes}, fetched counts downloads, and names in broken answer 403."""
    protocol_version = 'HTTP/1.1'
    files, fetched, broken = {}, [], set()

    def do_GET(self):
        path, status, headers = self.path.split('?')[0], 200, {'X-Repo-Commit': 'c0ffee' * 6 + 'abcd'}
        name = path.split('/resolve/')[-1].split('/', 1)[-1]
        if '/resolve/' in path and name in self.files and name not in self.broken:
            body = self.files[name]
            headers |= {'ETag': f'"{zlib.crc32(body)}"', 'Accept-Ranges': 'bytes'}
            first = int((re.findall(r'bytes=(\d+)-', self.headers.get('Range', '')) or ['0'])[0])
            if first:
                status, headers, body = 206, headers | {'Content-Range': f'bytes {first}-{len(body) - 1}/{len(body)}'}, body[first:]
            if self.command == 'GET':
                self.fetched.append(name)
        elif '/tree/' in path:
            body = json.dumps([{'type': 'directory', 'path': 'data', 'oid': '0'}, *(
                {'type': 'file', 'path': name, 'size': len(data), 'oid': str(zlib.crc32(data))} for name, data in self.files.items())]).encode()
        elif path.startswith('/api/datasets/') and '/resolve/' not in path:
            body = json.dumps({'id': path.removeprefix('/api/datasets/'), 'sha': 'c0ffee' * 6 + 'abcd', 'tags': [], 'siblings': []}).encode()
        else:
            status, body = 403 if name in self.broken else 404, b'{}'  # 500 would be tried again for half a minute
        self.send_response(status)
        for key, value in {**headers, 'Content-Type': 'application/json', 'Content-Length': len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    pytest.importorskip('huggingface_hub')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Hub.fetched, Hub.broken = [], set()
        yield {'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}', 'HF_HOME': str(tmp_path / 'home'), 'no_proxy': '*', 'HF_HUB_DISABLE_XET': '1'}
        server.shutdown()


@pytest.mark.parametrize('recipe', RECIPES)
def test_recipes_fetch_resume_and_read_local_samples_alike(tmp_path, hub, recipe):
    """A download that ends after a day should not begin again, and what the recipe reads from the hub is what it reads from a folder."""
    Hub.files = sample_of(recipe, tmp_path / 'sample')
    for name, data in Hub.files.items():
        (tmp_path / 'sample' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'sample' / name).write_bytes(data)
    local = {split: [tmp_path / 'sample' / name for name in sorted(Hub.files) if pattern in name] for split, pattern in
             [('input', 'train'), ('val_input', 'validation')]}
    script, flags = f'data/{recipe}/prepare.py', ['--tokenizer=byte', '--val_fraction=0.1']
    done = command(script, *flags, f'--out_dir={tmp_path / "local"}', *(f'--{flag}={path}' for flag, paths in local.items() for path in paths))
    assert done.returncode == 0, done.stderr
    wanted = [name for name in sorted(Hub.files) if 'train-' in name or 'train_' in name or 'validation' in name]
    Hub.broken = {wanted[1]}
    done = command(script, *flags, f'--out_dir={tmp_path / "out"}', env=hub)
    assert done.returncode == 2 and 'GB to download' in done.stdout and 'of disk' in done.stdout and not shards(tmp_path / 'out')
    one_line(done.stderr, script, 'Hugging Face', '--input=PATH', 'goes on')
    assert wanted[0] in Hub.fetched and wanted[1] not in Hub.fetched
    Hub.broken = set()
    done = command(script, *flags, f'--out_dir={tmp_path / "out"}', env=hub)
    assert done.returncode == 0, done.stderr
    assert sorted(Hub.fetched) == wanted  # each once
    assert shards(tmp_path / 'out') == shards(tmp_path / 'local') and {path.name for path in (tmp_path / 'out').iterdir()} == {'meta.json', *shards(tmp_path / 'out')}
    text = {split: bytes(ids_of(tmp_path / 'out', split)) for split in ('train', 'val')}
    if recipe != 'openwebtext':  # whose val is drawn from the rest
        assert text == {'train': b''.join(d.encode() + b'\0' for d in DOCUMENTS[:50]), 'val': b''.join(d.encode() + b'\0' for d in DOCUMENTS[50:])}
    assert len(text['train']) + len(text['val']) == sum(len(d.encode()) + 1 for d in DOCUMENTS)


def test_recipes_take_llamas_tokenizer(tmp_path):
    """SlimPajama is mostly trained on with LLaMA's."""
    pytest.importorskip('tokenizers')
    (tmp_path / 'tokenizer.json').write_text(llama_json())
    files = sample_of('slimpajama_627b', tmp_path / 'sample')
    (tmp_path / 'a.jsonl.zst').write_bytes(files['train/chunk1/example_train_0.jsonl.zst'])
    done = command('data/slimpajama_627b/prepare.py', f'--input={tmp_path / "a.jsonl.zst"}', f'--tokenizer={tmp_path}', '--val_fraction=0.2', f'--out_dir={tmp_path / "out"}')
    assert done.returncode == 0, done.stderr
    tokenizer = get_tokenizer(read_meta(tmp_path / 'out')['tokenizer'])
    ids = ids_of(tmp_path / 'out', 'train')
    first = tokenizer.decode(ids[:ids.index(tokenizer.eot)])
    assert first in DOCUMENTS[:2] and ids.count(tokenizer.eot) == 16


def test_ready_made_shards_are_fetched_as_they_are(tmp_path, hub):
    """llm.c's shards need no tokenizer; a cut one must not get a name."""
    Hub.files = {'fineweb_val_000000.bin': llmc_shard(90), **{f'fineweb_train_{n:06d}.bin': llmc_shard(100 + n) for n in range(1, 5)}}
    script, out = 'data/fineweb10B/prepare.py', tmp_path / 'out'
    Hub.broken = {'fineweb_train_000002.bin'}
    refused(command(script, '--shards=3', f'--out_dir={out}', env=hub), script, 'Hugging Face')
    assert not shards(out)
    Hub.broken = set()
    done = command(script, '--shards=3', f'--out_dir={out}', env=hub)
    assert done.returncode == 0 and sorted(Hub.fetched) == sorted(name for name in Hub.files if '4' not in name), done.stderr
    assert {path.name for path in out.iterdir()} == {'meta.json', 'val_000000.bin', *(f'train_{n:06d}.bin' for n in (1, 2, 3))}
    assert read_meta(out)['files']['train_000002.bin']['tokens'] == 102 and Loader(out, 'train', T).n_tokens == 306
    folder = tmp_path / 'folder'
    folder.mkdir()
    for name, data in Hub.files.items():
        (folder / name).write_bytes(data)
    assert command(script, '--shards=3', f'--input={folder}', f'--out_dir={tmp_path / "copy"}').returncode == 0
    assert shards(tmp_path / 'copy') == shards(out)
    (folder / 'fineweb_train_000002.bin').write_bytes(llmc_shard(102)[:-2])
    refused(command(script, '--shards=3', f'--input={folder}', f'--out_dir={tmp_path / "cut"}'), 'fineweb_train_000002.bin')
    assert not shards(tmp_path / 'cut')


@pytest.mark.parametrize('name', [*RECIPES, 'fineweb10B'])
def test_recipes_say_what_they_take(name):
    """train.py prints the size of a download instead of starting it, and the page of flags says both sizes."""
    facts = prepare_facts(ROOT / 'data' / name / 'prepare.py')
    done = command(f'data/{name}/prepare.py', '--help')
    assert done.returncode == 0 and 'GB' in done.stdout and facts['about'] in done.stdout and facts['download_mb'] > 1000 and facts['vocab_size'] == 50257
    refused(command('train.py', f'--dataset={name}', '--device=cpu', f'--out_dir=/nonexistent/{name}'), f"{facts['download_mb']:,} MB", f'python data/{name}/prepare.py')


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
    with http.server.HTTPServer(('127.0.0.1', 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}'
        for name, says in [('missing', '404'), ('short', 'IncompleteRead')]:
            with pytest.raises(ValueError) as e:
                download(f'{url}/{name}', tmp_path / 'input.txt')
            one_line(e.value, url, says, '--input=FILE')
        assert list(tmp_path.iterdir()) == []
        download(f'{url}/whole', tmp_path / 'input.txt')
        download(f'{url}/missing', tmp_path / 'input.txt')  # there already, so nothing is fetched
        server.shutdown()
    assert (tmp_path / 'input.txt').read_bytes() == b'hello'


