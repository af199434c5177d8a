"""The algebra of weight updates, from settings to ΔW, on any array library.

Data flows one way. ``config`` holds the settings and ``presets`` the named methods. ``superlora`` plans them for given
weights: ``layout`` cuts the long vector of all updates into groups, ``folding`` folds each group into a tensor.
``network`` computes one group, or any slice of it, from its splits (``formats``, combined by ``products``), with
``unfolding`` and ``rearrangement``. ``maps`` holds the fixed map F that follows. ``init`` initializes the arrays for
training; ``sources`` says which arrays are trained and computes the frozen ones, ``starting_points`` says where
training starts. ``rng`` draws every fixed or random number reproducibly, bit for bit. ``factoring`` finds updates that
are products of two factors, ``rounding`` adds an update to a weight, and ``geometry`` and ``norms`` measure updates.
"""

from types import ModuleType

from tnadapt.lazy_names import lazy_module


def __getattr__(name: str) -> ModuleType:
    return lazy_module(__name__, name)
