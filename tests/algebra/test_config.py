"""Config: frozen, strict, and unchanged by a JSON round trip."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.testing.strategies import configs, shapes


@given(st.data())
def test_json_and_pickle_round_trip(data: st.DataObject) -> None:
    config = data.draw(configs(data.draw(shapes())))
    assert tna.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(config.replace())


def test_defaults_are_the_specs() -> None:
    assert json.dumps(tna.Config().to_dict()) == (
        '{"rank": 4, "order": 2, "splits": 1, "groups": "weight", "fold": "stack", "format": "cp", '
        '"combine": "kronecker", "split_size": "balanced", "leading": "dense", "terms": 1, "projection": "identity", '
        '"ratio": 1.0, "shared": true, "alpha": null, "seed": 0}'
    )


def test_numpy_numbers_are_accepted() -> None:
    config = tna.Config(rank=np.int64(3), alpha=np.float32(2), groups=np.int32(1), ratio=1)
    assert (config.rank, config.alpha, config.groups, config.ratio) == (3, 2.0, 1, 1.0)
    assert json.loads(json.dumps(config.to_dict()))["rank"] == 3


def test_scale() -> None:
    assert tna.Config(rank=8).scale == 1.0
    assert tna.Config(rank=8, alpha=2).scale == 0.25
    assert tna.Config(rank=(None, 2, 4), alpha=8, order=3, fold=(2, 3, 4), format="tucker").scale == 2.0


BAD = [
    ({"rate": "adamw"}, "rate must be one of"),
    ({"rank": 2.0}, "rank must be an integer"),
    ({"rank": True}, "rank must be an integer"),
    ({"rank": None}, "rank must be an integer"),
    ({"rank": (2, 2)}, "format='cp' has one rank"),
    ({"rank": (2, 2, 2), "format": "tucker"}, "needs 2 ranks; got 3"),
    ({"rank": (None,), "format": "tt"}, r"rank\[0\] must be an integer"),
    ({"rank": (2, 2), "format": "tt"}, "needs 1 ranks; got 2"),
    ({"order": 3}, "use fold='hypercube'"),
    ({"groups": "all"}, 'groups must be "weight", "layer", "role"'),
    ({"groups": []}, "none of them empty"),
    ({"groups": [[0], []]}, "none of them empty"),
    ({"groups": [[0, -1]]}, r"groups\[0\] must be at least 0"),
    ({"groups": [["a"]]}, r"groups\[0\] must be an integer"),
    ({"groups": 1.5}, "groups must be an integer or"),
    ({"fold": "cube"}, "fold must be one of 'stack', 'hypercube', 'balanced' or a tuple"),
    ({"fold": (2, 3, 4)}, "set order=3"),
    ({"format": "svd"}, r"format must be one of 'dense', 'cp'.*got 'svd'.*install the plug-in"),
    ({"format": "tcuker"}, r"got 'tcuker'; did you mean 'tucker'\? If a plug-in provides it"),
    ({"format": "TT"}, r"got 'TT'; did you mean 'tt'\? If a plug-in provides it"),
    ({"projection": "circulants"}, r"got 'circulants'; did you mean 'circulant'\? If a plug-in"),
    ({"combine": "sum"}, "combine must be one of"),
    ({"leading": "cp"}, "leading must be one of"),
    ({"split_size": "even"}, 'split_size must be an integer or "balanced"'),
    ({"split_size": (8,)}, "has 1 sizes and order is 2: give one per mode"),
    ({"splits": 2, "combine": "hadamard", "split_size": 4}, "leave split_size out"),
    ({"ratio": 0.5}, "use projection='linear', or ratio=1"),
    ({"ratio": 0.5, "projection": "shuffle"}, "use projection='linear'"),
    ({"ratio": float("nan"), "projection": "linear"}, "ratio must be finite"),
    ({"ratio": "0.5", "projection": "linear"}, "ratio must be a number"),
    ({"shared": 1}, "shared must be True or False"),
    ({"rank": 10**5000}, "an integer of 16610 bits"),
    ({"split_size": np.array([2, 3])}, "split_size must be an integer"),
    ({"alpha": float("inf")}, "alpha must be finite"),
    ({"alpha": True}, "alpha must be a number"),
    *(
        ({"alpha": float(alpha)}, r"^alpha must be from 1e-09 to 1e\+09, or None for a scale of 1; ")
        for alpha in (np.nextafter(1e-9, 0), np.nextafter(1e9, np.inf))
    ),
    *(
        ({"ratio": ratio, "projection": "linear"}, r"^ratio must be above 0 and at most 1; got ")
        for ratio in (0.0, -0.5, float(np.nextafter(1, 2)))
    ),
    ({"seed": 1.0}, "seed must be an integer"),
    ({"weight_shape": (2, 3)}, "fold='stack' names none"),
    ({"weight_shape": 6, "fold": (2, 3)}, r"weight_shape must be \(rows, cols\)"),
    ({"weight_shape": (2, 0), "fold": (2, 3)}, r"weight_shape\[1\] must be at least 1"),
    ({"weight_shape": (2, 4), "fold": (2, 3)}, "do not multiply to the 2 rows and 4 columns"),
    ({"weight_shape": (4, 3), "fold": (2, 3)}, "do not multiply to the 4 rows and 3 columns"),
    *(
        ({"order": 3, "groups": 1, "fold": (4, 6, 5), "format": "tt", **changes}, re.escape(message))
        for changes, message in [
            ({"axes": (0, 1)}, "axes must name each of the positions 0 to 2 of fold=(4, 6, 5) once, in the order"),
            ({"axes": (0, 1, 1)}, "axes must name each of the positions 0 to 2"),
            ({"axes": ((0, 1, 2), ())}, "axes must name each of the positions 0 to 2"),
            ({"axes": (0, 1, 3)}, "axes[2] must be from 0 to 2"),
            ({"axes": "rows"}, "the positions 0 to 2 of fold=(4, 6, 5) once, such as (0, 1, 2); got 'rows'"),
            ({"axes": ((0, 1), 2)}, "are 2 modes and order is 3; set order=2"),
            (
                {"axes": (0, 1, 2), "fold": "hypercube"},
                "are positions in a fold of explicit sizes, and fold='hypercube'",
            ),
            ({"axes": (1, 0, 2), "splits": 2}, "Kronecker splits have several: leave axes out, or use splits=1"),
        ]
    ),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_invalid_settings_are_refused_with_a_remedy(fields: dict, message: str) -> None:
    with pytest.raises(tna.ConfigError, match=message):
        tna.Config(**fields)
    with pytest.raises(tna.ConfigError, match=message):
        tna.Config.from_dict(fields)


def test_unknown_fields() -> None:
    for call in (tna.Config.from_dict, lambda d: tna.Config(**d), lambda d: tna.Config().replace(**d)):
        with pytest.raises(tna.ConfigError, match="no field 'rnk'; did you mean 'rank'"):
            call({"rnk": 3})
    with pytest.raises(tna.ConfigError, match="no field 5"):
        tna.Config.from_dict({5: 3})  # type: ignore[dict-item]
    with pytest.raises(tna.ConfigError, match="expected a mapping"):
        tna.Config.from_dict([("rank", 3)])  # type: ignore[arg-type]
    with pytest.raises(tna.ConfigError, match="no field 'dropout'"):
        tna.presets.lora(dropout=0.1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)


@pytest.mark.law("fuzz")
@given(JSON, st.sampled_from(sorted(tna.Config().to_dict())))
def test_any_value_is_accepted_or_refused(value: object, field: str) -> None:
    try:
        config = tna.Config.from_dict({field: value})
    except tna.ConfigError:
        return
    assert tna.Config.from_dict(config.to_dict()) == config


# Every number that a setting may be, by the least and the largest; what else it takes to give such a number.
BOUNDS: list[tuple[str, Callable[[int], dict[str, object]], int, int]] = [
    ("rank", lambda n: {"rank": n}, 1, 2**40),
    ("rank[0]", lambda n: {"rank": (n, None), "format": "tucker"}, 1, 2**40),
    ("rank[1]", lambda n: {"rank": (1, n), "format": "tt", "order": 3, "fold": "balanced"}, 1, 2**40),
    ("order", lambda n: {"order": n, "fold": "hypercube"}, 1, 32),
    ("splits", lambda n: {"splits": n}, 1, 32),
    ("terms", lambda n: {"terms": n}, 1, 2**16),
    ("seed", lambda n: {"seed": n}, 0, 2**64 - 1),
    ("fold[0]", lambda n: {"fold": (n, 3)}, 1, 2**62),
    ("split_size", lambda n: {"split_size": n}, 1, 2**40),
    ("split_size[1]", lambda n: {"split_size": (1, n)}, 1, 2**40),
    ("groups", lambda n: {"groups": n}, 1, 2**62),
    ("groups[1]", lambda n: {"groups": [[2**39], [n]]}, 0, 2**40),
]


@pytest.mark.parametrize(("name", "settings", "low", "high"), BOUNDS, ids=[bound[0] for bound in BOUNDS])
def test_bounds_are_accepted_and_values_beyond_are_refused(
    name: str, settings: Callable[[int], dict[str, object]], low: int, high: int
) -> None:
    for value in (low, high):
        config = tna.Config.from_dict(settings(value))
        assert tna.Config.from_dict(config.to_dict()) == config
    # A limit that nobody meets by accident is not in the message about the other one.
    least, most = (f"at least {low}", f"at most {high:,}") if high > 10**6 else [f"from {low} to {high}"] * 2
    for value, limits in ((low - 1, least), (high + 1, most)):
        with pytest.raises(tna.ConfigError, match=rf"^{re.escape(name)} must be .*{limits}.*; got {value}$"):
            tna.Config.from_dict(settings(value))


def test_the_bounds_of_alpha_and_ratio_are_accepted() -> None:
    assert [tna.Config(alpha=alpha).alpha for alpha in (1e-9, 1e9)] == [1e-9, 1e9]
    assert [tna.Config(ratio=ratio, projection="linear").ratio for ratio in (5e-324, 1.0)] == [5e-324, 1.0]


@pytest.mark.parametrize(
    ("keyword", "ours"),
    [
        ("r", "'rank' here, a setting of tnadapt.Config and its presets"),
        ("lora_alpha", "'alpha' here, a setting of tnadapt.Config and its presets"),
        ("target_modules", "'targets' here, an argument of tnadapt.torch.attach"),
        ("modules_to_save", "'keep_trainable' here, an argument of tnadapt.torch.attach"),
    ],
)
@pytest.mark.parametrize("made", [tna.Config, tna.presets.lora, tna.presets.superlora], ids=lambda made: made.__name__)
def test_the_keywords_of_peft_are_translated(made: Callable[..., Any], keyword: str, ours: str) -> None:
    text = f"Config has no field {keyword!r}; PEFT's {keyword!r} is {ours}. The fields are rank, "
    with pytest.raises(tna.ConfigError, match=re.escape(text)):
        made(**{keyword: 8})
