"""Estimate what a run costs, and report it before the run begins."""
import shutil
from dataclasses import dataclass

import torch

from engine.common import GIB, UserError, duration, first_line
from engine.compile import choose_compile
from engine.cost import add_process, memory_estimate
from engine.machine import device_name, memory, peak_flops, total_memory
from engine.optim import describe
from engine.parallel import MODES
from model import REGISTRY

QUICK_LOOK = ('for a quick look: --max_iters=20 --eval_iters=2 --batch_size=2 '
              '--gradient_accumulation_steps=1 --block_size=128, or config/preset_quick_test.py')


@dataclass
class Costs:
    """The estimated cost of a run; see measure_costs()."""
    flops_per_token: float  # to train
    tokens_per_iter: int
    peak_flops: float  # per second and device
    peak_source: str
    expected_seconds: float  # at half of the peak
    compiled: bool
    compile_reason: str
    estimate: dict  # bytes
    too_large: bool  # whether the estimate exceeds this machine's memory
    flex: bool  # whether doc_mask uses flex attention
    disk_bytes: float  # of all checkpoints, at most

    def as_numbers(self, model):
        """Return the costs as numbers for the run log."""
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return dict(total_params=model.get_num_params(False), trainable_params=trainable,
                    non_embedding_params=model.get_num_params(),
                    tokens_per_iter=self.tokens_per_iter, flops_per_token=self.flops_per_token,
                    hardware_peak_tflops=self.peak_flops / 1e12, peak_source=self.peak_source,
                    memory_estimate=self.estimate, torch_version=str(torch.__version__))


def measure_costs(settings, given, model, loss, distillation, opt, state_tensors, batches, splits,
                  iter_num, parallel, console):
    """
    Estimate the Costs of the rest of a run, the same on all processes. Measure the peak if it is
    unknown.
    """
    device = parallel.device
    # before the peak, whose measurement leaves memory to this process that is not the run's
    estimate = estimate_memory(settings, model, loss, opt, state_tensors, batches, parallel,
                               console)
    peak, peak_source = peak_flops(device, settings['dtype'], settings['peak_tflops'])
    peak = parallel.mean(peak)  # all processes must decide alike
    block_size = model.config.block_size
    flops_per_token = model.flops_per_token()
    if distillation:
        flops_per_token += distillation.flops_per_token
    tokens_per_iter = batches.accumulation_steps * batches.batch_size * block_size
    iters_left = 0 if settings['eval_only'] else settings['max_iters'] - iter_num
    evaluations = iters_left // settings['eval_interval'] + 1
    eval_tokens = sum(split.n for split in splits.values()) * block_size
    # an evaluation is forward only, a third of training
    tokens = iters_left * tokens_per_iter + evaluations * eval_tokens / 3
    expected = tokens * flops_per_token / (0.5 * peak * parallel.world_size)
    compiled, why = choose_compile(settings, given, device, expected)
    ranks_here = parallel.world_size if device.type == 'cpu' else 1
    too_large = estimate['peak'] * ranks_here > total_memory(device)
    # FSDP compiles block by block, and the mask is made outside the blocks
    masked = model.config.doc_mask_token is not None
    flex = masked and compiled and parallel.mode != 'fsdp' and model.can_use_flex(device.type)
    # a checkpoint has weights and at most two moments; the newest, the previous, the best, and one
    # that is being written may all differ
    n_checkpoints = 0 if settings['eval_only'] else 4
    if settings['keep_interval']:
        n_checkpoints += iters_left // settings['keep_interval']
    disk_bytes = n_checkpoints * sum(3 * p.nbytes for p in model.parameters() if p.requires_grad)
    return Costs(flops_per_token, tokens_per_iter, peak, peak_source, expected, compiled, why,
                 estimate, too_large, flex, disk_bytes)


