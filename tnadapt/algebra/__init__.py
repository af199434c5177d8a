"""The algebra of weight updates, from settings to ΔW, on any array library.

Data flows one way. ``config`` holds the settings and ``presets`` the named methods, which ``named_config`` finds by
name. ``layout`` cuts the long vector of all updates into groups, and ``folding`` folds each group into a tensor.
``network`` computes a group before F, or any slice of it, from its splits (``formats``, combined by ``products``);
``maps`` holds the fixed map F that follows, and ``theta`` one before the network. ``group`` joins these to the ΔW of a
group. ``sources`` says which arrays are trained and computes the frozen ones, some by ``singular_vectors`` of the base
weights; ``init`` and ``starting_points`` say where training starts, ``units`` how far a step moves. ``superlora`` is
the plan of all updates, ``base_arrays`` has what a caller gives or the base weights determine, and ``composite`` joins
several configs. ``rng`` draws every fixed or random number, the same on all machines. ``factoring`` finds updates that
are products of two factors, ``applying`` says how an update meets its weight, ``rounding`` does that in float64, and
``geometry`` and ``norms`` measure updates.
"""

from types import ModuleType

from tnadapt.lazy_names import lazy_module


def __getattr__(name: str) -> ModuleType:
    return lazy_module(__name__, name)
