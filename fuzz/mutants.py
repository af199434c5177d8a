"""Mutants of the corpus for every target, without a fuzzer: ``python -m fuzz.mutants TARGET --count 5000``.

A mutant has some bytes changed, or hostile values in the JSON that it consists of or that is in it. Unlike what the
fuzzer finds, mutants are the same in every run, and nearly valid: most get past the first checks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import time
from collections.abc import Iterator
from typing import Any

from .__main__ import CORPUS
from .targets import TARGETS, FaultError, traced

__all__ = ["PATIENCE", "check_mutants", "mutants"]

#: Time limit of a mutant, in seconds of the processor.
PATIENCE = 5.0
_VALUES = (
    0, -1, 1, 3, 1 << 31, 1 << 63, 10**400, 0.5, 1e308, -1e-320, True, False, None, "", "0", "a" * 1000,
    "\u202e\x1b[31m", "(a|a)+!", "=1+1", "../../x", "\0", "RagTokenizer", [], [[]], [1, 2, 3], ["a"] * 40, {}, {"a": 1},
    {"": None},
)  # fmt: skip
_MOST = 4096


def mutants(target: str, count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield mutants of the inputs in a target's corpus."""
    rng = random.Random(f"{target} {seed}")
    inputs = [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
    for _ in range(count):
        data = rng.choice(inputs)
        for _ in range(rng.choice((1, 1, 2, 4))):
            spans = _json_spans(data)
            data = _with_value(data, rng.choice(spans), rng) if spans and rng.random() < 0.7 else _with_bytes(data, rng)
        yield data[: _MOST + len(max(inputs, key=len))]


def check_mutants(target: str, count: int, seed: int = 0) -> float:
    """Call a target with mutants, and return the seconds of the slowest.

    Raises
    ------
    FaultError
        If one takes too long or too much memory, or as in the target.
    """
    call, slowest = TARGETS[target], 0.0
    call(next(iter(mutants(target, 1, seed))))  # imports modules
    for place, data in enumerate(mutants(target, count, seed)):
        try:
            start = time.process_time()
            call(data)
            took = time.process_time() - start
            traced(call, data)
        except Exception as error:
            raise FaultError(f"mutant {place} of {target}, {data[:2000]!r}: {type(error).__name__}: {error}") from error
        if took > PATIENCE:
            raise FaultError(f"mutant {place} of {target}, {data[:2000]!r}: it took {took:.1f} s")
        slowest = max(slowest, took)
    return slowest


def _json_spans(data: bytes) -> list[tuple[int, int, Any]]:
    """Return where JSON objects are: the whole input, before zero bytes, or in the header of a safetensors file."""
    gap = data.find(b"\0\0")
    spans = [(0, len(data)), (0, gap)] if gap >= 0 else [(0, len(data))]
    for start in (0, gap + 2):
        size = int.from_bytes(data[start : start + 8], "little")
        spans.append((start + 8, start + 8 + size))
    found = []
    for start, stop in spans:
        with contextlib.suppress(ValueError, RecursionError):
            if 0 < stop - start <= len(data) - start and isinstance(
                value := json.loads(data[start:stop]), (dict, list)
            ):
                found.append((start, stop, value))
    return found


def _with_value(data: bytes, span: tuple[int, int, Any], rng: random.Random) -> bytes:
    """Return the input with another value, or one value less, somewhere in JSON."""
    start, stop, value = span
    # An adapter's recipe is JSON in JSON.
    node, place = rng.choice(list(_places(value)) or [([None], 0)])
    inner = node[place]
    if isinstance(inner, str) and inner[:1] == "{" and rng.random() < 0.9:
        with contextlib.suppress(ValueError):
            text = inner.encode()
            node[place] = _with_value(text, (0, len(text), json.loads(text)), rng).decode()
    elif isinstance(node, dict) and rng.random() < 0.2:
        node[str(rng.choice(_VALUES))] = node.pop(place)
    elif rng.random() < 0.1:
        del node[place]
    else:
        node[place] = rng.choice(_VALUES)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    if start >= 8 and int.from_bytes(data[start - 8 : start], "little") == stop - start:
        return data[: start - 8] + len(text).to_bytes(8, "little") + text + data[stop:]
    return data[:start] + text + data[stop:]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container and the place of each value in it."""
    for place in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, place
        yield from _places(value[place])


def _with_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return the input with some bytes changed, left out, repeated or cut off."""
    start = rng.randrange(len(data) + 1)
    stop = min(len(data), start + rng.choice((1, 1, 2, 4, 8, 64)))
    middle = (
        rng.randbytes(stop - start), bytes(stop - start), b"\xff" * (stop - start), b"", data[start:stop] * 2,
        b"9" * 20, b'"', b"\n", b",",
    )  # fmt: skip
    return data[:start] if rng.random() < 0.05 else data[:start] + rng.choice(middle) + data[stop:]


def main() -> None:
    """Check mutants of one target, or of all."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.mutants", description=__doc__)
    parser.add_argument("target", nargs="*", choices=[*TARGETS, []], help="by default all")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for target in given.target or TARGETS:
        start = time.perf_counter()
        slowest = check_mutants(target, given.count, given.seed)
        took = time.perf_counter() - start
        print(f"{target}: {given.count} mutants in {took:.0f} s, the slowest in {slowest:.2f} s", flush=True)


if __name__ == "__main__":
    main()
