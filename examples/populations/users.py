"""Train 64 users with 100 numbers each in batches that mix users, and compare each with a model of their own.

Every user turns the digits by an angle of their own, which a small vision transformer has not seen. A population on it
has a member for each user. A batch has 16 of the 64 users, with four images each. Then each user is trained alone, as
an ordinary adapter by torch's AdamW, on the user's part of the same batches: the numbers should be the same. Run it
from a clone of tnadapt: ``python -m examples.populations.users``.
"""

import copy
import time

import torch
from torch.nn.functional import cross_entropy

import tnadapt.torch

from .digits import LABELS, accuracy, parser, pretrained, turned, write

USERS, NUMBERS, RATE = 64, 100, 0.005
TOGETHER, IMAGES = 16, 4  # users in a batch, and images of each

options = parser(__doc__, steps=400).parse_args()

# start: the data
place = torch.arange(len(LABELS))
user_of, is_test = place % USERS, place // USERS % 3 == 0
angles = torch.linspace(-50, 50, USERS)
upright, images = turned([0] * len(LABELS)), turned(angles[user_of])
base = pretrained(upright[~is_test], LABELS[~is_test])
own = [torch.nonzero((user_of == user) & ~is_test).flatten() for user in range(USERS)]

torch.manual_seed(1)
batches = []
for _ in range(options.steps):
    users = torch.randperm(USERS)[:TOGETHER]
    batches.append((users, [own[user][torch.randint(len(own[user]), (IMAGES,))] for user in users]))


def losses(model, rows):
    """Return the mean loss of each user in a batch."""
    return cross_entropy(model(images[rows]), LABELS[rows], reduction="none").view(-1, IMAGES).mean(1)


# start: together
model = copy.deepcopy(base)
population = tnadapt.torch.attach(model, "unilora", "all-linear", parameters=NUMBERS, population=USERS)
optimizer = tnadapt.torch.MemberAdamW(population, lr=RATE)
started = time.process_time()
for users, rows in batches:
    with population.members(users.repeat_interleave(IMAGES)):
        losses(model, torch.cat(rows)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
together = time.process_time() - started

# start: each alone
own_model = copy.deepcopy(base)
adapter = tnadapt.torch.attach(own_model, "unilora", "all-linear", parameters=NUMBERS)
alone, differences, accuracies = 0.0, [], []
for user in range(USERS):
    adapter.reset()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=RATE, weight_decay=0.0)
    started = time.process_time()
    for users, rows in batches:
        for place in torch.nonzero(users == user).flatten():
            losses(own_model, rows[place]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    alone += time.process_time() - started
    population[user].activate()
    test = images[(user_of == user) & is_test], LABELS[(user_of == user) & is_test]
    with torch.no_grad():
        ours, theirs = (cross_entropy(each(test[0]), test[1]).item() for each in (model, own_model))
    differences.append(abs(ours - theirs) / theirs)
    accuracies.append([accuracy(each, *test) for each in (base, own_model, model)])

# start: the result
means = torch.tensor(accuracies).mean(0)
names = ("accuracy of the base", "of models of their own", "of the population")
write(
    options.out, users=USERS, numbers=NUMBERS, steps=options.steps,
    **{name: round(mean.item(), 1) for name, mean in zip(names, means, strict=True)},
    **{"largest difference of a test loss": f"{max(differences):.1e}", "seconds together": round(together, 1),
       "seconds alone": round(alone, 1), "ratio": round(alone / together, 1)},
)  # fmt: skip
