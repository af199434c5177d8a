"""Mutation testing: small faults are put into the code one by one, and the tests have to notice.

The mutations are a choice of cosmic-ray's and four more (:mod:`mutation.operators`); ``--left-out`` runs those of
cosmic-ray that are not among them.

What is new here is how they are run. Which tests reach which line is measured once (:mod:`mutation.reach`); a mutant is
run in a process forked from one that has imported NumPy, torch and JAX already, against the tests that reach it and no
others, cheapest first (:mod:`mutation.running`). That takes seconds rather than minutes.

``python -m mutation`` mutates everything that ``modules.toml`` lists; ``--sample N`` takes a random part. Results go to
``benchmarks/results/mutation.jsonl`` line by line, and a second run continues where the first one stopped. Each mutant
that survives needs a reason in ``survivors.toml``.
"""
