"""What the prepare.py scripts share: flags, the text to prepare, and errors of one line."""
import argparse
import fnmatch
import http.client
import os
import urllib.request
from pathlib import Path

from data.loader import write_files


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f'{self.prog}: {message} (--help shows the flags)\n')


def run(prepare, script, doc, takes_input=True):
    """Call prepare(out_dir) or prepare(out_dir, input) from the command line of a prepare.py.

    script and doc are its __file__ and __doc__; out_dir is a Path, the script's folder by default; input is a path or
    None. A ValueError, an OSError and a wrong flag end it with one line on stderr and status 2."""
    script = Path(script).resolve()
    parser = Parser(prog='/'.join(script.parts[-3:]), description=doc, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out_dir', metavar='DIR', type=Path, default=script.parent, help='where to write, by default beside the script')
    if takes_input:
        parser.add_argument('--input', metavar='FILE', help='a local UTF-8 text instead of the download')
    try:
        prepare(**vars(parser.parse_args()))
    except (OSError, ValueError) as e:
        parser.exit(2, f'{parser.prog}: {e}\n')


def read_text(path):
    """A file's text, with line ends as \\n. ValueError when it is empty or not UTF-8, OSError when it cannot be read."""
    try:
        with open(path, encoding='utf-8') as f:
            text = f.read()
    except UnicodeDecodeError as e:
        raise ValueError(f'{path} is not UTF-8 (byte {e.start}: {e.reason}): convert it first') from None
    if not text:
        raise ValueError(f'{path} is empty: give a file with text in it')
    return text


def download(url, path):
    """Fetch url into path, unless it is there already. ValueError says why that failed and names the way without it."""
    if path.exists():
        return
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            data = response.read()  # IncompleteRead when it is shorter than Content-Length
    except (OSError, http.client.HTTPException) as e:
        raise ValueError(f'download of {url} failed ({e}): --input=FILE takes a local copy') from None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files({path: data})


def hub_files(repo, splits):
    """[(split, name, bytes, fetch)] of a data set's files on Hugging Face, for splits {split: pattern}; fetch(folder) downloads one and gives its path.

    What a download left half done goes on. OSError for what the hub refuses, and then the same call goes on later."""
    os.environ.setdefault('HF_HUB_DISABLE_PROGRESS_BARS', '1')  # the bar here counts encoded bytes
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f'{repo} is fetched by the library huggingface_hub: pip install huggingface_hub') from None

    def ask(function, *args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception as e:  # of HTTP, of the hub, of the network
            reason = (str(e).strip().splitlines() or [''])[0]
            raise OSError(f'{repo} on Hugging Face: {type(e).__name__}: {reason:.200}; --input=PATH takes local copies, and the same command goes on') from None
    api = huggingface_hub.HfApi()
    version = ask(api.dataset_info, repo).sha
    sizes = {f.path: f.size for f in ask(lambda: list(api.list_repo_tree(repo, recursive=True, revision=version, repo_type='dataset'))) if hasattr(f, 'size')}
    found = []
    for split, pattern in splits.items():
        names = sorted(fnmatch.filter(sizes, pattern))
        if not names:
            raise ValueError(f'{repo} on Hugging Face has no files {pattern} any more: --input=PATH takes local copies')
        for name in names:
            fetch = lambda folder, name=name: Path(ask(huggingface_hub.hf_hub_download, repo, name, repo_type='dataset', revision=version, local_dir=folder))
            found.append((split, name, sizes[name], fetch))
    return found


def tinyshakespeare(out_dir, input=None):
    """Train and val text of Tiny Shakespeare, or of the file input: the first 90 % of the characters, and the rest."""
    if input is None:
        input = out_dir / 'input.txt'
        download('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt', input)
    text = read_text(input)
    cut = int(len(text) * 0.9)
    return text[:cut], text[cut:]