def startup_report(settings, costs, attention, model, opt, batches, splits, data_sets, tokenizer,
                   iter_num, parallel):
    """
    Return (summary, details), two dicts {title: text} about the model, the data, the expected speed
    and the cost. Every run prints the summary, and with --verbose=True the details too. `attention`
    is what choose_attention() returned.
    """
    c, device, max_iters = model.config, parallel.device, settings['max_iters']
    tokens, train_loader = costs.tokens_per_iter, batches.loader
    epochs = max_iters * tokens / train_loader.n_tokens
    n_params = model.get_num_params(False)
    n_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trained = f', {n_trainable:,} of them trained' if n_trainable < n_params else ''
    schedule = settings['lr_schedule'] if settings['decay_lr'] else 'constant'
    memory_here = total_memory(device) / GIB
    resumed = f' from {iter_num} on' if iter_num else ''
    training = (f'{max(0, max_iters - iter_num):,} iterations{resumed}, {tokens:,} tokens each, '
                f'{describe(opt)}, {schedule}')
    read = f', {epochs:,.0f} epochs' if epochs >= 100 else f', {epochs:.3g} epochs'
    if settings['eval_only']:
        training, read = f'none, only an evaluation of iteration {iter_num}', ''
    processes = f' x {parallel.world_size}, {MODES[parallel.mode]}' if parallel.distributed else ''
    if parallel.n_replicas > 1:
        processes += f' in groups of {parallel.shard_size}'
    summary = {
        'model': f'{n_params:,} parameters{trained}: {c.n_layer} layers, width {c.n_embd}, context '
                 f'{c.block_size}, {c.normalization}, {c.position_encoding}, {c.ffn_type}',
        'data': f"{settings['dataset']}: {count_tokens(train_loader):,} train tokens, tokenizer "
                f"{tokenizer.name if tokenizer else 'unknown'}{read}{packed_text(train_loader)}",
        'training': training,
        'machine': f"{device_name(device)}{processes}, {settings['dtype']}, "
                   f"{'compiled' if costs.compiled else 'not compiled'}, micro-batches of "
                   f'{batches.batch_size} sequences x {batches.per_rank}',
        'cost': f"about {costs.estimate['peak'] / GIB:.2f} of {memory_here:.0f} GiB, "
                f'roughly {duration(costs.expected_seconds)}',
    }
    sequences = batches.batch_size * batches.accumulation_steps
    at_half_peak = 0.5 * costs.peak_flops * parallel.world_size / costs.flops_per_token
    details = {
        'start': f"iteration {iter_num} of {max_iters} ({settings['init_from']})",
        'data sets': data_line(data_sets, train_loader, splits['val'].loader, max_iters * tokens),
        'architecture': architecture_line(c, costs.flex),
        'parameters': f'{n_params:,} total, {n_trainable:,} trainable, '
                      f'{model.get_num_params():,} non-embedding',
        'shape': f'{c.n_layer} layers, width {c.n_embd}, {c.n_head} heads, '
                 f'{c.kv_heads} kv heads, sequence {c.block_size}, '
                 f'vocabulary {c.vocab_size}',
        'batch': f'{batches.batch_size} sequences x {batches.per_rank} accumulation x '
                 f'{parallel.world_size} processes = {sequences} sequences, {tokens:,} tokens per '
                 f'iteration, {epochs:.2f} epochs in all',
        'optimizer': f"{describe(opt)}, {schedule}, weight decay {settings['weight_decay']:g}",
        'device': f'{device} ({device_name(device)}) x {parallel.world_size}, '
                  f"{memory_here:.0f} GiB, {settings['dtype']}, "
                  f'{MODES[parallel.mode]}, compile {costs.compiled} '
                  f'({costs.compile_reason})',
        'peak': f'{costs.peak_flops / 1e12:.4g} TFLOP/s per device ({costs.peak_source})',
        'FLOPs per token': flops_line(model),
        'memory': memory_line(costs.estimate, costs.compiled),
        'expected': f'{at_half_peak:,.0f} tokens/s at 50 % of peak: '
                    f'{duration(costs.expected_seconds)} for the run with its evaluations',
    }
    if attention:
        details['attention'] = attention
    return summary, details


def say_startup(summary, details, costs, out_dir, verbose, console):
    """Print the start-up report, in short or as a whole, and what may go wrong."""
    if verbose:
        lines, width = summary | details | {'out_dir': out_dir}, 16
    else:
        lines, width = summary | {'out_dir': f'{out_dir}; more: --verbose=True'}, 9
    for title, text in lines.items():
        console.say(f'{title:<{width}} {text}')
    if costs.too_large:
        console.say('NOTE: this will probably run out of memory; use a smaller --batch_size or '
                    '--activation_checkpointing=True')
    free = shutil.disk_usage(out_dir).free
    if costs.disk_bytes > free:
        console.say(f'NOTE: the checkpoints may need {costs.disk_bytes / 1e6:,.0f} MB in out_dir, '
                    f'where {free / 1e6:,.0f} MB are free')
    if costs.expected_seconds > 3600:
        console.say(f'NOTE: on this device the run will take {duration(costs.expected_seconds)} or '
                    f'more; {QUICK_LOOK}')


