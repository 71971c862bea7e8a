"""GPTQ with widths that differ from group to group."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from unit.solvers.test_gptq import correlated

from bitfloor.core.affine import decode, join_groups, pack
from bitfloor.core.metrics import output_error
from bitfloor.core.packed import dequantize
from bitfloor.core.spec import QuantSpec
from bitfloor.solvers.gptq import GridSearch, gptq
from bitfloor.solvers.ranges import minmax_grid


@pytest.mark.parametrize("static", [False, True])
def test_widths_may_differ_from_group_to_group(static: bool) -> None:
    """Each group is found at its own width; more bits in one group help, and one-bit groups keep their offsets."""
    case = correlated(4, 48)

    def error(*widths: int) -> float:
        find = lambda g, part, _: minmax_grid(part, QuantSpec(widths[g], 16))  # noqa: E731
        result = gptq(case.weight, case.hessian, GridSearch(16, find, static))
        assert result.grid.bits.tolist() == list(widths)
        assert (result.grid.offset is not None) is (1 in widths)
        assert all(int(result.codes[:, 16 * g : 16 * g + 16].max()) < 1 << w for g, w in enumerate(widths))
        packed = dequantize(pack(result.codes, result.grid))
        assert torch.equal(packed, decode(result.codes, result.grid))
        return output_error(case.weight, packed, case.hessian)

    assert error(3, 3, 3) < error(1, 3, 3) < error(1, 3, 1)
    assert error(4, 2, 3) < error(3, 2, 3)


def test_offsets_beside_zero_points_belong_to_one_bit_groups() -> None:
    one, two = minmax_grid(torch.randn(3, 8), QuantSpec(1, 8)), minmax_grid(torch.randn(3, 8), QuantSpec(2, 8))
    joined = join_groups([two, one], 8)
    assert torch.equal(joined.shift, torch.cat([two.shift, one.shift], 1))
    wide = replace(one, bits=torch.tensor([2]))
    with pytest.raises(ValueError, match="only one-bit groups have offsets"):
        join_groups([two, wide], 8)
