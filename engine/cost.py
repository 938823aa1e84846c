"""
What a model costs: parameters, FLOPs, memory; and the checkpoints of others, in and out.

    python model.py config/full_llama_1.36b.py --n_layer=24     # describe: parameters, FLOPs, memory (built without memory)
    python model.py --ckpt=out                                  # inspect a checkpoint
    python model.py --ckpt=out --consolidate=ckpt.pt            # a sharded checkpoint as one file
    python model.py --ckpt=out --export=hf_dir                  # for Hugging Face's transformers; --export=model.onnx for ONNX
    python model.py --list=True                                 # every config with its counts
"""
import contextlib
import os
import sys
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.common import first_line
from engine.machine import keep_dynamo_out, pick_device
from model import GPT, GPTConfig


class LiveBytes(TorchDispatchMode):
    """While entered: the bytes of the tensors made inside that are alive (now) and were at most (peak); views count with what they are of."""
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.alive:
                storage = t.untyped_storage()
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def freed(self, address, nbytes):
        self.alive.discard(address)
        self.now -= nbytes


keep_dynamo_out(LiveBytes.__torch_dispatch__)


def memory_estimate(config, batch_size, dtype, device, accumulation=1, parallelism='none', world_size=1, optimizer='adamw'):
    """
    {'weights', 'gradients', 'moments', 'gathered', 'activations', 'peak'}: bytes that tensors take on one device in a training step of batch_size
    sequences of block_size under dtype's autocast, the optimizer's moments included (AdamW two, Muon one), without torch.compile, which needs less. The step
    is run, on tensors without data unless it is a small one, so it holds for any part. activations is the rest of the peak: what autograd saved, autocast's
    copies of weights, temporaries. parallelism: none, ddp, zero1 or fsdp (https://arxiv.org/abs/1910.02054). gathered is what fsdp has whole at the worst moment:
    embeddings and head in float32, their gradients and the buffer that these are reduced in; a block at work, the next one, and its gradients.
    """
    fake, work = contextlib.nullcontext(), batch_size * config.block_size * config.n_embd * (12 * config.n_layer * config.n_embd + config.vocab_size)
    if work > 2 ** 32 or device.type != 'cpu':  # else the step itself, a tenth of a second, is sooner done than this is imported
        from torch._subclasses.fake_tensor import FakeTensorMode
        fake = FakeTensorMode()
    with torch.random.fork_rng([]), fake, torch.device(device), LiveBytes() as live:
        model = GPT(config)
        states = live.now
        idx = torch.zeros(batch_size, config.block_size, dtype=torch.long)
        for _ in range(min(accumulation, 2)):  # from the second micro-batch on, gradients live through the forward
            with torch.autocast(device.type, getattr(torch, dtype)) if dtype != 'float32' else contextlib.nullcontext():
                loss = model(idx, idx)[1]
            loss.backward()
    shard = 1 / world_size
    shares = {'none': (1, 1, 2), 'ddp': (1, 1, 2), 'zero1': (1, 1, 2 * shard), 'fsdp': (shard, shard, 2 * shard)}[parallelism]
    sizes = dict(zip(('weights', 'gradients', 'moments'), (round(states * share) for share in shares)), gathered=0)
    if optimizer == 'muon':
        sizes['moments'] -= round(sum(4 * p.numel() for p in model.muon_parameters()) * shares[2] / 2)
    if parallelism == 'fsdp':
        in_blocks = sum(p.numel() for p in model.transformer.h.parameters())
        sizes['gathered'] = 12 * (model.get_num_params(False) - in_blocks) + (3 * getattr(torch, dtype).itemsize + 4) * in_blocks // config.n_layer
    sizes['activations'] = live.peak - 2 * states
    return sizes | {'peak': sum(sizes.values())}


