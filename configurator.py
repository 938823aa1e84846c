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
import io
import os
import re
import sys
import tokenize
import traceback
import types
import warnings
from typing import Literal, NamedTuple, get_args

from engine.common import UserError, show_error
from engine.help import show_help
from engine.hints import suggest_file, suggest_key, suggestion
from engine.schema import shown

# Annotations that stand for a range. Python sees an ordinary int or float; read_block() finds the
# name in the source, and configure() checks the values that are set.
PositiveInt = NonNegativeInt = Size = Layers = Seed = int
PositiveFloat = NonNegativeFloat = Fraction = Share = OpenFraction = LogitScale = float

ON_COMMAND_LINE = 'on the command line'  # where a flag was set, in `given`

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

    def choices(self):
        """Return the members of a Literal or a union: values, and types that allow any value."""
        return [choice for part in get_args(self.kind) for choice in get_args(part) or [part]]

    def expected(self):
        """Say which values it may have."""
        if self.kind is bool:
            return 'True or False'
        parts = self.choices() or [self.kind]
        return ' | '.join(getattr(part, '__name__', repr(part)) for part in parts)


def read_block(script):
    """
    Return the settings of a script, {name: Setting}, read from its source without running it. They
    are the assignments that precede `... = configure(...)` in the same block of statements.
    """
    try:
        with tokenize.open(script) as f:
            source = f.read()
        tree = ast.parse(source)
    except SyntaxError as e:
        raise UserError(f"'{script}', line {e.lineno}: {e.msg}") from None
    comments, groups = {}, {}  # {line number: text}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip('# ')
            if match := re.fullmatch(r'\s*# ([\w/]+(: .+)?)\s*', token.line):
                groups[token.start[0]] = match[1]
    settings, group = {}, ''
    for statement in statements_before_configure(tree, script):
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


def statements_before_configure(tree, script):
    for node in ast.walk(tree):
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


def coerce(value, setting):
    """
    Return `value` as the type of a setting. An int is accepted for a float, and None if the default
    is None. Raise ValueError with the end of the sentence 'KEY must be ...'.
    """
    if value is None and setting.default is None or type(value) is setting.kind:
        return value
    if setting.kind is float and type(value) is int:
        if abs(value) >= 2 ** 1023:
            raise ValueError('a smaller number')
        return float(value)
    for choice in setting.choices():
        same = type(choice) is type(value) and choice == value  # the types, because 1 == True
        if same or choice is type(value):
            return value
    raise ValueError(setting.expected())


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
    """Coerce and check a value that was computed, or read from a checkpoint, for a setting."""
    setting = read_block(script)[name]
    try:
        value = coerce(value, setting)
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


class Given(dict):
    """
    {name: where} of the settings that were set. `history` is {name: [(value, where)]} of all
    settings: every value that they had in turn, the default first.
    """
    def __init__(self, defaults):
        super().__init__()
        self.history = {name: [(value, 'by default')] for name, value in defaults.items()}

    def put(self, name, value, where):
        self[name] = where
        self.history[name].append((value, where))

    def flags(self):
        """Return the settings that were set on the command line."""
        return {name for name, where in self.items() if where == ON_COMMAND_LINE}

    def without_flags(self):
        """Return {name: value} of all settings after the override files and before the flags."""
        return {name: [value for value, where in values if where != ON_COMMAND_LINE][-1]
                for name, values in self.history.items()}


def configure(script, *also, argv=None, convert=None):
    """
    Return (config, given): the settings of `script` after override files and flags. config is
    {name: value} for every key, given is a Given. Scripts in `also` add the keys that `script` does
    not have itself.

    Any mistake raises UserError, which sys.excepthook shows as one line. --help prints settings and
    exits. convert(name, value, setting) returns the value to store, or raises ValueError with what
    was expected; the default is coerce().
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
    convert = convert or (lambda name, value, setting: coerce(value, setting))
    config = {name: setting.default for name, setting in settings.items()}
    given = Given(config)

    def put(name, value, where):
        if name not in settings:
            raise UserError(f"unknown key '{name}' {where}{suggest_key(name, settings)}")
        setting = settings[name]
        try:
            config[name] = convert(name, value, setting)
        except ValueError as expected:
            word = value if isinstance(value, str) else shown(value)
            hint = suggestion(word, map(str, setting.choices()))
            if isinstance(value, (list, tuple)):
                hint += '; several values are for compare.py'
            message = f'{name} {where} must be {expected}, not {shown(value)}{hint}'
            raise UserError(message) from None
        check_range(name, where, config[name], setting)
        given.put(name, config[name], where)

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
    takes_true = setting and (setting.kind is bool or True in setting.choices())
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
    # names that the file assigns, even to the value they had, and names that it sets otherwise
    stored = (n for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    assigned = {n.id for n in stored}
    changes = {}
    for name, value in scope.items():
        if name.startswith('_') or isinstance(value, types.ModuleType):
            continue
        if name in assigned or name not in config or value is not config[name]:
            changes[name] = value
    return changes
