"""
From a CSV file to a server
===========================

A table of movie reviews becomes a service that says whether a review is positive. ``tnadapt finetune`` trains 1,000
numbers and a head on a pretrained sentence model, ``tnadapt predict`` tries the file on new texts, and a small server
answers over HTTP. A better adapter takes the place of the first one while the server runs.

.. code-block:: console

   $ pip install "tnadapt[demo,hub]"
"""

# %%
# A table of texts and labels
# ---------------------------
#
# Two columns called ``text`` and ``label`` need no options. Short reviews keep this page fast.

import json
import subprocess
import sys
import tempfile
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import matplotlib.pyplot as plt
import torch

import tnadapt as tna

folder = Path(tempfile.mkdtemp())  # for all files
reviews = datasets.load_dataset("cornell-movie-review-data/rotten_tomatoes", split="train").to_pandas()
reviews = reviews[reviews["text"].str.len() < 60].sample(frac=1, random_state=0)
reviews["label"] = reviews["label"].map({0: "negative", 1: "positive"})
reviews[:-3].to_csv(folder / "reviews.csv", index=False)
reviews[-3:][["text"]].to_csv(folder / "new.csv", index=False)
print((folder / "reviews.csv").read_text(encoding="utf-8")[:130])

# %%
# Train
# -----
#
# The base is all-MiniLM-L6-v2, a BERT of six layers; ``--model`` takes any folder or hub name that transformers can
# open. The command splits the reviews into three parts, trains the new head alone and then with the adapter, and says
# which is better. ``--limit`` makes do with 200 reviews for now.


def terminal(command):
    """Run what you would type into a terminal in the folder."""
    print("$", command)
    words = [sys.executable, "-m", *command.split()]
    return subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout


train = (
    "tnadapt finetune --model sentence-transformers/all-MiniLM-L6-v2 --data reviews.csv "
    "--preset unilora --set parameters=1000 --batch 16"
)
print(terminal(f"{train} --limit 200 --out monday"))

# %%
# Predict
# -------
#
# ``best.safetensors`` is all that has to be kept or sent: the 1,000 parameters, the head, the labels, and which base
# they belong to. So ``tnadapt predict`` needs no other options. (``tnadapt info`` prints what is in the file.) Scores
# near 0.5 mean that this adapter is not sure of anything yet.

print(terminal("tnadapt predict monday/best.safetensors --data new.csv"))

# %%
# Serve
# -----
#
# This shows how a service works. One that faces the internet needs a real server, and must answer wrong requests.


class Classifier:
    """A model with an adapter, both from the adapter's file."""

    def __init__(self, file):
        self.model = tna.torch.load_pretrained(file)
        self.tokenizer = tna.torch.load_processor(file)
        self.adapter = tna.torch.adapters(self.model)["default"]
        self.lock = threading.Lock()  # a swap must not happen in the middle of a prediction

    @torch.no_grad()
    def predict(self, texts):
        """Return the label and the probability of each text."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with self.lock:
            scores, labels = self.model(**inputs).logits.softmax(-1).max(-1)
        names = self.model.config.id2label
        return [f"{names[label]} {score:.3f}" for label, score in zip(labels.tolist(), scores.tolist(), strict=True)]

    def swap(self, file):
        """Replace the numbers of the adapter and of the head by those in another file of the same settings."""
        with self.lock:
            self.adapter.swap(file)
        return "swapped"


class Handler(BaseHTTPRequestHandler):
    """Pass the JSON of a POST to the classifier, and its answer back."""

    def do_POST(self):
        """Answer one request."""
        actions = {"/predict": self.server.classifier.predict, "/swap": self.server.classifier.swap}
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = actions[self.path](**content)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *message):
        """Print nothing for each request."""


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)  # on any free port
server.classifier = Classifier(folder / "monday/best.safetensors")
threading.Thread(target=server.serve_forever, daemon=True).start()

# %%
# A client, in this process or any other:


def ask(path, **content):
    """Send JSON to the server, and return what it answers."""
    url = f"http://127.0.0.1:{server.server_port}{path}"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(content).encode())) as answer:
        return json.load(answer)


texts = ["A film to remember.", "Slow, loud, and far too long.", "It's not a bad film at all."]
print(ask("/predict", texts=texts))

# %%
# Swap
# ----
#
# Some days later, there are three times as many reviews. The same command trains on them, and draws its table:

terminal(f"{train} --limit 600 --epochs 3 --out friday")

plt.figure(figsize=(7, 4), layout="constrained")
plt.imshow(plt.imread(folder / "friday/pareto.png"))
plt.axis("off")
plt.show()

# %%
# The server takes the new file without a restart. ``adapter.swap`` checks first that the file belongs to this base and
# has the same settings, so a wrong file changes nothing; then it copies the numbers into place.

print(ask("/swap", file=str(folder / "friday/best.safetensors")))
print(ask("/predict", texts=texts))
server.shutdown()

# %%
# The last answer is still wrong: 300 short reviews do not teach what a negation does.
#
# Keep the old file, to swap it back if the new one disappoints. :doc:`/serving` shows how to roll back, and what
# vLLM, llama.cpp and others take; :doc:`/many_adapters`, how one process answers with many adapters at once.
