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

from typing import Final

from onnx import FunctionProto, parser

from graphs.ops import DOMAIN
from graphs.ops.select_tokens.schema import COUNTS, DOC, NAME
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

_DISTANCE: Final = """
  # Distances, halved (exactly) to make room below the lowest float32: taken < NaN < -inf < all others.
  one_float = Constant<value_float = 1.0>()
  half = Constant<value_float = 0.5>()
  distance_given = Sub(one_float, similarity32)
  distance_half = Mul(distance_given, half)
  minus_infinite = Constant<value_float = -2e38>()
  not_a_number = Constant<value_float = -3e38>()
  distance_finite = Max(distance_half, minus_infinite)
  distance_nan = IsNaN(distance_given)
  distance = Where(distance_nan, not_a_number, distance_finite)   # [B,V,V]
  index_i = Unsqueeze(index, axis2)
  index_j = Unsqueeze(index, axis1)
  self = Equal(index_i, index_j)
  self_cap = Where(self, minus_infinity, never)                   # [1,V,V]: -inf on the diagonal, +inf elsewhere
  self_floor = Neg(self_cap)
  distance_others = Max(distance, self_floor)
  distance_taken = Min(distance, self_cap)
  any_rows = Constant<value_ints = [-1]>()
  rows_shape = Concat<axis = 0>(any_rows, size)
  distance_rows = Reshape(distance_taken, rows_shape)             # [B*V,V]: row b*V + i is token i's
  batch = Shape<start = 0, end = 1>(scores)
  batch0 = Squeeze(batch)
  batch_index = Range(zero, batch0, one)
  first_row = Mul(batch_index, size)                              # [B]
"""

_DIVERSITY: Final = """
  # Rule 2. From nothing, the first pick is the token farthest from its nearest other one. If the base would be empty,
  # rule 4 starts from nothing as well: that is one diverse pick in the base.
  seed_count1 = Size(seed_list)
  seed_count = Sub(seed_count1, one)
  quotas = Add(attention_quota, diversity_quota)
  base_most = Add(quotas, seed_count)
  base_empty = Equal(base_most, zero)
  base_empty_int = Cast<to = 7>(base_empty)
  diverse = Max(diversity_quota, base_empty_int)
  nearest_other = ReduceMin<keepdims = 0>(distance_others, axis2)
  first_pick = ArgMax<axis = 1, keepdims = 0>(nearest_other)      # [B]
  first_pick_row = Add(first_pick, first_row)
  near_first = Gather<axis = 0>(distance_rows, first_pick_row)
  diverse_left = Sub(diverse, one)
  diverse_steps = Max(diverse_left, one)
{diverse_loop}
  first_picks = Unsqueeze(first_pick, axis0)
  diverse_picks = Concat<axis = 0>(first_picks, diverse_more)     # [steps+1,B]
{diverse_times}
"""

_BASE: Final = """
  # Rule 3. base_key [B,V] puts A, D and seeds in their order; never = not in the base. A repeated seed counts once.
  # seed_list starts with a -1, which is no token, so that it is never empty.
  unit64 = Add(size, seed_count1)
  unit = Cast<to = 1>(unit64)
  four_units = Constant<value_float = 4.0>()
  five_units = Constant<value_float = 5.0>()
  diverse_after = Mul(unit, four_units)
  seeds_after = Mul(unit, five_units)
  diverse_key = Add(diverse_time, diverse_after)
  seed_float = Cast<to = 1>(seed_list)
  seed_column = Unsqueeze(seed_float, axis1)
  seed_hit = Equal(seed_column, index)                            # [m+1,V]
  seed_place64 = Range(zero, seed_count1, one)
  seed_place1 = Cast<to = 1>(seed_place64)
  seed_place = Unsqueeze(seed_place1, axis1)
  seed_keys = Add(seed_place, seeds_after)
  seed_keys_hit = Where(seed_hit, seed_keys, never)
  seed_key = ReduceMin<keepdims = 1>(seed_keys_hit, axis0)        # [1,V]
  base_key = Min(attention_key, diverse_key, seed_key)
  in_base = Less(base_key, never)
"""

