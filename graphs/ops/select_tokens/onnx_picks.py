"""BtpSelectTokens as an ONNX function, rules 2 to 4 with a similarity: picking by distance, or by gain.

Read with onnx_body.py, which says what shapes the text and joins it. Values that come from there: scores [B,V],
attention_key [B,V], the attributes by name, zero, one, axis0, axis1, axis2, size, index, never, minus_infinity.
"""

from typing import Final

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

_SEEDS: Final = """
  # Which seeds name which tokens. seed_list starts with a -1, which is no token, so that it is never empty.
  seed_count1 = Size(seed_list)
  seed_float = Cast<to = 1>(seed_list)
  seed_column = Unsqueeze(seed_float, axis1)
  seed_hit = Equal(seed_column, index)                            # [m+1,V]
"""

_DIVERSITY: Final = """
  # Rule 2. From nothing, the first pick is the token farthest from its nearest other one. If the base would be empty,
  # rule 4 starts from nothing as well: that is one diverse pick in the base. Seeds that name no token do not fill it.
  # How many steps the loops run follows from the attributes alone.
  quotas = Add(attention_quota, diversity_quota)
  seed_hit_int = Cast<to = 7>(seed_hit)
  seeds_inside = ReduceSum<keepdims = 0>(seed_hit_int)
  base_most = Add(quotas, seeds_inside)
  base_empty = Equal(base_most, zero)
  base_empty_int = Cast<to = 7>(base_empty)
  diverse = Max(diversity_quota, base_empty_int)
  nearest_other = ReduceMin<keepdims = 0>(distance_others, axis2)
  first_pick = ArgMax<axis = 1, keepdims = 0>(nearest_other)      # [B]
  first_pick_row = Add(first_pick, first_row)
  near_first = Gather<axis = 0>(distance_rows, first_pick_row)
  diverse_left = Sub(diversity_quota, one)
  diverse_steps = Max(diverse_left, one)
{diverse_loop}
  first_picks = Unsqueeze(first_pick, axis0)
  diverse_picks = Concat<axis = 0>(first_picks, diverse_more)     # [steps+1,B]
{diverse_times}
"""

_BASE: Final = """
  # Rule 3. base_key [B,V] puts A, D and seeds in their order; never = not in the base. A repeated seed counts once.
  unit64 = Add(size, seed_count1)
  unit = Cast<to = 1>(unit64)
  four_units = Constant<value_float = 4.0>()
  five_units = Constant<value_float = 5.0>()
  diverse_after = Mul(unit, four_units)
  seeds_after = Mul(unit, five_units)
  diverse_key = Add(diverse_time, diverse_after)
  seed_place64 = Range(zero, seed_count1, one)
  seed_place1 = Cast<to = 1>(seed_place64)
  seed_place = Unsqueeze(seed_place1, axis1)
  seed_keys = Add(seed_place, seeds_after)
  seed_keys_hit = Where(seed_hit, seed_keys, never)
  seed_key = ReduceMin<keepdims = 1>(seed_keys_hit, axis0)        # [1,V]
  base_key = Min(attention_key, diverse_key, seed_key)
  in_base = Less(base_key, never)
"""

_NEAR_BASE: Final = """
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
"""

_FILL: Final = """
  # Rule 4: as many picks as the base leaves room for, and the lowest keys of all.
  base_int = Cast<to = 7>(in_base)
  base_size = ReduceSum(base_int, axis1)
  needed = Sub(keep, base_size)                                   # [B,1]; rows with less than one need no step
  base_least = Max(attention_quota, diversity_quota)
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

_LEVELS: Final = """
  # Similarities as integers, s [B,V,V] int32 from 0 to 32767: gains are exact sums of them.
  none = Constant<value_float = 0.0>()
  full = Constant<value_float = 1.0>()
  scale = Constant<value_float = 32767.0>()
  similarity_nan = IsNaN(similarity32)
  similarity_known = Where(similarity_nan, none, similarity32)
  similarity_positive = Max(similarity_known, none)
  similarity_cut = Min(similarity_positive, full)
  similarity_scaled = Mul(similarity_cut, scale)
  similarity_rounded = Round(similarity_scaled)
  s = Cast<to = 6>(similarity_rounded)
  any_rows = Constant<value_ints = [-1]>()
  rows_shape = Concat<axis = 0>(any_rows, size)
  s_rows = Reshape(s, rows_shape)                                 # [B*V,V]: row b*V + i is token i's
  index_column = Transpose<perm = [1, 0]>(index)
  self = Equal(index_column, index)
  limit_rows = Where(self, minus_infinity, never)                 # [V,V]: -inf on the diagonal, +inf elsewhere
  batch = Shape<start = 0, end = 1>(scores)
  batch0 = Squeeze(batch)
  batch_index = Range(zero, batch0, one)
  first_row = Mul(batch_index, size)                              # [B]
  scores_shape = Shape(scores)
