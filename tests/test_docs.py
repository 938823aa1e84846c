"""README and docs: each command runs in a short form, and each link leads to a file."""
import gzip
import json
import os
import re
import shlex
import shutil
from importlib.util import find_spec

import pytest
import torch
from torch.distributed.run import get_args_parser as torchrun_parser

from conftest import BYTE, ROOT, TINY, checkpoint, command, llama_json, losses, succeeded
from data.chat import CHATML
from data.folder import write_dataset

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md')),
         *sorted((ROOT / 'config').glob('*.md'))]
SCRIPTS = '*.py', 'engine/*.py', 'engine/*.html', 'config/*.py', 'data/*.py', 'data/*/*.py'

TRAINS = r'(train|bench)\.py|compare\.py (config|--scaling)'
# {pattern: flags}: what makes the commands that the pattern is found in short; later ones win
SHORT = {
    TRAINS:
        '--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --gradient_accumulation_steps=2 '
        '--max_iters=2 --eval_interval=2 --eval_iters=1 --overwrite=True '
        '--device=cpu --compile=False --dtype=float32 --peak_tflops=1',
    r'compare\.py (config|--scaling)': '--seed=1',
    r'--position_encoding=\w+,': '--position_encoding=rope',
    r'--search=': '--search=2',
    r'--scaling=': '--n_embd=32,64,96 --n_head=1 --tokens_per_param=0.01',
    r'bench\.py': '--warmup=0 --repeats=1',
    r'--report=': '--sections=loader',
    r'^python model\.py config/': '--n_layer=2 --n_embd=64 --n_head=2',
    r'--find_batch_size=': '--batch_size=1',
    r'--fsdp_shard_size=': '--fsdp_shard_size=1',
    r'--what=generate': '--prompt_tokens=8 --new_tokens=2',
    r'sample\.py(?!.*--chat=True)': '--num_samples=2 --max_new_tokens=4',
    r'data/prepare\.py': '--overwrite',
    r'data/prepare\.py(?!.*--tokenizer)': '--tokenizer=byte',
}
# appended to the studies among the config files: two of their cells, as long as a flag says
SHORT_STUDY = '''
cells = {name: {key: cells[name][key] for key in cells[name] if key != 'max_iters'} for name in [*cells][:2]}
'''
# {pattern: libraries}: without them these commands are skipped
NEEDS = {
    r'compare\.py|--metrics': ['scipy', 'matplotlib'],
    r'score\.py': ['scipy'],
    r'--attention=': ['matplotlib'],
    r'--wandb_log': ['wandb'],
    r'--tensorboard_log': ['tensorboard'],
    r'--export=hf_dir': ['safetensors', 'tokenizers'],
    r'model\.onnx': ['onnx', 'onnxscript'],
    r'parquet': ['pyarrow', 'tokenizers'],
    r'--tokenizer=bpe': ['tokenizers'],
    r'--peft=': ['safetensors'],
}
# copies of the quick start's run, which the commands read
RUNS = ['out-before', 'out-after', 'out-a', 'out-b', 'out-c', 'out-book', 'out-chat-pystdlib', 'out-first', 'OUT_DIR',
        'out-ablate-shakespeare', 'out-ablate-gpt2-to-llama', 'out-choices-0.2M',
        'gpt2', 'gpt2-xl', '../nanoGPT', '.peers/nanoGPT']
DOWNLOADS = r'data/(openwebtext|tinystories|fineweb10B)/prepare\.py'  # not run at all


def code(page):
    """Yield the lines of a page's shell blocks, then its code spans. A backslash continues a line."""
    text = page.read_text()
    for language, block in re.findall(r'^```(\w*)\n(.*?)^```', text, re.M | re.S):
        if language in ('', 'sh'):
            yield from block.replace('\\\n', ' ').splitlines()
    yield from re.findall(r'`([^`\n]+)`', text)


def documented():
    """Return every python or torchrun command of the docs once, without its comment."""
    found = {}
    for page in PAGES:
        names = dict(re.findall(r'`(\$\w+)` is\s+`([^`]+)`', page.read_text()))  # as in `$S` is `a.py --b=c`
        for line in code(page):
            line = line.split(' && ')[-1]
            for name, meaning in names.items():
                line = line.replace(name, meaning)
            words = shlex.split(line, comments=True) if '.py' in line else []
            words = words[1:] if words and re.match(r'[A-Z_]+=', words[0]) else words
            is_python = words[:1] == ['python'] and words[1].endswith('.py') or words[:1] == ['torchrun']
            if is_python and 'config/...' not in words:
                command = shlex.join(words)
                kind = re.sub(r' --(jobs|dataset|out_dir)=\S+', '', command) if 'compare.py' in words else command
                found.setdefault(kind, command)  # a study with other data or jobs is run once
    assert len(found) > 80
    return list(found.values())


