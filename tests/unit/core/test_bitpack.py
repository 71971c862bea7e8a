"""The tile layout: dense, unambiguous, and equal to a drawing of it that shares no code with the package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitfloor.core.bitpack import (
    LINES,
    blocked,
    pack_tiles,
    pack_zeros,
    row_blocks,
    tiles,
    unblocked,
    unpack_tiles,
    unpack_zeros,
)
from bitfloor.core.spec import BITS

SHAPES = [(1, 1), (16, 32), (17, 33), (15, 31), (3, 100), (48, 64), (33, 7)]

# One string a line: which bit of which quad stands at bit 0, 1, .. 7 of every byte. "61" is bit 1 of quad 6.
DRAWING = {
    1: ["00 10 20 30 40 50 60 70"],
    2: ["00 01 10 11 20 21 30 31", "40 41 50 51 60 61 70 71"],
    3: ["00 01 02 10 11 12 60 61", "20 21 22 30 31 32 70 71", "40 41 42 50 51 52 62 72"],
    4: [
        "00 01 02 03 10 11 12 13",
        "20 21 22 23 30 31 32 33",
        "40 41 42 43 50 51 52 53",
        "60 61 62 63 70 71 72 73",
    ],
    5: [
        "00 01 02 03 04 50 51 52",
        "10 11 12 13 14 60 61 62",
        "20 21 22 23 24 70 71 72",
        "30 31 32 33 34 53 54 74",
        "40 41 42 43 44 73 63 64",
    ],
    6: [
        "00 01 02 03 04 05 60 61",
        "10 11 12 13 14 15 62 63",
        "20 21 22 23 24 25 64 65",
        "30 31 32 33 34 35 70 71",
        "40 41 42 43 44 45 72 73",
        "50 51 52 53 54 55 74 75",
    ],
    8: [" ".join(f"{quad}{bit}" for bit in range(8)) for quad in range(8)],
}


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


def packed_by_hand(codes: list[list[int]], bits: int) -> list[list[list[int]]]:
    """Bit by bit from the drawing; absent rows and columns are zero."""
    rows, columns = len(codes), len(codes[0])
    blocks = []
    for block in range((rows + 15) // 16):
        row_of_tiles = []
        for tile in range((columns + 31) // 32):
            stream = []
            for line in DRAWING[bits]:
                for dword in range(16):
                    for byte in range(4):
                        value = 0
                        for at, name in enumerate(line.split()):
                            row, column = 16 * block + dword, 32 * tile + 4 * int(name[0]) + byte
                            code = codes[row][column] if row < rows and column < columns else 0
                            value |= (code >> int(name[1]) & 1) << at
                        stream.append(value)
            row_of_tiles.append(stream)
        blocks.append(row_of_tiles)
    return blocks


@pytest.mark.parametrize("bits", BITS)
def test_tiles_equal_the_drawing_bit_for_bit(bits: int) -> None:
    codes = random_codes(19, 45, bits)
    assert pack_tiles(codes, bits).tolist() == packed_by_hand(codes.tolist(), bits)


@pytest.mark.parametrize("bits", BITS)
def test_fields_fill_every_bit_of_every_byte_once_and_hold_every_bit_of_every_code_once(bits: int) -> None:
    assert len(LINES[bits]) == bits
    code_bits = []
    for fields in LINES[bits]:
        byte_bits = [at + i for _, _, width, at in fields for i in range(width)]
        assert sorted(byte_bits) == list(range(8))
        code_bits += [(quad, low + i) for quad, low, width, _ in fields for i in range(width)]
    assert sorted(code_bits) == [(quad, bit) for quad in range(8) for bit in range(bits)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_at_any_shape(bits: int, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape, bits)
    packed = pack_tiles(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (row_blocks(shape[0]), tiles(shape[1]), 64 * bits)
    back = unpack_tiles(packed, bits, *shape)
    assert back.is_contiguous()
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", BITS)
def test_a_full_tile_of_16_by_32_codes_wastes_nothing(bits: int) -> None:
    # 16 * 32 codes of `bits` bits are exactly 64 * bits bytes.
    assert pack_tiles(random_codes(16, 32, bits), bits).numel() * 8 == 16 * 32 * bits


@pytest.mark.parametrize("bits", BITS)
def test_all_ones_fill_a_tile_and_padding_stays_zero(bits: int) -> None:
    top = (1 << bits) - 1
    assert bool((pack_tiles(torch.full((16, 32), top, dtype=torch.uint8), bits) == 255).all())
    lone = pack_tiles(torch.full((1, 1), top, dtype=torch.uint8), bits)
    assert sum(value.bit_count() for value in lone.flatten().tolist()) == bits


@pytest.mark.parametrize("bits", BITS)
def test_one_code_changes_only_its_own_dword(bits: int) -> None:
    codes = random_codes(32, 64, bits)
    other = codes.clone()
    other[21, 40] ^= (1 << bits) - 1
    changed = (pack_tiles(codes, bits) != pack_tiles(other, bits)).nonzero().tolist()
    # Row 21 is dword 5 of row block 1; column 40 is byte 0 of quad 2 in tile 1.
    assert changed
    assert all(block == 1 and tile == 1 and at % 64 == 4 * 5 for block, tile, at in changed)


def test_packing_reads_transposed_codes_as_they_are() -> None:
    codes = random_codes(40, 24, 3)
    assert torch.equal(pack_tiles(codes.T, 3), pack_tiles(codes.T.contiguous(), 3))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 3), (17, 5), (31, 2), (64, 1)])
def test_zero_points_round_trip_densely(bits: int, shape: tuple[int, int]) -> None:
    rows, groups = shape
    zero = random_codes(rows, groups, bits, seed=1)
    packed = pack_zeros(zero, bits)
    assert packed.shape == (row_blocks(rows), groups * 2 * bits)  # 16 values of `bits` bits: 2 * bits bytes
    assert torch.equal(unpack_zeros(packed, bits, rows, groups), zero)


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_are_one_little_endian_stream_per_row_block_and_group(bits: int) -> None:
    rows, groups = 21, 3
    zero = random_codes(rows, groups, bits, seed=2)
    for block, packed in enumerate(pack_zeros(zero, bits).tolist()):
        for group in range(groups):
            stream = bytes(packed[group * 2 * bits : (group + 1) * 2 * bits])
            expected = sum(
                int(value) << bits * row for row, value in enumerate(zero[16 * block :, group][:16].tolist())
            )
            assert int.from_bytes(stream, "little") == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("phase", [0, 1])
def test_extreme_zero_points_leave_their_neighbours_alone(bits: int, phase: int) -> None:
    # A packer that stores z - 1 turns a zero into a borrow from the next value: alternate the two extremes.
    zero = torch.zeros(32, 4, dtype=torch.uint8)
    zero[phase::2, 0::2] = (1 << bits) - 1
    zero[1 - phase :: 2, 1::2] = (1 << bits) - 1
    assert torch.equal(unpack_zeros(pack_zeros(zero, bits), bits, 32, 4), zero)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_blocked_scales_put_16_rows_side_by_side(dtype: torch.dtype) -> None:
    values = torch.arange(1, 35 * 3 + 1).reshape(35, 3).to(dtype)
    disk = blocked(values)
    assert disk.shape == (3, 3, 16)
    assert disk.is_contiguous()
    assert disk[1, 2].tolist() == values[16:32, 2].tolist()
    assert disk[2, :, 3:].abs().max() == 0  # rows 35 to 47 do not exist
    assert torch.equal(unblocked(disk, 35), values)
