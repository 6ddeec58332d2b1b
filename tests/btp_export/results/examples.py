"""Made-up result documents for tests that need one and do not care what was measured."""

from typing import Any

from btp_export.results.verification import AppliedGates, Verification


def verification(**changes: Any) -> Verification:
    """One that passed, of no graph."""
    fields: dict[str, Any] = {
        "passed": True, "graphs": (), "kept_agreement": (), "tokens_equal": True, "samples": 1, "tokens": 1,
        "profile": "b1", "profiles": ("b1",), "engine": None, "streamed": False, "maths": "float32",
        "precision": "float32", "computed_in": "float32", "dummy_weights": False, "failures": (), "near_ties": (),
        "gates": AppliedGates(cosine=1 - 1e-9, norm_ratio_within=1e-4, kept_agreement=0.99, free_run_agreement=0.99),
    }  # fmt: skip
    return Verification(**fields | changes)
