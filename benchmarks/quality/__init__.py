"""A benchmark of quality per parameter that anyone can run: ``python -m benchmarks.quality run digits``.

It is a grid of task × method × budget × seed × learning rate. A task (``tasks/``, one file each) is a pretrained model
and data from package registries, with a held-out part that chooses rates and a test part that chooses nothing. A method
(``methods/``) is a preset of tnadapt, a method of PEFT, or a control. At each budget of parameters, a method takes part
with its largest setting within the budget, if that uses at least half of it (``grid.py``). Every method gets the same
rates by the same rule (``tuning.py``).

Results are JSON lines by key (``store.py``): a run that was stopped resumes (``running.py``), and shards are merged.
Tables, figures and the page of the documentation (``report.py``, ``figures.py``, ``page.py``) are computed from these
files alone, with intervals that are paired over seeds (``comparison.py``). ``engine.py`` is the only module that starts
trainings; ``--together`` lets those of one setting, at several rates and seeds, be the members of one population.
"""
