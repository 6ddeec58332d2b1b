"""The page at /: one file without anything from elsewhere, and a policy for browsers that allows nothing more."""

import base64
import functools
import hashlib
import re
from importlib import resources


@functools.cache
def page() -> tuple[str, str]:
    """The page, and its Content-Security-Policy: only its own script and style, only this server."""
    text = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    [script], [style] = (re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("script", "style"))
    rules = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return text, "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
