"""Names of the published models, for help and for what a shell offers."""

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

MODEL = "KnownModel"  # what the families' files call one by


def model_names() -> list[str]:
    """Those of `btp_export.families.known_models`, read from the sources of the families.

    Importing them takes longer than all else that `--help` does, and a shell waits for it at every Tab.
    """
    families = find_spec("btp_export.families")
    assert families is not None and families.submodule_search_locations is not None
    files = [path for folder in families.submodule_search_locations for path in Path(folder).glob("[!_]*.py")]
    return [name for path in sorted(files) for name in _named_in(path)]


def _named_in(path: Path) -> Iterator[str]:
    """The models of one family, in their order."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == MODEL:
            yield ast.literal_eval(node.args[0])
