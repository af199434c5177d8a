"""The performance targets, where to find each in the results, and explanations for missed ones."""

from __future__ import annotations

from typing import NamedTuple

from finding import Find, inverse, largest, largest_over, over, times

__all__ = ["TARGETS", "Target"]


class Target(NamedTuple):
    """One line of the table of targets.

    Attributes
    ----------
    what : str
        Its text.
    limit : float
        The largest acceptable value.
    part : str
        The part whose results contain it.
    find : callable
        Returns the value from the rows, or None if they lack it.
    why : str
        Explanation, shown if it is missed or not measured.
    """

    what: str
    limit: float
    part: str
    find: Find
    why: str = ""


CACHED = (
    "In the caches, additions and shuffles take the time: the passes in the table below run far below the bandwidth of "
    "a copy."
)
FFHT = {
    10: "Calling compiled code from Python takes longer than the computation: the rows *a call* below divide the time.",
    16: CACHED,
    20: CACHED,
    24: "Two passes over memory; each takes about as long as a copy, in the table below.",
    26: "Two passes over memory; each takes about as long as a copy, in the table below.",
}

THIRD = (
    "An update that is not factored at the layer needs the gradient of the whole weight, a product that LoRA avoids; "
    "full fine-tuning of q and v in the table needs it too."
)
LOADED = "Numba, loaded for the kernels, takes as much as 'superlora' exceeds LoRA by."
KEPT = "W + ΔW is formed at each layer; merge if this is too slow."

FORMED = "Forming ΔW from its factors, and their gradients from ΔW's, which a dense update does not need."

PROBLEMS = (("vit", "ViT-base"), ("minilm", "MiniLM"))

#: The settings of ``files.py`` without F; those with it are the others.
WITHOUT_F = ("lora(4)", "lokr(16)", "superlora(4)", "lorta(4)", "dense")
WITH_F = ("superlora(4) + F, ρ = 1", "superlora(4) + F, ρ = 0.1", "fastfood(0.01)")

WHOLE = (
    "lonkr", "lotr", "lotr train", "lorta", "lorta_cp", "cara", "fact_tt", "fact_tk", "superlora", "dense",
)  # fmt: skip
WEIGHT_WISE = ("lokr", "krona", "loha", "lonkr stack", "compacter", "superlora weight-wise")
THROUGH_F = ("fastfood", "superlora F 0.01", "superlora F 1")

UNMERGED = (
    "lora(4)",
    "superlora(4)",
    "lorta(4)",
    "loha(4)",
    "lokr(4)",
    "fourierft(1000)",
    "dense",
    "superlora(4) + F, ρ = 0.1",
)

