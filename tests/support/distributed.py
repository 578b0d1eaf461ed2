"""A process of several that share a model: DDP, FSDP2 and distributed checkpoints of packed weights.

    python -m tests.support.distributed RANK WORLD FOLDER

prints "whole" when all of it held. tests/nn/test_distributed.py starts one for each rank.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import squish_nf4


def make() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    squish_nf4.quantize_model(model, only=["1"])
    return model


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(f"rank {dist.get_rank()}: {what}")


def ddp(x: Tensor) -> None:
    for options in ({}, {"broadcast_buffers": False}):
        model: Any = DistributedDataParallel(make(), **options)
        model(x).square().mean().backward()
        expect(torch.equal(model.module[1].weight, make()[1].weight), "the packed bytes have changed")
        own = model.module[0].weight.grad  # its gradient came through the packed layer
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        expect(all(torch.equal(one, own) for one in every), "the gradients are not averaged")


def collectives() -> None:
    """What brings bytes to other processes does; what adds them up is refused."""
    world, layer = dist.get_world_size(), make()[1]
    weight, everyone = layer.weight, [torch.empty_like(layer.weight) for _ in range(world)]
    flat, sent = torch.empty(64 * world, 32, dtype=torch.uint8), torch.zeros_like(weight)
    dist.all_gather(everyone, weight)
    dist.all_gather_into_tensor(flat, weight)
    expect(all(torch.equal(each, weight) for each in (*everyone, *flat.chunk(world))), "gathered other bytes")
    if dist.get_rank() == 0:
        sent.copy_(weight)
    dist.broadcast(sent, 0)
    expect(torch.equal(sent, weight), "other bytes were broadcast")
    for add in (lambda: dist.all_reduce(weight), lambda: dist.reduce(weight, 0)):
        try:
            add()
        except RuntimeError as error:
            expect("packed NF4 bytes" in str(error), str(error))
        else:
            expect(False, "packed bytes were added up")


def from_the_first_rank(x: Tensor) -> None:
    """The first process alone has a state, and sends it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for shard in (False, True):
        state = make().state_dict() if dist.get_rank() == 0 else {}
        model: Any = make()
        model[1].reset_parameters()
        if shard:
            fully_shard(model, mesh=mesh)
        set_model_state_dict(model, state, options=options)
        expect(torch.equal(model(x), make()(x)), f"another result of what the first rank sent, shards: {shard}")
    expect(isinstance(distribute_tensor(make()[1].weight, mesh, [Shard(0)]), DTensor), "no DTensor")
    distribute_module(make(), mesh)


def fsdp(x: Tensor) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
        model: Any = make()
        for layer in model:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        rows = model[1].weight.to_local().shape[0]
        expect(rows == 64 // dist.get_world_size(), f"{rows} rows of packed bytes in a shard")
        y = model(x)
        expected = make()(x) if policy.param_dtype is None else make().bfloat16()(x.bfloat16())
        expect(torch.equal(y, expected), "another result than on one process")
        expect(model[1].scales.dtype == torch.float32, "the scales were cast")
        y.float().square().mean().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        expect(torch.equal(model[1].weight.full_tensor(), make()[1].weight), "the packed bytes have changed")


def checkpoints(x: Tensor, folder: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    saved: Any = fully_shard(make(), mesh=mesh)
    dcp.save({"model": get_model_state_dict(saved)}, checkpoint_id=f"{folder}/checkpoint")
    for shards in (False, True):
        model: Any = make()
        model[1].reset_parameters()
        if shards:
            fully_shard(model, mesh=mesh)
        state = {"model": get_model_state_dict(model) if shards else model.state_dict()}
        dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
        set_model_state_dict(model, state["model"])
        expect(torch.equal(model(x), make()(x)), f"another result after loading, shards: {shards}")


def main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(rank))
    ddp(x)
    collectives()
    fsdp(x)
    from_the_first_rank(x)
    checkpoints(x, folder)
    dist.destroy_process_group()
    print("whole")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
