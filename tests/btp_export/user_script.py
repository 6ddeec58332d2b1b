"""What a user writes, for mypy --strict (`make lint`): every public name keeps its type through the lazy imports."""

from pathlib import Path

from typing_extensions import assert_type

import btp_export


def job(model: str, out: Path) -> bool:
    """The whole job."""
    plan: btp_export.Plan = btp_export.calibrate(model, compression=0.78)
    shape = btp_export.Shape(batch=2, image=(336, 672))
    bundle: btp_export.Bundle = btp_export.export(model, plan=plan, out=out, shapes=[shape])
    assert_type(btp_export.Bundle.open("b"), btp_export.Bundle)
    result = btp_export.verify(bundle)
    assert_type(result.passed, bool)
    assert_type(result.graphs[0].cosine, float | None)
    assert_type(btp_export.evaluate(bundle, plans=["btp"]).rows[0].accuracy, float)
    assert_type(btp_export.bench("b", rounds=1).prefill.speedup, float)
    assert_type(btp_export.build(bundle, "h100", dry_run=True).total.run_bytes, int)
    [answer] = btp_export.load(bundle).generate("a.png", "what is it?")
    assert_type(answer.text, str)
    try:
        btp_export.load("nowhere")
    except btp_export.InputError as error:
        assert_type(error.exit_code, int)
    return result.passed