TARGETS: list[Target] = [
    Target(
        "fwht, float32, 2^24, over a copy",
        2.0,
        "fwht",
        largest("ours/copy", case="in place", size=1 << 24, dtype="float32"),
        "Two passes over memory, each of which takes longer than a copy, as the table below lists.",
    ),
    *(
        Target(
            f"fwht, float32, 2^{bits}, over FFHT",
            1 / 1.5,
            "fwht",
            largest("ours/FFHT", case="in place", size=1 << bits, dtype="float32"),
            FFHT.get(bits, ""),
        )
        for bits in (10, 16, 20, 24, 26)
    ),
    *(
        Target(
            f"fwht, {what}, the slowest size over FFHT",
            1 / 1.5,
            "fwht",
            largest("ours/FFHT", case=cases, dtype=dtypes),
            "As for float32, one vector.",
        )
        for what, cases, dtypes in (
            ("float64", "in place", "float64"),
            ("batches of rows", ("a batch of 2^10", "a batch of 2^14"), ("float32", "float64")),
            ("with AVX2 only", "in place, AVX2", ("float32", "float64")),
        )
    ),
    Target(
        "a public call of fwht at 2^10 beyond the kernel, µs",
        1.2,
        "fwht",
        times(1e6, largest("ours - kernel", case="a call", dtype="float32")),
        "The new array, one look-up by dtype and shape, and the call of compiled code.",
    ),
    Target(
        "fwht of a tensor of 2^10 beyond NumPy's, µs",
        5.0,
        "fwht",
        times(1e6, largest("torch - ours", case="a call", dtype="float32")),
        "Checks of torch's modes, and views of the memory of tensors.",
    ),
    Target(
        "fwht of batches and on any axis, over one vector of as many",
        1.3,
        "fwht",
        largest("ours/one of as many"),
        "A few elements after the axis fill only a part of each vector in the first sweep.",
    ),
    Target(
        "fwht, float64 over float32",
        2.2,
        "fwht",
        largest("ours/float32"),
        "Twice the bytes, and half as many numbers in each cache.",
    ),
    Target(
        "fwht without numba, 2^24, over a copy",
        17.0,
        "fwht",
        largest("ours/copy to memory that is there", case="a new array, NumPy, plain", size=1 << 24),
        "Six matrix products, and the page faults of a new array, which the reference does not have.",
    ),
    *(
        Target(
            f"linear F of 2^24, ρ = {ratio:g}, {way}, over a copy, one thread",
            limit,
            "fastfood_profile",
            largest("copies", case="whole", way=way, size=1 << 24, ρ=ratio),
            why,
        )
        for ratio, limits, why in (
            (
                0.01,
                (6, 11),
                "Drawing the permutation and gathering by it takes most of it: the table below lists the passes.",
            ),
            (
                1.0,
                (10, 12),
                "Partitioning into buckets and placing in order take two more passes over memory, and the "
                "new pages of a second vector: the table below lists the passes.",
            ),
        )
        for way, limit in zip(("forward", "backward"), limits, strict=True)
    ),
    Target("its state, bytes per element", 9, "fastfood", largest("bytes an element", case="state")),
    Target("its state from the seed, s", 0.4, "fastfood", largest("ours", case="state", size=1 << 24)),
    *(
        Target(
            f"linear F without numba, {library}, over stacked butterflies in torch",
            1 / 8,
            "fastfood",
            inverse("stacked butterflies/ours", case=f"fallback, {library}"),
            "Its matrix products pass over memory six times, and its gather accesses memory at random.",
        )
        for library in ("NumPy", "torch")
    ),
    *(
        Target(
            f"{problem}: LoRA over PEFT's",
            1.0,
            "steps",
            largest("ratio", problem=kind, case="lora"),
            "Single rounds are both faster and slower: see *low* and *high* below.",
        )
        for kind, problem in PROBLEMS
    ),
    *(
        Target(
            f"{problem}: {what}, the slowest over PEFT's LoRA",
            limit,
            "steps",
            largest("ratio", problem=kind, case=cases),
            THIRD,
        )
        for kind, problem, limits in (("vit", "ViT-base", (1.03, 1.03, 1.06)), ("minilm", "MiniLM", (1.05, 1.05, 1.05)))
        for what, cases, limit in zip(
            ("presets of one group", "presets weight by weight", "through a linear F"),
            (WHOLE, WEIGHT_WISE, THROUGH_F),
            limits,
            strict=True,
        )
    ),
    *(
        Target(
            f"{problem}: superlora, lorta and lonkr, the slowest over dense",
            1.01,
            "steps",
            largest_over(("superlora", "lorta", "lonkr"), "dense", problem=kind),
            FORMED,
        )
        for kind, problem in PROBLEMS
    ),
    Target(
        "the adapted layers alone: superlora, lorta and lonkr, the slowest over dense, processor time",
        1.01,
        "steps",
        largest("ratio", problem="alone", case=("superlora", "lorta", "lonkr")),
        FORMED,
    ),
    *(
        Target(
            f"{problem}: superlora through F, ρ = {ratio}, over superlora",
            1.03,
            "steps",
            over(f"superlora F {ratio}", "superlora", problem=kind),
            "F and its adjoint are computed in every step, whatever the size of the batch.",
        )
        for kind, problem in PROBLEMS
        for ratio in ("0.01", "1")
    ),
    Target("ViT-base: LoKr over PEFT's own", 0.9, "steps", over("lokr", "peft lokr r=4", problem="vit")),
    Target("ViT-base: LoHa over PEFT's own", 0.9, "steps", over("loha", "peft loha r=4", problem="vit")),
    *(
        Target(
            f"ViT-base: peak memory above PEFT's LoRA, MB, {what}",
            150,
            "memory",
            largest("above lora MB", problem="vit", case=cases),
            why,
        )
        for what, cases, why in (
            ("no F", (*WHOLE, *WEIGHT_WISE, "lora"), ""),
            (
                "F of ρ = 0.01",
                THROUGH_F[:2],
                f"{LOADED} ΔW and the draws of F take one float32 per element each; backward needs two more vectors.",
            ),
            (
                "F of ρ = 1",
                THROUGH_F[2:],
                f"{LOADED} ΔW takes one float32 per element, and the draws of F 7 bytes: regenerating them in each "
                "call would take as long as its state from the seed, above. Backward needs two more vectors.",
            ),
        )
    ),
    *(
        Target(
            f"{problem}: inference, {what}, over the base",
            1.005,  # 1.00 as displayed
            "steps",
            largest("ratio", problem=kind, case=tuple(f"inference, {name} {state}" for name in ("lora", "superlora"))),
            KEPT if state == "attached" else "The same model without the adapter: the difference is machine noise.",
        )
        for kind, problem in PROBLEMS
        for what, state in (("merged", "merged"), ("the update cached", "attached"))
    ),
    *(
        Target(
            f"decoding, not merged, {dtype}, the slowest preset over the base",
            1.10,
            "decoding",
            largest("ratio", dtype=dtype, case=UNMERGED),
            "The product with ΔW reads as many bytes again as the adapted weights have; the column *bytes* is the "
            "limit. A dense update is its array, of float32 unless attached otherwise: twice the bytes of bfloat16.",
        )
        for dtype in ("float32", "bfloat16")
    ),
    Target(
        "decoding: the first token after a change of an adapter with F, s",
        0.5,
        "decoding",
        largest("first", how="eager", case="superlora(4) + F, ρ = 0.1"),
        "Every update is computed through F.",
    ),
    *(
        Target(
            f"a small layer of lora(4), {how}, over PEFT's",
            1.0,
            "adapters",
            largest("over peft", case="lora(4)", layers=224, how=how),
            "Overhead of Python.",
        )
        for how in ("without gradients", "forward", "forward and backward")
    ),
    Target(
        "a layer of compacter, of 1,000, without gradients, µs",
        50,
        "adapters",
        largest("µs a layer", case="compacter", layers=1000, how="without gradients"),
        "Each of its twelve arrays is compared with the copy that the cached update was computed from.",
    ),
    Target(
        "100 adapters that acted once: more memory, MB",
        50,
        "adapters",
        largest("more once each has acted, MB"),
        "Cached updates and draws, up to the limit of `set_cache_limit`.",
    ),
    Target(
        "switching between 100 adapters, ms",
        1.0,
        "adapters",
        largest("switch, ms"),
        "The weights of all adapters are set.",
    ),
    Target(
        "the chosen strategy over the best of the three, worst case",
        1.1,
        "strategies",
        largest("over best"),
        "The table shows how many are within the limit. The model's constants are fitted to one machine; on another, "
        "strategies of similar cost may rank differently.",
    ),
    Target(
        "exponent of time against N, the largest of all formats",
        1.05,
        "growth",
        largest("exponent", phase=("weight by weight", "whole")),
        "The time per element is the same at all sizes except for cache effects: the weights of the smaller models fit "
        "in the caches, and the padded length of an F is a power of two.",
    ),
    Target(
        "one 4096² slice of 2^30, CP and Tucker, over a copy by one thread",
        2.0,
        "slices",
        largest(
            "ratio",
            case=tuple([f"CP, M = {m}, r = 8" for m in (2, 3, 4, 5)] + [f"Tucker, M = {m}, r = 4" for m in (3, 5)]),
        ),
        "A rank of 8 takes 16 operations per element: with vectors of 32 bytes, one thread takes longer for them than "
        "for copying the result.",
    ),
    Target(
        "memory in addition to that slice, bytes",
        1e8,
        "slices",
        largest(
            "bytes_beyond",
            library=("numpy", "torch"),
            case=tuple([f"CP, M = {m}, r = 8" for m in (2, 3, 4, 5)] + [f"Tucker, M = {m}, r = 4" for m in (3, 5)]),
        ),
    ),
    Target(
        "plan for 10,000 weights and its table, s",
        5.0,
        "files",
        largest("wall", weights=10_000),
        "Every setting is checked for every shape.",
    ),
    Target(
        "extract through F, q and v of ViT-base, the slowest, s",
        5.0,
        "files",
        largest("wall", case=tuple(f"extract, {name}" for name in WITH_F)),
        "Every step of the search applies F and its adjoint to the whole group.",
    ),
    *(
        Target(
            f"merge on disk, {what}, the slowest, over a plain read and write, processor time",
            limit,
            "files",
            largest("cpu_ratio", case=tuple(f"merge, {name}" for name in names)),
            why,
        )
        for what, names, limit, why in (
            ("no F", WITHOUT_F, 1.5, "ΔW is formed in float64."),
            ("through F", WITH_F, 3.0, "F's normals and permutation are drawn in each merge."),
        )
    ),
    Target(
        "on a GPU: fwht of 2^24 over a device copy",
        5.0,
        "gpu",
        largest("× copy", what="fwht", points="2^24"),
        "No GPU was available.",
    ),
    Target(
        "attach on Llama-7B in addition to its arrays, s",
        2.0,
        "startup",
        largest("seconds_beyond", device=("meta", "cpu")),
    ),
    Target(
        "import tnadapt in addition to NumPy, s",
        0.15,
        "startup",
        largest("seconds_beyond", case="import tnadapt"),
        "Counted with SuperLoRA, presets and Target, whose about 140 modules are imported when they are first used. "
        "``import tnadapt`` alone imports none of them, nor NumPy.",
    ),
]
