"""What must not move while code is rearranged: ``python -m tests.frozen`` says what did.

``settings`` lists what is computed: presets with their variations, and products of the fields of Config. ``numbers``
computes it and compares it with ``numbers.txt``; ``names`` compares the public names with ``names.txt``. The library is
used by its public names alone.

What is the same on every machine is compared to the bit, by digests: shapes and units, starts drawn from the seed, the
draws of F, and the bytes of files with fixed arrays, header and all. Updates, their slices, the outputs of layers, and
maps with their adjoints go through BLAS, LAPACK and libm, whose last bits differ between machines. Their products with
a fixed vector are compared to 1e-12 of the norm in float64, and to 1e-5 in float32, which torch alone computes here; to
1e-6 where LAPACK computes arrays from the base weights, or orthonormal ones, as these are rounded to float32.
"""
