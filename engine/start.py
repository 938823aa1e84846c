"""Where a run starts: a new model, the weights of another run, or a checkpoint to resume."""
import os
from dataclasses import asdict, fields

from configurator import check_value
from data.folder import find_trained_on
from engine.checked_file import reading
from engine.checkpoint import (
    State,
    is_ours,
    is_sharded,
    load_checkpoint,
    newest_checkpoint,
    read_facts,
    restore_optimizer,
    restore_tensors,
    restore_weights,
)
from engine.common import UserError, user_errors
from engine.cost import check_weights_fit
from engine.huggingface import load_weights
from engine.lora import LORA_SETTINGS, base_weights, start_adapters
from engine.schema import check
from model import GPT, PRESETS, GPTConfig


def settings_of_run(script, config, given):
    """
    For --eval_only, return {key: value} of the settings that were not given and come from the run's
    checkpoint, so that a run is evaluated on its own data. Raise UserError if that data is missing.
    """
    keys = ('dataset', 'doc_mask', 'batch_size', 'gradient_accumulation_steps')
    keys = [key for key in keys if key not in given]
    init_from, out_dir = config['init_from'], config['out_dir']
    if init_from == 'scratch' or not keys:
        return {}
    path = config['ckpt'] or (out_dir if init_from in ('resume', 'auto') else init_from)
    if not os.path.isfile(path) and not is_sharded(path):
        path = newest_checkpoint(path)
    if not path:
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


def starting_point(config, given, folder, data_vocab, tokenizer, console):
    """
    Return (GPTConfig, model, checkpoint). A new run gets only the GPTConfig, one that takes another
    run's weights also a model, and one that resumes also the checkpoint; otherwise they are None.
    Raise UserError if out_dir, checkpoint and settings do not fit.
    """
    init_from, path, used = config['init_from'], config['ckpt'], folder.used()
    if init_from == 'auto' and used and not config['eval_only']:
        path = ''  # this run has come further than the file that it started from
    resuming = init_from == 'resume' or init_from == 'auto' and bool(used or path)
    starts_new_run = not resuming or path  # rather than continuing the one in out_dir
    if used and starts_new_run and not config['eval_only']:
        check_overwrite(config, given, used, console)
    if not resuming and init_from in ('scratch', 'auto'):
        if config['lora_rank']:
            raise UserError(f'lora_rank={config["lora_rank"]} needs a trained model: name one with '
                            '--init_from=FOLDER')
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
    check_tokenizer(ckpt, tokenizer, config['dataset'], resuming, console)
    teacher = ckpt['config'].get('teacher') if resuming and is_ours(ckpt) else None
    if teacher and teacher != config['teacher']:
        console.say(f"NOTE: until now this run had --teacher={teacher}, and goes on "
                    f"{'with ' + config['teacher'] if config['teacher'] else 'without one'}")
    model.config.unpadded_vocab_size = data_vocab or model.config.unpadded_vocab_size
    start_adapters(model, ckpt, config, resuming)
    model.chat_template = ckpt.get('chat_template')  # stays, even if this run trains on text
    return model.config, model, ckpt if resuming else None


def check_tokenizer(ckpt, tokenizer, dataset, resuming, console):
    """
    If the data set has another tokenizer than the checkpoint, raise UserError for a resumed run,
    and warn if a run only takes the weights.
    """
    if not tokenizer or ckpt.get('tokenizer') in (None, tokenizer.spec):
        return
    message = (f"the checkpoint '{ckpt['path']}' was trained with tokenizer "
               f"{ckpt['tokenizer']['name']}, not with that of data set '{dataset}', "
               f'{tokenizer.name}')
    if resuming:
        raise UserError(message)
    console.say(f'WARNING: {message}: its ids mean something else here')


def starting_state(ckpt, out_dir, parallel):
    """
    Return the State of a checkpoint dict, or that of a new run for None. Raise UserError if
    processes found different checkpoints.
    """
    state = State() if ckpt is None else State.from_dict(ckpt)
    if not parallel.all_equal(-1 if ckpt is None else state.iter_num):
        raise UserError('processes found different checkpoints (this one: iteration '
                        f"{state.iter_num}): out_dir '{out_dir}' must be a folder that all nodes "
                        'share')
    return state


