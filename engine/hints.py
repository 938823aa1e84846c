"""Hints at the key or config file that a user may have meant; configurator.py shows them."""
import difflib
import glob
import os
import sys

from engine.common import ROOT

# {a setting here: its names in other trainers}, for hints. Near misses need no line of their own.
OTHER_NAMES = {
    'n_layer': 'num_layers num_hidden_layers depth',
    'n_head': 'num_heads num_attention_heads',
    'n_kv_head': 'num_key_value_heads',
    'n_embd': 'd_model hidden_size hidden_dim embed_dim dim',
    'd_ff': 'intermediate_size ffn_dim',
    'block_size': 'context_length max_position_embeddings seq_len max_seq_len sequence_length',
    'norm_eps': 'layer_norm_epsilon eps',
    'weight_tying': 'tie_weights tie_embeddings tie_word_embeddings',
    'activation_checkpointing': 'gradient_checkpointing use_gradient_checkpointing',
    'learning_rate': 'lr lr_max max_lr peak_lr',
    'min_lr': 'lr_min min_learning_rate',
    'warmup_iters': 'warmup warmup_steps',
    'lr_decay_iters': 'cosine_cycle_iters',
    'max_iters': 'steps num_steps max_steps total_steps train_steps num_iterations',
    'beta1': 'adam_beta1',
    'beta2': 'adam_beta2',
    'grad_clip': 'clip_grad max_grad_norm max_l2_norm',
    'gradient_accumulation_steps': 'grad_accum grad_accum_steps',
    'batch_size': 'per_device_train_batch_size',
    'dtype': 'precision mixed_precision torch_dtype use_amp amp_dtype',
    'use_fsdp': 'fsdp',
    'dataset': 'data data_dir data_path input_file dataset_dir tokenization',
    'init_from': 'init_from_model resume resume_from resume_from_checkpoint',
    'out_dir': 'output_dir save_dir checkpoint_dir model_name',
    'eval_interval': 'eval_every eval_steps',
    'save_interval': 'save_every save_steps',
    'wandb_log': 'wandb use_wandb',
    'epochs': 'num_epochs num_train_epochs',
    'sample_start': 'prompt eval_prompts_file',  # of train.py
    'start': 'prompt',  # of sample.py
}

# {another trainer's name: what to say}, where the name of our setting would not be enough.
RESUME = 'init_from=resume, with the out_dir of the run'
WITH_ADVICE = {
    'tokenization': 'dataset, prepared by data/prepare.py --tokenizer=NAME',
    'resume': RESUME,
    'resume_from': RESUME,
    'resume_from_checkpoint': RESUME,
}

# {a config file of nanoGPT's: ours with the same settings}
NANOGPT_CONFIGS = {
    'train_shakespeare_char': 'preset_shakespeare_char',
    'train_gpt2': 'preset_gpt2_owt',
}


def suggestion(text, known):
    """Return the known word nearest to `text`, as a question; '' if none is near."""
    match = difflib.get_close_matches(text, known, n=1, cutoff=0.7)
    return f"; did you mean '{match[0]}'?" if match else ''


def suggest_key(name, settings):
    """Return a hint at the setting that `name` stands for, or at --help."""
    name = name.strip('-').replace('-', '_')
    for ours, others in OTHER_NAMES.items():
        if ours in settings and name in others.split():
            return f'; use {WITH_ADVICE.get(name, ours)}'
    if name in ('config', 'config_file'):
        return '; name config files without a flag, before the other flags'
    every = f"; 'python {sys.argv[0]} --help=all' lists every key"
    return suggestion(name, settings) or every


def suggest_file(path):
    """
    Return the config file whose name is nearest to that of `path`, with or without .py, as a
    question. It may be in the folder of `path` or in config/.
    """
    found = {}
    for folder in os.path.relpath(os.path.join(ROOT, 'config')), os.path.dirname(path):
        for file in glob.glob(os.path.join(glob.escape(folder), '*.py')):
            found[stem(file)] = file
    name = NANOGPT_CONFIGS.get(stem(path), stem(path))
    match = difflib.get_close_matches(name, found, n=1, cutoff=0.7)
    return f"; did you mean '{found[match[0]]}'?" if match else ''


def stem(path):
    return os.path.basename(path).removesuffix('.py')
