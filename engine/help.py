"""Print --help: the settings of a script, each with the comment that stands behind it."""
import ast
import itertools
import os
import sys
import textwrap
import tokenize

from engine.common import UserError, reader_may_exit, terminal_width

# The settings of train.py that people use most, which --help shows; --help=all shows the rest too.
COMMON = """
    out_dir eval_interval init_from verbose
    dataset gradient_accumulation_steps batch_size block_size
    arch_preset n_layer n_head n_embd dropout
    optimizer learning_rate max_iters epochs
    device compile use_fsdp
""".split()


def show_help(script, own, settings, asked):
    """
    Print the settings that people use most. `asked` is the value of --help: '', a group, or 'all'.
    """
    groups = list(dict.fromkeys(group_name(s) for s in settings.values() if s.group))
    if asked in groups:
        names = [name for name, s in settings.items() if group_name(s) == asked]
    elif asked == 'all':
        names = list(settings)
    elif asked == '':
        names = [name for name, s in settings.items() if name in COMMON or not s.group]
    else:
        raise UserError(f"--help={asked}: there is no such group; choose from "
                        f"{', '.join(['all', *groups])}")
    width = terminal_width()
    texts = []
    if asked not in groups:
        texts += introduction(script, asked == 'all', width)
    texts += sections({name: own[name] for name in names if name in own}, width)
    others = {name: settings[name] for name in names if name not in own}
    if others:
        texts += ['Settings of train.py, which override files may set:']
        texts += sections(others, width)
    if len(names) < len(settings):
        more = (f'--help=all shows all {len(settings)} settings, --help=GROUP those of a group: '
                f"{', '.join(groups)}")
        texts += [textwrap.fill(more, width)]
    with reader_may_exit():
        print('\n\n'.join(texts))


def group_name(setting):
    return setting.group.partition(':')[0]


def introduction(script, whole, width):
    """
    Return the paragraphs of a script's docstring and its usage. Without `whole`, only the first
    paragraph and the launch lines, which are indented.
    """
    with tokenize.open(script) as f:
        docstring = ast.get_docstring(ast.parse(f.read())) or ''
    first, *rest = docstring.split('\n\n')
    if not whole:
        rest = itertools.takewhile(lambda paragraph: paragraph.startswith(' '), rest)
    texts = [text if text.startswith(' ') else textwrap.fill(text, width)
             for text in (first, *rest)]
    program = os.path.basename(sys.argv[0])
    return texts + [f'usage: python {program} [override_file.py ...] [--key=value ...]']


def sections(settings, width):
    """Return one text per group: its heading, and its settings in the order of the block."""
    texts = []
    for group, items in itertools.groupby(settings.items(), key=lambda item: item[1].group):
        lines = [help_line(*item, width) for item in items]
        texts.append('\n'.join([group, *lines] if group else lines))
    return texts


def help_line(name, setting, width):
    kind = setting.expected()
    text = setting.comment or kind
    if setting.comment and setting.choices():
        text += f' ({kind})'
    key = f'  --{name}={setting.default!r}'
    return textwrap.fill(text, width, initial_indent=f'{key:<36} ', subsequent_indent=' ' * 37,
                         break_long_words=False, break_on_hyphens=False)
