"""Check the settings of sample.py, and read its prompts."""
from engine.common import UserError, optional

# {setting: others that it does not go with}
CONFLICTS = {
    'serve': 'chat interactive attention prompts start num_samples num_beams json metrics seed '
             'slide',
    'chat': 'interactive attention prompts start num_samples num_beams json metrics',
    'interactive': 'attention prompts start',
    'attention': 'prompts num_beams json metrics',
    'metrics': 'prompts num_beams json',
    'prompts': 'start',
    'num_beams': 'temperature top_k top_p min_p repetition_penalty slide seed',
}
LIBRARIES = {'attention': 'matplotlib', 'metrics': 'scipy', 'serve': 'fastapi uvicorn'}


def check_settings(config, given):
    """Raise UserError for settings that contradict each other, or that need a missing library."""
    changed = {name for name in given if config[name] != given.history[name][0][0]}
    for name, others in CONFLICTS.items():
        for other in others.split():
            if {name, other} <= changed:
                raise UserError(f'--{name} and --{other} do not go together: leave one of them out')
    num_beams, num_samples = config['num_beams'], config['num_samples']
    if (config['metrics'] or num_beams > 1) and config['max_new_tokens'] == 0:
        raise UserError('--metrics and --num_beams need --max_new_tokens of 1 or more, not 0')
    picture = config['attention']
    if picture and not picture.endswith(('.png', '.jpg', '.pdf', '.svg')):
        raise UserError(f"--attention='{picture}' must end in .png, .jpg, .pdf or .svg")
    for name, libraries in LIBRARIES.items():
        if config[name]:
            for library in libraries.split():
                optional(library, f'--{name}')
    if config['serve'] > 65535:
        raise UserError(f"--serve={config['serve']} is no port: ports end at 65535")
    if num_beams == 1 and 'length_penalty' in changed:
        raise UserError('--length_penalty is a setting of beam search: add --num_beams=4, for '
                        'example')
    if 1 < num_beams < num_samples and 'num_samples' in given:
        raise UserError(f'--num_beams={num_beams} finds {num_beams} samples, so --num_samples '
                        f'must be at most that, not {num_samples}')


def read_prompts(start, path):
    """Return the list of prompts: `start`, the text of FILE:path, or the lines of a file."""
    if path:
        lines = [line for line in read_prompt_file(path).split('\n') if line.strip()]
        if not lines:
            raise UserError(f"the prompt file '{path}' is empty; write one prompt per line")
        return lines
    if start.startswith('FILE:'):
        return [read_prompt_file(start.removeprefix('FILE:'))]
    return [start]


def read_prompt_file(path):
    try:
        with open(path, encoding='utf-8') as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"the prompt file '{path}' cannot be read as UTF-8: {e}") from e
