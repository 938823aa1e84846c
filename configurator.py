"""
Read the settings of every script, as in nanoGPT: a script's settings are a block of plain
assignments at its top, override files are Python that assigns some of the same names, and
--key=value flags come last and win.

    python train.py config/preset_quick_test.py --batch_size=32
    python train.py --help  # also --help=all, and --help=optimizer for one group

A script calls this right after its block:

    config, given = configure(__file__)
    globals().update(config)

The block is read from the script's source and documents itself: the comment behind a setting is
its help text. An annotation gives the type if the default does not show it, and the range:

    log_interval: PositiveInt = 1  # iterations between log lines
    d_ff: Size = None  # feed-forward width; None: 4 n_embd

A comment line of one word above a setting begins a group, with or without a note behind the word:
`# data` or `# model: its sizes`. --help shows settings without a group, and the COMMON ones.

Override files are code and are executed; nothing else is. Names in them that begin with an
underscore are private to the file.
"""
import ast
import difflib
import glob
import io
import itertools
import os
import re
import sys
import textwrap
import tokenize
import traceback
import types
import warnings
from typing import Literal, NamedTuple, get_args

from engine.common import UserError, reader_may_exit, show_error, terminal_width
from engine.schema import shown

# Annotations that stand for a range. Python sees an ordinary int or float; read_block() finds the
# name in the source, and configure() checks the values that are set.
PositiveInt = NonNegativeInt = Size = Layers = Seed = int
PositiveFloat = NonNegativeFloat = Fraction = Share = OpenFraction = LogitScale = float

ON_COMMAND_LINE = 'on the command line'  # where a flag was set, in `given`
CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'config')

# The settings of train.py that people use most, which --help shows; --help=all shows the rest too.
COMMON = """
    out_dir eval_interval init_from verbose
    dataset gradient_accumulation_steps batch_size block_size
    arch_preset n_layer n_head n_embd dropout
    optimizer learning_rate max_iters epochs
    device compile use_fsdp
""".split()

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
    'dataset': 'data data_dir data_path input_file dataset_dir',
    'dataset, prepared by data/prepare.py --tokenizer=NAME': 'tokenization',
    'init_from': 'init_from_model',
    'out_dir': 'output_dir save_dir checkpoint_dir model_name',
    'eval_interval': 'eval_every eval_steps',
    'save_interval': 'save_every save_steps',
    'wandb_log': 'wandb use_wandb',
    'init_from=resume, with the out_dir of the run': 'resume resume_from resume_from_checkpoint',
    'epochs': 'num_epochs num_train_epochs',
    'sample_start': 'prompt eval_prompts_file',  # of train.py
    'start': 'prompt',  # of sample.py
}

# {annotation: (words, whether a number is inside)}. Every number has a range. The limits keep
# products and float32 from overflowing; no machine needs more. NaN is inside none of them.
RANGES = {
    'PositiveInt': ('positive (at most 2147483647)', lambda x: 0 < x < 2**31),
    'NonNegativeInt': ('0 or more (at most 2147483647)', lambda x: 0 <= x < 2**31),
    'Size': ('positive (at most 16777216)', lambda x: 0 < x <= 2**24),  # of a model
    'Layers': ('positive (at most 1000)', lambda x: 0 < x <= 1000),
    'Seed': ('0 or more (below 2^63)', lambda x: 0 <= x < 2**63),
    'PositiveFloat': ('positive (1e-30 to 1e30)', lambda x: 1e-30 <= x <= 1e30),
    'NonNegativeFloat': ('0 or more (at most 1e30)', lambda x: 0 <= x <= 1e30),
    'Fraction': ('at least 0 and below 1', lambda x: 0 <= x < 1),
    'OpenFraction': ('above 0 and below 1', lambda x: 0 < x < 1),
    'Share': ('above 0 and at most 1', lambda x: 0 < x <= 1),
    # logits are divided by it
    'LogitScale': ('0, or from 0.001 to 1000000', lambda x: x == 0 or 1e-3 <= x <= 1e6),
}


class Setting(NamedTuple):
    default: object
    kind: type  # int, float, bool, str, a Literal, or a union such as int | Literal['auto']
    comment: str
    range: str  # a key of RANGES, or '' if it is not a number
    group: str  # the comment line that begins its group, or ''


