"""The algebra of weight updates, from settings to ΔW, on any array library.

Data flows one way. ``config`` holds the settings and ``presets`` the named methods. ``superlora`` plans them on given
weights: ``layout`` cuts the long vector of all updates into groups, ``folding`` folds each group to a tensor.
``network`` builds one group from its splits (``formats``, combined by ``products``), whole or any slice of it
(``unfolding``, ``rearrangement``). ``maps`` holds the fixed map F that follows. ``init`` chooses where training starts,
and ``rng`` draws every fixed or random number, to the bit. ``factoring`` finds updates that are products of two
factors, ``rounding`` adds an update to a weight, ``geometry`` and ``norms`` measure.
"""
