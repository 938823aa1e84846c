"""
Start a run: check the settings, prepare the data, and provide a model that is new, another run's,
or resumed.
"""
import glob
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields

from configurator import check_value, configure, suggestion
from data.loader import Loader, Mixture, find_trained_on, prepare_facts, read_meta
from data.tokenizer import get_tokenizer
from engine import optim
from engine.checked_file import reading
from engine.checkpoint import (
    checkpoints_in,
    is_ours,
    is_sharded,
    load_checkpoint,
    newest_checkpoint,
    no_checkpoint,
    read_facts,
)
from engine.common import (
    UserError,
    end_with_parent,
    first_line,
    optional,
    printable,
    user_errors,
)
from engine.cost import check_weights_fit
from engine.huggingface import load_weights
from engine.schedule import flags_in
from engine.schema import check
from model import GPT, PRESETS, GPTConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# -------------------------------------------------------------------------------------------------
# settings

def check_settings(config, given, parallel):
    """
    Raise UserError for settings that contradict each other. Return notes on settings that have no
    effect.
    """
    for key in ('dataset', 'out_dir', 'init_from'):
        if not config[key]:
            raise UserError(f'{key} must not be empty')
    own = config['init_from'] == 'resume' and not config['ckpt']
    if own and not checkpoints_in(config['out_dir']):
        raise UserError(no_checkpoint(config['out_dir']))
    if config['arch_preset'] not in PRESETS:
        raise UserError(f"unknown arch_preset '{config['arch_preset']}'; choose from "
                        f"{', '.join(PRESETS)}")
    optim.check_name(config['optimizer'])
    if config['use_zero1'] and config['use_fsdp']:
        raise UserError('use_zero1 and use_fsdp cannot be combined: FSDP already shards the '
                        'moments, weights and gradients')
    both = config['epochs'] and 'max_iters' in given
    if both and len(flags_in(given) & {'epochs', 'max_iters'}) != 1:
        raise UserError('epochs and max_iters both say how long to train: leave one of them out')
    if config['ckpt'] and config['init_from'] not in ('resume', 'auto'):
        raise UserError(f"--ckpt={config['ckpt']} resumes with --init_from=resume; "
                        f"--init_from={config['ckpt']} alone starts from its weights")
    if config['ckpt'] and not os.path.exists(config['ckpt']):
        raise UserError(no_checkpoint(config['ckpt']))
    for key in ('use_fsdp', 'use_zero1', 'sharded_checkpoint'):
        if config[key] and not parallel.distributed:
            raise UserError(f'{key} needs several processes; run: '
                            f"torchrun --standalone --nproc_per_node=N {' '.join(sys.argv)}")
    if config['tensorboard_log']:
        optional('tensorboard', 'tensorboard_log=True')
    return notes(config, given, parallel)


def check_accumulation(config, n):
    """Raise UserError if n processes cannot share the micro-batches of an iteration evenly."""
    steps, batch_size = config['gradient_accumulation_steps'], config['batch_size']
    from_checkpoint = batch_size == 'auto' and config['init_from'] in ('resume', 'auto')
    if steps % n == 0 or from_checkpoint:  # which auto_batch_size() checks
        return
    remedy = f'--gradient_accumulation_steps={math.ceil(steps / n) * n}'
    if batch_size != 'auto':
        sequences = steps * batch_size
        same = [k for k in range(n, sequences + 1, n) if sequences % k == 0 and k >= steps]
        if same:
            remedy = (f'--batch_size={sequences // same[0]} --gradient_accumulation_steps='
                      f'{same[0]}, which keep the tokens per iteration')
    raise UserError(f'gradient_accumulation_steps={steps} must be a multiple of the {n} processes '
                    f'that share it; try {remedy}')


