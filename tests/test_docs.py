"""README and docs: their commands are ones that the scripts accept, and their links lead somewhere."""
import os
import re
import shlex

import pytest

import compare
from configurator import configure
from conftest import ROOT

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
SETTINGS = {  # {script: the scripts whose settings it takes}
    'train.py': ['train.py'],
    'sample.py': ['sample.py'],
    'bench.py': ['bench.py', 'train.py'],
    'model.py': ['engine/cost.py', 'train.py'],
}


def shell_lines(page):
    """Yield the lines of a page's shell blocks. A line that ends with a backslash continues."""
    kind = None
    for line in page.read_text().replace('\\\n', ' ').splitlines():
        if line.startswith('```'):
            kind = line if kind is None else None
        elif kind in ('```', '```sh'):
            yield line


def commands():
    """Return {(script, arguments)} of every python or torchrun line in the docs."""
    found = set()
    for page in PAGES:
        for line in shell_lines(page):
            words = shlex.split(line, comments=True) if '.py' in line else []
            scripts = [i for i, word in enumerate(words) if word in {*SETTINGS, 'compare.py'}]
            if scripts:
                found.add((words[scripts[0]], *words[scripts[0] + 1:]))
    assert len(found) > 50
    return sorted(found)


@pytest.mark.parametrize('command', commands(), ids=' '.join)
def test_a_documented_command_is_accepted(command, monkeypatch):
    """A key that was renamed, or a config file that was moved, and docs that still name it."""
    monkeypatch.chdir(ROOT)
    script, *argv = command
    if script == 'compare.py':
        compare.settings([arg for arg in argv if not arg.startswith('out-')])
    else:
        configure(*SETTINGS[script], argv=argv)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_a_link_leads_to_a_file(page):
    for link in re.findall(r'\]\(([^)#]+)\)', page.read_text()):
        assert link.startswith('http') or os.path.exists(page.parent / link), link


def test_the_readme_stays_short():
    """It had 449 lines of up to 515 columns, and nobody read it."""
    lines = (ROOT / 'README.md').read_text().splitlines()
    assert len(lines) < 200 and max(map(len, lines)) <= 100
