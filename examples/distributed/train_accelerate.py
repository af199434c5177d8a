"""The same with accelerate: ``accelerate launch train_accelerate.py``."""

import argparse

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from task import Bars, pretrained_model
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import tnadapt.torch

arguments = argparse.ArgumentParser(description=__doc__)
arguments.add_argument("--batch", type=int, default=16, help="over all processes together")
arguments.add_argument("--epochs", type=int, default=6)
arguments.add_argument("--out", default="adapter.safetensors")
options = arguments.parse_args()

accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
model = pretrained_model()
adapter = tnadapt.torch.attach(model, keep_trainable="head")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
running, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Bars(), options.batch, drop_last=True))
for epoch in range(options.epochs):
    total = torch.zeros((), device=accelerator.device)
    for images, labels in loader:
        loss = cross_entropy(running(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach() / len(loader)
    accelerator.print(f"epoch {epoch}: loss {accelerator.reduce(total, 'mean').item():.6f}")
adapter.save(options.out)  # every process calls it, process 0 writes
accelerator.end_training()
