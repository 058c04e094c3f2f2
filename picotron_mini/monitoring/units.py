"""Numbers as people read them. `?` stands for a number that is not there."""

from __future__ import annotations

import math


def bytes_text(number: float | None) -> str:
    """1536 -> "1.5 KiB" (powers of 1024)."""
    return _scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def count_text(number: float | None) -> str:
    """3021312 -> "3.02 M" (powers of 1000)."""
    return _scaled(number, 1000, ("", "k", "M", "B", "T"))


def number_text(number: float | None) -> str:
    """Four significant digits, as a loss is read: 3.21449 -> "3.214", 21302.4 -> "21,302"."""
    if number is None:
        return "?"
    return f"{number:,.0f}" if 999.95 <= abs(number) < 1e12 else f"{number:#.4g}".rstrip(".")


def seconds_text(seconds: float | None) -> str:
    """75 -> "1:15", 7325 -> "2:02:05"."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def _scaled(number: float | None, base: int, units: tuple[str, ...]) -> str:
    if number is None or not math.isfinite(number):
        return "?"
    size, power = float(number), 0
    while abs(size) >= 999.5 and power < len(units) - 1:
        size, power = size / base, power + 1
    return f"{size:.3g} {units[power]}".strip()
