"""BtpSelectTokens as an ONNX function: what a runtime that does not know the operator runs instead.

The text below is ONNX's own textual form and follows the numbered rules of the schema. What shapes it:

- Equal indices everywhere need sure ties. The order of rule 1 is therefore counted pair by pair, TopK only ever sorts
  distinct keys, and ArgMax takes the first of equal ones by its definition.
- The farthest-point loops do four small operations a step, because a step costs what its number of operations costs.
  A token's distance to itself is -inf, so the minimum with its row marks it as taken.
- TensorRT wants trip counts that do not depend on data, so both loops run for the most steps any row can need, and at
  least once; steps that a row does not need are dropped afterwards. Its loops also name their values apart.
- Scan outputs are [B] a step: onnx's reference evaluator stacks only vectors as the specification says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from onnx import FunctionProto, helper, parser

from graphs.ops.domain import DOMAIN
from graphs.ops.select_tokens.onnx_picks import by_distance, by_gain
from graphs.ops.select_tokens.schema import COUNTS, COVERAGE, DOC, FARTHEST, NAME, OPTIONS
from graphs.records.errors import InputError

FIRST_OPSET: Final = 18
# From this opset on, Attention takes a mask of another float type: one generic body then serves both similarity types.
ATTENTION_OPSET: Final = 23

_ATTRIBUTES: Final = "".join(f"  {name} = Constant<value_int: int = @{name}>()\n" for name in COUNTS)

_ORDER: Final = """
  # Rule 1. rank [B,V]: how many tokens come before a token in the order. NaN counts as -inf, behind the real ones.
  zero = Constant<value_int = 0>()
  one = Constant<value_int = 1>()
  axis0 = Constant<value_ints = [0]>()
  axis1 = Constant<value_ints = [1]>()
  axis2 = Constant<value_ints = [2]>()
  size = Shape<start = 1, end = 2>(scores)                        # [1]: V
  size0 = Squeeze(size)
  index64 = Range(zero, size0, one)
  index_row = Unsqueeze(index64, axis0)
  index = Cast<to = 1>(index_row)                                 # [1,V]
  tokens = Cast<to = 1>(size)
  missing = IsNaN(scores)
  minus_infinity = Constant<value_float = -inf>()
  value = Where(missing, minus_infinity, scores)
  missing_float = Cast<to = 1>(missing)
  behind = Mul(missing_float, tokens)
  place = Add(index, behind)                                      # [B,V]: decides between equal values
  value_i = Unsqueeze(value, axis2)
  value_j = Unsqueeze(value, axis1)
  place_i = Unsqueeze(place, axis2)
  place_j = Unsqueeze(place, axis1)
  higher = Greater(value_j, value_i)
  equal = Equal(value_j, value_i)
  earlier = Less(place_j, place_i)
  tie_won = And(equal, earlier)
  before = Or(higher, tie_won)                                    # [B,V,V]: j comes before i
  before_float = Cast<to = 1>(before)
  rank = ReduceSum<keepdims = 0>(before_float, axis2)

  # Picks A are the attention_quota lowest of these keys: candidates before others, those below the boundary first.
  pool_float = Cast<to = 1>(pool)
  boundary_float = Cast<to = 1>(boundary)
  outside = GreaterOrEqual(rank, pool_float)
  late = GreaterOrEqual(index, boundary_float)
  outside_float = Cast<to = 1>(outside)
  late_float = Cast<to = 1>(late)
  two = Constant<value_float = 2.0>()
  outside_twice = Mul(outside_float, two)
  group = Add(outside_twice, late_float)
  group_key = Mul(group, tokens)
  order_key = Add(group_key, rank)                                # [B,V], below 4V
  some = Max(attention_quota, one)
  some_1d = Reshape(some, axis1)
  lowest_keys, lowest_tokens = TopK<axis = 1, largest = 0>(order_key, some_1d)
  last_key = ReduceMax(lowest_keys, axis1)
  within_quota = LessOrEqual(order_key, last_key)
  any_quota = Greater(attention_quota, zero)
  in_attention = And(within_quota, any_quota)
  never = Constant<value_float = inf>()
  attention_key = Where(in_attention, order_key, never)
