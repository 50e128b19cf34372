"""What counts as a number in values passed by a caller."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def is_integer(value: Any) -> bool:
    """Whether it is an integer of any library's type; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a real number of any library's type, including nan and infinities; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)
