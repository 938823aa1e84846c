"""How long a run trains, and the learning rate schedule that goes with it."""
import math

from configurator import check_value


def schedule(script, config, given, data_sets, train_loader, console):
    """
    Return max_iters, lr_decay_iters and warmup_iters of a run as a dict. Print a NOTE if a flag
    changes the schedule of a config file, or if the data are read many times.
    """
    tokens_per_iter = (config['batch_size'] * config['gradient_accumulation_steps']
                       * train_loader.block_size)
    flags = given.flags()
    if config['epochs'] and 'max_iters' not in flags:
        max_iters = max(1, math.ceil(config['epochs'] * train_loader.n_tokens / tokens_per_iter))
        max_iters = check_value(script, 'max_iters', max_iters, f"of epochs={config['epochs']:g}")
        config = config | {'max_iters': max_iters}
        if 'epochs' in flags:  # as if --max_iters had been given
            flags.add('max_iters')
    fitted = fit_schedule(config, flags, usual_iters=given.without_flags()['max_iters'])
    if not config['eval_only']:
        notes = [schedule_note(config, fitted)]
        notes += epochs_notes(data_sets, train_loader, config['max_iters'] * tokens_per_iter)
        for note in filter(None, notes):
            console.say(note)
    return {'max_iters': config['max_iters']} | fitted


def fit_schedule(config, flags, usual_iters):
    """
    Return lr_decay_iters and warmup_iters as a dict. lr_decay_iters=None means max_iters. The keys
    in `flags` beat those of a file: if max_iters is one, the decay ends there, and if that makes
    the run shorter than usual_iters, max_iters without flags, the warmup takes at most a tenth of
    it. lr_decay_iters and warmup_iters stay as given if they are flags too.
    """
    max_iters, decay, warmup = (
        config[key] for key in ('max_iters', 'lr_decay_iters', 'warmup_iters'))
    if decay is None or 'max_iters' in flags and 'lr_decay_iters' not in flags:
        decay = max_iters
    shortened = 'max_iters' in flags and max_iters < usual_iters
    if shortened and 'warmup_iters' not in flags:
        warmup = min(warmup, max_iters // 10)
    return {'lr_decay_iters': decay, 'warmup_iters': warmup}


def schedule_note(config, fitted):
    """Return a NOTE that says what fit_schedule() has changed; '' if that has no effect."""
    changed = [key for key in fitted if config[key] not in (None, fitted[key])]
    if config['lr_schedule'] in ('constant', 'sgdr'):  # neither ends at lr_decay_iters
        changed = [key for key in changed if key != 'lr_decay_iters']
    if not changed or not config['decay_lr']:
        return ''
    new = ', '.join(f'{key}={fitted[key]} instead of {config[key]}' for key in changed)
    keep = ' '.join(f'--{key}={config[key]}' for key in changed)
    return (f"NOTE: the learning rate schedule follows max_iters={config['max_iters']}: {new}; "
            f'to keep what was set: {keep}')


def epochs_notes(data_sets, train_loader, total_tokens):
    """Return a NOTE for each data set that a run of total_tokens reads more than 20 times."""
    lines = []
    loaders = getattr(train_loader, 'loaders', [train_loader])
    for (name, share, _), loader in zip(data_sets, loaders):
        epochs = total_tokens * share / loader.n_tokens
        if epochs > 20:
            lines.append(f"NOTE: this run reads the {loader.n_tokens:,} tokens of '{name}' "
                         f'{epochs:,.0f} times, so the model may memorize them: use more text, or '
                         'train less, with --epochs=20 for example')
    return lines
