"""The base of all result documents, and numbers that may not be finite."""

import json
import math
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from graphs.records.record import Record


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# A measured number that may come out as infinite or not a number, which JSON cannot say: it is null then.
Number = Annotated[float | None, BeforeValidator(_finite)]


# What is measured and counted, so that a document from somebody else can be reckoned with: sums and ratios stay finite.
Milliseconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**62)]


class Result(Record):
    """A document that a command prints. Each has `format`, its name with a version."""

    def document(self) -> dict[str, Any]:
        """What is printed and written, as JSON types: `format` first, null for numbers that are not finite."""
        fields = self.model_dump(mode="json")
        return {"format": fields.pop("format"), **finite(fields)}

    def to_json(self) -> str:
        """The document as text; the same result gives the same text."""
        return json.dumps(self.document(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """JSON types with null in place of numbers that are not finite, at any depth."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return _finite(value)