_FILL: Final = """
  # Rule 4. near_base [B,V]: distance to the nearest token of the base. Reduced over rows laid out [V,B*V], which ONNX
  # Runtime does several times faster than over the middle of [B,V,V].
  base_column = Transpose<perm = [1, 0]>(in_base)
  base_mask = Unsqueeze(base_column, axis2)
  base_cap = Where(base_mask, minus_infinity, never)              # [V,B,1]
  distance_by_row = Transpose<perm = [1, 0, 2]>(distance_taken)
  distance_base = Max(distance_by_row, base_cap)
  columns_shape = Concat<axis = 0>(size, any_rows)
  distance_columns = Reshape(distance_base, columns_shape)
  near_base_flat = ReduceMin<keepdims = 1>(distance_columns, axis0)
  scores_shape = Shape(scores)
  near_base = Reshape(near_base_flat, scores_shape)
  base_int = Cast<to = 7>(in_base)
  base_size = ReduceSum(base_int, axis1)
  needed = Sub(keep, base_size)                                   # [B,1]; rows with less than one need no step
  base_least = Max(attention_quota, diverse)
  fill_most = Sub(keep, base_least)
  fill_steps = Max(fill_most, one)
{fill_loop}
{fill_times}
  six_units = Constant<value_float = 6.0>()
  seven_units = Constant<value_float = 7.0>()
  fill_after = Mul(unit, six_units)
  rest_after = Mul(unit, seven_units)
  fill_key = Add(fill_time, fill_after)
  rest_key = Add(index, rest_after)
  {key} = Min(base_key, fill_key, rest_key)
"""

_KEPT: Final = """
  # The keep lowest keys, in ascending order of their tokens.
  keep_1d = Reshape(keep, axis1)
  kept_keys, kept = TopK<axis = 1, largest = 0>(key, keep_1d)
  kept_float = Cast<to = 1>(kept)
  ascending, ascending_places = TopK<axis = 1, largest = 0>(kept_float, keep_1d)
  indices = Cast<to = 6>(ascending)
"""


def _farthest_loop(name: str, steps: str, near: str) -> str:
    """Text of the loop that picks `steps` tokens a row, each the farthest: `near` [B,V] -> <name>_more [steps,B]."""
    return f"""
  {name}_go = Constant<value = bool {{1}}>()
  {name}_end, {name}_more = Loop({steps}, {name}_go, {near}) <body = {name}_step
    (int64 {name}_count, bool {name}_on, float[B,V] {name}_near)
    => (bool {name}_still, float[B,V] {name}_nearer, int64[B] {name}_pick) {{
      {name}_still = Identity({name}_on)
      {name}_pick = ArgMax<axis = 1, keepdims = 0>({name}_near)
      {name}_pick_row = Add({name}_pick, first_row)
      {name}_row = Gather<axis = 0>(distance_rows, {name}_pick_row)
      {name}_nearer = Min({name}_near, {name}_row)
    }}>"""


def _pick_times(name: str, picks: str, wanted: str) -> str:
    """Text that turns `picks` [n,B] into <name>_time [B,V]: when a token was picked, or `never`.

    Picks beyond the `wanted` first ones go to a place behind the last token, which is cut off.
    """
    return f"""
  {name}_row_picks = Transpose<perm = [1, 0]>({picks})            # [B,n]
  {name}_length = Shape<start = 1, end = 2>({name}_row_picks)
  {name}_length0 = Squeeze({name}_length)
  {name}_times64 = Range(zero, {name}_length0, one)
  {name}_times = Unsqueeze({name}_times64, axis0)
  {name}_is_wanted = Less({name}_times, {wanted})
  {name}_slot = Where({name}_is_wanted, {name}_row_picks, size)
  {name}_times_float = Cast<to = 1>({name}_times)
  {name}_shape = Shape({name}_row_picks)
  {name}_updates = Expand({name}_times_float, {name}_shape)
  {name}_width = Add(size, one)
  {name}_slots_shape = Concat<axis = 0>(batch, {name}_width)
  {name}_slots = Expand(never, {name}_slots_shape)                # [B,V+1]
  {name}_filled = ScatterElements<axis = 1>({name}_slots, {name}_slot, {name}_updates)
  {name}_time = Slice({name}_filled, axis0, size, axis1)"""


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


