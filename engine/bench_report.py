"""
The table of bench.py. The figures of a timed side are rows, {row of the table: text}, and numbers,
{name in --json: number}.
"""
import statistics

import torch

from engine.common import GIB, printable
from engine.cost import add_process, cache_bytes, memory_estimate
from engine.machine_rows import spread


def trains(s):
    return s['what'] in ('train', 'data', 'memory')


def tokens_per_step(s):
    if s['what'] == 'generate':
        return s['new_tokens'] * s['num_samples']
    accumulation = s['accumulation'] if trains(s) else 1
    return s['batch_size'] * s['model']['block_size'] * accumulation


def tokens_per_sec(side):
    return tokens_per_step(side.s) / side.median('whole')


def figures(side, model, peak, bandwidth):
    """Return (rows, numbers) of one side, from the sections that apply to it."""
    s = side.s
    sections = [size_figures(side), time_figures(side)]
    same_model = not side.info['note']  # FLOPs and bytes are computed for our model
    if same_model and s['what'] == 'generate':
        sections.append(decoding_figures(side, model, bandwidth))
    elif same_model:
        sections.append(flops_figures(side, model, *peak))
    if s['what'] == 'train':
        sections.append(training_figures(side))
    if s['what'] == 'data':
        sections.append(waiting_figures(side))
    if s['what'] == 'memory' and not s['versus']:
        sections.append(estimate_figures(side, model))
    sections.append(start_figures(side))
    rows, numbers = {}, {}
    for more_rows, more_numbers in sections:
        rows |= more_rows
        numbers |= more_numbers
    return rows, numbers


def size_figures(side):
    s, parameters = side.s, side.info['parameters']
    dtype = side.info.get('weights', s['dtype'])
    if s['what'] == 'generate':
        batch = f"{s['num_samples']} x {s['prompt_tokens']} tokens of prompt"
    else:
        batch = f"{s['batch_size']} x {s['model']['block_size']} tokens"
    if trains(s) and s['accumulation'] > 1:
        batch += f" x {s['accumulation']}"
    rows = {'parameters': f'{parameters:,}', 'dtype, compile': f"{dtype}, {s['compile']}",
            'batch': batch}
    note = dict(note=side.info['note']) if side.info['note'] else {}
    return rows, dict(parameters=parameters) | note


def time_figures(side):
    s, rows = side.s, {}
    for part in ('forward', 'backward', 'optimizer', 'prefill', 'reading', 'waiting'):
        if part in side.times:
            rows[part] = spread(side.times[part])
    whole = f"{s['new_tokens']} tokens" if s['what'] == 'generate' else 'whole step'
    rows[whole] = spread(side.times['whole'])
    rates = [tokens_per_step(s) / seconds for seconds in side.times['whole']]
    rows['tokens/s'] = spread(rates, '', 1)
    medians = {part: side.median(part) for part in side.times}
    return rows, medians | dict(tokens_per_sec=tokens_per_sec(side))


def flops_figures(side, model, peak, source):
    flops = model.flops_per_token() / (1 if trains(side.s) else 3)
    rate = flops * tokens_per_sec(side)
    mfu = f'{100 * rate / peak:.1f}%'
    if source.startswith('measured'):
        mfu += ' of measured'
    rows = {'FLOPs per token': f'{flops / 1e9:.4g} G', 'TFLOP/s': f'{rate / 1e12:.3g}', 'MFU': mfu}
    return rows, dict(flops_per_token=flops, tflops=rate / 1e12, mfu=rate / peak,
                      peak_tflops=peak / 1e12)


def decoding_figures(side, model, bandwidth):
    """
    Compare decoding with the bandwidth limit: each new token of all samples reads all matrices and
    the KV caches, which are taken at their average length.
    """
    s, c, n = side.s, model.config, side.s['num_samples']
    length = s['prompt_tokens'] + s['new_tokens'] / 2
    cache = cache_bytes(c, length, side.info['cache_itemsize'])
    read = side.info['matrix_bytes'] + n * cache
    limit = n * bandwidth / read
    decode = n * (s['new_tokens'] - 1) / (side.median('whole') - side.median('prefill'))
    rows = {
        'tokens/s after the first': f'{decode:,.1f}',
        'bandwidth limit': f'{limit:,.1f} tokens/s ({read / 1e6:,.0f} MB per step '
                           f'at {bandwidth / 1e9:.1f} GB/s)',
        'share of the limit': f'{100 * decode / limit:.0f}%',
    }
    return rows, dict(decode_tokens_per_sec=decode, bytes_per_token=read,
                      bandwidth_limit_tokens_per_sec=limit)