def check_overwrite(config, given, used, console):
    """
    Raise UserError if a new run would replace a run in out_dir, unless overwrite is set. A config
    file sets it for the file's own out_dir only.
    """
    for_own_folder = given.get('overwrite') == given.get('out_dir')
    if not config['overwrite'] or 'overwrite' not in given.flags() and not for_own_folder:
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
        ckpt = load_checkpoint(path, moments=False, weights=not by_rows(folder), merge=False)
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
    if 'lora' in ckpt:  # restore_weights() reads the adapters
        ckpt |= dict(weights=ckpt.get('weights', ckpt['model']), model=base_weights(ckpt))
    return ckpt


def load_newest(folder, console):
    """Load the newest checkpoint in out_dir, or the previous one if it is damaged."""
    previous = previous_of(folder.path, newest_checkpoint(folder.path))
    try:
        return load_checkpoint(folder.path, moments=False, weights=not by_rows(folder), merge=False)
    except UserError as e:
        if not os.path.exists(previous):
            raise
        console.say(f'WARNING: {e}; using the previous checkpoint')
        return load_checkpoint(previous, moments=False, weights=not by_rows(folder), merge=False)


def by_rows(folder):
    """Return whether a process needs only its rows of the weights; wrap() makes room for them."""
    return folder.parallel.mode == 'fsdp'


def previous_of(out_dir, newest):
    """Return the path of the checkpoint before the newest one."""
    sharded = os.path.isdir(newest or '')
    return os.path.join(out_dir, 'ckpt_sharded_prev' if sharded else 'ckpt_prev.pt')


def restore(ckpt, raw_model, state_tensors, opt, scaler, config, parallel):
    """Fill a model, state_tensors, an optimizer and a gradient scaler from a checkpoint."""
    restore_weights(raw_model, ckpt, parallel)  # FSDP's rows; other modes have them
    restore_tensors(state_tensors, ckpt, parallel)
    if not config['eval_only']:  # evaluation needs no moments
        restore_optimizer(opt, config['optimizer'], ckpt, parallel)
    if scaler.is_enabled() and ckpt.get('scaler'):
        with reading(ckpt['path']):
            check(ckpt, {'scaler': dict.fromkeys(scaler.state_dict(), float)})
            scaler.load_state_dict(ckpt['scaler'])


# Keys of the model that may differ from the checkpoint's. All others are fixed by training.
FREE = {'dropout', 'attention_backend', 'attention_chunk_size', 'activation_checkpointing'}


def fit_model(ckpt, config, given, resuming):
    """
    Return the model in a checkpoint, in float32. Raise ValueError if the user asked for a part that
    differs from the checkpoint's.
    """
    model_keys = {f.name for f in fields(GPTConfig)} | set(LORA_SETTINGS if resuming else ())
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
    stored = asdict(model.config) | ckpt.get('lora', {'lora_rank': 0})
    stored['n_kv_head'] = stored['n_kv_head'] or stored['n_head']
    stored['d_ff'] = stored['d_ff'] or model.transformer.h[0].mlp.c_proj.in_features
    for key, value in asked.items():
        free = key in FREE or key == 'block_size' and not resuming
        if value != stored.get(key, value) and not free:
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


def say_changed_schedule(ckpt, config, console):
    """Print a NOTE if settings change the learning rate of a resumed run."""
    saved = ckpt['config'] if is_ours(ckpt) else {}
    changed = [f'{key}={config[key]} instead of {saved[key]}' for key in SCHEDULE_SETTINGS
               if key in saved and saved[key] != config[key]]
    if changed:
        console.say(f"NOTE: resumed with {', '.join(changed)}: the learning rate may jump here")


def say_changed_data(ckpt, config, console):
    """Print a NOTE if settings make a resumed run read its data otherwise."""
    if not is_ours(ckpt):  # nanoGPT's data order is random anyway
        return
    changed = []
    for name, value in data_settings(config).items():
        before = data_settings(ckpt['config'])[name]
        if value != before:
            changed.append(f'{name} {value} instead of {before}')
    if changed:
        console.say(f"NOTE: resumed with {', '.join(changed)}: from here on the data is read "
                    'otherwise, and some windows may be read twice')


DATA_SETTINGS = 'dataset', 'seed', 'batch_size', 'gradient_accumulation_steps'


def data_settings(config):
    sequences = config['batch_size'] * config['gradient_accumulation_steps']
    return {'dataset': config['dataset'], 'seed': config['seed'],
            'doc_mask': config.get('doc_mask', False), 'sequences per iteration': sequences}