def notes(config, given, parallel):
    """Return notes on flags that have no effect because another setting is missing."""
    one_process, flags = 'in one process', flags_in(given)
    no_fsdp = 'without --use_fsdp=True' if parallel.distributed else one_process
    schedule, init_from = config['lr_schedule'], config['init_from']
    continues = init_from in ('resume', 'auto') and not config['ckpt']
    useless = [
        ('fsdp_shard_size', not config['use_fsdp'], no_fsdp),
        ('fsdp_reshard_after_forward', not config['use_fsdp'], no_fsdp),
        ('fsdp_min_num_params', not config['use_fsdp'], no_fsdp),
        ('backend', not parallel.distributed, one_process),
        ('attention_chunk_size',
         config['attention_backend'] != 'chunked' and init_from == 'scratch',
         'without --attention_backend=chunked'),
        ('muon_learning_rate', config['optimizer'] != 'muon', 'without --optimizer=muon'),
        ('muon_momentum', config['optimizer'] != 'muon', 'without --optimizer=muon'),
        ('cooldown_frac', schedule != 'wsd', 'without --lr_schedule=wsd'),
        ('restart_iters', schedule != 'sgdr', 'without --lr_schedule=sgdr'),
        ('restart_mult', schedule != 'sgdr', 'without --lr_schedule=sgdr'),
        ('overwrite', continues and config['overwrite'], f'with --init_from={init_from}'),
    ]
    lines = [f'NOTE: --{key} does nothing {why}' for key, is_useless, why in useless
             if is_useless and key in flags]
    if config['wandb_artifacts'] and not config['wandb_log']:
        lines.append('NOTE: --wandb_artifacts=True has no effect without --wandb_log=True')
    rate, min_lr = config['learning_rate'], config['min_lr']
    only_adamw = 'learning_rate' in flags and 'muon_learning_rate' not in flags
    if config['optimizer'] == 'muon' and only_adamw:
        lines.append('NOTE: --learning_rate is for embeddings, head and norms; Muon trains the '
                     f"other matrices with --muon_learning_rate={config['muon_learning_rate']:g}")
    if config['decay_lr'] and schedule != 'constant' and min_lr > rate:
        lines.append(f'NOTE: min_lr ({min_lr:g}) is above learning_rate ({rate:g}), so the '
                     'learning rate will rise to it')
    return lines


def settings_of_run(script, config, given):
    """
    For --eval_only, return {key: value} of the settings that were not given and come from the run's
    checkpoint, so that a run is evaluated on its own data. Raise UserError if that data is missing.
    """
    keys = ('dataset', 'doc_mask', 'batch_size', 'gradient_accumulation_steps')
    keys = [key for key in keys if key not in given]
    init_from, out_dir = config['init_from'], config['out_dir']
    own_run = init_from in ('scratch', 'resume', 'auto')
    path = config['ckpt'] or (out_dir if own_run else init_from)
    if not os.path.isfile(path) and not is_sharded(path):
        path = newest_checkpoint(path)
    if not path or init_from == 'scratch' or not keys:
        return {}
    try:
        saved = read_facts(path).get('config') or {}
    except ValueError:
        previous = previous_of(out_dir, path)
        if init_from not in ('resume', 'auto') or not os.path.exists(previous):
            raise
        saved = read_facts(previous).get('config') or {}  # starting_point warns of it
    if 'dataset' in keys and 'dataset' in saved:
        try:
            find_trained_on(saved)
        except ValueError as e:
            raise UserError(f"{e}; choose another with --dataset=... ('{path}')") from None
    return {key: check_value(script, key, saved[key], f"in '{path}'")
            for key in keys if key in saved}


def previous_of(out_dir, newest):
    """Return the path of the checkpoint before the newest one."""
    sharded = os.path.isdir(newest or '')
    return os.path.join(out_dir, 'ckpt_sharded_prev' if sharded else 'ckpt_prev.pt')


# -------------------------------------------------------------------------------------------------
# data

def prepare_data(name, folder, vocab_size, console, parallel):
    """
    Prepare a data set if necessary, on the first process of each node, by its own prepare.py or,
    for a text file, by data/prepare.py. Raise UserError if it does not exist, or with the command
    to run if it is a large download. vocab_size is the model's, or None if it is the data set's.
    """
    prepared = glob.glob(os.path.join(glob.escape(folder), 'train*.bin'))
    if parallel.local_rank == 0 and not prepared:
        if os.path.isfile(name):
            prepare_file(name, folder, console)
        else:
            run_recipe(name, folder, vocab_size, console)
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
                        f"{suggestion(name, names + files)}. The data sets are "
                        f"{', '.join(names)} (--dataset=pystdlib needs no download). A folder "
                        f"data/{name} with nanoGPT's or llm.c's train*.bin and val*.bin also works")
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


