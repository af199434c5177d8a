"""
The networks of all presets
===========================

Every preset on the 24 query and value weights of ViT-base, of 768 × 768: its tensor network, the steps from the tensor
to the weights, and the number of trained parameters. :doc:`plot_network` explains the signs, and :doc:`/presets` has
the sizes in one table.
"""

# %%
# Low-rank updates of each weight
# -------------------------------

import inspect
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import tnadapt as tna
from tnadapt import plot

P = tna.presets
vit = [(768, 768)] * 24  # query and value of ViT-base
alike = {"weights": 24, "rows": 768, "cols": 768}
drawn = set()


def show(name, *arguments, **settings):
    """Draw a preset's first group into a file, and show that."""
    preset = getattr(P, name)
    config = preset(*arguments, **settings)
    method = inspect.getdoc(preset).partition("\n")[0].replace("`", "").rstrip(".")
    fold = config.fold if isinstance(config.fold, str) else " × ".join(map(str, config.fold))
    note = f"format {config.format}, fold {fold}, groups {config.groups}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "picture.png")
        plot.network(config, vit, path, title=f"{name}: {method}", note=note)
        image = plt.imread(path)
    height, width, _ = image.shape
    plt.figure(figsize=(width / 150, height / 150), dpi=150).figimage(image)
    drawn.add(name)


show("lora", 4)
show("dora", 4)
show("hira", 4)
show("gralora", 4)
show("dense")
plt.show()

# %%
# Frozen factors, drawn from a seed or from the base weights
# ----------------------------------------------------------

show("lora_fa", 4)
show("share_lora", 4)
show("tied_lora", 4)
show("vera", 64)
show("randlora", 384, rows=768, cols=768)
show("lora_xs", 8)
show("svft", 768)
show("craft", 16, groups=1)
plt.show()

# %%
# Arrays computed from a few parameters
# -------------------------------------

show("tinylora")
show("unilora")
show("nola", 100)
plt.show()

# %%
# Kronecker and Hadamard products, and circuits
# ---------------------------------------------

show("lokr", 4)
show("krona")
show("lonkr", 4)
show("loha", 4)
show("compacter")
show("quanta", (16, 8))
plt.show()

# %%
# One tensor of many weights
# --------------------------

show("superlora", 22, groups=5, projection="nonlinear", ratio=0.1)
show("lorta", 4, order=5)
show("lotr", 4, **alike)
show("fact_tt", 4, **alike)
show("fact_tk", 4, **alike)
show("cara", 4, **alike, heads=12)
show("lorta_cp", 4, layers=12, rows=768, cols=768, heads=12)
show("metatt", 4)
plt.show()

# %%
# A vector and a fixed map
# ------------------------

show("fastfood")
show("shira")
show("fourierft")
show("loca")
show("waveft", family="db4")
show("c3a")
show("miss")
plt.show()

# %%
# These are all presets.

assert drawn == set(P.__all__)