"""

_BY_ORDER: Final = """
  # Rule 4 without similarity: A, then the others in order.
  four = Constant<value_int = 4>()
  after_order64 = Mul(size, four)
  after_order = Cast<to = 1>(after_order64)
  rest_by_order = Add(rank, after_order)
  {key} = Min(attention_key, rest_by_order)
"""

_KEPT: Final = """
  # The keep lowest keys, in ascending order of their tokens.
  keep_1d = Reshape(keep, axis1)
  kept_keys, kept = TopK<axis = 1, largest = 0>(key, keep_1d)
  kept_float = Cast<to = 1>(kept)
  ascending, ascending_places = TopK<axis = 1, largest = 0>(kept_float, keep_1d)
  indices = Cast<to = 6>(ascending)
"""


_NO_SEEDS: Final = "  no_seed = Constant<value = int32[1] {-1}>()\n"
_SEEDS: Final = "  {list} = Concat<axis = 0>(no_seed, seeds)\n"

_CONSUME_CONCAT: Final = """
  no_rows = Constant<value_ints = [0]>()
  no_rows_shape = Concat<axis = 0>(no_rows, size, size)
  no_similarity = ConstantOfShape<value = float[1] {0.0}>(no_rows_shape)
  similarity32 = Concat<axis = 0>(no_similarity, similarity)
"""
_CONSUME_ATTENTION: Final = """
  heads_axes = Constant<value_ints = [0, 3]>()
  zeros = Sub(rank, rank)
  nothing = Unsqueeze(zeros, heads_axes)                          # [1,B,V,1]: q, k, v; B stands where the heads are
  unused, unused_key, unused_value, masked = Attention<qk_matmul_output_mode = 2>(nothing, nothing, nothing, similarity)
  given_batch = Shape<start = 0, end = 1>(scores)
  given_shape = Concat<axis = 0>(given_batch, size, size)
  similarity32 = Reshape(masked, given_shape)