def run_script(script, *flags):
    """Run a Python script, which ends when this process does. Return its exit status."""
    command = [sys.executable, script, *flags]
    return subprocess.run(command, preexec_fn=end_with_parent).returncode


def is_recipe(script):
    """
    Return whether a prepare.py is in data/. Any other is foreign code, and naming a data set is not
    asking for a script to be run.
    """
    data = os.path.join(ROOT, 'data')
    return os.path.commonpath([data, os.path.abspath(script)]) == data


def read_metas(data_sets):
    """
    Return the first data set's meta.json. Raise UserError if the others have another tokenizer.
    """
    metas = [read_meta(folder) for _, _, folder in data_sets]
    for (name, _, _), meta in zip(data_sets, metas):
        if any(meta.get(key) != metas[0].get(key) for key in ('tokenizer', 'vocab_size')):
            raise UserError(f"data sets '{data_sets[0][0]}' and '{name}' have different "
                            'tokenizers, so their ids do not match; prepare one of them again')
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


# -------------------------------------------------------------------------------------------------
# the model

# Keys of the model that may differ from the checkpoint's. All others are fixed by training.
FREE = {'dropout', 'attention_backend', 'attention_chunk_size', 'activation_checkpointing'}


def starting_point(config, given, folder, data_vocab, tokenizer, console):
    """
    Return (config, model, checkpoint): (config, None, None) for a new model, (config, model, None)
    for another run's weights, all three to resume. Raise UserError if out_dir, checkpoint and
    settings do not fit.
    """
    init_from, path, used = config['init_from'], config['ckpt'], folder.used()
    if init_from == 'auto' and used and not config['eval_only']:
        path = ''  # this run has come further than the file that it started from
    resuming = init_from == 'resume' or init_from == 'auto' and bool(used or path)
    if used and (path or not resuming) and not config['eval_only']:
        check_overwrite(config, given, used, console)
    if not resuming and init_from in ('scratch', 'auto'):
        with user_errors():
            model_config = GPTConfig.from_settings(config, data_vocab)
        shards = folder.parallel.shard_size if by_rows(folder) else 1
        check_weights_fit(model_config, int(os.environ.get('LOCAL_WORLD_SIZE', 1)), shards)
        return model_config, None, None
    if resuming:
        ckpt = load_to_resume(folder, path, console)
        if path and not config['eval_only']:
            console.say(f"resuming from '{ckpt['path']}'; new checkpoints go to '{folder.path}'")
    else:
        block_size = config['block_size'] if 'block_size' in given else None
        ckpt = load_weights(init_from, block_size)
    with user_errors():
        model = fit_model(ckpt, config, given, resuming)
    if (data_vocab or 0) > model.config.vocab_size:
        raise UserError(f"data set '{config['dataset']}' has {data_vocab} ids, but the checkpoint "
                        f"'{ckpt['path']}' has only {model.config.vocab_size}")
    if tokenizer and ckpt.get('tokenizer') not in (None, tokenizer.spec):
        message = (f"the checkpoint '{ckpt['path']}' was trained with tokenizer "
                   f"{ckpt['tokenizer']['name']}, not with that of data set "
                   f"'{config['dataset']}', {tokenizer.name}")
        if resuming:
            raise UserError(message)
        console.say(f'WARNING: {message}: its ids mean something else here')
    model.config.unpadded_vocab_size = data_vocab or model.config.unpadded_vocab_size
    return model.config, model, ckpt if resuming else None


