"""
Check what was read from a file before anything is computed from it: run logs, meta.json, the plain
values of a checkpoint. A file may be of another program, damaged, or hostile. Nothing here imports
torch.

A schema says which values are allowed:

    int                      an integer from 0 to 2^63 - 1, and not a bool
    range(-1, 10)            an integer in this range
    float                    a finite number; an integer only if numpy can hold it
    Between(0, 1e10)         a number from the first to the second
    str, bool, dict, list    any value of this type
    [schema]                 a list, each of whose values fits
    {'a': ..., 'b?': ...}    a dict with at least these keys; 'b' may be missing
    {str: schema}            a dict, each of whose keys is a text and each of whose values fits
    (schema, schema)         a value that fits one of these
    None, 'word', ...        this value
"""
import json
from typing import NamedTuple

from engine.common import UserError, first_line

NATURAL = range(2 ** 63)
NUMPY_INTS = range(-2 ** 63, 2 ** 63)


class Between(NamedTuple):
    low: float
    high: float


def read_json(path, schema):
    """Return the content of a JSON file. UserError names the file and the field that is wrong."""
    try:
        with open(path, encoding='utf-8') as f:
            content = json.load(f)
        check(content, schema)
    except (ValueError, RecursionError) as e:
        raise UserError(f"'{path}' cannot be used: {first_line(e)}") from None
    return content


def check(value, schema, name=''):
    """Raise ValueError, which names the field, unless `value` fits the schema."""
    if isinstance(schema, dict) and isinstance(value, dict):
        for key, inner in schema.items():
            if isinstance(key, type):
                check_items(value, key, inner, name)
                continue
            field = key.removesuffix('?')
            if field in value:
                check(value[field], inner, f'{name}.{field}' if name else field)
            elif field == key:
                raise ValueError(f"{name or 'it'} has no '{field}'")
    elif isinstance(schema, list) and isinstance(value, list):
        for i, item in enumerate(value):
            check(item, schema[0], f'{name}[{i}]')
    elif not fits(value, schema):
        raise ValueError(f"{name or 'it'} must be {describe(schema)}, not {shown(value)}")


def check_items(value, key_schema, schema, name):
    """Check all keys and all values of a dict."""
    for key, item in value.items():
        check(key, key_schema, f"a key of {name or 'it'}")
        check(item, schema, f'{name}.{key}' if name else str(key))


def fits(value, schema):
    """Return whether a value fits a schema without fields, or one of several."""
    match schema:
        case Between(low, high):
            return is_number(value) and low <= value <= high
        case tuple():
            return any(allowed(value, choice) for choice in schema)
        case type() if schema is int:
            return type(value) is int and value in NATURAL
        case type() if schema is float:
            return is_number(value)
        case type():
            return isinstance(value, schema)
        case range():
            return type(value) is int and value in schema
    return type(value) is type(schema) and value == schema


def is_number(value):
    """Return whether a value is a finite number that numpy and matplotlib accept."""
    if type(value) is int:
        return value in NUMPY_INTS
    return type(value) is float and abs(value) < 2.0 ** 1023  # and so not NaN


def allowed(value, schema):
    try:
        check(value, schema)
    except ValueError:
        return False
    return True


def describe(schema):
    match schema:
        case Between(low, high):
            return f'a number from {low:g} to {high:g}'
        case tuple():
            return ' or '.join(map(describe, schema))
        case dict():
            return 'a dict'
        case list():
            return 'a list'
        case range():
            return f'an integer from {schema.start} to {schema.stop - 1}'
        case type():
            names = {int: 'an integer of 0 or more', float: 'a finite number', str: 'a text'}
            return names.get(schema, f'a {schema.__name__}')
    return repr(schema)


def shown(value, width=60):
    """Return a short text for a value that may be huge."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer with thousands of digits, a deep nest
        text = f'this {type(value).__name__}'
    return text if len(text) <= width else f'{text[:width - 3]}...'
