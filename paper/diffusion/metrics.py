"""Six measures of generated images, from what an extractor sees in them and in real ones."""

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

#: What :func:`quality` gives, and how people write it.
METRICS = {
    "is": "IS",
    "is_distance": "|IS − IS of real images|",
    "fid": "FID",
    "kid": "KID",
    "msid": "MSID",
    "precision": "improved precision",
    "recall": "improved recall",
    "agreement": "of the class asked for",
}
#: Those of which less is better.
LOWER = ("is_distance", "fid", "kid", "msid")

SPLITS, SUBSETS, SUBSET, NEIGHBOURHOOD = 10, 20, 1000, 3


@dataclasses.dataclass(frozen=True)
class Seen:
    """What an extractor sees in images.

    Attributes
    ----------
    features : Tensor, shape (n, d)
    logits : Tensor, shape (n, classes)
    """

    features: Tensor
    logits: Tensor


def quality(generated: Seen, real: Seen, asked: Tensor | None = None, seed: int = 0) -> dict[str, float | None]:
    """How good generated images are.

    Parameters
    ----------
    generated, real : Seen
        Of at least 10 images each. Where there are more of one, IS and MSID are of its first.
    asked : Tensor, shape (n,), optional
        The class that was asked for, image by image.
    seed : int
        Of what is drawn: the ten parts of IS, the subsets of KID, the probes of MSID.

    Returns
    -------
    dict of str to float
        Each of :data:`METRICS`. ``is``, ``fid``, ``kid``, ``precision``, ``recall`` are torch-fidelity's (Salimans et
        al. 2016; Heusel et al. 2017; Binkowski et al. 2018, the mean over 20 subsets; Kynkäänniemi et al. 2019, with 3
        neighbours), ``msid`` is :func:`~paper.diffusion.msid.msid`. ``is_distance`` is how far ``is`` is
        from that of the real images: the paper says that its IS, by an l1 distance, is better when lower, and no more.
        ``agreement`` is the fraction of images that the extractor takes for the class asked for. None for what is not
        finite, and for ``agreement`` where no classes were asked for.

    Raises
    ------
    ShapeError
        If there are too few images, or the two were seen by other extractors.
    TnadaptError
        If torch-fidelity is not installed.

    Examples
    --------
    Real images of themselves:

    >>> import torch
    >>> import torch_fidelity  # what computes them
    >>> seen = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    >>> found = quality(Seen(seen, seen), Seen(seen, seen))
    >>> found["is_distance"], abs(found["fid"]) < 1e-6, found["msid"], found["precision"], found["recall"]
    (0.0, True, 0.0, 1.0, 1.0)
    """
    if min(len(generated.features), len(real.features)) < 10 or generated.features.shape[1] != real.features.shape[1]:
        raise ShapeError(
            f"expected at least 10 images of either kind, seen by one extractor; got features of shape "
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
    """Whether what samples and measures is there.

    Raises
    ------
    TnadaptError
        If diffusers or torch-fidelity is not.
    """
    for name in ("diffusers", "torch_fidelity"):
        if importlib.util.find_spec(name) is None:
            raise TnadaptError(f"the diffusion model needs {name.replace('_', '-')}: pip install 'tnadapt[paper]'")


def _fidelity(generated: Seen, real: Seen, seed: int) -> dict[str, float]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what its imports find old in one another
            from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
    except ImportError:
        raise TnadaptError("the measures need torch-fidelity: pip install 'tnadapt[paper]'") from None
    # IS of few images is another than that of many, and so is MSID: of both kinds, as many are looked at.
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
