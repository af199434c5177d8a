"""LLVM intrinsics for operations that numba cannot express: signs packed as bits, and prefetching."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = ["fetch", "signed"]

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
