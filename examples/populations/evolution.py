"""Adapt a vision transformer to turned digits by an evolution strategy, without backward, and by Adam.

The adapter has 100 numbers (Uni-LoRA). The strategy tries 32 of them at a time, the members of one population: a mean
plus noise, and minus the same noise. One pass runs all members on the same images. Their scores are accuracies, which
have no gradient; only the members' ranks count. Run it from a clone of tnadapt:
``python -m examples.populations.evolution``.
"""

import copy
import time

import torch
from torch.nn.functional import cross_entropy

import tnadapt.torch

from .digits import LABELS, accuracy, parser, pretrained, turned, write

ANGLE, NUMBERS = 30, 100
MEMBERS, NOISE, BATCH, RATE = 32, 0.02, 16, 0.005  # of the strategy
ADAM_BATCH, ADAM_RATE = 64, 0.005

options = parser(__doc__, steps=500)
options.add_argument("--adam-steps", type=int, default=200)
options = options.parse_args()

# start: the task
is_test = torch.arange(len(LABELS)) % 3 == 0
upright, images = turned([0] * len(LABELS)), turned([ANGLE] * len(LABELS))
base = pretrained(upright[~is_test], LABELS[~is_test])
train, labels = images[~is_test], LABELS[~is_test]
test = images[is_test], LABELS[is_test]
result = {
    "numbers": NUMBERS,
    "base, upright": accuracy(base, upright[is_test], test[1]),
    "base, turned": accuracy(base, *test),
}


# start: the strategy
@torch.no_grad()
def evolve(steps):
    """Return the accuracy after steps of the evolution strategy, and its passes without backward."""
    model = copy.deepcopy(base)
    population = tnadapt.torch.attach(model, "unilora", "all-linear", parameters=NUMBERS, population=MEMBERS)
    (theta,) = population.parameters()  # (members, numbers)
    mean = torch.zeros(NUMBERS)
    optimizer = torch.optim.Adam([mean], RATE)
    for _ in range(steps):
        noise = torch.randn(MEMBERS // 2, NUMBERS)
        noise = torch.cat([noise, -noise])
        theta.copy_(mean + NOISE * noise)
        rows = torch.randint(len(labels), (BATCH,))
        with population.members(range(MEMBERS)):  # each member stands for BATCH consecutive rows
            answers = model(train[rows].repeat(MEMBERS, 1, 1, 1)).argmax(-1)
        scores = (answers.view(MEMBERS, BATCH) == labels[rows]).sum(1)
        better = (scores[:, None] > scores).sum(1) - (scores[:, None] < scores).sum(1)  # ranks; equal scores share one
        mean.grad = -(better / MEMBERS) @ noise / MEMBERS
        optimizer.step()
    theta[0] = mean
    population[0].activate()
    return accuracy(model, *test)


# start: Adam
def train_by_adam(steps):
    """Return the accuracy after steps of Adam, each with a backward pass."""
    model = copy.deepcopy(base)
    adapter = tnadapt.torch.attach(model, "unilora", "all-linear", parameters=NUMBERS)
    optimizer = torch.optim.Adam(adapter.parameters(), ADAM_RATE)
    for _ in range(steps):
        rows = torch.randint(len(labels), (ADAM_BATCH,))
        cross_entropy(model(train[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return accuracy(model, *test)


# start: the comparison
for name, method, steps in (("evolution", evolve, options.steps), ("Adam", train_by_adam, options.adam_steps)):
    torch.manual_seed(1)
    started = time.process_time()
    result[name] = method(steps)
    result[f"{name}, steps"], result[f"{name}, seconds"] = steps, round(time.process_time() - started, 1)
write(options.out, **result)
