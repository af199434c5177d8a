"""SIMD instructions as LLVM intrinsics: butterflies in registers, signs packed as bits, and prefetching.

numba's vectorizer does not keep several vectors in registers over several butterfly stages. These intrinsics
do: they emit LLVM code with explicit vectors as wide as the host's registers, and with unaligned loads and
stores. They can only be called from compiled code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

# -- Butterflies in SIMD registers -------------------------------------------------------------------------------------

# mypy: disable-error-code="no-untyped-def,no-untyped-call"


# The target that numba compiles for, and that its cache is keyed by: triple, processor, features.
_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
VECTOR_BYTES = 64 if "+avx512f" in _FEATURES else 32

_FUSED = "+fma" in _FEATURES

# Vectors held in registers at once. They take half of the registers (32 with AVX-512, otherwise 16) and leave the other
# half for temporaries. With 16 of 16 registers, half of the vectors are spilled to memory in every stage, and a
# transform takes up to 1.8 times as long.
LOW_VECTORS = 16 if VECTOR_BYTES == 64 else 8

# Stages across rows that are done at once: one vector of each of 2**RADIX_BITS rows, LOW_VECTORS vectors in all.
RADIX_BITS = LOW_VECTORS.bit_length() - 1

_INT32 = ir.IntType(32)


def _inlined(function: Callable[..., Any]) -> Any:
    """Make a function a numba intrinsic: compiled code calls it without its first argument, ``typing``."""
    return intrinsic(function)


class _Lanes:
    """Emit loads, stores and butterflies of SIMD vectors with a number of lanes (with one lane, of scalars)."""

    def __init__(self, context: Any, builder: Any, element: Any, lanes: int) -> None:
        self.context, self.builder, self.lanes = context, builder, lanes
        self.element = context.get_data_type(element)
        self.type = ir.VectorType(self.element, lanes) if lanes > 1 else self.element
        self.itemsize = element.bitwidth // 8

    def data(self, array_type: Any, array: Any) -> Any:
        return self.context.make_array(array_type)(self.context, self.builder, array).data

    def _at(self, data: Any, offset: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(data, [offset]), self.type.as_pointer())

    def load(self, data: Any, offset: Any) -> Any:
        return self.builder.load(self._at(data, offset), align=self.itemsize)

    def store(self, value: Any, data: Any, offset: Any) -> None:
        self.builder.store(value, self._at(data, offset), align=self.itemsize)

    def fetch(self, data: Any, offset: Any) -> None:
        """Prefetch an element into the level 2 cache."""
        pointer = ir.IntType(8).as_pointer()
        hint = ir.FunctionType(ir.VoidType(), [pointer, _INT32, _INT32, _INT32])
        fetch = self.builder.module.declare_intrinsic("llvm.prefetch", [pointer], hint)
        read, second_cache, of_data = (ir.Constant(_INT32, number) for number in (0, 2, 1))
        place = self.builder.bitcast(self.builder.gep(data, [offset]), pointer)
        self.builder.call(fetch, [place, read, second_cache, of_data])

    def spread(self, number: Any) -> Any:
        if self.lanes == 1:
            return number
        lane = self.builder.insert_element(ir.Constant(self.type, ir.Undefined), number, ir.Constant(_INT32, 0))
        zeros = ir.Constant(ir.VectorType(_INT32, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(lane, ir.Constant(self.type, ir.Undefined), zeros)

    def between(self, values: Sequence[Any], stages: Sequence[int]) -> list[Any]:
        """Do stages that combine whole vectors: stage s pairs vector i with vector i + 2**s."""
        values = list(values)
        for half in (1 << stage for stage in stages):
            for low in (i for i in range(len(values)) if not i & half):
                a, b = values[low], values[low + half]
                values[low], values[low + half] = self.builder.fadd(a, b), self.difference(a, b)
        return values

    def difference(self, a: Any, b: Any) -> Any:
        """Return a - b, where there are fused instructions as ``-1 * b + a``: the same bits, from other units.

        AMD's Zen has units that only add besides those that multiply and add. With differences in the latter, a sum and
        a difference are computed at the same time.
        """
        if not _FUSED:
            return self.builder.fsub(a, b)
        # LLVM would turn a product with a constant -1 that it sees back into a subtraction.
        name = f"llvm.arithmetic.fence.{f'v{self.lanes}' if self.lanes > 1 else ''}f{self.itemsize * 8}"
        function_type = ir.FunctionType(self.type, [self.type])
        hidden = self.builder.module.globals.get(name) or ir.Function(self.builder.module, function_type, name)
        minus = ir.Constant(self.type, [-1.0] * self.lanes if self.lanes > 1 else -1.0)
        product = self.builder.fmul(b, self.builder.call(hidden, [minus]), flags=("contract",))
        return self.builder.fadd(a, product, flags=("contract",))

    def within(self, value: Any, stage: int) -> Any:
        """Do a stage that combines lanes of one vector, 2**stage lanes apart."""
        half = 1 << stage
        swapped = self.builder.shuffle_vector(
            value,
            ir.Constant(self.type, ir.Undefined),
            ir.Constant(ir.VectorType(_INT32, self.lanes), [lane ^ half for lane in range(self.lanes)]),
        )
        signs = ir.Constant(self.type, [-1.0 if lane & half else 1.0 for lane in range(self.lanes)])
        # swapped + (1 or -1) * value is one fused instruction. The product is exact, so that fusing does not change the
        # rounding: the bits are those of a sum or difference.
        return self.builder.fadd(self.builder.fmul(value, signs, flags=("contract",)), swapped, flags=("contract",))

    def stage(self, values: list[Any], number: int) -> list[Any]:
        """Do the stage with that number on contiguous vectors: its pairs are 2**number elements apart."""
        inside = self.lanes.bit_length() - 1
        if number >= inside:
            return self.between(values, [number - inside])
        return [self.within(value, number) for value in values]

    def all_stages(self, values: list[Any]) -> list[Any]:
        """Do all stages on contiguous vectors, those of the first half before those of the second.

        Stages within vectors, which are fused, and stages between vectors then alternate in the code, so that the
        processor computes both at the same time, in different units. Differences are no fused instructions here.
        """
        if len(values) == 1:
            for number in range(self.lanes.bit_length() - 1):
                values = [self.within(values[0], number)]
            return values
        half = len(values) // 2
        low, high = self.all_stages(values[:half]), self.all_stages(values[half:])
        sums = [self.builder.fadd(a, b) for a, b in zip(low, high, strict=True)]
        return [*sums, *(self.builder.fsub(a, b) for a, b in zip(low, high, strict=True))]

    def where(self, condition: Any, values: list[Any], change: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Apply a change to the values if a condition holds; a branch, which is well predicted if it rarely varies."""
        before = self.builder.block
        with self.builder.if_then(condition):
            changed = change(values)
            after = self.builder.block
        merged = []
        for old, new in zip(values, changed, strict=True):
            merged.append(self.builder.phi(self.type))
            merged[-1].add_incoming(old, before)
            merged[-1].add_incoming(new, after)
        return merged

    def times(self, values: list[Any], scale: Any) -> list[Any]:
        """Multiply the values by a number, unless it is 1."""
        other = self.builder.fcmp_unordered("!=", scale, ir.Constant(self.element, 1.0))
        return self.where(other, values, lambda those: [self.builder.fmul(v, self.spread(scale)) for v in those])


