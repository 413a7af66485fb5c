"""Exercise 5, compared with bitsandbytes bit for bit."""

import torch
from torch import Tensor

from exercises.e5_normal_float import LEVELS
from exercises.judge import check, check_close


def drawn_weight() -> Tensor:
    """Returns a weight of 48 blocks, some of which continue from one row into the next."""
    torch.manual_seed(0)
    return torch.randn(32, 96) * torch.rand(32, 1)


def reference(weight: Tensor) -> tuple:
    """Returns bitsandbytes' packed indices and absmax, and the state to dequantise them with."""
    from bitsandbytes.functional import quantize_4bit  # it takes seconds to import

    # Flat, because bitsandbytes 0.50 dequantises on a CPU as if each row began a new block.
    packed, state = quantize_4bit(weight.flatten(), quant_type="nf4", blocksize=64)
    return packed, state.absmax, state


def scaled(weight: Tensor) -> Tensor:
    blocks = weight.reshape(-1, 64)
    return blocks / blocks.abs().amax(dim=1, keepdim=True)


def halves(first: Tensor, second: Tensor) -> Tensor:
    return (first.to(torch.uint8) << 4 | second.to(torch.uint8))[:, None]


def check_bytes(found: Tensor, expected: Tensor, cures: dict[str, Tensor]) -> None:
    """Fails unless the bytes are equal."""
    is_right_form = isinstance(found, Tensor) and found.dtype == torch.uint8
    check(
        is_right_form and found.shape == expected.shape,
        f"The packed indices are {getattr(found, 'dtype', type(found))} of shape "
        f"{tuple(getattr(found, 'shape', ()))}, and should be torch.uint8 of shape "
        f"{tuple(expected.shape)}: two indices to a byte.",
    )
    if torch.equal(found, expected):
        return
    lines = [f"{(found != expected).sum()} of {len(expected)} bytes are not bitsandbytes'."]
    lines += [cure for cure, wrong in cures.items() if torch.equal(found, wrong)]
    start = (found != expected).flatten().nonzero()[0].item()
    part = slice(start, start + 16)
    yours = bytes(found[part].flatten().tolist()).hex(" ")
    theirs = bytes(expected[part].flatten().tolist()).hex(" ")
    lines.append(f"From byte {start} on yours are     {yours}\nwhere bitsandbytes' are {theirs}")
    check(False, "\n".join(lines))


def test_absmax_is_bitsandbytes(answer):
    weight = drawn_weight()
    _, absmax = answer.quantize(weight)
    _, expected, _ = reference(weight)
    blocks = weight.reshape(-1, 64)
    cures = {
        "It is the largest number of each block: the largest magnitude may be a negative "
        "number's.": blocks.amax(dim=1),
        "It is the largest magnitude of the whole weight.": blocks.abs().max().expand(48),
    }
    check_close(absmax, expected, "absmax", cures, tolerance=0)
    check(absmax.dtype == torch.float32, f"absmax is in {absmax.dtype}, and should be in fp32.")


def test_packed_indices_are_bitsandbytes(answer):
    weight = drawn_weight()
    packed, _ = answer.quantize(weight)
    expected, _, _ = reference(weight)
    first = expected[:, 0] >> 4
    second = expected[:, 0] & 15
    above = torch.bucketize(scaled(weight), LEVELS).reshape(-1, 2)
    below = (torch.bucketize(scaled(weight), LEVELS, right=True) - 1).reshape(-1, 2)
    even = ((scaled(weight) + 1) / 2 * 15).round().reshape(-1, 2)
    cures = {
        "They are if the halves of each byte are exchanged: the first value goes into the high "
        "half, first << 4 | second.": halves(second, first),
        "They are the indices of the next level above each value. The nearest may be the one "
        "below: the borders lie half way between the levels.": halves(*above.T),
        "They are the indices of the next level below each value. The nearest may be the one "
        "above: the borders lie half way between the levels.": halves(*below.T),
        "They are the indices of 16 evenly spaced levels. NF4's lie closer near 0: the nearest "
        "of LEVELS is wanted.": halves(*even.T),
    }
    check_bytes(packed, expected, cures)


def test_a_value_half_way_between_two_levels_gets_the_lower_one(answer):
    borders = (LEVELS[1:] + LEVELS[:-1]) / 2
    weight = torch.cat((borders, torch.ones(1))).repeat(4)  # absmax is 1
    packed, _ = answer.quantize(weight)
    expected, _, _ = reference(weight)
    upper = torch.bucketize(weight, borders, right=True).reshape(-1, 2)
    cures = {"A value on a border got the upper level: it goes to the lower one.": halves(*upper.T)}
    check_bytes(packed, expected, cures)


def test_a_block_of_zeros_stays_zero(answer):
    weight = drawn_weight()
    weight[2:4] = 0  # three blocks
    packed, absmax = answer.quantize(weight)
    expected, expected_absmax, _ = reference(weight)
    check(
        absmax[3] == 0,
        f"absmax of a block of zeros is {absmax[3].item():g}, and should be 0. Divide by "
        "something else there, but do not store it.",
    )
    check_close(absmax, expected_absmax, "absmax", tolerance=0)
    byte = packed[100].item()  # 96 = 3 * 64 / 2 is the first of the zeros
    check(
        byte == 0x77,
        f"A block of zeros is stored as bytes 0x{byte:02x}, and should be as 0x77: twice the "
        "index 7, of the level 0.0. There w / absmax is 0 / 0 = NaN, to which no level is "
        "nearest: argmin then returns 0, and bucketize 15. Divide by 1 where absmax is 0.",
    )
    check_bytes(packed, expected, {})


def test_dequantised_values_are_bitsandbytes(answer):
    from bitsandbytes.functional import dequantize_4bit

    weight = drawn_weight()
    packed, absmax, state = reference(weight)
    restored = answer.dequantize(packed, absmax, weight.shape)
    expected = dequantize_4bit(packed, state).reshape(weight.shape)
    pairs = expected.reshape(-1, 2)
    ones = expected / absmax.repeat_interleave(64).reshape(expected.shape)
    cures = {
        "The two values of each byte are exchanged: the high half, packed >> 4, comes first.": (
            pairs.flip(1).reshape(expected.shape)
        ),
        "They are the levels, in [-1, 1]: each block is multiplied by its absmax.": ones,
    }
    check_close(restored, expected, "the dequantised weight", cures, tolerance=1e-6)
    check(
        torch.equal(restored, expected),
        "The dequantised weight is right except for the last bit: compute LEVELS[index] * absmax "
        "in fp32.",
    )


def test_a_weight_in_sixteen_bits_is_quantised_in_full_precision(answer):
    weight = drawn_weight().bfloat16()
    packed, absmax = answer.quantize(weight)
    expected, expected_absmax, _ = reference(weight)
    check(
        absmax.dtype == torch.float32,
        f"absmax of a weight in bf16 is in {absmax.dtype}: take weight.float() first.",
    )
    check_close(absmax, expected_absmax, "absmax of a weight in bf16", tolerance=0)
    check_bytes(packed, expected, {})