def add_texts(here, text):
    """Write the text files that the commands of the docs read."""
    for name in ('path/to/book.txt', 'book.txt', 'corpus.txt', '1GB.txt', 'FILE', 'notes/note.txt',
                 '.peers/tinyshakespeare.txt'):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)
    (here / 'prompts.txt').write_text('def main(\nimport os\n')
    talks = [json.dumps({'instruction': f'{n} + {n}?', 'output': str(2 * n)}) for n in range(40)]
    (here / 'talks.jsonl').write_text('\n'.join(talks))
    (here / 'lora.py').write_text('lora_rank = 8\n')
    paragraphs = text.split('\n\n')
    lines = '\n'.join(json.dumps({'text': paragraph}) for paragraph in paragraphs)
    (here / 'more.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
    if find_spec('pyarrow') and find_spec('tokenizers'):
        from pyarrow import parquet, table
        (here / 'corpus').mkdir()
        (here / 'llama').mkdir()
        parquet.write_table(table({'text': paragraphs}), here / 'corpus/part.parquet')
        (here / 'llama/tokenizer.json').write_text(llama_json())


def paste_example_of_a_part(folder):
    """Do in a copy of this repository what docs/parts.md says about the example of a part."""
    part = (ROOT / 'docs/parts.md').read_text().split('```python\n')[1].split('```')[0]
    source = (folder / 'model.py').read_text()
    end_of_class = source.index('\n\n\n', source.index('class SwiGLU'))
    (folder / 'model.py').write_text(source[:end_of_class] + '\n\n\n' + part + source[end_of_class:])


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    """A folder with the scripts, and small stand-ins for everything that the commands of the docs read."""
    here = tmp_path_factory.mktemp('docs') / 'plainGPT'
    for path in (path for pattern in SCRIPTS for path in ROOT.glob(pattern)):
        copy = here / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    paste_example_of_a_part(here)
    for study in here.glob('config/ablate_*.py'):
        study.write_text(study.read_text() + SHORT_STUDY)
    text = (ROOT / 'test_model.py').read_text()
    add_texts(here, text)
    for folder in [*here.glob('data/*/'), here / 'data/book', here / 'data/talks']:
        write_dataset(folder, {'train': text.encode(), 'val': text.encode()[:9000]}, BYTE)
    first_run, sharded = ['config/preset_quick_test.py', *SHORT[TRAINS].split()], '--sharded_checkpoint=True'
    succeeded(command('train.py', *first_run, cwd=here))
    succeeded(command('train.py', *first_run, sharded, '--out_dir=out', cwd=here, processes=2))
    for name in RUNS:
        shutil.copytree(here / 'out-quick-test', here / name)
    chat = checkpoint(here / 'out-chat-pystdlib') | {'chat_template': CHATML}
    del chat['checksums']
    torch.save(chat, here / 'out-chat-pystdlib/ckpt.pt')
    adapters = '--init_from=out-quick-test', '--lora_rank=2', '--out_dir=out-lora'
    succeeded(command('train.py', *first_run, *adapters, cwd=here))
    for folder in '../nanoGPT', '.peers/nanoGPT':
        shutil.copy(here / 'model.py', here / folder)
    shutil.copy(here / 'out-first/ckpt.pt', here / 'out-first/ckpt_000500.pt')
    return here


@pytest.mark.parametrize('line', documented(), ids=str)
def test_a_documented_command_runs(line, workspace, tmp_path):
    """A key that was renamed, a file that was moved, a comparison that is refused, and docs that still name it."""
    for pattern, libraries in NEEDS.items():
        for library in libraries if re.search(pattern, line) else []:
            pytest.importorskip(library)
    if re.search(DOWNLOADS, line):
        pytest.skip('a large download')
    if '--serve=' in line:
        pytest.skip('it does not end; tests/test_serve.py starts a server')
    if re.search(r"compare\.py '?--(against|try|ledger|power)", line):
        pytest.skip('its exit status is the verdict; tests/test_judge.py judges')
    program, *words = shlex.split(line)
    processes = 1
    if program == 'torchrun':
        asked = torchrun_parser().parse_args(words)
        words, processes = [asked.training_script, *asked.training_script_args], 2
    short = [flag for pattern, flags in SHORT.items() if re.search(pattern, line) for flag in flags.split()]
    here, env = shutil.copytree(workspace.parent, tmp_path / 'copy') / 'plainGPT', {'WANDB_MODE': 'offline'}
    succeeded(command(*words, *short, cwd=here, env=env, processes=processes))


def test_the_example_of_a_part_learns(text_set, workspace, tmp_path):
    """The example of a new part in docs/parts.md has stopped working."""
    assert any('--ffn_type=maxout' in line for line in documented())
    flags = *TINY, '--ffn_type=maxout', '--learning_rate=1e-2', f'--dataset={text_set}', f'--out_dir={tmp_path}'
    succeeded(command('train.py', *flags, cwd=workspace), 'maxout')
    first, *_, last = losses(tmp_path).values()
    assert last < first - 1


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_a_link_leads_to_a_file(page):
    for link in re.findall(r'\]\(([^)#]+)\)', page.read_text()):
        assert link.startswith('http') or os.path.exists(page.parent / link), link


@pytest.mark.parametrize('folder', ['engine', 'data'])
def test_contributing_lists_every_file(folder):
    """engine/judge_cost.py was missing."""
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    assert [path.name for path in (ROOT / folder).glob('*.py') if f'`{path.name}`' not in text] == []


def test_the_readme_stays_short():
    """It had 449 lines of up to 515 columns, and nobody read it."""
    lines = (ROOT / 'README.md').read_text().splitlines()
    assert len(lines) < 200 and max(map(len, lines)) <= 100