@_inlined
def low_stages(typing, src, at, dst, to, first, last, scale, ahead):
    """Do stages first to last - 1 on ``LOW_VECTORS`` contiguous vectors: ``dst[to:] = stages(scale * src[at:])``.

    Stage s pairs elements 2**s apart. Prefetches as many elements of src from ``at + ahead`` on; a prefetch
    reads nothing, so that these may be past the end.
    """
    intp = types.intp
    signature = types.void(src, intp, dst, intp, intp, intp, src.dtype, intp)
    lanes = VECTOR_BYTES * 8 // src.dtype.bitwidth

    def emit(context, builder, signature, args):
        v = _Lanes(context, builder, src.dtype, lanes)
        source, target = v.data(src, args[0]), v.data(dst, args[2])
        steps = [ir.Constant(args[1].type, i * lanes) for i in range(LOW_VECTORS)]
        later = builder.add(args[1], args[7])
        for step in steps:
            v.fetch(source, builder.add(later, step))
        values = v.times([v.load(source, builder.add(args[1], step)) for step in steps], args[6])
        count = (lanes * LOW_VECTORS).bit_length() - 1

        def store(values: Sequence[Any]) -> None:
            for value, step in zip(values, steps, strict=True):
                v.store(value, target, builder.add(args[3], step))

        every = builder.icmp_signed("==", builder.sub(args[5], args[4]), ir.Constant(args[4].type, count))
        with builder.if_else(every) as (in_every_stage, in_some_stages):
            with in_every_stage:
                store(v.all_stages(values))
            with in_some_stages:
                for stage in range(count):
                    number = ir.Constant(args[4].type, stage)
                    begun = builder.icmp_signed("<=", args[4], number)
                    wanted = builder.and_(begun, builder.icmp_signed("<", number, args[5]))
                    values = v.where(wanted, values, functools.partial(v.stage, number=stage))
                store(values)
        return context.get_dummy_value()

    return signature, emit