def read_block(script):
    """
    Return the settings of a script, {name: Setting}, read from its source without running it. They
    are the assignments that precede `... = configure(...)` in the same block of statements.
    """
    with tokenize.open(script) as f:
        source = f.read()
    comments, groups = {}, {}  # {line number: text}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip('# ')
            if match := re.fullmatch(r'\s*# ([\w/]+(: .+)?)\s*', token.line):
                groups[token.start[0]] = match[1]
    settings, group = {}, ''
    for statement in statements_before_configure(source, script):
        group = groups.get(statement.lineno - 1, group)
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                annotation = None
            case ast.AnnAssign(target=ast.Name(id=name), value=value, annotation=annotation):
                pass
            case _:
                continue
        if name.startswith('_'):
            continue
        default = evaluate(value)
        kind = evaluate(annotation) if annotation else type(default)
        names = [n.id for n in ast.walk(statement) if isinstance(n, ast.Name)]
        range_name = next((n for n in names if n in RANGES), '')
        comment = comments.get(statement.end_lineno, '')
        settings[name] = Setting(default, kind, comment, range_name, group)
    return settings


def statements_before_configure(source, script):
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, 'body', None)
        if not isinstance(body, list):  # a lambda's body is an expression
            continue
        for i, statement in enumerate(body):
            match statement:
                case ast.Assign(value=ast.Call(func=ast.Name(id='configure'))):
                    return body[:i]
    raise RuntimeError(f'{script} does not call configure()')


def evaluate(expression):
    """
    Return the value of an expression in a settings block. It may use Literal and names of RANGES.
    """
    names = {'Literal': Literal} | {name: globals()[name] for name in RANGES}
    try:
        return eval(compile(ast.Expression(expression), '<settings>', 'eval'), names)
    except NameError as e:
        text = ast.unparse(expression)
        raise UserError(f"line {expression.lineno}: every assignment before configure() is a "
                        f"setting with a plain value, which '{text}' is not ({e})") from e


def coerce(value, default, kind):
    """
    Return `value` as type `kind`. An int is accepted for a float, and None if the default is None.
    ValueError says what was expected.
    """
    if value is None and default is None or type(value) is kind:
        return value
    if kind is float and type(value) is int:
        if abs(value) >= 2 ** 1023:
            raise ValueError('a smaller number')
        return float(value)
    for choice in choices(kind):
        if choice is type(value) or type(choice) is type(value) and choice == value:
            return value
    raise ValueError(describe(kind))


def choices(kind):
    """Return the members of a Literal or a union: values, and types that allow any value."""
    return [choice for part in get_args(kind) for choice in get_args(part) or [part]]


def describe(kind):
    if kind is bool:
        return 'True or False'
    parts = choices(kind) or [kind]
    return ' | '.join(getattr(part, '__name__', repr(part)) for part in parts)


def check_range(name, where, value, setting):
    """Raise UserError for a number out of range. compare.py may give a key several numbers."""
    if not setting.range:
        return
    words, inside = RANGES[setting.range]
    values = value if isinstance(value, (list, tuple)) else [value]
    for number in values:
        if not isinstance(number, (int, float)):
            continue  # None, or a word such as 'auto'
        if not inside(number):
            raise UserError(f'{name} {where} must be {words}, not {shown(number)}')


def check_value(script, name, value, where):
    """Return a value from elsewhere, a checkpoint say, as the type of a script's setting."""
    setting = read_block(script)[name]
    try:
        value = coerce(value, setting.default, setting.kind)
    except ValueError as expected:
        raise UserError(f'{name} {where} must be {expected}, not {shown(value)}') from None
    check_range(name, where, value, setting)
    return value


def parse(text, kind):
    """Return the value of a flag: a Python literal, or the text itself. --out_dir=123 is a name."""
    try:
        with warnings.catch_warnings():  # newer Pythons warn about a backslash in a string
            warnings.simplefilter('ignore')
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    if kind is str and value is not None and not isinstance(value, str):
        return text
    return value


def suggestion(text, known):
    """Return the known word nearest to `text`, as a question; '' if none is near."""
    match = difflib.get_close_matches(text, known, n=1, cutoff=0.7)
    return f"; did you mean '{match[0]}'?" if match else ''


def suggest_key(name, settings):
    """Return a hint at the setting that `name` stands for, or at --help."""
    name = name.strip('-').replace('-', '_')
    for ours, others in OTHER_NAMES.items():
        if name in others.split() and re.match(r'\w+', ours)[0] in settings:
            return f'; use {ours}'
    every = f"; 'python {sys.argv[0]} --help=all' lists every key"
    return suggestion(name, settings) or every


def suggest_file(path):
    """
    Return the config file whose name is nearest to that of `path`, with or without .py, as a
    question. It may be in the folder of `path` or in config/.
    """
    found = {}
    for folder in os.path.relpath(CONFIG), os.path.dirname(path):
        for file in glob.glob(os.path.join(glob.escape(folder), '*.py')):
            found[stem(file)] = file
    match = difflib.get_close_matches(stem(path), found, n=1, cutoff=0.7)
    return f"; did you mean '{found[match[0]]}'?" if match else ''