def count_tokens(loader):
    """Return the number of tokens in a loader, without what pads packed windows."""
    if not loader.packed:
        return loader.n_tokens
    return sum(sum(shard.lengths) for shard in loader.shards)


def packed_text(loader):
    """Return how conversations were packed; '' for a data set of text."""
    if not loader.packed:
        return ''
    n = sum(len(shard.lengths) for shard in loader.shards)
    n_cut = sum(shard.n_cut for shard in loader.shards)
    return f', {n:,} conversations in {loader.n_windows:,} windows, {n_cut:,} cut to block_size'


def data_line(data_sets, train_loader, val_loader, total_tokens):
    line = f'{count_tokens(train_loader):,} train tokens, {count_tokens(val_loader):,} val tokens'
    for (name, share, _), loader in zip(data_sets, getattr(train_loader, 'loaders', [])):
        epochs = total_tokens * share / loader.n_tokens
        line += (f'; {share:.3g} from {name}, {epochs:.2f} epochs of its '
                 f'{count_tokens(loader):,} tokens')
    return line


def architecture_line(c, flex):
    parts = [str(getattr(c, kind)) for kind in REGISTRY]
    parts += ['biases' if c.bias else 'no biases', 'tied' if c.weight_tying else 'untied']
    parts += [key for key in ('qk_norm', 'zero_init_residual', 'token_shift') if getattr(c, key)]
    if c.logit_softcap:
        parts.append(f'logit_softcap {c.logit_softcap:g}')
    if c.doc_mask_token is not None:
        parts.append(f"doc_mask by {'flex attention' if flex else 'a dense mask'}")
    return ', '.join(parts)


def flops_line(model):
    parts, to_train = model.flops_by_part(), model.flops_by_part(training=True)
    each = ', '.join(f'{part} {n / 1e9:.4g}' for part, n in to_train.items())
    ratio = (parts['attention projections'] + parts['attention scores']) / parts['ffn']
    return (f'{model.flops_per_token() / 1e9:.4g} GFLOP to train, attention in full ({each}); '
            f'{model.flops_per_token(causal=True) / 1e9:.4g} causal (half of the scores); '
            f'attention/FFN ratio {ratio:.2f}')


def memory_line(estimate, compiled):
    parts = ', '.join(f'{key} {size / GIB:.2f}' for key, size in estimate.items()
                      if size and key != 'peak')
    note = ' (the step without torch.compile)' if compiled else ''
    return f"about {estimate['peak'] / GIB:.2f} GiB per device estimated: {parts}{note}"


def estimate_memory(settings, model, loss, opt, state_tensors, batches, parallel, console):
    """
    Estimate the memory of a training step and of state_tensors. On a CPU the estimate includes the
    rest of the process, because memory() counts all of it. If the step cannot be run without data,
    print a NOTE and use zeros.
    """
    device, present = parallel.device, memory(parallel.device)
    try:
        estimate = memory_estimate(model.config, batches.batch_size, settings['dtype'], device,
                                   batches.per_rank, parallel.mode, parallel.shard_size,
                                   settings['optimizer'], loss, getattr(model, 'lora', None))
    except UserError:  # the micro-batch is too large for any machine
        raise
    except Exception as e:  # not everything runs on tensors without data
        console.say(f'NOTE: cannot estimate the memory of a step: {first_line(e)}')
        estimate = dict(weights=0, moments=0, peak=0)
    for kind, tensors in state_tensors.items():
        estimate[kind] = sum(parallel.local(t).nbytes for t in tensors.values())
        estimate['peak'] += estimate[kind]
    if device.type == 'cpu':
        there = estimate['weights'] + sum(estimate[kind] for kind in state_tensors)
        there += bool(opt.state) * estimate['moments']
        add_process(estimate, present.get('resident', present['peak']) - there)
    return estimate
