"""
Estimate the cost of training on many ranks (bench.py --plan), with the formulas of
config/PARAMETER_FORMULAS.md and the speed of one device.
"""
import math
from dataclasses import asdict, replace

import numpy as np
import torch

from engine.common import GIB, optional
from engine.cost import memory_estimate
from engine.lora import add_adapters
from engine.machine import free_memory
from engine.side import Side
from model import GPT


def plan_ranks(config, s, model, device):
    """
    Print, for each number of ranks and each of DDP, ZeRO-1, FSDP and, with fsdp_shard_size, hybrid
    FSDP, memory per rank, bytes sent per rank and step, and step time. The time is a range: at best
    communication is completely hidden behind computation, at worst not at all. Return the rows and
    the device's speed.
    """
    rate, source = config['plan_tflops'] * 1e12, 'as given'
    if not rate:
        rate, source = measure_rate(s, model, device)
    print(f'one device: {rate / 1e12:.3g} TFLOP/s ({source}); '
          f"interconnect {config['interconnect_gbps']:g} Gbit/s per rank, each way")
    print(f"{'ranks':>6} {'mode':>7} {'micro-batches':>14} {'tokens/step':>14} {'GiB/rank':>10} "
          f"{'GB sent':>9} {'in group':>9} {'s/step':>17} {'tokens/s':>23}")
    bytes_per_sec = config['interconnect_gbps'] * 1e9 / 8
    in_group_per_sec = config['node_gbps'] * 1e9 / 8 or bytes_per_sec
    shard_size, rows = s['fsdp_shard_size'], []
    for ranks in map(int, config['plan'].split(',')):
        micro_batches = max(1, math.ceil(s['gradient_accumulation_steps'] / ranks))
        tokens_per_rank = micro_batches * s['batch_size'] * model.config.block_size
        computing = tokens_per_rank * model.flops_per_token() / rate
        traffic = bytes_sent(model, s['dtype'], micro_batches, ranks, shard_size)
        for mode, (sent, in_group) in traffic.items():
            divided = ('fsdp', shard_size) if mode == 'hybrid' else (mode, ranks)
            sizes = memory_estimate(model.config, s['batch_size'], s['dtype'], device,
                                    micro_batches, *divided, s['optimizer'],
                                    lora=getattr(model, 'lora', None))
            sending = sent / bytes_per_sec + in_group / in_group_per_sec
            seconds = max(computing, sending), computing + sending
            rows.append(dict(ranks=ranks, mode=mode, micro_batches=micro_batches,
                             tokens=tokens_per_rank * ranks, memory=sizes['peak'], sizes=sizes,
                             sent=sent, sent_in_group=in_group, seconds=seconds))
            print_plan_row(rows[-1])
    return dict(plan=rows, device_flops=rate, source=source)


def print_plan_row(row):
    low, high = row['seconds']
    seconds = f'{low:,.3f}-{high:,.3f}'
    rates = f"{row['tokens'] / high:,.0f}-{row['tokens'] / low:,.0f}"
    print(f"{row['ranks']:>6} {row['mode']:>7} {row['micro_batches']:>14} {row['tokens']:>14,} "
          f"{row['memory'] / GIB:>10.2f} {row['sent'] / 1e9:>9.2f} "
          f"{row['sent_in_group'] / 1e9:>9.2f} {seconds:>17} {rates:>23}")


def memory_figure(rows, title):
    """Return a figure with the memory per rank of each row of a plan as a bar of its parts."""
    Figure = optional('matplotlib.figure', '--plan_picture').Figure
    figure = Figure(figsize=(7.5, 4.5), layout='constrained')
    ax = figure.subplots()
    labels = [f"{row['mode']}\n{row['ranks']}" for row in rows]
    top = np.zeros(len(rows))
    for part in ('weights', 'gradients', 'moments', 'gathered', 'activations'):
        gibibytes = np.array([row['sizes'][part] / GIB for row in rows])
        ax.bar(range(len(rows)), gibibytes, bottom=top, label=part)
        top += gibibytes
    ax.set_xticks(range(len(rows)), labels)
    ax.set(xlabel='mode and number of ranks', ylabel='memory per rank, GiB', title=title)
    ax.legend(frameon=False)
    return figure


def bytes_sent(model, dtype, micro_batches, ranks, shard_size=0):
    """
    Return {mode: (bytes that a rank sends per step, bytes that it sends within its group of
    shard_size ranks)}. DDP reduces float32 gradients, which frozen weights do not have. ZeRO-1 also
    sends the new weights. In every micro-batch, FSDP gathers the blocks in dtype for the forward
    and for the backward pass, gathers the rest once in float32, and reduces float32 gradients.
    Hybrid FSDP does so within the group, and once per step reduces the rank's share of the
    gradients over the groups.
    """
    n = model.get_num_params(False)
    in_blocks = sum(p.numel() for p in model.transformer.h.parameters())
    size = getattr(torch, dtype).itemsize
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_micro_batch = 2 * size * in_blocks + 4 * (n - in_blocks) + 4 * n_trained

    def ring(members):
        return (members - 1) / members

    sent = {'ddp': (8 * n_trained * ring(ranks), 0), 'zero1': (12 * n_trained * ring(ranks), 0),
            'fsdp': (micro_batches * per_micro_batch * ring(ranks), 0)}
    if shard_size and ranks > shard_size and ranks % shard_size == 0:
        sent['hybrid'] = (8 * n_trained / shard_size * ring(ranks // shard_size),
                          micro_batches * per_micro_batch * ring(shard_size))
    return sent


def measure_rate(s, model, device):
    """Measure (training FLOP/s of one device, source) with as many layers as fit comfortably."""
    lora = getattr(model, 'lora', None)

    def needed(layers):
        config = replace(model.config, n_layer=layers)
        return memory_estimate(config, s['batch_size'], s['dtype'], device, lora=lora)['peak']

    layers = model.config.n_layer
    while layers > 1 and needed(layers) > 0.6 * free_memory(device):
        layers = max(1, layers // 2)
    config = replace(model.config, n_layer=layers)
    side = Side('one device', s | dict(what='train', model=asdict(config), accumulation=1))
    side.step()
    seconds = min(side.step()['whole'] for _ in range(3))
    side.close()
    smaller = GPT.without_data(config)
    if lora:
        add_adapters(smaller, lora)
    source = 'measured here'
    if layers < model.config.n_layer:
        source += f', with {layers} of {model.config.n_layer} layers'
    return smaller.flops_per_token() * s['batch_size'] * config.block_size / seconds, source
