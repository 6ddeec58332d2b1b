"""One pruning stage of the reference: scores, the operators' reference selection, and the gathering of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from graphs.ops import gather_tokens, select_tokens
from graphs.pruning import torch_scores
from graphs.pruning.spatial_set import stage_seeds
from graphs.records.plan import PruningPlan, Stage

Rule = tuple[str | None, ...]


@dataclass
class SameRows:
    """What stages have in common that choose from the same rows: those of a prompt's plans that pruned alike so far.

    `similarities` by features, and `picks` by rule: tokens picked one after another from nothing, of which a plan that
    keeps fewer than `most` keeps the first. The first stage that asks makes them; where there is one stage nothing is
    kept.
    """

    stages: int = 0
    most: dict[Rule, int] = field(default_factory=dict)
    picks: dict[Rule, torch.Tensor] = field(default_factory=dict)
    similarities: dict[str, torch.Tensor] = field(default_factory=dict)

    def expect(self, plan: PruningPlan, number: int) -> None:
        """A stage that will ask."""
        self.stages += 1
        rule = chain_rule(plan, number)
        if rule is not None:
            self.most[rule] = max(self.most.get(rule, 0), plan.stages[number].keep)

    def similarity(self, stage: Stage, image: torch.Tensor) -> torch.Tensor:
        """Of the stage's tokens `image` [1, V_i, C]: [1, V_i, V_i]."""
        known = self.similarities.get(stage.features)
        if known is None:
            known = torch_scores.stage_similarity(stage, image)
            if self.stages > 1:
                self.similarities[stage.features] = known
        return known

    def picked(self, rule: Rule, stage: Stage, scores: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """The first `stage.keep` picks of the rule from `image` [1, V_i, C] with `scores` [V_i], in ascending order."""
        if rule not in self.picks:
            settings = {name: value for name, value in stage.attributes.items() if name in _RULE}
            (similarity,) = self.similarity(stage, image)
            self.picks[rule] = select_tokens.picks_from_nothing(scores, similarity, self.most[rule], **settings)
        return self.picks[rule][: stage.keep].sort().values.to(torch.int32)


_RULE = ("diversity_rule", "weighted")  # what the operator's attributes say of picks from nothing


def chain_rule(plan: PruningPlan, number: int) -> Rule | None:
    """What picks a stage's tokens from nothing; None where quotas or seeds come first."""
    stage = plan.stages[number]
    if stage.keep == 0 or stage.attention_quota or stage.diversity_quota or stage.seeds or not stage.needs_similarity:
        return None
    weighing = plan.importance_of(number) if stage.weights == "scores" else None
    return stage.diversity, stage.features, weighing


@dataclass(frozen=True)
class StageRecord:
    """What stage `number` did to one prompt.

    `indices` [k] among the tokens it chose from and `absolute` [k] among the V of the picture, both ascending;
    `chosen` [k] is what the reference selects, other than `indices` only where a kept set was forced;
    `scores` [V_i] float32, empty where the stage needs none (keep 0); `last` is the prompt's last token afterwards.
    `margin` is the smallest relative gap of the scores at the two cuts (pool and attention quota): near 0, rounding
    may decide, and another runtime may keep the other token. It is inf where no cut is made.
    """

    number: int
    indices: np.ndarray
    absolute: np.ndarray
    chosen: np.ndarray
    scores: np.ndarray
    margin: float
    last: int


def apply_stage(
    plan: PruningPlan,
    number: int,
    *,
    rows: tuple[torch.Tensor, ...],
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    last: int,
    image_start: int,
    before: torch.Tensor,
    forced: Sequence[int] | None = None,
    class_attention: torch.Tensor | None = None,
    same: SameRows | None = None,
) -> tuple[StageRecord, tuple[torch.Tensor, ...]]:
    """Prune `rows` (hidden first, then whatever goes along; each [1, S, ...]) as stage `number` of `plan` says.

    `query` [1,H,S,D] and `key` [1,K,S,D] are those of the layer before, after RoPE (None at layer 0); `before` [V_i]
    are the survivors so far in the picture's numbering; `class_attention` [V] is the vision tower's; `same` is what
    the stage shares with others, if anything. Gives the record and the gathered rows, each [1, S-V_i+k, ...].
    """
    stage, count = plan.stages[number], len(before)
    chosen, scores = _choose(plan, number, rows[0], query, key, last, image_start, class_attention, same)
    indices = chosen if forced is None else torch.as_tensor(forced, dtype=torch.int32)
    at = indices[None].to(before.device)
    gathered = tuple(_gather(row, at, start=image_start, count=count) for row in rows)
    record = StageRecord(
        number=number,
        indices=_numpy(indices),
        absolute=_numpy(before[at[0].long()]),
        chosen=_numpy(chosen),
        scores=scores.numpy(),
        margin=score_margin(scores.numpy(), stage),
        last=last - count + stage.keep,
    )
    return record, gathered


def _choose(
    plan: PruningPlan,
    number: int,
    hidden: torch.Tensor,
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    last: int,
    image_start: int,
    class_attention: torch.Tensor | None,
    same: SameRows | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices [k] int32 and scores [V_i] float32 of one stage, on the CPU wherever the layers run."""
    stage, count = plan.stages[number], plan.tokens_before(number)
    if stage.keep == 0:
        return torch.empty(0, dtype=torch.int32), torch.empty(0)
    hidden = hidden.cpu()
    if query is not None and key is not None:
        text = torch_scores.query_rows(plan, number) == "text"
        rows = slice(image_start + count, None) if text else slice(last, last + 1)
        query, key = query[:, :, rows].cpu(), key.cpu()
    scores = torch_scores.importance_scores(
        plan, number, prefix_tokens=image_start, hidden=hidden, last=torch.tensor([last]), query=query, key=key,
        vision_cls=None if class_attention is None else class_attention[None].cpu(),
    )  # fmt: skip
    image = hidden[:, image_start : image_start + count]
    same, rule = same or SameRows(), chain_rule(plan, number)
    if rule is not None and rule in same.most:
        return same.picked(rule, stage, scores[0], image), scores[0]
    seeds = stage_seeds(plan, number)
    indices = select_tokens.reference(
        scores,
        same.similarity(stage, image) if stage.needs_similarity else None,
        None if seeds is None else torch.from_numpy(seeds),
        **stage.attributes,
    )
    return indices[0], scores[0]


def _gather(rows: torch.Tensor, indices: torch.Tensor, *, start: int, count: int) -> torch.Tensor:
    """rows [1,S,...] -> [1,S-count+k,...]; the operator keeps at least one token, a stage may keep none."""
    if indices.shape[1] == 0:
        return torch.cat([rows[:, :start], rows[:, start + count :]], dim=1)
    gathered: torch.Tensor = gather_tokens.reference(rows, indices, start=start, count=count)
    return gathered


def score_margin(scores: np.ndarray, stage: Stage) -> float:
    """Smallest gap of `scores` [V_i] at the cuts of attention picking, over the highest score; see StageRecord."""
    quota, pool = stage.attention_quota, stage.pool
    if stage.keep == 0 or quota == 0 or len(scores) == 0:
        return float("inf")
    order = np.argsort(-scores, kind="stable")
    candidates = order[:pool]
    near, far = candidates[candidates < stage.boundary], candidates[candidates >= stage.boundary]
    cuts = [(order, pool)]
    cuts += [(near, quota)] if quota <= len(near) else [(far, quota - len(near))]
    gaps = [float(scores[group[at - 1]] - scores[group[at]]) for group, at in cuts if 0 < at < len(group)]
    scale = float(np.abs(scores[np.isfinite(scores)]).max(initial=0.0)) or 1.0
    return min(gaps) / scale if gaps else float("inf")


def _numpy(indices: torch.Tensor) -> np.ndarray:
    return np.asarray(indices.cpu().numpy().astype(np.int64))
