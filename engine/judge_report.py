"""Report a judgement: the verdict in a few lines, judge.png, and the ledger judged.jsonl."""
import json
import math
import os
import shutil
import subprocess
import time
from typing import NamedTuple

from engine.common import ROOT, UserError, duration, first_line, printable, replacing
from engine.run_report import markdown_table, save_picture
from engine.schema import Between, check

LEDGER = 'judged.jsonl'
# the fields of its entries that are read here
ENTRY = {'time': str, 'verdict': str, 'difference': (float, None), 'interval': (float, None),
         'unit': str, 'by_seed': dict, 'against': str, 'against_commit?': (str, None),
         'tried': dict, 'commit': (str, None),
         'diff': (str, None), 'alpha': Between(0, 1)}
VERDICTS = {
    'better': 'keep it',
    'worse': 'its loss is higher',
    'no difference': 'not as large as the margin, in either direction',
    'no gain': 'a gain as large as the margin is unlikely',
    'undecided': 'after max_pairs; --seed=1000 begins a new judgement with other pairs',
    'given up': 'inside a run, because it trailed too far',
    'costs more': 'its loss is lower, but it costs more',
    'failed': 'a run of the candidate crashed or diverged',
    'measured otherwise': 'its loss is lower, but it edits code that measures or judges',
    'other evaluation': 'its windows of val are not those of the baseline',
}


class Decision(NamedTuple):
    verdict: str | None  # None: another pair is needed
    difference: float
    interval: float  # half its width


def unit_of(result, unit):
    """Return the factor from nats per token to the unit."""
    last = result.evals[-1]
    if unit == 'nats':
        return 1.0
    if last.bits_per_byte is None:
        raise UserError('bits per byte are not known for this data set: give --unit=nats')
    return last.bits_per_byte / last.loss


def shown(decision, unit):
    """Format a difference with its interval, which is not known after one pair that ended early."""
    interval = '' if math.isnan(decision.interval) else f' ± {decision.interval:.4f}'
    return f'{decision.difference:+.4f}{interval} {unit.replace("_", " ")}'


def report(found, config):
    """Print the verdict, draw judge.png, and add a line to judged.jsonl. Return the exit status."""
    out_dir, pairs = config['out_dir'], found.pop('pairs')
    verdict, diff = found['verdict'], found.pop('diff')
    found['diff'] = f"diffs/{'-'.join(found['sides'])}.diff" if diff else None
    if diff:
        os.makedirs(os.path.join(out_dir, 'diffs'), exist_ok=True)
        with replacing(os.path.join(out_dir, found['diff']), 'w', encoding='utf-8') as f:
            f.write(diff)
    asked = {key: config[key] for key in ('against', 'alpha', 'margin', 'max_pairs', 'at')}
    found |= asked | dict(time=time.strftime('%Y-%m-%d %H:%M:%S'))
    line = json.dumps({k: None if v != v else v for k, v in found.items()})
    why = VERDICTS[verdict]
    if found['more']:
        why += '; ' + ', '.join(f"{found['costs'][name]:.2f} x {name}" for name in found['more'])
    decision = Decision(verdict, found['difference'], found['interval'])
    comparable = found['by_seed'] and verdict not in ('failed', 'other evaluation')
    print(f'{verdict} ({why})' + (f': {shown(decision, found["unit"])}' if comparable else ''))
    runs = ', '.join(f'{n:.3g} {name}' for name, n in found['runs'].items() if n)
    add_to_ledger(os.path.join(out_dir, LEDGER), line)  # after the verdict has been printed
    print(f"pairs: {len(pairs)}; new runs: {runs or 'none'}; {duration(found['seconds'])}")
    if pairs:
        draw(pairs, found, os.path.join(out_dir, 'judge.png'))
    print(line)
    return {'better': 0, 'measured otherwise': 2, 'other evaluation': 2}.get(verdict, 1)


def git(*words):
    """Return what a git command prints about this repository, None if it fails or is not there."""
    if not shutil.which('git'):
        return None
    done = subprocess.run(['git', '-C', ROOT, *words], capture_output=True, text=True)
    return done.stdout.strip() or None


def draw(pairs, found, path):
    """Plot how the difference of each pair went, and where the mean ended."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout='constrained')
    ax = figure.subplots()
    for seed, (a, b) in zip(found['by_seed'], pairs):
        scale = unit_of(a, found['unit'])
        losses = {e.iter: e.loss for e in a.evals}
        shared = [e for e in b.evals if e.iter in losses and e.iter > 0]
        ax.plot([e.iter for e in shared], [scale * (e.loss - losses[e.iter]) for e in shared],
                marker='o', markersize=4, label=f'seed {seed}')
    ax.errorbar(pairs[-1][0].evals[-1].iter, found['difference'], found['interval'], fmt='D',
                color='black', capsize=5, label='mean')
    ax.axhspan(-found['margin'], found['margin'], color='grey', alpha=0.2, label='margin')
    ax.axhline(0, color='grey', linewidth=1)
    ax.set(xlabel='iteration', title=found['verdict'],
           ylabel=f"candidate minus baseline, {found['unit'].replace('_', ' ')}")
    ax.legend()
    save_picture(figure, path)


def add_to_ledger(path, line):
    """Append a line as a whole, or not at all. A line that was cut off is closed first."""
    earlier = ''
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace') as f:
            earlier = f.read()
    if earlier and not earlier.endswith('\n'):
        earlier += '\n'
    with replacing(path, 'w', encoding='utf-8') as f:
        f.write(earlier + line + '\n')


def read_ledger(path):
    """Return the entries of a ledger. A NOTE names lines that are none, e.g. cut off ones."""
    entries = []
    with open(path, encoding='utf-8', errors='replace') as f:
        for number, line in enumerate(f, 1):
            try:
                entry = json.loads(line)
                check(entry, ENTRY)
                entries.append(entry)
            except (ValueError, RecursionError) as e:
                print(f"NOTE: line {number} of '{path}' is left out: {first_line(e)}")
    return entries


def show_ledger(out_dir):
    """Print judged.jsonl as a table, with the number of false keeps to expect."""
    path = os.path.join(out_dir, LEDGER)
    if not os.path.exists(path):
        raise UserError(f"there is no ledger '{path}' yet: --against or --try begin one")
    entries = read_ledger(path)
    rows = [['time', 'verdict', 'difference', 'pairs', 'against', 'tried', 'commit', 'diff']]
    for e in entries:
        tried = ' '.join(f'--{key}={value}' for key, value in e['tried'].items())
        interval = math.nan if e['interval'] is None else e['interval']
        decision = Decision(e['verdict'], e['difference'], interval)
        difference = shown(decision, e['unit']) if e['difference'] is not None else ''
        rows.append([e['time'], e['verdict'], difference, str(len(e['by_seed'])),
                     e.get('against_commit') or e['against'],
                     tried, e['commit'] or '', e['diff'] or ''])
    kept = sum(e['verdict'] == 'better' for e in entries)
    false = sum(e['alpha'] for e in entries)
    print(printable(markdown_table(rows)))
    print(f'\n{len(entries)} changes judged, {kept} found better. If none of them did anything, '
          f'at most {false:.2g} of them would be found better on average.')
