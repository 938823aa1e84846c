"""Check the settings of a run before it starts: errors, and notes on flags without effect."""
import os
import sys

from engine import optim
from engine.batch_size import check_accumulation
from engine.checkpoint import checkpoints_in, no_checkpoint
from engine.common import UserError, optional
from engine.huggingface import check_weights_exist
from model import PRESETS


def check_settings(config, given, parallel):
    """
    Raise UserError for settings that contradict each other or cannot be used here. Return notes on
    settings that have no effect.
    """
    check_names(config)
    check_start(config)
    check_length(config, given)
    check_processes(config, parallel)
    if config['tensorboard_log']:
        optional('tensorboard', 'tensorboard_log=True')
    return notes(config, given, parallel)


def check_names(config):
    for key in ('dataset', 'out_dir', 'init_from'):
        if not config[key]:
            raise UserError(f'{key} must not be empty')
    if config['arch_preset'] not in PRESETS:
        raise UserError(f"unknown arch_preset '{config['arch_preset']}'; choose from "
                        f"{', '.join(PRESETS)}")
    optim.check_name(config['optimizer'])


def check_start(config):
    """Raise UserError if there is no such checkpoint or model to start from."""
    init_from, ckpt = config['init_from'], config['ckpt']
    if ckpt and init_from not in ('resume', 'auto'):
        raise UserError(f'--ckpt={ckpt} resumes with --init_from=resume; --init_from={ckpt} alone '
                        'starts from its weights')
    if ckpt and not os.path.exists(ckpt):
        raise UserError(no_checkpoint(ckpt))
    own_run = init_from == 'resume' and not ckpt
    if own_run and not checkpoints_in(config['out_dir']):
        raise UserError(no_checkpoint(config['out_dir']))
    if init_from not in ('scratch', 'resume', 'auto'):
        check_weights_exist(init_from)
    if config['teacher']:
        check_weights_exist(config['teacher'])


def check_length(config, given):
    """Raise UserError if two settings say how long to train, and neither beats the other."""
    if not (config['epochs'] and 'max_iters' in given):
        return
    flags = given.flags()
    one_is_a_flag = ('epochs' in flags) != ('max_iters' in flags)  # it beats the one in a file
    if not one_is_a_flag:
        raise UserError('epochs and max_iters both say how long to train: leave one of them out')


def check_processes(config, parallel):
    """Raise UserError for settings that do not go with each other, or with this many processes."""
    if config['use_zero1'] and config['use_fsdp']:
        raise UserError('use_zero1 and use_fsdp cannot be combined: FSDP already shards the '
                        'moments, weights and gradients')
    for key in ('use_fsdp', 'use_zero1', 'sharded_checkpoint'):
        if config[key] and not parallel.distributed:
            raise UserError(f'{key} needs several processes; run: '
                            f"torchrun --standalone --nproc_per_node=N {' '.join(sys.argv)}")
    if not config['eval_only']:
        check_accumulation(config, parallel.world_size)


def check_doc_mask(config, tokenizer):
    if config['doc_mask'] and getattr(tokenizer, 'eot', None) is None:
        raise UserError('doc_mask needs an end-of-text token between documents, and the tokenizer '
                        f"of data set '{config['dataset']}' has none")


def notes(config, given, parallel):
    """Return notes on flags that have no effect because another setting is missing."""
    one_process, flags = 'in one process', given.flags()
    no_fsdp = 'without --use_fsdp=True' if parallel.distributed else one_process
    schedule, init_from = config['lr_schedule'], config['init_from']
    has_muon = optim.OPTIMIZER[config['optimizer']].rate == 'muon_learning_rate'
    continues = init_from in ('resume', 'auto') and not config['ckpt']
    useless = [
        ('fsdp_shard_size', not config['use_fsdp'], no_fsdp),
        ('fsdp_reshard_after_forward', not config['use_fsdp'], no_fsdp),
        ('fsdp_min_num_params', not config['use_fsdp'], no_fsdp),
        ('backend', not parallel.distributed, one_process),
        ('attention_chunk_size',
         config['attention_backend'] != 'chunked' and init_from == 'scratch',
         'without --attention_backend=chunked'),
        ('muon_learning_rate', not has_muon, 'without --optimizer=muon or normuon'),
        ('muon_momentum', not has_muon, 'without --optimizer=muon or normuon'),
        ('lora_alpha', not config['lora_rank'], 'without --lora_rank'),
        ('lora_targets', not config['lora_rank'], 'without --lora_rank'),
        ('distill_weight', not config['teacher'], 'without --teacher=DIR'),
        ('distill_temperature', not config['teacher'], 'without --teacher=DIR'),
        ('cooldown_frac', schedule != 'wsd', 'without --lr_schedule=wsd'),
        ('restart_iters', schedule != 'sgdr', 'without --lr_schedule=sgdr'),
        ('restart_mult', schedule != 'sgdr', 'without --lr_schedule=sgdr'),
        ('overwrite', continues and config['overwrite'], f'with --init_from={init_from}'),
    ]
    lines = [f'NOTE: --{key} does nothing {why}' for key, is_useless, why in useless
             if is_useless and key in flags]
    if config['wandb_artifacts'] and not config['wandb_log']:
        lines.append('NOTE: --wandb_artifacts=True has no effect without --wandb_log=True')
    if config['eval_only'] and init_from == 'scratch':
        lines.append('NOTE: this evaluates new weights; --init_from=resume evaluates the run in '
                     'out_dir')
    rate, min_lr = config['learning_rate'], config['min_lr']
    only_adamw = 'learning_rate' in flags and 'muon_learning_rate' not in flags
    if has_muon and only_adamw:
        lines.append('NOTE: --learning_rate is for embeddings, head and norms; Muon trains the '
                     f"other matrices with --muon_learning_rate={config['muon_learning_rate']:g}")
    if config['decay_lr'] and schedule != 'constant' and min_lr > rate:
        lines.append(f'NOTE: min_lr ({min_lr:g}) is above learning_rate ({rate:g}), so the '
                     'learning rate will rise to it')
    return lines