def _butterfly(lanes: int | None) -> Any:
    def butterfly(typing, src, at, apart, dst, to, to_apart, bits, scale, coming, ahead):
        """Scale ``2**bits`` vectors, ``apart`` elements from each other, and transform across them; bits 1 to 4.

        Prefetches as many vectors of ``coming`` from ``at + ahead`` on, unless ahead is 0.
        """
        intp = types.intp
        signature = types.void(src, intp, intp, dst, intp, intp, intp, src.dtype, coming, intp)

        def emit(context, builder, signature, args):
            v = _Lanes(context, builder, src.dtype, lanes or VECTOR_BYTES * 8 // src.dtype.bitwidth)
            source, target, later = v.data(src, args[0]), v.data(dst, args[3]), v.data(coming, args[8])
            asked = builder.icmp_signed("!=", args[9], ir.Constant(args[9].type, 0))
            for count in range(RADIX_BITS, 0, -1):
                with builder.if_then(builder.icmp_signed("==", args[6], ir.Constant(args[6].type, count))):
                    offsets = [args[1]]
                    while len(offsets) < 1 << count:
                        offsets.append(builder.add(offsets[-1], args[2]))
                    with builder.if_then(asked):
                        for offset in offsets:
                            v.fetch(later, builder.add(offset, args[9]))
                    values = v.times([v.load(source, offset) for offset in offsets], args[7])
                    offset = args[4]
                    for value in v.between(values, range(count)):
                        v.store(value, target, offset)
                        offset = builder.add(offset, args[5])
            return context.get_dummy_value()

        return signature, emit

    return _inlined(butterfly)


butterfly = _butterfly(None)
# For the remaining columns if their number is not a multiple of the vector width.
butterfly_of_four = _butterfly(4)
butterfly_of_one = _butterfly(1)


# -- Signs packed as bits, and prefetching -----------------------------------------------------------------------------


_BIT = ir.IntType(1)
_SIGNED = 32  # elements at once: one per bit of a word


@_inlined
def signed(typing, src, dst, at, word, scale):
    """Set ``dst = scale * src`` for 32 elements from ``at`` on, negated where the word's bit (lowest first) is set."""

    def emit(context, builder, signature, args):
        v = _Lanes(context, builder, src.dtype, _SIGNED)
        positive = builder.fmul(v.load(v.data(src, args[0]), args[2]), v.spread(args[4]))
        set_bits = builder.bitcast(args[3], ir.VectorType(_BIT, _SIGNED))
        v.store(builder.select(set_bits, builder.fneg(positive), positive), v.data(dst, args[1]), args[2])
        return context.get_dummy_value()

    return types.void(src, dst, types.intp, types.uint32, src.dtype), emit


@_inlined
def signed_butterfly(typing, src, at, apart, dst, to, to_apart, bits, words, scale):
    """Transform across ``2**bits`` vectors, ``apart`` elements from each other; bits 1 to RADIX_BITS.

    Of each result, multiplies by scale and negates the elements of dst whose bit in words is set.
    """
    intp = types.intp
    signature = types.void(src, intp, intp, dst, intp, intp, intp, words, src.dtype)
    lanes = VECTOR_BYTES * 8 // src.dtype.bitwidth

    def emit(context, builder, signature, args):
        source, at, apart, target, to, to_apart, count, words, scale = args
        v, bytes_of_bits = _Lanes(context, builder, src.dtype, lanes), ir.IntType(max(8, lanes))
        source, target, factor = v.data(src, source), v.data(dst, target), v.spread(scale)
        signs = builder.bitcast(v.data(signature.args[7], words), bytes_of_bits.as_pointer())

        def number(value: int) -> Any:
            return ir.Constant(to.type, value)

        def negative(offset: Any) -> Any:
            """Return the bits of as many elements as a vector has, which may be half of a byte."""
            width = bytes_of_bits.width
            some = builder.load(builder.gep(signs, [builder.udiv(offset, number(width))]))
            some = builder.lshr(some, builder.trunc(builder.urem(offset, number(width)), bytes_of_bits))
            some = some if width == lanes else builder.trunc(some, ir.IntType(lanes))
            return builder.bitcast(some, ir.VectorType(_BIT, lanes))

        for stages in range(RADIX_BITS, 0, -1):
            with builder.if_then(builder.icmp_signed("==", count, ir.Constant(count.type, stages))):
                values, offset = [], at
                for _ in range(1 << stages):
                    values.append(v.load(source, offset))
                    offset = builder.add(offset, apart)
                offset = to
                for value in v.between(values, range(stages)):
                    positive = builder.fmul(value, factor)
                    result = builder.select(negative(offset), builder.fneg(positive), positive)
                    v.store(result, target, offset)
                    offset = builder.add(offset, to_apart)
        return context.get_dummy_value()

    return signature, emit


@_inlined
def fetch(typing, array, at):
    """Prefetch an element into the level 2 cache."""

    def emit(context, builder, signature, args):
        v = _Lanes(context, builder, array.dtype, 1)
        v.fetch(v.data(array, args[0]), args[1])
        return context.get_dummy_value()

    return types.void(array, types.intp), emit
