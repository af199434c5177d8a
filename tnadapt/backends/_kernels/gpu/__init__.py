"""Kernels for CUDA tensors, in Triton: the Hadamard transform, and F with nothing stored.

Design requirements of this package:

* A kernel takes tensors and uses their methods alone: torch itself is not imported here.
* What is random is drawn inside the kernel, from the seed and the index, with the bits of :mod:`tnadapt.algebra.rng`.
* Two runs give the same bits: nothing is added up by atomics.
* Everything here also runs on tensors on the CPU under Triton's interpreter (``TRITON_INTERPRET=1``), slowly, and
  compiles to machine code without a device: so it is tested where there is none.
"""
