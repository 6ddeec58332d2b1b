"""Where files are kept that can be made again: dummy checkpoints, and the checkpoints of interrupted work."""

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """`$XDG_CACHE_HOME/btp-export/...`, by default under ~/.cache; not made here."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"  # a relative one is to be ignored (XDG)
    return root.joinpath("btp-export", *parts)
