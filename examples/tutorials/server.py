"""Answer over HTTP with a text classifier and its adapter; exchange the adapter without a restart.

``python examples/tutorials/server.py best.safetensors --port 8000``, then::

    curl localhost:8000/predict -d '{"texts": ["A film to remember."]}'
    curl localhost:8000/swap -d '{"adapter": "newer.safetensors"}'
"""

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

import tnadapt
import tnadapt.torch


class Classifier:
    """A model with an adapter, both from the adapter's file."""

    def __init__(self, file):
        self.model = tnadapt.torch.load_pretrained(file)
        self.tokenizer = tnadapt.torch.load_processor(file)
        self.adapter = tnadapt.torch.adapters(self.model)["default"]
        self.file = file
        self.lock = threading.Lock()  # a swap must not happen in the middle of a prediction

    @torch.no_grad()
    def predict(self, texts):
        """Return the label and the probability of each text."""
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("texts must be a list of strings, at least one")
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with self.lock:
            shares, labels = self.model(**inputs).logits.softmax(-1).max(-1)
            file = self.file
        pairs = zip(labels.tolist(), shares.tolist(), strict=True)
        found = [{"label": self.model.config.id2label[label], "score": round(share, 3)} for label, share in pairs]
        return {"adapter": file, "predictions": found}

    def swap(self, adapter):
        """Replace the numbers of the adapter and of the head by those in another file of the same settings."""
        with self.lock:
            self.adapter.swap(adapter)
            self.file = adapter
        return {"adapter": adapter}


class Handler(BaseHTTPRequestHandler):
    """Pass the JSON of a POST to the classifier, and its answer back."""

    def do_POST(self):
        """Answer one request."""
        actions = {"/predict": self.server.classifier.predict, "/swap": self.server.classifier.swap}
        try:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path in actions:
                status, answer = 200, actions[self.path](**content)
            else:
                status, answer = 404, {"error": f"no {self.path}; there are {', '.join(actions)}"}
        except (KeyError, TypeError, ValueError, tnadapt.TnadaptError) as error:
            status, answer = 400, {"error": str(error)}
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *message):
        """Print nothing for each request."""


def main():
    """Start the server, and print its address once it answers."""
    options = argparse.ArgumentParser(description="Serve a text classifier with an adapter.")
    options.add_argument("adapter", help="a file of tnadapt finetune, or of adapter.save_pretrained")
    options.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    options = options.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    server.classifier = Classifier(options.adapter)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
