"""Numbers as people read them: few digits, thousands apart, powers of ten where they are very large or small."""

from __future__ import annotations

import math

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many digits.

    >>> number(15854.37), number(0.0123456), number(292.4), number(None)
    ('15,850', '0.01235', '292.4', '-')
    >>> number(123456789.0, 3), number(-2.5e-7), number(0.0)
    ('1.23 × 10⁸', '-2.500 × 10⁻⁷', '0')
    """
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    if not -4 <= power < 7:
        return f"{value / 10.0**power:.{digits - 1}f} × 10{str(power).translate(_RAISED)}"
    places = digits - 1 - power
    return f"{round(value, places):,.{max(0, places)}f}"


def with_spread(value: float, spread: float) -> str:
    """A mean with its standard deviation, of which two digits count.

    >>> with_spread(15854.37, 5870.6), with_spread(0.51234, 0.0123)
    ('15,854 ± 5,871', '0.512 ± 0.012')
    >>> with_spread(3.2e9, 1.5e8)
    '3.200 × 10⁹ ± 1.5 × 10⁸'
    """
    if not math.isfinite(value) or not math.isfinite(spread):
        return number(value)
    if spread <= 0:
        return f"{number(value)} ± 0"
    if not spread >= 1e-4 or max(abs(value), spread) >= 1e7:
        return f"{number(value)} ± {number(spread, 2)}"
    places = max(0, 1 - math.floor(math.log10(spread)))
    return f"{value:,.{places}f} ± {spread:,.{places}f}"
