"""Escape the texts of other people before they are printed."""

import logging
import re

# Control characters, bidirectional overrides, and surrogates, which no terminal can show.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, kept: str = "\n\t") -> str:
    r"""Escape the characters in ``text`` that control a terminal, except those in ``kept``.

    The result of a JSON text is the same value in JSON.

    >>> print(printable("\x1b[2J\u202eHello"))
    \u001b[2J\u202eHello
    """
    return _HIDDEN.sub(lambda found: found[0] if found[0] in kept else f"\\u{ord(found[0]):04x}", text)


class Record(logging.LogRecord):
    """Keep a log message of this package or of a library without such characters."""

    def getMessage(self) -> str:
        """Return the escaped message."""
        return printable(super().getMessage())
