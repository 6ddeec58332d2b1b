"""How the page writes numbers: shares, bytes, milliseconds, counts, small differences."""

from btp_export.drawing.figures import milliseconds

NBSP = "\N{NO-BREAK SPACE}"


def percent(value: float | None, digits: int = 1) -> str:
    """0.776 -> "77.6 %"; None -> a dash."""
    return "–" if value is None else f"{value * 100:.{digits}f}{NBSP}%"


def size(count: float) -> str:
    """Bytes with a decimal unit: 12_345_678 -> "12.3 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f}{NBSP}{unit}" if unit == "bytes" else f"{f'{count:#.3g}'.rstrip('.')}{NBSP}{unit}"


def time(value: float) -> str:
    """Milliseconds with the unit."""
    return f"{milliseconds(value)}{NBSP}ms"


def count(value: float) -> str:
    """A large number with a decimal prefix: 1.23e9 -> "1.23 G"."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000 or prefix == "T":
            break
        value /= 1000
    return f"{f'{value:#.3g}'.rstrip('.')}{NBSP}{prefix}".rstrip()


def tokens(value: float) -> str:
    """An average token count: 129.0 -> "129", 130.25 -> "130.2"."""
    return f"{value:.1f}".removesuffix(".0")


def tiny(value: float | None) -> str:
    """A small difference: two significant digits; not a number or missing -> said so."""
    if value is None or value != value:
        return "not a number"
    return "0" if value == 0 else f"{value:.1e}"


def counted(number: int, noun: str) -> str:
    """1 question, 2 questions."""
    return f"{number}{NBSP}{noun}{'' if number == 1 else 's'}"
