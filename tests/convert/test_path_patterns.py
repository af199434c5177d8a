"""Patterns of module paths that come from a file: PEFT's choice for those that are supported, in few steps."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import tnadapt as tna
from tnadapt import FileError

from .internals import PathPatterns

# What users of PEFT, PEFT and this library write.
SHAPES = [
    "q_proj", "self_attn.q_proj", "model.layers.3.mlp", r"^model\.layers\.3\.self_attn\.q_proj", "^stem.conv",
    "layer.3.*query", r".*\.q_proj", r".*layers\.(0|1|12)\.mlp", r"layers\.\d+\.q", "layers.[0-9]+.mlp.fc_1",
    r"layers\.1?\d\.q", "q_proj|v_proj", r"(q|k)_proj$", "^a$|^b", "", ".*", "(?:ab?)+c", "a{2}b{1,}c{0,2}", "[^.]*q",
    r"\w+-\d*?x", "[a-c1_-]+",
]  # fmt: skip
LETTERS = st.sampled_from(["a", "b", "1", "_", ".", r"\.", r"\d", r"\w", "[ab]", "[^a.]"])
ATOMS = st.recursive(
    LETTERS,
    lambda inner: (
        st.builds(
            "({}|{}){}".format,
            inner,
            st.lists(inner, max_size=2).map("".join),
            st.sampled_from(["", "*", "+", "?", "{2}"]),
        )
        | st.builds("{}{}".format, LETTERS, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{0,}"]))
    ),
    max_leaves=6,
)
PATTERNS = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "^", ".*"]),
    st.lists(ATOMS, max_size=4).map("".join),
    st.sampled_from(["", "$"]),
)
PATHS = st.lists(st.text("aab1_", max_size=3), min_size=1, max_size=4).map(".".join)


@given(st.lists(PATTERNS | st.builds("{}|{}".format, PATTERNS, PATTERNS), min_size=1, max_size=4), PATHS)
@example(["a*?"], "ab.")
@example([r"a\.b", "a.b"], "a_b")
def test_the_first_that_matches_is_the_one_that_peft_takes(keys: list[str], path: str) -> None:
    found = PathPatterns("rank_pattern", {key: key for key in keys}).get(path, None)
    assert found == next((key for key in keys if re.match(rf"(.*\.)?({key})$", path)), None)


@pytest.mark.parametrize("key", SHAPES)
def test_what_is_written_for_peft_is_read_as_peft_does(key: str) -> None:
    other = pytest.importorskip("peft.utils.other")
    paths = [
        "q_proj", "model.layers.3.self_attn.q_proj", "x.model.layers.3.self_attn.q_proj", "model.layers.3.mlp",
        "model.layers.12.mlp", "model.layersX3.mlp", "stem.conv", "a.stem.conv", "layer.3.x.query", "layers.11.q",
        "layers.7.mlp.fc_1", "my_q_proj", "a", "b", "a.b", "", "a.", "ababc", "aabbcc", "x-1x", "a-1_",
    ]  # fmt: skip
    patterns = PathPatterns("rank_pattern", {key: 1})
    assert [patterns.get(path, 0) for path in paths] == [
        int(other.get_pattern_key([key], path) == key) for path in paths
    ]


@pytest.mark.parametrize(
    "key",
    [
        "(?=a)b", "(?!a)b", "(?<=a)b", r"(a)\1", "(?i)a", "(?P<x>a)", r"\bq", r"\Aq", "a++", "a**", "(", "a)", "*",
        "a|*", "^*", "a^b", "(^a)", "a$b", "[b-a]", "[a", "a{3,1}", "a{1", "\\", r"\x41", "(" * 20 + "a" + ")" * 20,
    ],
)  # fmt: skip
def test_another_expression_is_refused(key: str) -> None:
    message = rf"^alpha_pattern has the pattern .*{re.escape('groups (a|b)')}.*: write the modules' paths in full"
    with pytest.raises(FileError, match=message):
        PathPatterns("alpha_pattern", {key: 1})


HOSTILE = {
    "(a|a)+b": "a" * 40, "(a+b?)+c": "a" * 40, "(a*b?)*c": "a" * 60, "(?:a|aa)+!": "a" * 60, "((a+))+!": "a" * 40,
    "(.*.*.*.*.*.*.*.*)!": "a" * 200, "(a+|b)+!": "a" * 40, "((a{0,99}){0,99}){0,99}!": "a" * 40,
}  # fmt: skip


def test_expressions_that_take_python_forever_are_matched_at_once() -> None:
    start = time.process_time()
    for key, path in HOSTILE.items():
        patterns = PathPatterns("rank_pattern", {key: 2})
        assert [patterns.get(path + end, 0) for end in ("", key[-1])] == [0, 2]
    assert time.process_time() - start < 1
    # In time that is linear in the path.
    assert PathPatterns("rank_pattern", {"(a|a)+b": 2, "(.*.*.*.*)!": 3}).get("a" * 50_000, 0) == 0
    assert time.process_time() - start < 5


def test_patterns_that_would_take_too_long_are_refused() -> None:
    patterns = PathPatterns("rank_pattern", {f".*{number}.*.*.*a.*b": 1 for number in range(1000)})
    path = "".join(map(str, range(1000))) * 10 + "ba"
    message = r"^rank_pattern has 1000 patterns that would take too long to match: write the modules' paths in full"
    start = time.process_time()
    with pytest.raises(FileError, match=message):
        patterns.get(path, 0)
    assert time.process_time() - start < 8


def test_a_folder_with_thousands_of_modules_and_keys(tmp_path: Path) -> None:
    names = [f"model.layers.{number // 7}.self_attn.p{number % 7}_proj" for number in range(3000)]
    start = time.process_time()
    for keys in (names, [f"^{re.escape(name)}" for name in names], [f".*{name}" for name in names]):
        patterns = PathPatterns("rank_pattern", {key: place for place, key in enumerate(keys)})
        assert [patterns.get(name, None) for name in names] == list(range(3000))
    assert time.process_time() - start < 3
    ones = dict.fromkeys(names, 1)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ones, "alpha_pattern": ones}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    one = np.ones((1, 1), np.float32)
    tensors = {f"base_model.model.{name}.lora_{which}.weight": one for name in names for which in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert len(tna.convert(tmp_path).file.targets) == len(names)
    assert time.process_time() - start < 13  # it takes one or two; in quadratic time, more than half a minute


def test_a_path_with_a_line_break_has_no_pattern() -> None:
    with pytest.raises(FileError, match=r"^'a\\nb' has a line break, so that no pattern of rank_pattern is for it$"):
        PathPatterns("rank_pattern", {"b": 1}).get("a\nb", 0)
    assert PathPatterns("rank_pattern", {}).get("a\nb", 3) == 3
