"""
Spread a run over processes: one process, DDP, ZeRO-1 (https://arxiv.org/abs/1910.02054) or FSDP2.
FSDP2 divides the weights among all processes or, if it is hybrid, among the processes of each
group, and every group holds a full copy. train.py calls the same methods in every mode.
"""
import math
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.overrides import TorchFunctionMode

from engine.common import UserError, end_with_parent, first_line, script_name, show_error
from model import GPT

MODES = {'none': 'one process', 'ddp': 'DDP', 'zero1': 'ZeRO-1', 'fsdp': 'FSDP'}


class Parallel:
    """
    `mode` is a key of MODES. rank, world_size and local_rank come from torchrun. Without torchrun
    there is one process, and collectives return what they are given. With FSDP, `shard_size`
    neighbouring ranks divide the weights among themselves, and n_replicas such groups repeat them;
    fsdp_shard_size=0 makes all ranks one group.
    """
    def __init__(self, use_zero1=False, use_fsdp=False, fsdp_shard_size=0):
        self.distributed = 'RANK' in os.environ
        self.rank = int(os.environ.get('RANK', 0))
        self.world_size = int(os.environ.get('WORLD_SIZE', 1))
        self.local_rank = int(os.environ.get('LOCAL_RANK', 0))
        self.master = self.rank == 0
        self.device = torch.device('cpu')
        self.on_host = None  # a process group for collectives on the CPU; connect() sets it
        self.mode = 'none'
        if self.distributed:
            self.mode = 'fsdp' if use_fsdp else 'zero1' if use_zero1 else 'ddp'
        self.shard_size = self.world_size
        if self.mode == 'fsdp' and fsdp_shard_size:
            self.shard_size = fsdp_shard_size
        if self.world_size % self.shard_size:
            raise UserError(f'fsdp_shard_size={fsdp_shard_size} does not divide the '
                            f'{self.world_size} processes: use the number of GPUs of a node')
        self.n_replicas = self.world_size // self.shard_size

    # -----------------------------------------------------------------------------------------
    # start and end

    def own_device(self, device):
        """
        Return the device that --device means for this process. Under torchrun each process has its
        own GPU.
        """
        if not self.distributed or device not in ('auto', 'cuda'):
            return device
        if not torch.cuda.is_available():
            return 'cpu' if device == 'auto' else device  # gloo does not work on mps
        processes, gpus = int(os.environ['LOCAL_WORLD_SIZE']), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(f'{processes} processes on this machine, which has {gpus} GPUs; '
                            f'use --nproc_per_node={gpus}')
        return f'cuda:{self.local_rank}'

    def connect(self, device, backend='auto'):
        """Join the process group. Collectives use `device` from here on."""
        self.device = device
        if not self.distributed:
            return
        if backend == 'nccl' and device.type != 'cuda':
            raise UserError(f'backend=nccl needs a GPU for each process, and this is '
                            f'{device.type}; use --backend=gloo')
        if backend == 'auto':
            backend = 'nccl' if device.type == 'cuda' else 'gloo'
        device_id = device if device.type == 'cuda' else None
        dist.init_process_group(backend=backend, device_id=device_id)
        self.on_host = self.host_group()
        sys.excepthook = show_lost_process
        end_with_parent()  # save and end if torchrun itself is killed

    def leave(self, code):
        """Exit all processes together with this status."""
        if self.distributed:
            dist.barrier()
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(code)  # Python's shutdown with gloo's threads aborts a few times in 1000
        raise SystemExit(code)

    # -----------------------------------------------------------------------------------------
    # agreement between processes

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM):
        """Reduce a tensor over all processes, in place, and return it."""
        if self.distributed:
            dist.all_reduce(tensor, op)
        return tensor

    def all_max(self, number):
        """
        Return, on all processes, the largest int that any of them passes. This waits for the other
        processes, but not for a GPU.
        """
        if self.distributed:
            on_cpu = torch.tensor(number)
            dist.all_reduce(on_cpu, dist.ReduceOp.MAX, self.on_host)
            number = on_cpu.item()
        return number

    def all_equal(self, number):
        """Return whether all processes pass the same int."""
        return self.all_max(number) == -self.all_max(-number)

    def mean(self, number):
        """Return, on all processes, the mean of the floats that they pass."""
        if not self.distributed:
            return number
        total = self.all_reduce(torch.tensor(number, dtype=torch.float64, device=self.device))
        return total.item() / self.world_size

    def gather_objects(self, value, group=None):
        """
        Return, on all processes, the list of values that they pass, which must be plain values.
        """
        if not self.distributed:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group)
        return values

    def host_group(self):
        """
        Return a process group of its own for collectives on the CPU, so that a thread can use them
        while training uses others, or None in a single process.
        """
        return dist.new_group(backend='gloo') if self.distributed else None

    def barrier(self):
        if self.distributed:
            dist.barrier()

    def fail(self, message):
        """End all processes, which must all call this. Rank 0 prints the message."""
        raise UserError(message) if self.master else SystemExit(2)

    # -----------------------------------------------------------------------------------------
    # the model and its gradients

    def new_model(self, config):
        """
        Build a model. With FSDP it has no data yet: after wrap(), new_weights() gives each process
        its rows, so that none ever holds the whole model.
        """
        return GPT.without_data(config) if self.mode == 'fsdp' else GPT(config)

    def wrap(self, raw_model, dtype, reshard_after_forward=True, min_num_params=0):
        """
        Move the model to the device and return what to train: the model itself, the model inside
        DDP, or, with FSDP2, the model with every parameter divided among the processes. A model
        without data gets memory for the rows of this process.
        """
        if self.mode == 'fsdp':
            without_data = next(raw_model.parameters()).is_meta
            self._shard(raw_model, dtype, reshard_after_forward, min_num_params)
            if without_data:
                raw_model.to_empty(device=self.device)
            return raw_model
        raw_model.to(self.device)
        if not self.distributed:
            return raw_model
        device_ids = [self.device] if self.device.type == 'cuda' else None
        return DDP(raw_model, device_ids=device_ids, gradient_as_bucket_view=True)

    def _shard(self, raw_model, dtype, reshard_after_forward, min_num_params):
        from torch.distributed.fsdp import (  # takes a second to import
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )
        sizes, names = (self.shard_size,), ('shard',)
        if self.n_replicas > 1:
            sizes, names = (self.n_replicas, *sizes), ('replicate', *names)
        mesh = dist.init_device_mesh(self.device.type, sizes, mesh_dim_names=names)
        # Blocks are gathered in dtype; the residual stream stays float32, as under autocast.
        param_dtype = None if dtype == 'float32' else getattr(torch, dtype)
        policy = MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False)
        for block in raw_model.transformer.h:
            if sum(p.numel() for p in block.parameters()) >= min_num_params:
                fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward,
                            mp_policy=policy)
        # The rest is one group, so that the embedding and a tied head stay one tensor.
        fully_shard(raw_model, mesh=mesh)
        register_fsdp_forward_method(raw_model, 'generate')
        self.reshard_after_forward = reshard_after_forward

    @torch.no_grad()
    def new_weights(self, raw_model):
        """
        With FSDP, give a model from new_model() the weights that GPT(config) would have in a single
        process. GPT(config) draws random numbers twice, in the constructors and in init_weights();
        this draws the same ones in the same order.
        """
        if self.mode != 'fsdp':
            return
        with InitByRows(self):
            for name, module in raw_model.named_modules():
                if hasattr(module, 'reset_parameters'):
                    module.reset_parameters()
                elif list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)):
                    raise UserError(f'FSDP cannot initialize {name}: give {type(module).__name__} '
                                    'a method reset_parameters(), as nn.Linear has it')
            raw_model.init_weights()

    def shard_optimizer(self, optimizer):
        """
        Return the optimizer, or, with ZeRO-1, one that keeps only this process's share of the
        moments.
        """
        if self.mode != 'zero1':
            return optimizer
        from torch.distributed.optim import ZeroRedundancyOptimizer
        groups = [dict(group) for group in optimizer.param_groups]  # complete with all settings
        return ZeroRedundancyOptimizer(groups, type(optimizer))

    def sync_gradients(self, model, last):
        """
        Set whether the next backward averages gradients over processes. With DDP and ZeRO-1 only
        the last micro-batch does. FSDP does so in every micro-batch, because unreduced gradients
        take as much memory as all weights; with fsdp_reshard_after_forward=False it waits for the
        last one. Hybrid FSDP averages over its groups in the last one only.
        """
        if self.mode == 'fsdp':
            model.set_requires_gradient_sync(last or self.reshard_after_forward)
            model.set_requires_all_reduce(last)
        elif self.distributed:
            model.require_backward_grad_sync = last

    def release_gathered(self, raw_model):
        """Free the weights that FSDP keeps for backward, after a forward pass without one."""
        if self.mode == 'fsdp':
            for module in (*raw_model.transformer.h, raw_model):
                if hasattr(module, 'reshard'):  # blocks below min_num_params are not sharded alone
                    module.reshard()

    def local(self, tensor):
        """Return the part of a tensor that this process holds."""
        return tensor.to_local() if self.mode == 'fsdp' else tensor

    def sum_over_shards(self, tensor):
        """
        With FSDP, return the sum of a tensor that each process computed from its shards; the tensor
        changes in place. The sum is over all processes, divided by the number of replicas, so that
        every process gets the same bits.
        """
        return self.all_reduce(tensor).div_(self.n_replicas) if self.mode == 'fsdp' else tensor

    @torch.no_grad()
    def norms(self, tensors):
        """
        Return the 2-norm of each tensor of a list, (n,) float32. With FSDP they are sharded like
        parameters.
        """
        if self.mode != 'fsdp':
            return torch.stack(torch._foreach_norm(tensors))
        norms = torch.stack(torch._foreach_norm([t.to_local() for t in tensors]))
        return self.sum_over_shards(norms.double().square()).sqrt().float()

    def global_norm(self, tensors):
        """
        Return the 2-norm of all tensors together as a 0-dim tensor, as clip_grad_norm_ computes it.
        """
        return torch.linalg.vector_norm(self.norms(tensors))

    # -----------------------------------------------------------------------------------------
    # tensors shaped like parameters: whole, or this process's share

    def moments(self, optimizer):
        """
        Return (tensors, param_groups): this process's optimizer state as {'number/key': tensor},
        and the settings of all groups. Parameters are numbered as in a single process, group after
        group, in every mode.
        """
        inner, numbers = self.inner_optimizer(optimizer)
        # the base class's state_dict(), because ZeroRedundancyOptimizer's needs a consolidation
        param_groups = torch.optim.Optimizer.state_dict(optimizer)['param_groups']
        tensors = {f'{numbers[p]}/{key}': value
                   for group in inner.param_groups for p in group['params']
                   for key, value in inner.state[p].items()}
        return tensors, param_groups

    def inner_optimizer(self, optimizer):
        """Return (the optimizer that holds this process's moments, {parameter: its number})."""
        params = [p for group in optimizer.param_groups for p in group['params']]
        # ZeroRedundancyOptimizer keeps its share of the moments in an inner optimizer, `optim`
        return getattr(optimizer, 'optim', optimizer), {p: i for i, p in enumerate(params)}

    def gather(self, tensors, copy=False):
        """
        Collect {name: whole tensor} on rank 0; each process passes a dict with some tensors or some
        rows. The result on other ranks is not meaningful. Tensors are sent one at a time. With
        copy=True rank 0 gets copies in host memory, which no later step changes.
        """
        if self.mode == 'fsdp':
            return self._gather_rows(tensors, copy)
        distinct = {id(t): t.detach() for t in tensors.values()}
        if copy and self.master:
            distinct = {key: copy_to_host(t) for key, t in distinct.items()}
        whole = {name: distinct[id(t)] for name, t in tensors.items()}
        if self.mode != 'zero1':
            return whole
        described = {name: (tuple(whole[name].shape), whole[name].dtype)
                     for name in self.owned(tensors)}
        for owner, theirs in enumerate(self.gather_objects(described)):
            for name, (shape, dtype) in theirs.items():
                if owner > 0 and self.rank == owner:
                    dist.send(whole[name].to(self.device).contiguous(), 0)
                elif owner > 0 and self.master:
                    received = torch.empty(shape, dtype=dtype, device=self.device)
                    dist.recv(received, owner)
                    whole[name] = received.cpu()  # or rank 0's GPU would hold all moments
        return whole

    def owned(self, tensors):
        """Return the names in this process's dict that no lower rank has."""
        lower = self.gather_objects(list(tensors))[:self.rank]
        return set(tensors).difference(*lower)

    def _gather_rows(self, tensors, copy):
        gathered = {}  # a tied tensor occurs twice but is gathered once
        for t in tensors.values():
            if id(t) not in gathered:
                full = t.detach().full_tensor() if hasattr(t, 'full_tensor') else t
                gathered[id(t)] = full.to('cpu', copy=copy) if self.master else None
        return {name: gathered[id(t)] for name, t in tensors.items()}

    def rows(self, shape, like):
        """
        Return (first row, number of rows) that this process holds of a tensor of that shape,
        divided like the parameter `like` (as torch.chunk does).
        """
        n = shape[0] if len(shape) else 0
        if self.mode != 'fsdp' or tuple(shape) != tuple(like.shape):  # such as AdamW's step count
            return 0, n
        per_rank = math.ceil(n / self.shard_size)
        first = min(n, self.rank % self.shard_size * per_rank)
        return first, min(n - first, per_rank)

    def place(self, own_rows, shape, like):
        """Build a tensor like the parameter `like` from this process's rows; see rows()."""
        if self.mode != 'fsdp' or tuple(shape) != tuple(like.shape):
            return own_rows
        from torch.distributed.tensor import DTensor
        return DTensor.from_local(own_rows.to(self.device), like.device_mesh, like.placements,
                                  shape=like.shape, stride=like.stride())


def copy_to_host(tensor):
    """Return a copy of a tensor in host memory, pinned if it comes from a GPU."""
    host = torch.empty_like(tensor, device='cpu', pin_memory=tensor.is_cuda)
    return host.copy_(tensor)


class InitByRows(TorchFunctionMode):
    """
    Inside this context, torch.nn.init draws the random numbers of a whole tensor, as in a single
    process, and keeps the rows that this process holds.
    """
    def __init__(self, parallel):
        super().__init__()
        self.parallel = parallel

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return func(*args, **kwargs)
        tensor = kwargs.pop('tensor')
        whole = func(torch.empty(tensor.shape), **kwargs)
        first, n = self.parallel.rows(tensor.shape, tensor)
        tensor.to_local().copy_(whole[first:first + n])
        return tensor


def show_lost_process(kind, error, trace):
    """
    Show an uncaught exception of a rank. If another process was lost, print one line, because that
    process reports the cause.
    """
    if not issubclass(kind, dist.DistError) and 'gloo' not in str(error):
        return show_error(kind, error, trace)
    rank = os.environ['RANK']
    print(f'{script_name()}: rank {rank}: another process of this run has ended or does not answer '
          f'({first_line(error)[:200]})', file=sys.stderr, flush=True)
