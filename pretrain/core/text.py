"""Text for a terminal, a log or a card: names of files and folders may hold any bytes."""

from collections.abc import Iterable


def printable(text: str) -> str:
    """Escape control characters, line breaks and bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(items: Iterable[str], at_most: int = 10) -> str:
    """Items with commas, escaped, and how many more there are: a, b and 3 more."""
    items = [printable(item) for item in items]
    more = f" and {len(items) - at_most:,} more" if len(items) > at_most else ""
    return ", ".join(items[:at_most]) + more
