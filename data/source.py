"""Provide the command line and the downloads for the prepare.py scripts."""
import argparse
import fnmatch
import functools
import http.client
import os
import sys
import urllib.request
from pathlib import Path

from data.documents import Source
from data.folder import HERE
from engine.common import (
    UserError,
    first_line,
    optional,
    printable,
    reader_may_exit,
    replacing,
    show_error,
    terminal_width,
)

SHAKESPEARE = ('https://raw.githubusercontent.com/karpathy/char-rnn/master/'
               'data/tinyshakespeare/input.txt')


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, width=terminal_width())


class Parser(argparse.ArgumentParser):
    def print_help(self, file=None):
        with reader_may_exit():
            super().print_help(file)

    def error(self, message):
        self.exit(2, printable(f'{self.prog}: {message} (--help shows the flags)') + '\n')


def script_parser(script, doc):
    """
    Return the parser of a prepare.py, given its __file__ and __doc__. From here on the script ends
    with one line and status 2 for a wrong flag, a UserError or an OSError.
    """
    sys.excepthook = show_error
    script = Path(script).resolve()
    in_data = script.parent == HERE  # data/prepare.py itself
    name = '/'.join(script.parts[-2 if in_data else -3:])
    return Parser(prog=name, description=doc, allow_abbrev=False, formatter_class=HelpFormatter)


def small_parser(script, doc, takes_input=True):
    """Return the parser of a data set that is small enough to be prepared in memory."""
    parser = script_parser(script, doc)
    add_out_dir(parser, script)
    if takes_input:
        parser.add_argument('--input', metavar='FILE',
                            help='a local UTF-8 text instead of the download')
    return parser


def add_out_dir(parser, script):
    beside = Path(script).resolve().parent
    parser.add_argument('--out_dir', metavar='DIR', type=Path, default=beside,
                        help='where to write, by default beside the script')


def read_whole_text(path):
    """
    Return the text of a file, with line ends as \\n. Raise UserError if it is empty or not UTF-8.
    """
    try:
        with open(path, encoding='utf-8') as f:
            text = f.read()
    except UnicodeDecodeError as e:
        problem = f'{path} is not UTF-8 (byte {e.start}: {e.reason})'
        raise UserError(f'{problem}: convert it first') from None
    if not text:
        raise UserError(f'{path} is empty: give a file with text in it')
    return text


def tinyshakespeare(out_dir, input=None):
    """
    Return the train and val text of Tiny Shakespeare, or of the file `input`: the first 90 % of the
    characters, and the rest.
    """
    if input is None:
        input = out_dir / 'input.txt'
        download(SHAKESPEARE, input)
    text = read_whole_text(input)
    cut = int(len(text) * 0.9)
    return text[:cut], text[cut:]


def download(url, path):
    """Download url to path unless it exists. Raise UserError if that fails."""
    if path.exists():
        return
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            data = response.read()  # IncompleteRead when it is shorter than Content-Length
    except (OSError, http.client.HTTPException) as e:
        message = f'download of {url} failed ({e})'
        raise UserError(f'{message}: --input=FILE takes a local copy') from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as f:
        f.write(data)


def hub_files(repo, splits):
    """
    Return a Source for each file of a Hugging Face data set that matches {split: pattern}. An
    interrupted download resumes when it is fetched again.
    """
    os.environ.setdefault('HF_HUB_DISABLE_PROGRESS_BARS', '1')  # data/prepare.py has its own bar
    library = optional('huggingface_hub', repo)
    api = library.HfApi()
    version = ask_hub(repo, api.dataset_info, repo).sha
    entries = ask_hub(repo, lambda: list(api.list_repo_tree(
        repo, recursive=True, revision=version, repo_type='dataset')))
    sizes = {entry.path: entry.size for entry in entries if hasattr(entry, 'size')}  # no folders
    sources = []
    for split, pattern in splits.items():
        names = sorted(fnmatch.filter(sizes, pattern))
        if not names:
            problem = f'{repo} on Hugging Face has no files {pattern} any more'
            raise UserError(f'{problem}: --input=PATH takes local copies')
        for name in names:
            fetch = functools.partial(fetch_from_hub, repo, name, version)
            sources.append(Source(f'{repo}/{name}', None, split, sizes[name], None, fetch))
    return sources


def fetch_from_hub(repo, name, version, folder):
    library = optional('huggingface_hub', repo)
    path = ask_hub(repo, library.hf_hub_download, repo, name, repo_type='dataset',
                   revision=version, local_dir=folder)
    return Path(path)


def ask_hub(repo, function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as e:  # from HTTP, the hub or the network
        problem = f'{repo} on Hugging Face: {type(e).__name__}: {first_line(e):.200}'
        remedy = '--input=PATH takes local copies, and the same command resumes'
        raise UserError(f'{problem}; {remedy}') from None
