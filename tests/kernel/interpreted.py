"""What Triton's interpreter lacks and the packed kernels need, for tests without a GPU.

It has no assembly; it cuts float32 off where bfloat16 is wanted instead of rounding; and its ``tl.dot`` takes the bits
of bfloat16, which it keeps as 16-bit integers, for numbers.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

ASSEMBLY = ("dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r")


def mend(patch: pytest.MonkeyPatch) -> None:
    """Add it, for as long as the patch holds."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    handle: Any = interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def four_products(self: Any, assembly: str, constraints: str, values: list[Any], *rest: Any) -> Any:
        """The one instruction that the kernels use: sums of four products of bytes."""
        assert (assembly, constraints) == ASSEMBLY
        codes, x, total = (value.data for value in values)
        codes = codes.astype("<i4", order="C").view("u1").reshape(*codes.shape, 4)
        x = x.astype("<i4", order="C").view("i1").reshape(*x.shape, 4)
        found = total + (codes.astype("i4") * x).sum(-1, dtype="i4")
        return SimpleNamespace(get_result=lambda index: handle(found, values[2].dtype))

    def rounding_cast(self: Any, given: Any, wanted: Any) -> Any:
        if given.dtype.scalar != tl.float32 or wanted.scalar != tl.bfloat16:
            return cast(self, given, wanted)
        bits = given.data.astype("f4", order="C").view("u4")
        nearest = ((bits.astype("u8") + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("u2")
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        nearest[nan] = 0x7FC0
        return handle(nearest, wanted.scalar)

    def widening_dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (handle((part.data.astype("u4") << 16).view("f4"), tl.float32) for part in (a, b))
        return dot(self, a, b, total, *rest)

    patch.setattr(builder, "create_inline_asm", four_products)
    patch.setattr(builder, "cast_impl", rounding_cast)
    patch.setattr(builder, "create_dot", widening_dot)
