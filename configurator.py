"""
Configuration for every script alike, in nanoGPT's manner: a script's settings are a block of plain assignments at its top,
override files are Python that assigns some of the same names, and --key=value flags come last and win.

    python train.py config/preset_quick_test.py --batch_size=32
    python train.py --help

In a script, right after its block:

    config, given = configure(__file__)
    globals().update(config)

The block is read from the source, so that it is its own documentation: each line's comment becomes the help text, and a
type that the default does not show is written as an annotation (`d_ff: int = None`). A name with a leading underscore in
an override file is the file's own. Override files are code and are executed; nothing else is.
"""
import ast
import difflib
import os
import sys
import tokenize
import types
import typing
import warnings


def fail(message):
    """Print one line and leave with exit status 2, for whatever a person typed wrong. Only rank 0 speaks under torchrun."""
    if os.environ.get('RANK', '0') == '0':
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def read_block(script):
    """
    The settings of a script, read from its source without running it: {name: (default, type, comment)}.
    They are the assignments that stand before `... = configure(...)` in the same block of statements.
    """
    with tokenize.open(script) as f:
        source = f.read()
    comments = {}
    for token in tokenize.generate_tokens(iter(source.splitlines(True)).__next__):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip('# ')
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, 'body', None)
        calls = [i for i, s in enumerate(body) if is_configure(s)] if isinstance(body, list) else []
        if calls:
            break
    else:
        raise RuntimeError(f'{script} does not call configure()')
    block = {}
    for s in body[:calls[0]]:
        target = s.targets[0] if isinstance(s, ast.Assign) else getattr(s, 'target', None)
        if isinstance(target, ast.Name) and not target.id.startswith('_'):
            default = eval(compile(ast.Expression(s.value), script, 'eval'), {})
            annotation = getattr(s, 'annotation', None)
            kind = type(default) if annotation is None else eval(ast.unparse(annotation), {'Literal': typing.Literal})
            block[target.id] = (default, kind, comments.get(s.end_lineno, ''))
    return block


def is_configure(statement):
    call = getattr(statement, 'value', None)
    return isinstance(statement, ast.Assign) and isinstance(call, ast.Call) and getattr(call.func, 'id', '') == 'configure'


def coerce(value, default, kind):
    """`value` as type `kind`: an int is fine for a float, None for a key whose default is None. ValueError says what was expected."""
    if value is None and default is None or type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if any(choice is type(value) or type(choice) is type(value) and choice == value for choice in choices(kind)):
        return value
    raise ValueError(describe(kind))


def choices(kind):
    """What a Literal or a union with one allows: values, and types that allow any value."""
    return [choice for part in typing.get_args(kind) for choice in typing.get_args(part) or [part]]


def describe(kind):
    return ' | '.join(getattr(c, '__name__', repr(c)) for c in choices(kind)) or {bool: 'True or False'}.get(kind, kind.__name__)


def nearest(name, names):
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean '{match[0]}'?" if match else f"'python {sys.argv[0]} --help' lists every key"


def show_help(script, block, own):
    lines = [ast.get_docstring(ast.parse(open(script, encoding='utf-8').read())) or '', '',
             f'usage: python {os.path.basename(sys.argv[0])} [override_file.py ...] [--key=value ...]', '']
    for title, names in (('keys of this script:', own), ('keys of train.py, which override files may set:', block.keys() - own.keys())):
        lines += [title] if names else []
        for name in (n for n in block if n in names):
            default, kind, comment = block[name]
            lines += [f"{f'  --{name}={default}':<42} {comment or describe(kind)}" + (f' ({describe(kind)})' if comment and choices(kind) else '')]
    print('\n'.join(lines))  # at once: its reader may be `head`, which leaves early


def configure(script, *also, argv=None, convert=lambda name, value, default, kind: coerce(value, default, kind)):
    """
    The settings of `script` (and those of the scripts in `also`, where it has no key of that name) after override files
    and flags: (config, given). config is {name: value} for every key, given {name: where} for those that somebody set.
    Prints the help for --help, and one line with exit status 2 for anything wrong. convert says what a value becomes, or raises ValueError.
    """
    argv = sys.argv[1:] if argv is None else argv
    block = own = read_block(script)
    for other in also:
        block = block | {k: v for k, v in read_block(other).items() if k not in block}
    if '--help' in argv or '-h' in argv:
        show_help(script, block, own)
        raise SystemExit(0)
    config, given = {k: default for k, (default, _, _) in block.items()}, {}

    def put(name, value, where):
        if name not in block:
            fail(f"unknown key '{name}' {where}; {nearest(name, block)}")
        default, kind, _ = block[name]
        try:
            config[name] = convert(name, value, default, kind)
        except ValueError as expected:
            hint = difflib.get_close_matches(str(value), map(str, choices(kind)), n=1)
            fail(f"{name} {where} must be {expected}, not {value!r}" + (f"; did you mean {hint[0]!r}?" if hint else '') +
                 '; several values are for compare.py' * isinstance(value, (list, tuple)))
        given[name] = where

    flags = []
    for i, arg in enumerate(argv):
        name, equals, text = arg.removeprefix('--').partition('=')
        if arg.startswith('--') and equals and name.isidentifier():
            flags.append((name, text))
        elif arg.startswith('--') and not equals and i + 1 < len(argv) and not argv[i + 1].startswith('-'):
            fail(f"flags are written --key=value: '{arg}={argv[i + 1]}', not '{arg} {argv[i + 1]}'")
        elif arg.startswith('-') or equals:
            hint = '' if name in block else f'; {nearest(name.strip("-"), block)}'
            fail(f"malformed flag '{arg}': flags are written --key=value{hint}")
        else:
            run_file(arg, config, put)
    for name, text in flags:
        try:
            with warnings.catch_warnings():  # newer Pythons warn of a backslash in a string
                warnings.simplefilter('ignore')
                value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = text
        if name in block and block[name][1] is str and value is not None and not isinstance(value, str):
            value = text  # --out_dir=123 is the name 123 and no number
        put(name, value, 'on the command line')
    return config, given


def run_file(path, config, put):
    """Execute an override file with the values so far in scope, then put() each name it set."""
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or '.'
        here = [os.path.join(folder, n) for n in os.listdir(folder)] if os.path.isdir(folder) else []
        match = difflib.get_close_matches(path, [p.removeprefix('./') for p in here if p.endswith('.py')], n=1)
        fail(f"no such override file: '{path}'" + (f"; did you mean '{match[0]}'?" if match else ''))
    scope, assigned = dict(config, __file__=path, __name__='config'), set()
    try:
        with open(path, 'rb') as f:
            tree = ast.parse(f.read(), path)
        assigned = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        exec(compile(tree, path, 'exec'), scope)
    except Exception as e:  # whatever a person's file does wrong is reported at its line
        line, tb = getattr(e, 'lineno', None), e.__traceback__
        while tb is not None:
            line, tb = (tb.tb_lineno if tb.tb_frame.f_code.co_filename == path else line), tb.tb_next
        fail(f"override file '{path}'{f' line {line}' if line else ''}: {type(e).__name__}: {getattr(e, 'msg', e)}")
    for name, value in scope.items():
        if name.startswith('_') or isinstance(value, types.ModuleType):
            continue
        if name in assigned or name not in config or value is not config[name]:
            put(name, value, f"in '{path}'")
