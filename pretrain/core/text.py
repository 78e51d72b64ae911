"""Text for a terminal, a log or a card: names of files and folders may hold any bytes."""


def printable(text: str) -> str:
    """Escape control characters, line breaks and bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