"""

_WEIGHTS: Final = """
  # {w} [B,V]: the scores as weights, none negative or NaN.
  score_nan = IsNaN(scores)
  score_known = Where(score_nan, none, scores)
  {w} = Max(score_known, none)
"""
_IF_WEIGHTED: Final = """
  is_weighted = Cast<to = 9>(weighted)
  all_one = Expand(full, scores_shape)
  w = Where(is_weighted, score_weights, all_one)
"""

_DIVERSITY_BY_GAIN: Final = """
  # Rule 2. From nothing: nothing is covered, and no token is taken.
  diverse_steps = Max(diversity_quota, one)
  none_covered = Constant<value = int32 {{0}}>()
  covered_first = Expand(none_covered, scores_shape)
  limit_first = Expand(never, scores_shape)
{diverse_loop}
{diverse_times}
"""

_COVERED_BASE: Final = """
  # Rule 4. covered_base [B,V]: the largest s of the base's tokens, reduced over rows laid out [V,B*V] as distances are.
  base_column = Transpose<perm = [1, 0]>(in_base)
  base_mask_bool = Unsqueeze(base_column, axis2)
  base_mask = Cast<to = 6>(base_mask_bool)                        # [V,B,1]
  s_by_row = Transpose<perm = [1, 0, 2]>(s)
  s_base = Mul(s_by_row, base_mask)
  columns_shape = Concat<axis = 0>(size, any_rows)
  s_columns = Reshape(s_base, columns_shape)
  covered_flat = ReduceMax<keepdims = 1>(s_columns, axis0)
  covered_base = Reshape(covered_flat, scores_shape)
  limit_base = Where(in_base, minus_infinity, never)
"""


def by_distance(key: str) -> str:
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
    return _DISTANCE + _SEEDS + diversity + _BASE + _NEAR_BASE + fill


def by_gain(key: str, weighted: int | None) -> str:
    """The same with the coverage rule; weighted None: as the attribute `weighted` says."""
    if weighted is None:
        weights = _WEIGHTS.format(w="score_weights") + _IF_WEIGHTED
    else:
        weights = _WEIGHTS.format(w="w") if weighted else ""
    diversity = _DIVERSITY_BY_GAIN.format(
        diverse_loop=_covering_loop("diverse", "diverse_steps", "first", weighted=weights != ""),
        diverse_times=_pick_times("diverse", "diverse_more", "diversity_quota"),
    )
    fill = _FILL.format(
        key=key,
        fill_loop=_covering_loop("fill", "fill_steps", "base", weighted=weights != ""),
        fill_times=_pick_times("fill", "fill_more", "needed"),
    )
    return _LEVELS + weights + _SEEDS + diversity + _BASE + _COVERED_BASE + fill


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


def _covering_loop(name: str, steps: str, start: str, *, weighted: bool) -> str:
    """Text of the loop that picks `steps` tokens a row, each adding most -> <name>_more [steps,B].

    It starts from covered_<start> [B,V] int32 and limit_<start> [B,V], which is -inf where a token is taken.
    """
    value = f"""
      {name}_product = Mul({name}_gain, w)
      {name}_some = Greater({name}_gain, none)
      {name}_value = Where({name}_some, {name}_product, {name}_gain)    # not 0 x inf"""
    return f"""
  {name}_go = Constant<value = bool {{1}}>()
  {name}_end, {name}_end_limit, {name}_more = Loop({steps}, {name}_go, covered_{start}, limit_{start})
    <body = {name}_step (int64 {name}_count, bool {name}_on, int32[B,V] {name}_covered, float[B,V] {name}_limit)
      => (bool {name}_still, int32[B,V] {name}_covered_more, float[B,V] {name}_limit_more, int64[B] {name}_pick) {{
      {name}_still = Identity({name}_on)
      {name}_covered_row = Unsqueeze({name}_covered, axis1)
      {name}_best = Max(s, {name}_covered_row)                          # [B,V,V]
      {name}_sums = ReduceSum<keepdims = 0>({name}_best, axis2)
      {name}_covered_sum = ReduceSum<keepdims = 1>({name}_covered, axis1)
      {name}_gain_int = Sub({name}_sums, {name}_covered_sum)
      {name}_gain = Cast<to = 1>({name}_gain_int){value if weighted else ""}
      {name}_open = Min({name}_{"value" if weighted else "gain"}, {name}_limit)
      {name}_pick = ArgMax<axis = 1, keepdims = 0>({name}_open)
      {name}_pick_row = Add({name}_pick, first_row)
      {name}_row = Gather<axis = 0>(s_rows, {name}_pick_row)
      {name}_covered_more = Max({name}_covered, {name}_row)
      {name}_taken = Gather<axis = 0>(limit_rows, {name}_pick)
      {name}_limit_more = Min({name}_limit, {name}_taken)
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
