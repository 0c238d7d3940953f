"""The table of ExMy floating-point formats; grids, maxima and integer codes are derived.

A format has one sign bit, ``exponent_bits`` (x) and ``mantissa_bits`` (y). Its values divided by
the smallest positive one, the *step*, are integers, so a quantized number is
``scale * integer_value(code)``; searching an exponent bias, a clipping maximum or a scale is the
same search (LLM-FP4, arXiv 2310.16836, section 3.1). E1My is the uniform grid: E1M2 is symmetric
int4 and E1M6 symmetric int8.

A code is ``sign << (bits - 1) | magnitude_code``; magnitude codes ascend with the magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fp4compile.errors import UnknownFormatError

INT8_MAX = 127


@dataclass(frozen=True)
class FloatFormat:
    """One sign bit, ``exponent_bits`` >= 1, ``mantissa_bits`` >= 0; the largest
    ``reserved_codes`` magnitude codes (NaN and infinity of the OCP 8-bit formats) are not values.
    """

    exponent_bits: int
    mantissa_bits: int
    reserved_codes: int = 0

    @property
    def name(self) -> str:
        return f"e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @cached_property
    def magnitudes(self) -> tuple[int, ...]:
        """Integer magnitude of every magnitude code, ascending; the first is 0."""
        count = 2 ** (self.exponent_bits + self.mantissa_bits) - self.reserved_codes
        return tuple(self._magnitude(code) for code in range(count))

    def _magnitude(self, code: int) -> int:
        exponent, mantissa = divmod(code, 2**self.mantissa_bits)
        if exponent == 0:
            # E3M0 has no subnormal but 0, hence its first normal (exponent field 1) is the step.
            return mantissa
        return (2**self.mantissa_bits + mantissa) << (exponent - 1)

    @cached_property
    def integer_values(self) -> tuple[int, ...]:
        """Signed integer value of every code, in code order; reserved codes saturate."""
        half = 2 ** (self.bits - 1)
        padded = self.magnitudes + (self.max_integer,) * (half - len(self.magnitudes))
        return padded + tuple(-value for value in padded)

    @property
    def max_integer(self) -> int:
        """Largest magnitude in steps; ``clipping maximum == scale * max_integer``."""
        return self.magnitudes[-1]

    @cached_property
    def thresholds(self) -> tuple[float, ...]:
        """float32 thresholds in steps: ``magnitude code == count of thresholds t with a >= t``.

        They are the midpoints between neighbours. A tie goes to the even code (what hardware
        does), so a midpoint below an odd code is moved up by one float32 ulp.
        """
        low = np.array(self.magnitudes[:-1], dtype=np.float32)
        high = np.array(self.magnitudes[1:], dtype=np.float32)
        middle = (low + high) / 2
        upper_is_odd = np.arange(1, len(self.magnitudes)) % 2 == 1
        moved = np.where(upper_is_odd, np.nextafter(middle, np.float32(np.inf)), middle)
        return tuple(float(threshold) for threshold in moved)

    @property
    def default_bias(self) -> int:
        """IEEE-style exponent bias, at least 1 so that E1My has integer steps of 2^-mantissa."""
        return max(1, 2 ** (self.exponent_bits - 1) - 1)

    @property
    def default_step(self) -> float:
        """Value of the smallest magnitude when the exponent bias is ``default_bias``."""
        return 2.0 ** (1 - self.default_bias - self.mantissa_bits)

    @property
    def max_shift(self) -> int:
        """Largest integer exponent bias of a channel (LLM-FP4, section 3.3).

        On the integer route the shifted magnitude must stay in int8; a format that leaves int8
        anyway takes the paper's range of 2^x - 1, exact in its bfloat16 operand.
        """
        if not self.fits_int8:
            return 2**self.exponent_bits - 1
        return (INT8_MAX // self.max_integer).bit_length() - 1

    @property
    def fits_int8(self) -> bool:
        """Whether all integer values are int8, so that products can be summed exactly in int32."""
        return self.max_integer <= INT8_MAX


def _family(bits: int) -> tuple[FloatFormat, ...]:
    return tuple(
        FloatFormat(exponent_bits, bits - 1 - exponent_bits)
        for exponent_bits in range(1, 6)
        if bits - 1 - exponent_bits >= 0
    )


# 5 exponent bits are the most that OCP formats have; E4M3 and E5M2 reserve NaN/infinity there.
_OCP8 = {FloatFormat(4, 3): FloatFormat(4, 3, 1), FloatFormat(5, 2): FloatFormat(5, 2, 4)}
FORMATS: dict[str, FloatFormat] = {
    fmt.name: _OCP8.get(fmt, fmt) for bits in (4, 6, 8) for fmt in _family(bits)
}


def by_name(name: str) -> FloatFormat:
    """The format called ``name`` (``"e2m1"``, case-insensitive).

    Raises:
        UnknownFormatError: the table has no such format.
    """
    try:
        return FORMATS[name.lower()]
    except KeyError:
        raise UnknownFormatError(
            f"unknown format {name!r}; known formats are {', '.join(FORMATS)}"
        ) from None


def alternatives(names: str) -> tuple[FloatFormat, ...]:
    """One format, or the two of ``"e2m1|e1m2"`` between which every block chooses.

    Raises:
        UnknownFormatError: a name is unknown, or there are more than two.
    """
    found = tuple(by_name(name) for name in names.split("|"))
    if len(found) > 2:
        raise UnknownFormatError(f"{names!r} names {len(found)} formats; a block chooses among two")
    return found


def of_width(bits: int) -> tuple[FloatFormat, ...]:
    """All formats of ``bits`` bits, in table order.

    Raises:
        UnknownFormatError: no format has that width.
    """
    found = tuple(fmt for fmt in FORMATS.values() if fmt.bits == bits)
    if not found:
        widths = sorted({fmt.bits for fmt in FORMATS.values()})
        raise UnknownFormatError(f"no format has {bits} bits; widths are {widths}")
    return found
