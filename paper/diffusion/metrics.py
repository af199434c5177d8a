"""Measures of generated images, from the features of generated and real ones."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import warnings
from typing import Any

import numpy as np
from torch import Tensor

from tnadapt.errors import ShapeError, TnadaptError

from .msid import msid

__all__ = ["LOWER", "METRICS", "Seen", "quality", "require_packages"]

#: The measures that :func:`quality` returns, and their usual names.
METRICS = {
    "is": "IS",
    "is_distance": "|IS − IS of real images|",
    "fid": "FID",
    "kid": "KID",
    "msid": "MSID",
    "precision": "improved precision",
    "recall": "improved recall",
    "agreement": "in the requested class",
}
#: Measures for which lower is better.
LOWER = ("is_distance", "fid", "kid", "msid")

SPLITS, SUBSETS, SUBSET, NEIGHBOURHOOD = 10, 20, 1000, 3


@dataclasses.dataclass(frozen=True)
class Seen:
    """The output of a feature extractor for images.

    Attributes
    ----------
    features : Tensor, shape (n, d)
    logits : Tensor, shape (n, classes)
    """

    features: Tensor
    logits: Tensor


def quality(generated: Seen, real: Seen, asked: Tensor | None = None, seed: int = 0) -> dict[str, float | None]:
    """Measure the quality of generated images.

    Parameters
    ----------
    generated, real : Seen
        Features of at least 10 images each. If one has more images, only its first are used for IS and MSID.
    asked : Tensor, shape (n,), optional
        The requested class of each generated image.
    seed : int
        Seed of random choices: the ten parts of IS, the subsets of KID, the probes of MSID.

    Returns
    -------
    dict of str to float
        Each of :data:`METRICS`. ``is``, ``fid``, ``kid``, ``precision``, ``recall`` are torch-fidelity's (Salimans et
        al. 2016; Heusel et al. 2017; Binkowski et al. 2018, the mean over 20 subsets; Kynkäänniemi et al. 2019, with 3
        neighbors), ``msid`` is :func:`~paper.diffusion.msid.msid`. ``is_distance`` is the distance of ``is`` to that
        of the real images: the paper says only that its IS, measured by an l1 distance, is better when lower.
        ``agreement`` is the fraction of images that the extractor assigns to the requested class. A measure that is not
        finite is None, and so is ``agreement`` without ``asked``.

    Raises
    ------
    ShapeError
        If there are too few images, or the two are from different extractors.
    TnadaptError
        If torch-fidelity is not installed.

    Examples
    --------
    A set of images compared with itself:

    >>> import torch
    >>> import torch_fidelity  # computes the measures
    >>> seen = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    >>> found = quality(Seen(seen, seen), Seen(seen, seen))
    >>> found["is_distance"], abs(found["fid"]) < 1e-6, found["msid"], found["precision"], found["recall"]
    (0.0, True, 0.0, 1.0, 1.0)
    """
    if min(len(generated.features), len(real.features)) < 10 or generated.features.shape[1] != real.features.shape[1]:
        raise ShapeError(
            f"expected at least 10 images of either kind, and the same extractor for both; got features of shape "
            f"{tuple(generated.features.shape)} and {tuple(real.features.shape)}"
        )
    if not all(bool(part.isfinite().all()) for part in (generated.features, generated.logits)):
        return dict.fromkeys(METRICS)
    found = _fidelity(generated, real, seed)
    count = min(len(generated.features), len(real.features))
    one, other = (seen.features[:count].double().numpy() for seen in (generated, real))
    found["msid"] = msid(one, other, seed=seed)
    if asked is not None:
        found["agreement"] = float((generated.logits.argmax(1) == asked.cpu()).double().mean())
    return {name: found[name] if math.isfinite(found.get(name, math.nan)) else None for name in METRICS}


def require_packages() -> None:
    """Check that the packages for sampling and measuring are installed.

    Raises
    ------
    TnadaptError
        If diffusers or torch-fidelity is missing.
    """
    for name in ("diffusers", "torch_fidelity"):
        if importlib.util.find_spec(name) is None:
            raise TnadaptError(f"the diffusion model needs {name.replace('_', '-')}: pip install 'tnadapt[paper]'")


def _fidelity(generated: Seen, real: Seen, seed: int) -> dict[str, float]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation warnings of its imports
            from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
    except ImportError:
        raise TnadaptError("the measures need torch-fidelity: pip install 'tnadapt[paper]'") from None
    # IS and MSID depend on the number of images, so the same number of either kind is used.
    count = min(len(generated.logits), len(real.logits))
    scores = [
        metric_isc.isc_features_to_metric(seen.logits[:count], SPLITS, True, seed)[metric_isc.KEY_METRIC_ISC_MEAN]
        for seen in (generated, real)
    ]
    features = [seen.features.double() for seen in (generated, real)]
    statistics: list[Any] = [metric_fid.fid_features_to_statistics(seen) for seen in features]
    size = min(SUBSET, *map(len, features))
    kid = metric_kid.kid_features_to_metric(
        *features, kid_subsets=SUBSETS, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    near = metric_prc.prc_features_to_metric(*features, prc_neighborhood=NEIGHBOURHOOD, verbose=False)
    return {
        "is": scores[0],
        "is_distance": float(np.abs(scores[0] - scores[1])),
        "fid": metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID],
        "kid": kid[metric_kid.KEY_METRIC_KID_MEAN],
        "precision": near[metric_prc.KEY_METRIC_PRECISION],
        "recall": near[metric_prc.KEY_METRIC_RECALL],
    }