# python model.py: describe, inspect, list
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def describe(model, settings, device, dtype):
    """What a model is and costs, as text, trained with these settings. Works on the meta device, where a model takes no memory."""
    c, n = model.config, model.get_num_params(non_embedding=False)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cache = 2 * 2 * c.n_layer * (c.n_kv_head or c.n_head) * (c.n_embd // c.n_head) * c.block_size
    lines = ['architecture'] + [f'  {k:<24} {v}' for k, v in vars(c).items() if v is not None]
    lines += ['parameters'] + [f'  {k:<24} {v:>16,}' for k, v in model.params_by_part().items()]
    lines += [f'  {k:<24} {v:>16,}' for k, v in (('total', n), ('trainable', trainable), ('non-embedding', model.get_num_params()))]
    full, causal = model.flops_by_part(), model.flops_by_part(causal=True)
    lines += [f"{f'FLOPs a token at sequence length {c.block_size}':<42} {'full':>16} {'causal':>16}  matmuls only; causal counts half of the scores"]
    rows = [(f'{part}, forward', full[part], causal[part]) for part in full] + [('forward', sum(full.values()), sum(causal.values())),
            ('training, 3 x forward', model.flops_per_token(), model.flops_per_token(causal=True))]
    lines += [f'  {name:<40} {flops:>16,.0f} {half:>16,.0f}' for name, flops, half in rows]
    batch_size = settings.get('batch_size', 1)
    batch_size = 1 if batch_size == 'auto' else batch_size
    if batch_size < 1:
        raise ValueError(f'batch_size must be positive, not {batch_size}')
    optimizer = settings.get('optimizer', 'adamw')
    training = memory_estimate(c, batch_size, dtype, device, settings.get('gradient_accumulation_steps', 1), optimizer=optimizer)
    training = {k: v for k, v in training.items() if k in ('weights', 'gradients', 'moments', 'activations')}
    for title, sizes in ((f'memory to train, {optimizer}, {dtype} on {device}, batch_size {batch_size}, one process, estimated', training),
                         ('memory to sample, bfloat16', {'weights': 2 * n, f'KV cache, {c.block_size} tokens': cache})):
        lines += [title] + [f'  {k:<24} {v / 1e9:>12,.3f} GB' for k, v in (sizes | {'total': sum(sizes.values())}).items()]
    return '\n'.join(lines)


def meta_model(settings):
    """The model of a dict of settings on the meta device; a vocabulary that the settings leave open comes from the data set, or is GPT-2's."""
    from data.loader import prepare_facts, read_meta
    folder = os.path.join(HERE, 'data', settings['dataset'])
    script = os.path.join(folder, 'prepare.py')
    vocab = read_meta(folder).get('vocab_size') or (prepare_facts(script)['vocab_size'] if os.path.exists(script) else None) or 50257
    if settings['vocab_size'] is not None:
        vocab = min(vocab, settings['vocab_size'])
    with torch.device('meta'):
        return GPT(GPTConfig.from_settings(settings, vocab))


def main():
    from engine.checkpoint import load_checkpoint, model_of, save_checked
    from engine.huggingface import load_weights, save_onnx
    from configurator import configure, fail
    ckpt = ''  # inspect this checkpoint: a file, or a run's out_dir
    consolidate = ''  # write the checkpoint, sharded or not, to this one file, as train.py writes ckpt.pt
    export = ''  # write the checkpoint for others: a folder for Hugging Face's transformers, or a file that ends in .onnx
    list = False  # print a table of every file in config/ with its counts
    config, given = configure(__file__, os.path.join(HERE, 'train.py'))
    try:
        if config['list']:
            folder = os.path.join(HERE, 'config')
            print(f"{'config':<30} {'preset':<7} {'layers':>6} {'width':>6} {'heads':>6} {'block':>6} {'vocab':>6} "
                  f"{'parameters':>14} {'non-embedding':>14} {'GFLOP/token':>12}")
            for name in sorted(n for n in os.listdir(folder) if n.endswith('.py') and not n.startswith('ablate_')):  # which are several models each
                settings, _ = configure(__file__, os.path.join(HERE, 'train.py'), argv=[os.path.join(folder, name)])
                model = meta_model(settings)
                c = model.config
                print(f"{name:<30} {settings['arch_preset']:<7} {c.n_layer:>6} {c.n_embd:>6} {c.n_head:>6} {c.block_size:>6} {c.vocab_size:>6} "
                      f'{model.get_num_params(False):>14,} {model.get_num_params():>14,} {model.flops_per_token() / 1e9:>12.4g}')
        elif config['consolidate']:
            if not config['ckpt']:
                raise ValueError('--consolidate=FILE needs --ckpt=FOLDER, what to read')
            saved, path = load_checkpoint(config['ckpt']), config['consolidate']
            if os.path.exists(path):
                raise ValueError(f"'{path}' is there already: another name, or remove it first")
            try:
                save_checked({k: v for k, v in saved.items() if k != 'path'}, path + '.tmp')
                os.replace(path + '.tmp', path)
            except (OSError, RuntimeError, ValueError) as e:
                with contextlib.suppress(OSError):
                    os.remove(path + '.tmp')
                raise OSError(f"'{path}' could not be written: {first_line(e)}") from e
            print(f"{saved['path']} -> {path}")
        elif config['export']:
            if not config['ckpt']:
                raise ValueError('--export=FOLDER needs --ckpt=FOLDER, what to read')
            saved, path = load_weights(config['ckpt']), config['export']
            model = model_of(saved)
            if path.endswith('.onnx'):
                save_onnx(model, path)
            else:
                model.to(torch.float32 if config['dtype'] == 'auto' else getattr(torch, config['dtype'])).save_pretrained(path, saved)
                if not os.path.exists(os.path.join(path, 'tokenizer.json')):
                    print('without a tokenizer: the checkpoint names none that fits', file=sys.stderr)
            print(f"{saved['path']} -> {path}")
        elif config['ckpt']:
            saved = load_weights(config['ckpt'])
            print(describe(model_of(saved), saved.get('config') or {}, *pick_device()))
            print(f"checkpoint {saved['path']}\n  {'iterations':<24} {saved.get('iter_num')}\n  {'best val loss':<24} {saved.get('best_val_loss')}")
            for split, values in (saved.get('losses') or {}).items():
                print(f'  {split:<24} ' + ', '.join(f'{k} {v:.4f}' for k, v in values.items()))
            for key in ('tokenizer', 'torch_version'):
                print(f'  {key:<24} {str(saved.get(key)):.120}')
            print('config')
            for key, value in (saved.get('config') or {}).items():
                print(f'  {key:<24} {value!r}')
        else:
            print(describe(meta_model(config), config, *pick_device(config['device'], config['dtype'])))
    except (ValueError, OSError) as e:
        fail(str(e))
