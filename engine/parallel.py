"""
How a run spreads over processes: one process, DDP, ZeRO-1 (https://arxiv.org/abs/1910.02054) or
FSDP2, behind one object. train.py calls the same methods in every mode.
"""
import ctypes
import math
import os
import signal
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from engine.common import UserError, first_line, script_name, show_error

MODES = {'none': 'one process', 'ddp': 'DDP', 'zero1': 'ZeRO-1', 'fsdp': 'FSDP'}


class Parallel:
    """
    mode is a key of MODES; rank, world_size and local_rank are torchrun's. Without torchrun it is
    a single process, for which every method below does nothing or returns what it was given.
    """
    def __init__(self, use_zero1=False, use_fsdp=False):
        self.distributed = 'RANK' in os.environ
        self.rank = int(os.environ.get('RANK', 0))
        self.world_size = int(os.environ.get('WORLD_SIZE', 1))
        self.local_rank = int(os.environ.get('LOCAL_RANK', 0))
        self.master = self.rank == 0
        self.device = torch.device('cpu')
        self.mode = 'none'
        if self.distributed:
            self.mode = 'fsdp' if use_fsdp else 'zero1' if use_zero1 else 'ddp'

    # -----------------------------------------------------------------------------------------
    # start and end

    def own_device(self, device):
        """The device that --device means for this process: under torchrun, a GPU of its own."""
        if not self.distributed or device not in ('auto', 'cuda'):
            return device
        if not torch.cuda.is_available():
            return 'cpu' if device == 'auto' else device  # gloo does not work on mps
        processes, gpus = int(os.environ['LOCAL_WORLD_SIZE']), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(f'{processes} processes on this machine, which has {gpus} GPUs; '
                            f'--nproc_per_node={gpus}')
        return f'cuda:{self.local_rank}'

    def connect(self, device, backend='auto'):
        """Join the process group. From here on, `device` is where collectives take place."""
        self.device = device
        if not self.distributed:
            return
        if backend == 'nccl' and device.type != 'cuda':
            raise UserError(f'backend=nccl needs a GPU for each process, and this is '
                            f'{device.type}; --backend=gloo')
        if backend == 'auto':
            backend = 'nccl' if device.type == 'cuda' else 'gloo'
        device_id = device if device.type == 'cuda' else None
        dist.init_process_group(backend=backend, device_id=device_id)
        sys.excepthook = show_lost_process
        if sys.platform == 'linux':  # if torchrun itself is killed: save and end
            PR_SET_PDEATHSIG = 1
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def leave(self, code):
        """Exit with this status, all processes together."""
        if self.distributed:
            dist.barrier()
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(code)  # Python's own shutdown under gloo's threads aborts a few times in 1000
        raise SystemExit(code)

    # -----------------------------------------------------------------------------------------
    # agreement between processes

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM):
        """Reduce over all processes, in place; returns the tensor."""
        if self.distributed:
            dist.all_reduce(tensor, op)
        return tensor

    def all_max(self, number):
        """The largest of the ints that the processes pass, on all of them."""
        if not self.distributed:
            return number
        return self.all_reduce(torch.tensor(number, device=self.device), dist.ReduceOp.MAX).item()

    def all_equal(self, number):
        """Whether all processes pass the same int."""
        return self.all_max(number) == -self.all_max(-number)

    def mean(self, number):
        """The mean of the floats that the processes pass, on all of them."""
        if not self.distributed:
            return number
        total = self.all_reduce(torch.tensor(number, dtype=torch.float64, device=self.device))
        return total.item() / self.world_size

    def gather_objects(self, value):
        """[the value that each process passes], on all of them. Plain values only."""
        if not self.distributed:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self):
        if self.distributed:
            dist.barrier()

    def fail(self, message):
        """End all processes, each of which calls this; rank 0 says why."""
        raise UserError(message) if self.master else SystemExit(2)

    # -----------------------------------------------------------------------------------------
    # the model and its gradients

    def wrap(self, raw_model, dtype, reshard_after_forward=True, min_num_params=0):
        """
        Move the model to the device and return what to train: the model itself, the model inside
        DDP, or, with FSDP2, the model with every parameter divided among the processes.
        """
        if self.mode == 'fsdp':
            self._shard(raw_model, dtype, reshard_after_forward, min_num_params)
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
        mesh = dist.init_device_mesh(self.device.type, (self.world_size,))
        # Blocks are gathered in dtype; the residual stream stays float32, as under autocast.
        param_dtype = None if dtype == 'float32' else getattr(torch, dtype)
        policy = MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False)
        for block in raw_model.transformer.h:
            if sum(p.numel() for p in block.parameters()) >= min_num_params:
                fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward,
                            mp_policy=policy)
        # The rest is one group, so that embeddings and a tied head stay one tensor.
        fully_shard(raw_model, mesh=mesh)
        register_fsdp_forward_method(raw_model, 'generate')
        self.reshard_after_forward = reshard_after_forward

    def shard_optimizer(self, optimizer):
        """With ZeRO-1, an optimizer that keeps the moments of some parameters only."""
        if self.mode != 'zero1':
            return optimizer
        from torch.distributed.optim import ZeroRedundancyOptimizer
        groups = [dict(group) for group in optimizer.param_groups]  # complete with all settings
        return ZeroRedundancyOptimizer(groups, type(optimizer))

    def sync_gradients(self, model, last):
        """
        Whether the next backward averages gradients over processes. Only the last micro-batch's
        does, except that FSDP does it each time unless its weights stay gathered: gradients that
        wait for the last micro-batch take the memory of whole weights.
        """
        if self.mode == 'fsdp':
            model.set_requires_gradient_sync(last or self.reshard_after_forward)
        elif self.distributed:
            model.require_backward_grad_sync = last

    def release_gathered(self, raw_model):
        """After a forward without backward: free the weights that FSDP keeps for backward."""
        if self.mode == 'fsdp':
            raw_model.reshard()

    def local(self, tensor):
        """The part of a tensor that this process holds."""
        return tensor.to_local() if self.mode == 'fsdp' else tensor

    def sum_over_shards(self, tensor):
        """Sum over processes what each has computed from its shards; in place."""
        return self.all_reduce(tensor) if self.mode == 'fsdp' else tensor

    @torch.no_grad()
    def norms(self, tensors):
        """The 2-norm of each of a list of tensors like parameters, (n,) float32."""
        if self.mode != 'fsdp':
            return torch.stack(torch._foreach_norm(tensors))
        norms = torch.stack(torch._foreach_norm([t.to_local() for t in tensors]))
        return self.all_reduce(norms.double().square()).sqrt().float()

    def global_norm(self, tensors):
        """The 2-norm of all of them together, a 0-dim tensor, as clip_grad_norm_ computes it."""
        return torch.linalg.vector_norm(self.norms(tensors))

    # -----------------------------------------------------------------------------------------
    # tensors like parameters, between one process's view and this process's share

    def moments(self, optimizer):
        """
        ({'number/key': tensor} of this process's optimizer state, the settings of all groups).
        Whatever the mode, parameters are numbered as a single process numbers them, group after
        group.
        """
        inner, numbers = self.inner_optimizer(optimizer)
        tensors = {f'{numbers[p]}/{key}': value
                   for group in inner.param_groups for p in group['params']
                   for key, value in inner.state[p].items()}
        return tensors, torch.optim.Optimizer.state_dict(optimizer)['param_groups']

    def inner_optimizer(self, optimizer):
        """(the optimizer with this process's moments, {parameter: its number})."""
        params = [p for group in optimizer.param_groups for p in group['params']]
        return getattr(optimizer, 'optim', optimizer), {p: i for i, p in enumerate(params)}

    def gather(self, tensors):
        """
        {name: whole tensor} on rank 0, from a dict of which each process has some tensors or some
        rows of them; meaningless on the other ranks. One tensor travels at a time.
        """
        if self.mode == 'fsdp':
            return self._gather_rows(tensors)
        whole = {name: t.detach() for name, t in tensors.items()}
        if self.mode != 'zero1':
            return whole
        described = {name: (tuple(whole[name].shape), whole[name].dtype)
                     for name in self.owned(tensors)}
        for owner, theirs in enumerate(self.gather_objects(described)):
            for name, (shape, dtype) in theirs.items():
                if owner > 0 and self.rank == owner:
                    dist.send(whole[name].to(self.device).contiguous(), 0)
                elif owner > 0 and self.master:
                    whole[name] = torch.empty(shape, dtype=dtype, device=self.device)
                    dist.recv(whole[name], owner)
        return whole

    def owned(self, tensors):
        """The names in a dict of tensors that no process with a lower rank has in its dict."""
        lower = self.gather_objects(list(tensors))[:self.rank]
        return set(tensors).difference(*lower)

    def _gather_rows(self, tensors):
        gathered = {}  # a tied tensor is in there twice and gathered once
        for t in tensors.values():
            if id(t) not in gathered:
                full = t.detach().full_tensor() if hasattr(t, 'full_tensor') else t
                gathered[id(t)] = full.cpu() if self.master else None
        return {name: gathered[id(t)] for name, t in tensors.items()}

    def rows(self, shape, like):
        """
        (first row, number of rows) of a tensor of that shape that this process has, if it is
        divided like the parameter `like`: as torch.chunk divides it.
        """
        n = shape[0] if len(shape) else 0
        if self.mode != 'fsdp' or tuple(shape) != tuple(like.shape):  # AdamW's step count
            return 0, n
        per_rank = math.ceil(n / self.world_size)
        first = min(n, self.rank * per_rank)
        return first, min(n - first, per_rank)

    def place(self, own_rows, shape, like):
        """A tensor like the parameter `like` from this process's rows of it; see rows()."""
        if self.mode != 'fsdp' or tuple(shape) != tuple(like.shape):
            return own_rows
        from torch.distributed.tensor import DTensor
        return DTensor.from_local(own_rows.to(self.device), like.device_mesh, like.placements,
                                  shape=like.shape, stride=like.stride())


def show_lost_process(kind, error, trace):
    """sys.excepthook of a rank: losing another process is one line, since that one says why."""
    if not issubclass(kind, dist.DistError) and 'gloo' not in str(error):
        return show_error(kind, error, trace)
    rank = os.environ['RANK']
    print(f'{script_name()}: rank {rank}: another process of this run has ended or does not answer '
          f'({first_line(error)[:200]})', file=sys.stderr, flush=True)
