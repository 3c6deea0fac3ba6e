"""Messages and stored files without credentials."""

from __future__ import annotations

import re


def redact(text: str) -> str:
    """The text without the credentials in any URI."""
    text = re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s]*@", r"\1", text)
    return re.sub(r"(?i)([?&](?:password|passwd|pwd|token|secret)=)[^&\s]+", r"\1***", text)


def first_line(error: BaseException | None) -> str:
    """An error in one line, without credentials."""
    text = (str(error) if error else "").strip()
    return redact(text.splitlines()[0]) if text else type(error).__name__
