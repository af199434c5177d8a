"""
Tensor network diagrams
=======================

Each group of updates is a small tensor network. :func:`tnadapt.plot.network` draws it from the plan, with the plan's
sizes. A node is a trainable array. A line between two nodes is an index that is summed over, with its size; an open
line is a mode of the tensor.
"""

# %%
# LoRA
# ----
#
# Two factors per weight. The line between them is the index of :math:`\sum_{s=1}^{r}`.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import tnadapt as tna
from tnadapt import plot

P = tna.presets
vit = [(768, 768)] * 24  # query and value of ViT-base


def show(config, **settings):
    """Draw the first group into a file, and show that."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture.png")
        plot.network(config, vit, path, **settings)
        image = plt.imread(path)
    height, width, _ = image.shape
    plt.figure(figsize=(width / 150, height / 150), dpi=150).figimage(image)
    plt.show()


show(P.lora(rank=4), title="LoRA: one group per weight")

# %%
# LoRTA
# -----
#
# One group of all weights, folded to a cube: a core, and a factor for each of three modes. The cube has a few elements
# more than the weights; they are cut off.

show(P.lorta(rank=4, order=3), title="LoRTA 3D: Tucker on a cube")

# %%
# LoNKr
# -----
#
# A Kronecker product of three splits. Its size in each mode is the product of their sizes, cut to the size of the
# tensor.

show(P.lonkr(rank=4, splits=3), title="LoNKr: K = 3")

# %%
# SuperLoRA with a projection
# ---------------------------
#
# Here the network gives a shorter vector. A fixed map F, drawn from a seed, expands it to the group.

show(P.superlora(rank=8, groups=4, projection="linear", ratio=0.1), title="SuperLoRA: G = 4, linear F")

# %%
# A tensor train
# --------------
#
# Each core shares an index with the next one. Ranks are limited to what the sizes allow: this example requests 20, but
# a first mode of size 16 cannot use more than 16.

train = tna.Config(rank=20, order=6, groups=1, fold="balanced", format="tt")
for name, shape in tna.UpdatePlan(train, vit).param_shapes.items():
    print(name, shape)
show(train, title="A tensor train of order 6")
