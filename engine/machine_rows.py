"""
The rows of `bench.py --report`: they are measured in turn, and after each one report.json and
report.md are written again.
"""
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from engine.common import ROOT, UserError, end_with_parent, printable, replacing
from engine.run_report import markdown_table


class Row(NamedTuple):
    section: str
    name: str
    command: str  # measures this row again
    seconds: float  # it is expected to take
    measure: Callable = None  # seconds left -> ({column: text}, {name: number})
    unfit: str = ''  # why this machine cannot measure it


@dataclass
class Report:
    folder: str
    device: object  # torch.device
    dtype: str  # of training
    machine: dict  # facts about it
    peak: float  # FLOP/s in dtype
    peak_is_measured: bool  # not from a datasheet
    seconds: float  # that all of it may take
    sections: dict  # {name: text above its table}
    flags: list = field(default_factory=list)  # of the user, for every row
    versus: str = ''  # another checkout's model.py
    rows: list = field(default_factory=list)  # dicts of those that are done
    ended: str = 'still being measured'
    started: float = field(default_factory=time.time)

    def left(self):
        """Return the seconds until the deadline."""
        return self.started + self.seconds - time.time()

    def rows_of(self, section):
        return [row for row in self.rows if row['section'] == section]


def command_line(words, env=None):
    """Return a command as a user types it."""
    variables = [f'{key}={value}' for key, value in (env or {}).items()]
    return ' '.join([*variables, shlex.join(words)])


def run(words, seconds, env=None):
    """
    Run a command in the repository and return what it prints. Raise UserError if it fails or takes
    longer than `seconds`; it does not outlive this call.
    """
    argv = [sys.executable if word == 'python' else word for word in words]
    process = subprocess.Popen(
        argv, cwd=ROOT, env=os.environ | (env or {}), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace',
        preexec_fn=end_with_parent)
    try:
        output, _ = process.communicate(timeout=max(1, seconds))
    except subprocess.TimeoutExpired:
        raise UserError(f'stopped after {seconds:.0f} s, when no time was left') from None
    finally:
        end(process)
    if process.returncode:
        last = (output.strip().splitlines() or ['no output'])[-1]
        raise UserError(f'failed with status {process.returncode}: {last[:300]}')
    return output


def end(process):
    """End a process if it still runs, and wait for it."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def measure_rows(report, rows):
    """Measure rows in turn. One that would take longer than the time left is only listed."""
    for row in rows:
        left = report.left()
        entry = dict(section=row.section, name=row.name, command=row.command, cells={}, numbers={},
                     note=row.unfit)
        if not row.unfit and row.seconds > left:
            entry['note'] = (f'left out: it takes about {row.seconds:.0f} s, and '
                             f'{max(0, left):.0f} s were left')
        elif not row.unfit:
            started = time.time()
            try:
                entry['cells'], entry['numbers'] = row.measure(left)
            except UserError as e:
                entry['note'] = str(e)
            entry['seconds'] = time.time() - started
        report.rows.append(entry)
        shown = entry['note'] or ', '.join(f'{k} {v}' for k, v in entry['cells'].items())
        print(printable(f'{row.section}, {row.name}: {shown}'), flush=True)
        write(report)


def write(report):
    """Write report.json and report.md as far as they are measured."""
    facts = dict(machine=report.machine, ended=report.ended, rows=report.rows)
    with replacing(os.path.join(report.folder, 'report.json'), 'w', encoding='utf-8') as f:
        json.dump(facts, f, indent=1)
    with replacing(os.path.join(report.folder, 'report.md'), 'w', encoding='utf-8') as f:
        f.write(markdown(report))


def markdown(report):
    """Return the whole report in Markdown."""
    machine = [['machine', ''], *([key, str(value)] for key, value in report.machine.items())]
    parts = ['# What this machine does', markdown_table(machine),
             f'The report is {report.ended}. Times are medians, with the middle half in '
             'parentheses. Memory is what a process takes beyond its start.']
    for section, text in report.sections.items():
        rows = report.rows_of(section)
        if rows:
            parts += [f'## {section.capitalize()}', text, table(rows), fits(rows)]
            picture = os.path.join(report.folder, f'{section}.png')
            parts += [f'![{section}]({section}.png)'] if os.path.exists(picture) else []
            parts += [commands(rows)]
    return '\n\n'.join(filter(None, parts)) + '\n'


def table(rows):
    """Return the rows of a section as a table. What could not be measured is below it."""
    measured = [row for row in rows if row['cells']]
    columns = list(dict.fromkeys(column for row in measured for column in row['cells']))
    lines = [[row['name'], *(row['cells'].get(c, '') for c in columns)] for row in measured]
    notes = [f"- {row['name']}: {row['note']}" for row in rows if row['note']]
    text = [markdown_table([['', *columns], *lines])] if measured else []
    return '\n\n'.join(text + (['\n'.join(notes)] if notes else []))


def commands(rows):
    """Return the commands of measured rows, without repetition."""
    lines = dict.fromkeys(row['command'] for row in rows if row['cells'])
    return '\n'.join(['```', *lines, '```']) if lines else ''


def exponent(x, y):
    """Return the exponent of y in x, by least squares of their logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def fits(rows):
    """Return a table of how time and memory grow with each setting, or '' if no row is for that."""
    lines = [['grows with', 'points', 'time', 'by FLOPs', 'memory', 'by estimate']]
    points = [row['numbers'] for row in rows if 'key' in row['numbers']]
    for key in dict.fromkeys(point['key'] for point in points):
        those = [point for point in points if point['key'] == key]
        if len(those) > 1:
            x = [point['x'] for point in those]
            found = [exponent(x, [point[name] for point in those])
                     for name in ('seconds', 'flops', 'bytes', 'estimate')]
            lines.append([key, str(len(x)), *(f'{round(value, 2) + 0:.2f}' for value in found)])
    if len(lines) == 1:
        return ''
    return ('Exponents, by a fit of logarithms over the points above; beside them those of the '
            'FLOPs and of the estimate at the same points.\n\n' + markdown_table(lines))


def spread(values, unit='ms', scale=1000.0):
    """Format the median and the middle half of values, by default of seconds in ms."""
    low, middle, high = (np.quantile(values, q) * scale for q in (0.25, 0.5, 0.75))
    digits = 0 if middle >= 1000 else 1 if middle >= 10 else 3
    unit = f' {unit}' if unit else ''
    return f'{middle:,.{digits}f}{unit} ({low:,.{digits}f}-{high:,.{digits}f})'