def check_overwrite(config, given, used, console):
    """
    Raise UserError if a new run would replace a run in out_dir, unless overwrite is set. A config
    file sets it for the file's own out_dir only.
    """
    for_own_folder = given.get('overwrite') == given.get('out_dir')
    if not config['overwrite'] or 'overwrite' not in flags_in(given) and not for_own_folder:
        shown = ', '.join(used[:4] + ['...'] * (len(used) > 4))
        raise UserError(f"out_dir '{config['out_dir']}' holds a run ({shown}): "
                        '--init_from=resume or --init_from=auto continues it, another --out_dir '
                        'keeps it, --overwrite=True replaces it (in a config file it is for the '
                        "file's own out_dir)")
    console.say('WARNING: overwrite=True: this run will replace the checkpoints in '
                f"'{config['out_dir']}'")


def load_to_resume(folder, path, console):
    """
    Load the checkpoint at `path` to start a run in out_dir from it or, without a path, the newest
    one in out_dir to continue that run.
    """
    if path:
        ckpt = load_checkpoint(path, moments=False, weights=not by_rows(folder))
        folder.starts_from(ckpt['path'])
    else:
        ckpt = load_newest(folder, console)
        folder.resumes(ckpt['path'])
    if not {'optimizer', 'iter_num', 'best_val_loss'} <= ckpt.keys():
        raise UserError(f"checkpoint '{ckpt['path']}' has weights only and cannot be resumed; "
                        f"--init_from={ckpt['path']} and another --out_dir fine-tune it")
    if is_ours(ckpt):
        with reading(ckpt['path']):
            check(ckpt, {'config': dict.fromkeys(DATA_SETTINGS, object)})
    return ckpt


def load_newest(folder, console):
    """Load the newest checkpoint in out_dir, or the previous one if it is damaged."""
    previous = previous_of(folder.path, newest_checkpoint(folder.path))
    try:
        return load_checkpoint(folder.path, moments=False, weights=not by_rows(folder))
    except UserError as e:
        if not os.path.exists(previous):
            raise
        console.say(f'WARNING: {e}; using the previous checkpoint')
        return load_checkpoint(previous, moments=False, weights=not by_rows(folder))


def by_rows(folder):
    """Return whether a process needs only its rows of the weights; wrap() makes room for them."""
    return folder.parallel.mode == 'fsdp'


def restore_scaler(scaler, ckpt):
    with reading(ckpt['path']):
        check(ckpt, {'scaler': dict.fromkeys(scaler.state_dict(), float)})
        scaler.load_state_dict(ckpt['scaler'])


def fit_model(ckpt, config, given, resuming):
    """
    Return the model in a checkpoint, in float32. Raise ValueError if the user asked for a part that
    differs from the checkpoint's.
    """
    model_keys = {f.name for f in fields(GPTConfig)}
    asked = {key: value for key, value in config.items()
             if key in model_keys and key in given and value is not None}
    if 'arch_preset' in given:
        preset = dict(PRESETS[config['arch_preset']])
        if 'ffn_type' in asked:  # which may have an activation of its own
            del preset['activation']
        asked = preset | asked
    ckpt['model_args'].update({key: asked[key] for key in FREE & asked.keys()})
    ckpt['model_args']['dropout'] = config['dropout']  # as in nanoGPT: not from ckpt
    model = GPT.from_dict(ckpt).float()
    stored = asdict(model.config)
    stored['n_kv_head'] = stored['n_kv_head'] or stored['n_head']
    stored['d_ff'] = stored['d_ff'] or model.transformer.h[0].mlp.c_proj.in_features
    for key, value in asked.items():
        free = key in FREE or key == 'block_size' and not resuming
        if value != stored[key] and not free:
            where = given.get(key, given.get('arch_preset'))
            raise ValueError(f"{key}={value} {where} does not fit the checkpoint "
                             f"'{ckpt['path']}', which has {key}={stored[key]}; give the settings "
                             'that the run began with, or train a new model in another --out_dir')
    crop(model, config['block_size'], asked, pretrained='iter_num' not in ckpt)
    return model


def crop(model, block_size, asked, pretrained):
    """
    Shorten the context to block_size if it was asked for, or, as in nanoGPT, if the model is
    pretrained.
    """
    shorter = pretrained and block_size < model.config.block_size
    wanted = asked.get('block_size', model.config.block_size)
    if shorter or wanted != model.config.block_size:
        model.crop_block_size(block_size)


