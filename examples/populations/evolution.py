"""Adapt a vision transformer to turned digits by an evolution strategy, without backward, and by Adam.

The adapter has 100 numbers (Uni-LoRA). The strategy tries 32 of them at a time, the members of one population: a mean
plus noise, and minus the same noise. One pass runs all members on the same images. Their scores are accuracies, which
have no gradient; only the members' ranks count. Run it from a clone of tnadapt:
``python -m examples.populations.evolution``. With ``--choose``, it prints the accuracy of each method with each noise
and rate on images that are not the test's, by which the settings below were chosen.
"""

import copy
import itertools
import statistics
import time

import torch
from torch.nn.functional import cross_entropy

import tnadapt.torch

from .digits import LABELS, accuracy, parser, pretrained, turned, write

ANGLE, NUMBERS = 30, 100
MEMBERS, BATCH, NOISE, RATE = 32, 16, 0.02, 0.005  # of the strategy
ADAM_BATCH, ADAM_RATE = 64, 0.01
# To choose from:
NOISES, RATES = (0.01, 0.02, 0.05), (0.002, 0.005, 0.01)
ADAM_RATES = (0.002, 0.005, 0.01, 0.02)

options = parser(__doc__, steps=500)
options.add_argument("--adam-steps", type=int, default=200)
options.add_argument("--seeds", type=int, nargs="+", default=(1, 2, 3))
options.add_argument("--choose", action="store_true", help="compare settings on a third of the training images")
options = options.parse_args()

# start: the task
third = torch.arange(len(LABELS)) % 3
is_test = third == 0
upright, images = turned([0] * len(LABELS)), turned([ANGLE] * len(LABELS))
base = pretrained(upright[~is_test], LABELS[~is_test])
test = images[is_test], LABELS[is_test]
is_train = third == 2 if options.choose else ~is_test
train, labels = images[is_train], LABELS[is_train]
held_out = (images[third == 1], LABELS[third == 1]) if options.choose else test
result = {
    "numbers": NUMBERS,
    "base, upright": accuracy(base, upright[is_test], test[1]),
    "base, turned": accuracy(base, *test),
}


# start: the strategy
@torch.no_grad()
def evolve(steps, rate=RATE, noise_size=NOISE):
    """Return the held-out accuracy after steps of the evolution strategy, and its passes without backward."""
    model = copy.deepcopy(base)
    population = tnadapt.torch.attach(model, "unilora", "all-linear", parameters=NUMBERS, population=MEMBERS)
    (theta,) = population.parameters()  # (members, numbers)
    mean = torch.zeros(NUMBERS)
    optimizer = torch.optim.Adam([mean], rate)
    for _ in range(steps):
        noise = torch.randn(MEMBERS // 2, NUMBERS)
        noise = torch.cat([noise, -noise])
        theta.copy_(mean + noise_size * noise)
        rows = torch.randint(len(labels), (BATCH,))
        with population.members(range(MEMBERS)):  # each member stands for BATCH consecutive rows
            answers = model(train[rows].repeat(MEMBERS, 1, 1, 1)).argmax(-1)
        scores = (answers.view(MEMBERS, BATCH) == labels[rows]).sum(1)
        better = (scores[:, None] > scores).sum(1) - (scores[:, None] < scores).sum(1)  # ranks; equal scores share one
        mean.grad = -(better / MEMBERS) @ noise / MEMBERS
        optimizer.step()
    theta[0] = mean
    population[0].activate()
    return accuracy(model, *held_out)


# start: Adam
def train_by_adam(steps, rate=ADAM_RATE):
    """Return the held-out accuracy after steps of Adam, each with a backward pass."""
    model = copy.deepcopy(base)
    adapter = tnadapt.torch.attach(model, "unilora", "all-linear", parameters=NUMBERS)
    optimizer = torch.optim.Adam(adapter.parameters(), rate)
    for _ in range(steps):
        rows = torch.randint(len(labels), (ADAM_BATCH,))
        cross_entropy(model(train[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return accuracy(model, *held_out)


# start: the choice of settings
if options.choose:
    for rate, noise_size in itertools.product(RATES, NOISES):
        torch.manual_seed(0)
        print(f"evolution, rate {rate}, noise {noise_size}: {evolve(options.steps, rate, noise_size)}", flush=True)
    for rate in ADAM_RATES:
        torch.manual_seed(0)
        print(f"Adam, rate {rate}: {train_by_adam(options.adam_steps, rate)}", flush=True)
    raise SystemExit


# start: the comparison
for name, method, steps in (("evolution", evolve, options.steps), ("Adam", train_by_adam, options.adam_steps)):
    accuracies, started = [], time.process_time()
    for seed in options.seeds:
        torch.manual_seed(seed)
        accuracies.append(method(steps))
    result |= {
        name: round(statistics.fmean(accuracies), 1),
        f"{name}, of each seed": accuracies,
        f"{name}, steps": steps,
        f"{name}, seconds of a training": round((time.process_time() - started) / len(accuracies), 1),
    }
write(options.out, **result)