def body(opset: int, *, similarity: bool, seeds: bool) -> FunctionProto:
    """The body for nodes with exactly these inputs; similarity may be float32 or float16. TensorRT can import it."""
    _check_opset(opset)
    if seeds and not similarity:
        raise InputError(f"{NAME}: a body with seeds and no similarity", "seeds together with similarity", "see rule 4")
    inputs = ["scores", *["similarity"] * similarity, *["seeds"] * seeds]
    if not similarity:
        return _function(opset, inputs, _ORDER + _BY_ORDER.format(key="key") + _KEPT)
    listed = _NO_SEEDS + (_SEEDS.format(list="seed_list") if seeds else "  seed_list = Identity(no_seed)\n")
    return _function(
        opset, inputs, _ORDER + listed + "  similarity32 = Cast<to = 1>(similarity)\n" + _by_distance("key") + _KEPT
    )


def function(opset: int) -> FunctionProto:
    """The one body for nodes with any of the inputs: scores; scores, similarity; scores, similarity, seeds.

    Up to opset 22 a float16 similarity needs `body`. Why, and how a missing input is used without being there, is
    written in docs/decisions/optional-inputs-in-function-bodies.md.
    """
    _check_opset(opset)
    consume = _CONSUME_ATTENTION if opset >= ATTENTION_OPSET else _CONSUME_CONCAT
    chosen = f"""
  has_seeds = OptionalHasElement(seeds)
  has_similarity = OptionalHasElement(similarity)
{_NO_SEEDS}
  seed_list = If(has_seeds)
    <then_branch = with_seeds () => (given_seeds) {{ {_SEEDS.format(list="given_seeds")} }},
     else_branch = without_seeds () => (no_seeds) {{ no_seeds = Identity(no_seed) }}>
  key = If(has_similarity)
    <then_branch = by_distance () => (distance_key) {{ {consume} {_by_distance("distance_key")} }},
     else_branch = by_order () => (score_key) {{ {_BY_ORDER.format(key="score_key")} }}>
"""
    return _function(opset, ["scores", "similarity", "seeds"], _ORDER + chosen + _KEPT)


def _by_distance(key: str) -> str:
    """Rules 2 to 4 with similarity: similarity32 [B,V,V] and seed_list [m+1] -> `key` [B,V], whose lowest are kept."""
    diversity = _DIVERSITY.format(
        diverse_loop=_farthest_loop("diverse", "diverse_steps", "near_first"),
        diverse_times=_pick_times("diverse", "diverse_picks", "diverse"),
    )
    fill = _FILL.format(
        key=key,
        fill_loop=_farthest_loop("fill", "fill_steps", "near_base"),
        fill_times=_pick_times("fill", "fill_more", "needed"),
    )
    return _DISTANCE + diversity + _BASE + fill


def _function(opset: int, inputs: list[str], text: str) -> FunctionProto:
    header = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}"> {NAME} <{", ".join(COUNTS)}>'
    proto = parser.parse_function(f"{header} ({', '.join(inputs)}) => (indices) {{\n{_ATTRIBUTES}{text}}}")
    proto.doc_string = DOC
    return proto


def _check_opset(opset: int) -> None:
    if opset < FIRST_OPSET:
        raise InputError(f"{NAME}: opset {opset}", f"opset {FIRST_OPSET} or later", "convert the model")
