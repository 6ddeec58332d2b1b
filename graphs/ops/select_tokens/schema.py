"""What BtpSelectTokens takes and gives: the ONNX schema, and the check of its attributes and sizes."""

from collections.abc import Sequence
from typing import Any, Final

from onnx import TensorProto, TypeProto, defs, helper

from graphs.ops.domain import DOMAIN, PLUGIN, VERSION
from graphs.records.errors import InputError

NAME: Final = "BtpSelectTokens"

DOC: Final = """\
Selects `keep` of V tokens per batch row; all ties go to the lower index, and NaN counts as lowest (below -inf), in
scores and in distances. The distance of two tokens is 1 - similarity in float32; whatever token a step looks from, it
reads that token's row of the similarity, which matters only where the matrix is not symmetric.

1. order = tokens by score, highest first. candidates = first `pool` of order. picks A = the first `attention_quota` of
   (candidates with index < boundary, in order, then the other candidates, in order).
2. picks D = `diversity_quota` tokens by farthest-point selection from nothing: first the token with the largest
   distance to its nearest other token, then always the token with the largest distance to its nearest selected one.
3. base = A, then D, then seeds, without repeats, cut at `keep`. A seed outside 0 to V-1 names no token: forms that
   can look at seeds before they select (torch, ONNX Runtime on the CPU) refuse it, all others leave it out.
4. fill: farthest-point selection continued with base as the selected set until `keep` (from nothing if base is empty).
   Without similarity: fill by order instead; diversity_quota must then be 0.

With `diversity_rule` "coverage" rules 2 and 4 pick by gain in place of distance; rule 2 starts from nothing, rule 4
from base. s_ij = round(32767 * min(max(similarity_ij, 0), 1)): one float32 product of the similarity as float32, halves
to even, NaN is 0. c_j = the largest s_ij of the tokens i selected so far, 0 with none. gain_i = the sum over all tokens
j of max(0, s_ij - c_j), exact in int32. The next token is the one not selected yet with the largest value: the float32
product float32(gain_i) * w_i, and 0 where gain_i is 0. w_i is 1, or with `weighted` 1 max(scores_i, 0), NaN as 0.
Neither attribute changes anything without similarity, nor does `weighted` with "farthest".
"""

COUNTS: Final = {
    "keep": "k, tokens kept per row",
    "attention_quota": "tokens picked by score (rule 1)",
    "diversity_quota": "tokens picked by distance (rule 2)",
    "pool": "best-scored tokens that rule 1 picks from",
    "boundary": "rule 1 prefers candidates below this index",
}
FARTHEST: Final = "farthest"
COVERAGE: Final = "coverage"
# Attributes that may be missing: name -> default, purpose.
OPTIONS: Final[dict[str, tuple[str | int, str]]] = {
    "diversity_rule": (FARTHEST, f'rules 2 and 4 pick by distance ("{FARTHEST}") or by gain ("{COVERAGE}")'),
    "weighted": (0, "1: gains are multiplied by the scores"),
}

_Parameter, _Attribute = defs.OpSchema.FormalParameter, defs.OpSchema.Attribute
_OPTIONAL: Final = defs.OpSchema.FormalParameterOption.Optional


def _infer(context: Any) -> None:
    """indices [B,keep] int32, as far as B is known."""
    scores = context.get_input_type(0)
    output = TypeProto()
    output.tensor_type.elem_type = TensorProto.INT32
    batch = output.tensor_type.shape.dim.add()
    if scores is not None and scores.tensor_type.HasField("shape") and scores.tensor_type.shape.dim:
        batch.CopyFrom(scores.tensor_type.shape.dim[0])
    output.tensor_type.shape.dim.add().dim_value = context.get_attribute("keep").i
    context.set_output_type(0, output)


def _schema() -> defs.OpSchema:
    schema = defs.OpSchema(
        NAME,
        DOMAIN,
        VERSION,
        doc=DOC,
        inputs=[
            _Parameter("scores", "tensor(float)", "[B,V] importance of the tokens"),
            _Parameter("similarity", "T", "[B,V,V] cosine similarity of the tokens", param_option=_OPTIONAL),
            _Parameter("seeds", "tensor(int32)", "[m] tokens for rule 3; only with similarity", param_option=_OPTIONAL),
        ],
        outputs=[_Parameter("indices", "tensor(int32)", "[B,keep] kept tokens, ascending, distinct")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "types of the similarity")],
        attributes=[
            *(_Attribute(name, defs.OpSchema.AttrType.INT, doc, required=True) for name, doc in COUNTS.items()),
            *(
                _Attribute(name, helper.make_attribute(name, value), doc)
                for name, (value, doc) in (OPTIONS | PLUGIN).items()
            ),
        ],
    )
    schema.set_type_and_shape_inference_function(_infer)
    return schema


SCHEMA: Final = _schema()


def check(
    tokens: int,
    *,
    keep: int,
    attention_quota: int,
    diversity_quota: int,
    pool: int,
    boundary: int,
    similarity: bool,
    seeds: Sequence[int] | None = None,
    diversity_rule: str = FARTHEST,
    weighted: int = 0,
) -> None:
    """Raise InputError if the operator cannot select `keep` of V = `tokens` with these settings.

    What the rules give a meaning is legal: quotas may add up to more than `keep` (rule 3 cuts the base there, also
    within A), a pool above V is all tokens, and repeated seeds count once.
    """

    def require(holds: bool, got: str, wanted: str, do: str) -> None:
        if not holds:
            raise InputError(f"{NAME}: {got}", wanted, do)

    require(1 <= keep <= tokens, f"keep is {keep}", f"1 to {tokens}, the number of tokens", "change keep")
    for name, quota in (("attention_quota", attention_quota), ("diversity_quota", diversity_quota)):
        require(0 <= quota <= tokens, f"{name} is {quota}", f"0 to {tokens}, the number of tokens", f"change {name}")
    require(
        pool >= attention_quota,
        f"attention_quota is {attention_quota} but the pool it is picked from is {pool}",
        "pool >= attention_quota",
        "raise pool or lower attention_quota",
    )
    require(boundary >= 0, f"boundary is {boundary}", "0 or more", "change boundary; 0 prefers no token")
    rules = f'"{FARTHEST}" or "{COVERAGE}"'
    known = diversity_rule in (FARTHEST, COVERAGE)
    require(known, f'diversity_rule is "{diversity_rule}"', rules, "change diversity_rule")
    require(weighted in (0, 1), f"weighted is {weighted}", "0 or 1", "change weighted")
    require(
        similarity or diversity_quota == 0,
        f"diversity_quota is {diversity_quota}, and there is no similarity",
        "a similarity [B,V,V], or diversity_quota 0",
        "give the similarity",
    )
    require(
        similarity or seeds is None,
        "there are seeds, and there is no similarity",
        "seeds together with a similarity [B,V,V], or no seeds",
        "give the similarity or leave out the seeds",
    )
    strangers = [seed for seed in seeds or () if not 0 <= seed < tokens]
    require(not strangers, f"seeds hold {strangers[:3]}", f"indices from 0 to {tokens - 1}", "use indices of tokens")
