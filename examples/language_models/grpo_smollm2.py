"""Train SmolLM2-135M with TRL's GRPOTrainer on sums that a checker rewards, with at most 1,000 trained parameters.

Run it from a clone of tnadapt: ``python -m examples.language_models.grpo_smollm2``.
"""

import random
import re
import time

import datasets
import trl

import tnadapt.torch

from .smollm2 import answers, config, parser, pretrained, write

PROMPT = "Question: What is {} + {}?\nAnswer:"

options = parser(__doc__)
options.add_argument("--largest", type=int, default=9, help="largest number in a sum")
options.add_argument("--prompts", type=int, default=4, help="sums in each step")
options.add_argument("--generations", type=int, default=8, help="answers to each sum")
options.set_defaults(steps=30, rate=0.3, tests=40)
options = options.parse_args()
started = time.time()

# start: the data
numbers = range(1, options.largest + 1)
sums = [(PROMPT.format(a, b), a + b) for a in numbers for b in numbers]
random.Random(options.seed).shuffle(sums)
tests, rows = sums[: options.tests], sums[options.tests :]
train = datasets.Dataset.from_list([{"prompt": prompt, "total": total} for prompt, total in rows])


def right(completions, total, **others):
    """Reward an answer whose first number is the sum."""
    return [float(first_number(text) == wanted) for text, wanted in zip(completions, total, strict=True)]


def first_number(text):
    """Return the first number of a text, or None."""
    found = re.search(r"\d+", text)
    return int(found[0]) if found else None


# start: the model
model, tokenizer = pretrained(options.cache)
adapter = tnadapt.torch.attach(model, config(options), targets="all-linear")
print(adapter)


def accuracy():
    """Return the share of test sums whose greedy answer is right."""
    found = answers(model.eval(), tokenizer, [prompt for prompt, _ in tests], tokens=6)
    return sum(right(found, [total for _, total in tests])) / len(tests)


# start: training
arguments = trl.GRPOConfig(
    str(options.out), learning_rate=options.rate, max_steps=options.steps, num_generations=options.generations,
    per_device_train_batch_size=options.prompts * options.generations, max_completion_length=6, temperature=1.0,
    lr_scheduler_type="constant", logging_steps=1, save_steps=20, seed=options.seed, report_to="none", bf16=False,
    gradient_checkpointing=False,
)  # fmt: skip
trainer = trl.GRPOTrainer(model, right, args=arguments, train_dataset=train, processing_class=tokenizer)
tnadapt.torch.adapter_checkpoints(trainer)
trainer.train()

# start: the result
found = {"accuracy": accuracy()}
with adapter.disabled():
    found["accuracy of the base"] = accuracy()
rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
write(options, adapter, tokenizer, started, **found, tests=len(tests), rewards=rewards)