def stem(path):
    return os.path.basename(path).removesuffix('.py')


def configure(script, *also, argv=None, convert=None):
    """
    Return (config, given): the settings of `script` after override files and flags. config is
    {name: value} for every key, given is {name: where} for those that were set. Scripts in `also`
    add the keys that `script` does not have itself.

    Any mistake raises UserError, which sys.excepthook shows as one line. --help prints settings and
    exits. convert(name, value, default, kind) returns the value to store, or raises ValueError with
    what was expected; the default is coerce().
    """
    if argv is None:  # the script's own command line
        sys.excepthook = show_error
        argv = sys.argv[1:]
    own = read_block(script)
    settings = dict(own)
    for other in also:
        for name, setting in read_block(other).items():
            settings.setdefault(name, setting)
    for arg in argv:
        flag, _, group = arg.partition('=')
        if flag in ('-h', '--help'):
            show_help(script, own, settings, group)
            raise SystemExit(0)
    convert = convert or (lambda name, *rest: coerce(*rest))
    config = {name: setting.default for name, setting in settings.items()}
    given = {}

    def put(name, value, where):
        if name not in settings:
            raise UserError(f"unknown key '{name}' {where}{suggest_key(name, settings)}")
        setting = settings[name]
        try:
            config[name] = convert(name, value, setting.default, setting.kind)
        except ValueError as expected:
            word = value if isinstance(value, str) else shown(value)
            hint = suggestion(word, map(str, choices(setting.kind)))
            if isinstance(value, (list, tuple)):
                hint += '; several values are for compare.py'
            message = f'{name} {where} must be {expected}, not {shown(value)}{hint}'
            raise UserError(message) from None
        check_range(name, where, config[name], setting)
        given[name] = where

    files, flags = split_arguments(argv, settings)
    for path in files:
        for name, value in run_file(path, config).items():
            put(name, value, f"in '{path}'")
    for name, text in flags:
        kind = settings[name].kind if name in settings else None
        put(name, parse(text, kind), ON_COMMAND_LINE)
    return config, given


def split_arguments(argv, settings):
    """Split a command line into (override files, [(key, text of its value)])."""
    files, flags = [], []
    for i, arg in enumerate(argv):
        name, equals, text = arg.removeprefix('--').partition('=')
        if arg.startswith('--') and equals and name.isidentifier():
            flags.append((name, text))
        elif arg.startswith('-') or equals:
            following = argv[i + 1] if i + 1 < len(argv) else '-'
            raise UserError(malformed(arg, following, settings))
        else:
            files.append(arg)
    return files, flags


def malformed(arg, following, settings):
    """Return the message for an argument that is not written --key=value."""
    name, equals, _ = arg.strip('-').partition('=')
    setting = settings.get(name)
    hint = '' if setting else suggest_key(name, settings)
    takes_true = setting and (setting.kind is bool or True in choices(setting.kind))
    if takes_true and following not in ('True', 'False'):
        hint = f', as in --{name}=True'
    elif arg.startswith('--') and not equals and not following.startswith('-'):
        return f"flags are written --key=value: '{arg}={following}', not '{arg} {following}'{hint}"
    return f"malformed flag '{arg}': flags are written --key=value{hint}"


def run_file(path, config):
    """Execute an override file with the values so far in scope. Return the names that it set."""
    if not os.path.isfile(path):
        raise UserError(f"no such override file: '{path}'{suggest_file(path)}")
    scope = dict(config, __file__=path, __name__='config')
    try:
        with open(path, 'rb') as f:
            tree = ast.parse(f.read(), path)
        exec(compile(tree, path, 'exec'), scope)
    except Exception as e:  # an override file may raise anything; report the line
        frames = traceback.extract_tb(e.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        line = lines[-1] if lines else getattr(e, 'lineno', None)
        at = f' line {line}' if line else ''
        message = getattr(e, 'msg', e)  # a SyntaxError's str() repeats file and line
        raise UserError(f"override file '{path}'{at}: {type(e).__name__}: {message}") from e
    stored = (n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    assigned = {n.id for n in stored}  # so that `count = 3` counts even if 3 was its value before
    changes = {}
    for name, value in scope.items():
        if name.startswith('_') or isinstance(value, types.ModuleType):
            continue
        if name in assigned or name not in config or value is not config[name]:
            changes[name] = value
    return changes


# -------------------------------------------------------------------------------------------------
# --help

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
    kind = describe(setting.kind)
    text = setting.comment or kind
    if setting.comment and choices(setting.kind):
        text += f' ({kind})'
    key = f'  --{name}={setting.default!r}'
    return textwrap.fill(text, width, initial_indent=f'{key:<36} ', subsequent_indent=' ' * 37,
                         break_long_words=False, break_on_hyphens=False)
