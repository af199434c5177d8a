"""Snapshots see every change on the CPU, and elsewhere every change that torch records, without waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tnadapt.torch._delta import Snapshot

from .pretended_device import PretendedDevice


def _new_memory(array: Any) -> None:
    array.data = array.detach().clone()


SEEN: dict[str, Callable[[Any], Any]] = {
    "in place": lambda array: array.detach().add_(1.0),
    "a part": lambda array: array.detach()[0].zero_(),
    "foreach": lambda array: torch._foreach_mul_([array.detach()], 2.0),
    "new memory": _new_memory,
}


@pytest.mark.law("array-changes")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", SEEN)
def test_changes_are_seen_without_waiting(name: str, mode: Any) -> None:
    array = torch.ones(3, requires_grad=True)
    with PretendedDevice(), mode():
        before = Snapshot.of(array)
        assert before.array.data_ptr() == array.data_ptr()
        assert before.is_of(array)
        SEEN[name](array)
        assert not before.is_of(array)
        assert Snapshot.of(array).is_of(array)


def test_on_a_device_writes_that_torch_does_not_record_are_not_seen() -> None:
    array = torch.ones(3)
    with PretendedDevice():
        before = Snapshot.of(array)
        array.data.zero_()
        assert before.is_of(array)
    before = Snapshot.of(array)
    array.data.add_(1.0)
    assert not before.is_of(array)


def test_memory_that_was_freed_is_not_taken_for_its_successor() -> None:
    with PretendedDevice():
        before = Snapshot.of(torch.ones(1000))
        assert not any(before.is_of(torch.ones(1000)) for _ in range(20))


def test_other_types_and_shapes() -> None:
    array = torch.ones(4)
    before = Snapshot.of(array)
    assert not before.is_of(array.double())
    assert not before.is_of(array.view(2, 2))
    assert not before.is_of(array.to("meta"))
    with PretendedDevice():
        before = Snapshot.of(array)
        assert not before.is_of(array.view(2, 2).T.contiguous().view(4))
        assert not Snapshot.of(array.view(2, 2)).is_of(array.view(2, 2).T)
