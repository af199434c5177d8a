"""Mutation testing: introduce small faults into the code one by one, which the tests have to notice.

The mutations are a selection of cosmic-ray's operators and four of our own (:mod:`mutation.operators`); ``--left-out``
runs cosmic-ray's other operators.

The way of running them is different. Which tests reach which line is measured once (:mod:`mutation.reach`); a mutant
runs in a process forked from one that has already imported NumPy, torch and JAX, against only the tests that reach it,
cheapest first (:mod:`mutation.running`). That takes seconds rather than minutes.

``python -m mutation`` mutates everything that ``modules.toml`` lists; ``--sample N`` takes a random part. Results go to
``benchmarks/results/mutation.jsonl`` line by line, and a second run resumes where the first one stopped. Each mutant
that survives needs a reason in ``survivors.toml``.
"""