def training_figures(side):
    """
    Compute the rate at the run's own accumulation, and the cost of gradient statistics on our side.
    """
    s, rows, numbers = side.s, {}, {}
    n = s['gradient_accumulation_steps']
    if n != s['accumulation']:
        passes = (side.median('forward') + side.median('backward')) / s['accumulation']
        tokens = n * tokens_per_step(s) / s['accumulation']
        rate = tokens / (n * passes + side.median('optimizer'))
        rows[f'tokens/s, accumulation {n}'] = f'{rate:,.0f} (from the parts)'
    if 'gradient statistics' in side.times:
        seconds, interval = side.median('gradient statistics'), s['gradient_log_interval']
        text = spread(side.times['gradient statistics'])
        if interval:
            share = 100 * seconds / interval / side.median('whole')
            text += f': {share:.2f}% of a step at gradient_log_interval={interval}'
        rows['gradient statistics'] = text
        numbers['gradient_statistics'] = seconds
    return rows, numbers


def waiting_figures(side):
    share = sum(side.times['waiting']) / sum(side.times['whole'])
    return {'waiting for data': f'{100 * share:.2f}% of the steps'}, dict(waiting_share=share)


def estimate_figures(side, model):
    """Return the memory estimate of train.py's start-up report, to compare with the measurement."""
    s = side.s
    sizes = memory_estimate(model.config, s['batch_size'], s['dtype'], torch.device(s['device']),
                            s['accumulation'], optimizer=s['optimizer'],
                            lora=getattr(model, 'lora', None))
    if s['device'] == 'cpu':
        base = side.info['base']
        add_process(sizes, base.get('resident', base['peak']))
    rows = {f'estimated: {part}': f'{size / GIB:.2f} GiB' for part, size in sizes.items() if size}
    return rows, dict(memory_estimate=sizes)


def start_figures(side):
    peak, base = max(side.memory.values()), max(side.info['base'].values())
    start = f"{side.info['setup'] + side.first:.1f} s"
    compiling = 0.0
    if side.s['compile']:
        compiling = side.info.get('prepared', max(0.0, side.first - side.median('whole')))
        start += f', {compiling:.1f} of it compiling'
    rows = {'peak memory': f'{peak / GIB:.2f} GiB', 'to the first step': start}
    return rows, dict(peak_bytes=peak, base_bytes=base, first_step=side.first,
                      setup=side.info['setup'], compile=compiling)


def add_ratios(rows, numbers, side, first):
    """
    Add how many times as fast the first side is, round by round, and how much memory it takes.
    """
    scale = tokens_per_step(side.s) / tokens_per_step(first.s)
    pairs = zip(first.times['whole'], side.times['whole'])
    ratios = [theirs / ours / scale for ours, theirs in pairs]
    memory_ratio = max(first.memory.values()) / max(side.memory.values())
    numbers['first_is_faster_by'] = statistics.median(ratios)
    rows[f'{first.name}, tokens/s'] = spread(ratios, 'x', 1.0)
    rows[f'{first.name}, peak memory'] = f'{memory_ratio:.2f} x'


def print_table(columns):
    """Print [(name, rows, numbers)] with one column each. A row may be missing in some."""
    names = list(dict.fromkeys(row for _, rows, _ in columns for row in rows))
    table = [['', *(name for name, _, _ in columns)]]
    for row in names:
        table.append([row, *(rows.get(row, '') for _, rows, _ in columns)])
    widths = [max(map(len, column)) for column in zip(*table)]
    for label, *cells in table:
        aligned = [f'{cell:>{width}}' for cell, width in zip(cells, widths[1:])]
        print(printable(f'{label:<30}' + '  '.join(aligned)))
