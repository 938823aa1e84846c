"""
The two sides of a judgement: copies of the code of the working tree and of a commit or a folder, so
that the sources may be edited while both train.
"""
import difflib
import glob
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from data.folder import find_datasets, is_prepared
from engine.common import ROOT, UserError, first_line
from engine.machine import device_name, pick_device, processor

CODE = '*.py', 'config/**/*.py', 'engine/**/*', 'data/*.py', 'data/*/*.py'
DATA = 'data/*/*.bin', 'data/*/meta.*', 'data/*/.checked.json'  # prepared data sets
IGNORED = 'seed', 'out_dir', 'overwrite'  # settings that are not part of a side's key
# run by another process, with the modules of another tree
BEGIN = '''import sys
tree, *argv = sys.argv[1:]
sys.path[0], sys.argv[0] = tree, 'compare.py'
from engine.common import show_error
sys.excepthook = show_error
'''
READ_SETTINGS = BEGIN + '''import json
from configurator import configure
config, given = configure(tree + '/train.py', argv=argv)
print(json.dumps([config, sorted(given)]))'''
PREPARE = BEGIN + '''from data.folder import find_datasets
from engine.console import Console
from engine.datasets import prepare_data
from engine.parallel import Parallel
prepare_data(find_datasets(*argv), None, Console(), Parallel())'''


class Side(NamedTuple):
    """What one side trains: the code in a folder, override files, and flags of train.py."""
    tree: str
    files: list[str]
    flags: dict
    settings: dict  # all settings of its train.py
    key: str  # names everything that its runs depend on


def make_side(tree, files, flags):
    """Return the Side of a tree. Override files are read from its own copies, if it has them."""
    inside = [os.path.relpath(os.path.realpath(path), os.path.realpath(ROOT)) for path in files]
    own = [os.path.join(tree, name) for name in inside]
    files = [copy if os.path.isfile(copy) else path for copy, path in zip(own, files)]
    words = files + [f'--{name}={value}' for name, value in flags.items()]
    command = [sys.executable, '-c', READ_SETTINGS, tree, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ['no reason given'])[-1]
        raise UserError(f"the settings of '{tree}': {reason.removeprefix('compare.py: ')}")
    settings, given = json.loads(done.stdout.splitlines()[-1])  # a config file may print, too
    flags = {name: settings[name] for name in flags}  # as the types of the settings
    # where a setting comes from counts, too: the schedule follows max_iters if that is a flag
    facts = [{k: v for k, v in settings.items() if k not in IGNORED},
             [k for k in given if k not in IGNORED], sorted(k for k in flags if k not in IGNORED),
             code_of(tree), data_of(settings), processor(),
             device_name(pick_device(settings['device'])[0]), platform.python_version(),
             version('torch')]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return Side(tree, files, flags, settings, key)


def prepare(dataset):
    """Prepare what --dataset names in this folder, or each side would prepare its own."""
    if not all(is_prepared(folder) for _, _, folder in find_datasets(dataset)):
        if subprocess.run([sys.executable, '-c', PREPARE, ROOT, dataset]).returncode:
            raise SystemExit(2)  # it has said why


def copy_code(source, to):
    """
    Copy the code of a folder, or of a commit of this repository, and link to the prepared data sets
    of this folder. Runs then go on with the same code while the sources are edited.
    """
    shutil.rmtree(to, ignore_errors=True)
    if os.path.isfile(os.path.join(source, 'train.py')):
        for name in find(CODE, source):
            os.makedirs(os.path.dirname(os.path.join(to, name)), exist_ok=True)
            shutil.copy2(os.path.join(source, name), os.path.join(to, name))
    else:
        if not shutil.which('git'):
            raise UserError(f"against='{source}' is no folder with a train.py, and git, which "
                            'would read it as a commit, is not installed')
        done = subprocess.run(['git', '-C', ROOT, 'archive', source], capture_output=True)
        if done.returncode:
            reason = done.stderr.decode('utf-8', 'replace').strip().partition('\n')[0]
            raise UserError(f"against='{source}' is neither a folder with a train.py nor a commit "
                            f'of this repository ({reason})')
        try:
            tarfile.open(fileobj=io.BytesIO(done.stdout)).extractall(to, filter='data')
        except tarfile.TarError as e:  # such as a link that leads out of the folder
            raise UserError(f"against='{source}' cannot be unpacked: {first_line(e)}") from None
    os.makedirs(os.path.join(ROOT, 'data', '.cache'), exist_ok=True)  # those made of text files
    for name in [*find(DATA, ROOT), 'data/.cache']:
        if not os.path.lexists(os.path.join(to, name)):
            os.makedirs(os.path.dirname(os.path.join(to, name)), exist_ok=True)
            os.symlink(os.path.join(ROOT, name), os.path.join(to, name))


def find(patterns, folder):
    names = [n for pattern in patterns for n in glob.glob(pattern, root_dir=folder, recursive=True)]
    return sorted(n for n in names
                  if os.path.isfile(os.path.join(folder, n)) and '__pycache__' not in n)


def code_of(tree):
    """Return {name: text} of the code in a folder."""
    code = {}
    for name in find(CODE, tree):
        with open(os.path.join(tree, name), encoding='utf-8', errors='replace') as f:
            code[name] = f.read()
    return code


def data_of(settings):
    """Return {path: size and time} of the files that a run reads: data sets, and weights."""
    paths = []
    for _, _, folder in find_datasets(settings['dataset']):
        paths += [*folder.glob('*.bin'), *folder.glob('meta.*')]
    for key in ('init_from', 'teacher'):
        start = Path(settings.get(key) or '-')
        paths.append(start)
        for pattern in ('ckpt*', '*.safetensors', '*.bin', 'config.json'):
            paths += start.rglob(pattern)
    stats = {str(path): path.stat() for path in sorted(paths) if path.is_file()}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def diff_of(baseline, candidate):
    """Return the names of the files whose code differs, and how, as a unified diff."""
    before, after = code_of(baseline.tree), code_of(candidate.tree)
    names = [n for n in sorted(before | after) if before.get(n) != after.get(n)]
    lines = []
    for name in names:
        lines += difflib.unified_diff(before.get(name, '').splitlines(True),
                                      after.get(name, '').splitlines(True), name, name)
    return names, ''.join(line if line.endswith('\n') else line + '\n' for line in lines)
