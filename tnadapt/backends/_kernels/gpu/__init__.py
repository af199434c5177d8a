"""Kernels for CUDA devices, in Triton: the Hadamard transform, and F without stored draws.

Design requirements of this package:

* A kernel takes tensors and uses only their methods: torch is not imported here.
* Random numbers are drawn inside the kernel, from the seed and the index, with the bits of :mod:`tnadapt.algebra.rng`.
* Two runs give the same bits: sums do not use atomics.
* The Triton kernels also run on CPU tensors under Triton's interpreter (``TRITON_INTERPRET=1``), slowly, and compile to
  machine code without a device, so that they can be tested on a machine without one.
"""
