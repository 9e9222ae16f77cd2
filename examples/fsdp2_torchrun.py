"""FSDP2: one process for each device, weights and moments sharded.

Start it with ``torchrun --nproc-per-node 2 examples/fsdp2_torchrun.py``; without GPUs it runs on
CPUs over gloo.
"""

import torch
import toy
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

import leantune as lt


def main(num_steps: int = 10) -> float:
    """Train in all processes, each on its own batches; return the last loss."""
    is_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if is_gpu else "gloo")
    rank = dist.get_rank()
    if is_gpu:
        torch.cuda.set_device(rank)
    device = torch.device("cuda", rank) if is_gpu else torch.device("cpu")

    model = toy.encoder().to(device)
    session = lt.apply(model, lt.WTACRS(keep_ratio=0.3), seed=0)  # the same seed everywhere
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.bert.encoder.layer:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    optimizer = session.optimizer(torch.optim.AdamW, lr=2e-3)  # after sharding: of the shards
    model.train()
    for batch in toy.batches(num_steps, seed=rank):
        loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.on_step()
    session.merge()  # all processes; the plain modules are sharded still
    print(f"process {rank}: loss {loss.item():.3f}")
    dist.destroy_process_group()
    return loss.item()


if __name__ == "__main__":
    main()
