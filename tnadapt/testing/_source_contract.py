"""The contract of a source: the tests that every source of an array passes, as a class to inherit.

``class TestMine(SourceContract): sources = (Mine(),)`` runs them all; the page on extending tnadapt has an example.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.sources import Multiplied, Source, Stream, Tied, source_from_dict, source_to_dict
from tnadapt.algebra.superlora import SuperLoRA

from ._required import Required

__all__ = ["SourceContract"]

_WEIGHTS = [(6, 4), (8, 4)]
_CONFIGS = (
    Config(rank=2),
    Config(rank=2, format="tucker", groups=1, fold="hypercube", projection="linear", ratio=0.5),
    Config(rank=2, order=3, format="tt", groups=1, fold="balanced", projection="nonlinear"),
)


class SourceContract:
    """What every source must do. Inherit, register the class, and give ``sources``.

    What a source computes is tested for those that need nothing but their settings and random words: not for one that
    needs base weights or the caller's arrays, or refers to other arrays.

    Attributes
    ----------
    sources : sequence of Source
        Those under test: one for each kind of setting.
    shapes : sequence of tuple of int
        Shapes of arrays that they can provide. Give matrices alone for sources of matrices.

    Examples
    --------
    >>> from tnadapt.sources import Trained
    >>> class TestTrained(SourceContract):
    ...     sources = (Trained(),)
    >>> TestTrained().test_a_dictionary_gives_the_source_back()
    """

    sources: Any = Required("(MySource(),)")
    shapes: Sequence[tuple[int, ...]] = ((1,), (7,), (1, 1), (5, 3), (3, 5), (2, 3, 4))

    def test_a_dictionary_gives_the_source_back(self) -> None:
        for source in self.sources:
            for other in (source_from_dict(source_to_dict(source)), copy.deepcopy(source)):
                assert other == source
                assert hash(other) == hash(source)

    def test_frozen_arrays_are_finite_and_of_their_shape(self) -> None:
        for source in self._frozen():
            for shape in self.shapes:
                found = source.array(shape, Stream(3, 1, 1 << 16))
                assert found.shape == shape
                assert found.dtype == np.float32
                assert np.isfinite(found).all()

    def test_equal_streams_give_equal_arrays(self) -> None:
        state = repr(np.random.get_state(legacy=False))
        for source in self._frozen():
            for shape in self.shapes:
                found, again = (source.array(shape, Stream(2**64 - 1, 5, 1 << 16)) for _ in range(2))
                assert found.tobytes() == again.tobytes()
                assert not np.shares_memory(found, again)
        assert repr(np.random.get_state(legacy=False)) == state

    def test_a_plan_uses_what_they_compute(self) -> None:
        rng = np.random.default_rng(0)
        for source in [source for source in self.sources if source.trained or source in self._frozen()]:
            for config in _CONFIGS:
                every = SuperLoRA(config, _WEIGHTS)
                arrays = {name: rng.normal(size=shape) for name, shape in every.param_shapes.items()}
                for number, (name, shape) in enumerate(every.groups[0].network.shapes.items()):
                    if len(shape) not in {len(other) for other in self.shapes}:
                        continue
                    plan = SuperLoRA(config.replace(sources={name: source}), _WEIGHTS)
                    frozen = {f"group{g}.{name}" for g in range(plan.num_groups)} if not source.trained else set()
                    assert plan.frozen_shapes.keys() == frozen
                    assert plan.num_parameters == sum(
                        math.prod(shape) for full, shape in every.param_shapes.items() if full not in frozen
                    )
                    fresh = plan.init(dtype="float64")
                    assert not any(delta.any() for delta in plan.deltas(fresh))
                    if not plan.groups[0].projection.linear:
                        own = {full: array + 0.1 for full, array in fresh.items()}
                        assert any(delta.any() for delta in plan.deltas(own))
                    else:
                        whole = dict(arrays)
                        own_shapes = [every.param_shapes[full] for full in frozen]
                        largest = tuple(max(sizes) for sizes in zip(shape, *own_shapes, strict=True))
                        for full in frozen:
                            group, shape = int(full[5 : full.index(".")]), every.param_shapes[full]
                            stream = Stream(config.seed, group, (1 << 16) + number, largest)
                            whole[full] = source.array(shape, stream).astype(np.float64)
                        own = {full: arrays[full] for full in plan.param_shapes}
                        for found, expected in zip(plan.deltas(own), every.deltas(whole), strict=True):
                            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)

    def _frozen(self) -> list[Source]:
        return [
            source
            for source in self.sources
            if not (source.trained or source.needs_base or source.brought or isinstance(source, (Tied, Multiplied)))
        ]
