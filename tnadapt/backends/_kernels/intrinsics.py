"""LLVM intrinsics for operations that numba cannot express: signs packed as bits, and prefetching."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .simd import RADIX_BITS, VECTOR_BYTES

__all__ = ["fetch", "signed", "signed_butterfly"]

_BIT, _BYTE, _INT32 = ir.IntType(1), ir.IntType(8), ir.IntType(32)
_SIGNED = 32  # elements at once: one per bit of a word


def _place(context: Any, builder: Any, kind: Any, array: Any, at: Any, seen_as: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), seen_as.as_pointer())


@intrinsic  # type: ignore[untyped-decorator]
def signed(typing: Any, src: Any, dst: Any, at: Any, word: Any, scale: Any) -> Any:
    """Set ``dst = scale * src`` for 32 elements from ``at`` on, negated where the word's bit (lowest first) is set."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = context.get_data_type(src.dtype)
        vector = ir.VectorType(element, _SIGNED)
        align = src.dtype.bitwidth // 8
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), args[4], ir.Constant(_INT32, 0))
        zeros = ir.Constant(ir.VectorType(_INT32, _SIGNED), [0] * _SIGNED)
        factor = builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)
        x = builder.load(_place(context, builder, signature.args[0], args[0], args[2], vector), align=align)
        positive = builder.fmul(x, factor)
        set_bits = builder.bitcast(args[3], ir.VectorType(_BIT, _SIGNED))
        result = builder.select(set_bits, builder.fneg(positive), positive)
        builder.store(result, _place(context, builder, signature.args[1], args[1], args[2], vector), align=align)
        return context.get_dummy_value()

    return types.void(src, dst, types.intp, types.uint32, src.dtype), emit


@intrinsic  # type: ignore[untyped-decorator]
def signed_butterfly(
    typing: Any, src: Any, at: Any, apart: Any, dst: Any, to: Any, to_apart: Any, bits: Any, words: Any, scale: Any
) -> Any:
    """Transform across ``2**bits`` vectors, ``apart`` elements from each other; bits 1 to RADIX_BITS.

    Of each result, multiplies by scale and negates the elements of dst whose bit in words is set.
    """
    intp = types.intp
    signature = types.void(src, intp, intp, dst, intp, intp, intp, words, src.dtype)
    lanes = VECTOR_BYTES * 8 // src.dtype.bitwidth

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, at, apart, target, to, to_apart, count, words, scale = args
        element, align = context.get_data_type(src.dtype), src.dtype.bitwidth // 8
        vector, bytes_of_bits = ir.VectorType(element, lanes), ir.IntType(max(8, lanes))
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), scale, ir.Constant(_INT32, 0))
        zeros = ir.Constant(ir.VectorType(_INT32, lanes), [0] * lanes)
        factor = builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)
        data = context.make_array(signature.args[7])(context, builder, words).data
        signs = builder.bitcast(data, bytes_of_bits.as_pointer())

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
                    place = _place(context, builder, signature.args[0], source, offset, vector)
                    values.append(builder.load(place, align=align))
                    offset = builder.add(offset, apart)
                for half in (1 << stage for stage in range(stages)):
                    for low in (i for i in range(len(values)) if not i & half):
                        a, b = values[low], values[low + half]
                        values[low], values[low + half] = builder.fadd(a, b), builder.fsub(a, b)
                offset = to
                for value in values:
                    positive = builder.fmul(value, factor)
                    result = builder.select(negative(offset), builder.fneg(positive), positive)
                    place = _place(context, builder, signature.args[3], target, offset, vector)
                    builder.store(result, place, align=align)
                    offset = builder.add(offset, to_apart)
        return context.get_dummy_value()

    return signature, emit


@intrinsic  # type: ignore[untyped-decorator]
def fetch(typing: Any, array: Any, at: Any) -> Any:
    """Prefetch an element into the level 2 cache."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _BYTE.as_pointer()
        hint = ir.FunctionType(ir.VoidType(), [pointer, _INT32, _INT32, _INT32])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [pointer], hint)
        read, second_cache, of_data = (ir.Constant(_INT32, number) for number in (0, 2, 1))
        builder.call(ask, [_place(context, builder, array, args[0], args[1], _BYTE), read, second_cache, of_data])
        return context.get_dummy_value()

    return types.void(array, types.intp), emit
