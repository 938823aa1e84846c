"""The data sets of a run: prepared if necessary, with one tokenizer, and read by loaders."""
import glob
import os
import shlex

from data.folder import prepare_facts, read_meta
from data.loader import Loader, Mixture
from data.tokenizer import get_tokenizer
from engine.common import ROOT, UserError, first_line, printable, run_script
from engine.hints import suggestion
from model import GPTConfig


def prepare_data(data_sets, vocab_size, console, parallel):
    """
    Prepare the data sets that need it, on the first process of each node, by their own prepare.py
    or, for a text file, by data/prepare.py. Raise UserError if one does not exist, or with the
    command to run if it is a large download. vocab_size is the model's, or None if it is the data
    set's.
    """
    for name, _, folder in data_sets:
        if parallel.local_rank == 0 and not any(folder.glob('train*.bin')):
            if os.path.isfile(name):
                prepare_file(name, str(folder), console)
            else:
                run_recipe(name, str(folder), vocab_size, console)
        parallel.barrier()


def prepare_file(name, folder, console):
    # Bytes suit any text and keep a small model small; a large text is worth GPT-2's vocabulary.
    tokenizer = 'gpt2' if os.path.getsize(name) > 20e6 else 'byte'
    console.say(f"preparing '{name}' once, with tokenizer {tokenizer}; another choice: python "
                f'data/prepare.py {shlex.quote(name)} --tokenizer=... --out=NAME, then '
                '--dataset=NAME')
    script = os.path.join(ROOT, 'data', 'prepare.py')
    flags = [f'--input={name}', f'--out={folder}', f'--tokenizer={tokenizer}']
    if run_script(script, *flags):
        raise SystemExit(2)  # prepare.py has printed the error


def run_recipe(name, folder, vocab_size, console):
    script = os.path.join(folder, 'prepare.py')
    if not os.path.isdir(folder):
        recipes = glob.glob(os.path.join(ROOT, 'data', '*', 'prepare.py'))
        names = sorted(os.path.basename(os.path.dirname(path)) for path in recipes)
        shares = ' (several need shares, as in a:0.7,b:0.3)' if ',' in name else ''
        files = [file for file in os.listdir() if os.path.isfile(file)]
        raise UserError(f"there is no data set or file '{name}'{shares}"
                        f"{suggestion(name, names + files) or '.'} The data sets are "
                        f"{', '.join(names)} (--dataset=pystdlib needs no download). A folder in "
                        "data/ with nanoGPT's or llm.c's train*.bin and val*.bin also works")
    if not os.path.exists(script):
        source = shlex.quote(name if os.path.isdir(name) else folder)
        raise UserError(f"'{name}' has no train*.bin; to make a data set of text in it: python "
                        f'data/prepare.py --input={source} --out=NAME, then --dataset=NAME')
    facts = prepare_facts(script)
    megabytes, command = facts['download_mb'], f'python {shlex.quote(os.path.relpath(script))}'
    check_vocabulary(name, facts, vocab_size, command)
    if megabytes > 100:
        raise UserError(f"data set '{name}' is not prepared; to prepare it, with "
                        f'{download_of(megabytes)}: {command}; {TRY_AT_ONCE}')
    if facts['needs_flags']:
        raise UserError(f"data set '{name}' is not prepared; to prepare it: {command} "
                        f"{facts['needs_flags']}")
    if not is_recipe(script):
        raise UserError(f"data set '{name}' is not prepared, and only the prepare.py of folders in "
                        f'{os.path.join(ROOT, "data")} are run; to run this one: {command}')
    console.say(f"preparing data set '{name}' by {command} ({download_of(megabytes)}): "
                f"{facts['about']}")
    if run_script(script):
        raise UserError(f"data set '{name}' could not be prepared, see above; to try again: "
                        f'{command}')


TRY_AT_ONCE = ('to try this config at once, without a download: --dataset=pystdlib; a small model '
               'instead: config/preset_quick_test.py')


def download_of(megabytes):
    if not megabytes:
        return 'no download'
    size = f'{megabytes / 1000:,.3g} GB' if megabytes > 100 else f'{megabytes:g} MB'
    return f'a download of {size}'


def check_vocabulary(name, facts, vocab_size, command):
    """
    Raise UserError, before anybody waits for the download, if a recipe makes more ids than
    vocab_size, the model's. The commands in the message make them fit.
    """
    n_ids = facts['vocab_size']
    if not (n_ids and vocab_size and n_ids > vocab_size):
        return
    remedy = f'add --vocab_size={GPTConfig.from_settings({}, n_ids).vocab_size} here'
    if facts['takes_tokenizer']:
        remedy = (f'prepare it by {command} --tokenizer=PATH/tokenizer.json, with a tokenizer of '
                  f"at most {vocab_size:,} ids such as LLaMA's; or by {command}, and {remedy}")
    raise UserError(f"data set '{name}' ({download_of(facts['download_mb'])}) is not prepared, and "
                    f'its {n_ids:,} ids would not fit vocab_size={vocab_size}: {remedy}; '
                    f'{TRY_AT_ONCE}')


def is_recipe(script):
    """
    Return whether a prepare.py is in data/. Any other is foreign code, and naming a data set is not
    asking for a script to be run.
    """
    data = os.path.join(ROOT, 'data')
    return os.path.commonpath([data, os.path.abspath(script)]) == data


def read_metas(data_sets):
    """
    Return the first data set's meta.json. Raise UserError if the others have another tokenizer or
    another chat template.
    """
    metas = [read_meta(folder) for _, _, folder in data_sets]
    for (name, _, _), meta in zip(data_sets, metas):
        keys = 'tokenizer', 'vocab_size', 'chat_template', 'chat_separator'
        if any(meta.get(key) != metas[0].get(key) for key in keys):
            raise UserError(f"data sets '{data_sets[0][0]}' and '{name}' have different tokenizers "
                            'or chat templates, so their ids do not match; prepare one of them '
                            'again')
    return metas[0]


def load_tokenizer(meta, console, parallel):
    """
    Return the tokenizer of a data set. If it is unknown or some process cannot load it, warn and
    return None. Without meta.json the ids are GPT-2's, as in nanoGPT.
    """
    tokenizer = None
    if 'tokenizer' in meta or not meta:
        try:
            tokenizer = get_tokenizer(meta.get('tokenizer', 'gpt2'))
        except (ValueError, ImportError) as e:
            if parallel.local_rank == 0:  # it may be missing on this node only
                print("WARNING: the data set's tokenizer cannot be loaded, so there are no samples "
                      f'and no bits per byte: {printable(first_line(e))}', flush=True)
    missing = parallel.all_max(int(tokenizer is None))
    if missing and tokenizer:  # all processes must evaluate and sample alike
        console.say('WARNING: a process cannot load the tokenizer of this data set, so there are '
                    'no samples and no bits per byte')
    return None if missing else tokenizer


def load_split(split, data_sets, model_config, device, **kwargs):
    """Return the Loader of a split, or a Mixture of several."""
    kwargs |= dict(vocab_size=model_config.vocab_size, device=device)
    loaders = [Loader(folder, split, model_config.block_size, **kwargs)
               for _, _, folder in data_sets]
    if len(loaders) == 1:
        return loaders[0]
    return Mixture(loaders, [share for _, share, _ in data_sets])
