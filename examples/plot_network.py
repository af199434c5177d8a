"""
Networks of tensors
===================

Each group of updates is a small tensor network. :func:`tnadapt.plot.network` draws it from the plan, with the numbers
that the plan has. A node is an array that is trained. A line between two is an index that is summed over, with its
size; an open one is a mode of the tensor.
"""

# %%
# LoRA
# ----
#
# Two factors a weight. The dot is the index of :math:`\sum_{s=1}^{r}`: one for all its lines.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import tnadapt as tna
from tnadapt import plot

P = tna.presets
vit = [(768, 768)] * 24  # query and value of ViT-base


def show(config, **settings):
    """The picture of the first group; it goes to a file, which is shown."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture.png")
        plot.network(config, vit, path, **settings)
        image = plt.imread(path)
    height, width, _ = image.shape
    plt.figure(figsize=(width / 150, height / 150), dpi=150).figimage(image)
    plt.show()


show(P.lora(rank=4), title="LoRA: a group a weight")

# %%
# LoRTA
# -----
#
# One group of all weights, folded to a cube: a core, and a factor for each of three modes. The cube holds a few
# elements more than the weights have; they are cut off.

show(P.lorta(rank=4, order=3), title="LoRTA 3D: Tucker on a cube")

# %%
# LoNKr
# -----
#
# A Kronecker product of three splits. In each mode its size is the product of theirs, cut to the size of the tensor.

show(P.lonkr(rank=4, splits=3), title="LoNKr: K = 3")

# %%
# SuperLoRA with a projection
# ---------------------------
#
# The network makes a shorter vector here. A fixed map F, drawn from a seed, makes the group from it.

show(P.superlora(rank=8, groups=4, projection="linear", ratio=0.1), title="SuperLoRA: G = 4, linear F")

# %%
# A tensor train
# --------------
#
# Each core shares an index with the next one. Ranks are cut to what the sizes allow: 20 is asked for, and a first mode
# of 16 has no use for more than 16.

train = tna.Config(rank=20, order=6, groups=1, fold="balanced", format="tt")
for name, shape in tna.SuperLoRA(train, vit).param_shapes.items():
    print(name, shape)
show(train, title="A tensor train of order 6")
