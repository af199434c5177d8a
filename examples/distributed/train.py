"""Fine-tune an adapter on one process or many: ``torchrun --nproc-per-node 2 train.py --how ddp``."""

import argparse
import os

import torch
import torch.distributed as dist
from task import Bars, pretrained_model
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import tnadapt.torch

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--how", choices=("ddp", "fsdp2"), default="ddp")
arguments.add_argument("--batch", type=int, default=16, help="over all processes together")
arguments.add_argument("--epochs", type=int, default=6)
arguments.add_argument("--adapter", help="adapter file to resume from")
arguments.add_argument("--out", default="adapter.safetensors")
options = arguments.parse_args()

# start: the processes
if torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dist.init_process_group()  # NCCL on CUDA, Gloo on CPUs
rank, world = dist.get_rank(), dist.get_world_size()

# start: the model
model = pretrained_model().to(device)  # the same weights in every process
if options.adapter:
    adapter = tnadapt.torch.load(model, options.adapter)
else:
    adapter = tnadapt.torch.attach(model, keep_trainable="head")

# start: spreading it
if options.how == "ddp":
    running = DistributedDataParallel(model)
else:
    for block in model.blocks:
        fully_shard(block)
    running = fully_shard(model)

# start: training
data = Bars()
sampler = DistributedSampler(data, num_replicas=world, rank=rank, seed=0)
loader = DataLoader(data, options.batch // world, sampler=sampler, drop_last=True)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
for epoch in range(options.epochs):
    sampler.set_epoch(epoch)
    total = torch.zeros((), device=device)
    for images, labels in loader:
        loss = cross_entropy(running(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
    dist.all_reduce(total)
    if rank == 0:
        print(f"epoch {epoch}: loss {total.item() / world / len(loader):.6f}")

# start: saving
adapter.save(options.out)  # every process calls it, process 0 writes
dist.barrier()  # no process closes its connections while another still writes
dist.destroy_process_group()