"""


def body(
    opset: int, *, similarity: bool, seeds: bool, diversity_rule: str = FARTHEST, weighted: int = 0
) -> FunctionProto:
    """The body for nodes with exactly these inputs and this rule; similarity may be float32 or float16.

    TensorRT can import it. The nodes' attributes `diversity_rule` and `weighted` must be those given here: TensorRT
    knows no strings, so this body does not read them.
    """
    _check_opset(opset)
    if seeds and not similarity:
        raise InputError(f"{NAME}: a body with seeds and no similarity", "seeds together with similarity", "see rule 4")
    inputs = ["scores", *["similarity"] * similarity, *["seeds"] * seeds]
    if not similarity:
        return _function(opset, inputs, _ORDER + _BY_ORDER.format(key="key") + _KEPT)
    listed = _NO_SEEDS + (_SEEDS.format(list="seed_list") if seeds else "  seed_list = Identity(no_seed)\n")
    picked = by_gain("key", weighted) if diversity_rule == COVERAGE else by_distance("key")
    return _function(opset, inputs, _ORDER + listed + "  similarity32 = Cast<to = 1>(similarity)\n" + picked + _KEPT)


@dataclass(frozen=True)
class Form:
    """What an exact body is made for; `suffix` tells forms apart in names."""

    similarity: bool
    seeds: bool
    diversity_rule: str = FARTHEST
    weighted: int = 0

    @property
    def suffix(self) -> str:
        rule = "" if self.diversity_rule == FARTHEST else self.diversity_rule.capitalize()
        return "".join(["Similarity" * self.similarity, "Seeds" * self.seeds, rule, "Weighted" * self.weighted])

    def body(self, opset: int) -> FunctionProto:
        return body(opset, **asdict(self))


def form(inputs: Sequence[bool], attributes: Mapping[str, Any]) -> Form:
    """The form of nodes with these inputs (is each there?) and attributes; without similarity no rule matters."""
    similarity, seeds = (*inputs[1:], False, False)[:2]
    return Form(similarity, seeds, **{name: attributes[name] for name in OPTIONS if similarity and name in attributes})


def function(opset: int, *, only: str | None = None) -> FunctionProto:
    """The one body for nodes with any of the inputs: scores; scores, similarity; scores, similarity, seeds.

    It serves both rules, as the node's attributes say. `only` "farthest": a shorter one for nodes of that rule, which
    also runs in onnx's reference evaluator where nodes leave the two attributes out (the evaluator has no defaults).

    Up to opset 22 a float16 similarity needs `body`. Why, and how a missing input is used without being there, is
    written in docs/decisions/optional-inputs-in-function-bodies.md.
    """
    _check_opset(opset)
    consume = _CONSUME_ATTENTION if opset >= ATTENTION_OPSET else _CONSUME_CONCAT
    picked = by_distance("distance_key") if only == FARTHEST else _BY_EITHER_RULE
    chosen = f"""
  has_seeds = OptionalHasElement(seeds)
  has_similarity = OptionalHasElement(similarity)
{_NO_SEEDS}
  seed_list = If(has_seeds)
    <then_branch = with_seeds () => (given_seeds) {{ {_SEEDS.format(list="given_seeds")} }},
     else_branch = without_seeds () => (no_seeds) {{ no_seeds = Identity(no_seed) }}>
  key = If(has_similarity)
    <then_branch = by_distance () => (distance_key) {{ {consume} {picked} }},
     else_branch = by_order () => (score_key) {{ {_BY_ORDER.format(key="score_key")} }}>
"""
    options = {} if only == FARTHEST else {name: value for name, (value, _) in OPTIONS.items()}
    return _function(opset, ["scores", "similarity", "seeds"], _ORDER + chosen + _KEPT, options)


# Strings cannot be compared before opset 19, but equal ones are one unique string.
_BY_EITHER_RULE: Final = f"""
  rule = Constant<value_string: string = @diversity_rule>()
  rule_1d = Reshape(rule, axis1)
  coverage = Constant<value_strings = ["{COVERAGE}"]>()
  both_rules = Concat<axis = 0>(rule_1d, coverage)
  different_rules = Unique(both_rules)
  rules = Size(different_rules)
  is_coverage = Equal(rules, one)
  distance_key = If(is_coverage)
    <then_branch = by_gain () => (gain_key) {{
       weighted = Constant<value_int: int = @weighted>() {by_gain("gain_key", None)} }},
     else_branch = by_farthest () => (farthest_key) {{ {by_distance("farthest_key")} }}>
"""


def _function(
    opset: int, inputs: list[str], text: str, options: Mapping[str, str | int] | None = None
) -> FunctionProto:
    """The function of this text; options: attributes that nodes may leave out, with their defaults."""
    header = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}"> {NAME} <{", ".join(COUNTS)}>'
    proto = parser.parse_function(f"{header} ({', '.join(inputs)}) => (indices) {{\n{_ATTRIBUTES}{text}}}")
    proto.attribute_proto.extend(helper.make_attribute(name, value) for name, value in (options or {}).items())
    proto.doc_string = DOC
    return proto


def _check_opset(opset: int) -> None:
    if opset < FIRST_OPSET:
        raise InputError(f"{NAME}: opset {opset}", f"opset {FIRST_OPSET} or later", "convert the model")


def scratch_bytes(shapes: Sequence[Sequence[int]]) -> int:
    """Memory of a body beside its inputs: it compares all pairs of tokens, three times in four bytes."""
    batch, tokens = shapes[0]
    return 3 * 4 * batch * tokens * tokens