SCHEDULE_SETTINGS = ('learning_rate', 'muon_learning_rate', 'min_lr', 'lr_schedule',
                     'lr_decay_iters', 'warmup_iters')


def changed_schedule(ckpt, config):
    """Return, as text, the settings that change the learning rate of a resumed run; '' if none."""
    saved = ckpt['config'] if is_ours(ckpt) else {}
    return ', '.join(f'{key}={config[key]} instead of {saved[key]}' for key in SCHEDULE_SETTINGS
                     if key in saved and saved[key] != config[key])


def changed_data(ckpt, config):
    """
    Return, as text, the settings that make a resumed run read its data otherwise; '' if none do.
    """
    if not is_ours(ckpt):  # nanoGPT's data order is random anyway
        return ''
    changed = []
    for name, value in data_settings(config).items():
        before = data_settings(ckpt['config'])[name]
        if value != before:
            changed.append(f'{name} {value} instead of {before}')
    return ', '.join(changed)


DATA_SETTINGS = 'dataset', 'seed', 'batch_size', 'gradient_accumulation_steps'


def data_settings(config):
    sequences = config['batch_size'] * config['gradient_accumulation_steps']
    return {'dataset': config['dataset'], 'seed': config['seed'],
            'doc_mask': config.get('doc_mask', False), 'sequences per iteration': sequences}


# -------------------------------------------------------------------------------------------------
# batch_size='auto'

def auto_batch_size(script, config, model_config, ckpt, console, parallel):
    """
    Return (batch_size, gradient_accumulation_steps) for batch_size='auto': the checkpoint's if
    there is one, otherwise the largest micro-batch that bench.py finds, with as many sequences per
    iteration as the settings give without 'auto'. Rank 0 searches and all processes use its answer.
    """
    saved = (ckpt or {}).get('config') or {}
    if 'gradient_accumulation_steps' in saved:
        steps, n = saved['gradient_accumulation_steps'], parallel.world_size
        if steps % n:
            raise UserError("batch_size='auto' takes the checkpoint's gradient_accumulation_steps="
                            f'{steps}, which must be a multiple of the {n} processes that share '
                            'it; give both keys for as many tokens per iteration: '
                            f"{saved['batch_size'] * steps} sequences")
        return (check_value(script, 'batch_size', saved['batch_size'], f"in '{ckpt['path']}'"),
                steps)
    flags = [arg for arg in sys.argv[1:] if arg != '--batch_size=auto']
    batch_size = configure(script, argv=flags)[0]['batch_size']
    if batch_size == 'auto':  # in a config file
        batch_size = configure(script, argv=[])[0]['batch_size']
    accumulation_steps = config['gradient_accumulation_steps']
    found = 0
    if parallel.master:
        console.say("batch_size='auto': looking for the largest micro-batch that fits, for the "
                    f'{accumulation_steps * batch_size} sequences per iteration of batch_size '
                    f'{batch_size} x gradient_accumulation_steps {accumulation_steps} ...')
        settings = {key: value for key, value in asdict(model_config).items() if key in config}
        settings |= {key: config[key] for key in ('dataset', 'device', 'dtype', 'optimizer')}
        settings |= dict(batch_size=batch_size,
                         gradient_accumulation_steps=accumulation_steps // parallel.world_size)
        found = largest_that_fits(settings)
    found = parallel.all_max(found)
    if not found:
        raise UserError("batch_size='auto' found no size that fits (see above); set --batch_size")
    return found, accumulation_steps * batch_size // found


def largest_that_fits(settings):
    """Return the batch size that bench.py finds, or 0 if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'found.json')
        flags = [f'--{key}={value}' for key, value in settings.items()]
        bench = os.path.join(ROOT, 'bench.py')
        if run_script(bench, '--find_batch_size=True', f'--json={path}', *flags):
            return 0
        with open(path, encoding='utf-8') as f:
            return json.load(f)['batch_size']
