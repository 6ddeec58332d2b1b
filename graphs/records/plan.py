"""The pruning plan: at which decoder layers how many image tokens are kept, and how they are chosen (plan.json).

The format is a contract: "btp-plan/1", and "btp-plan/2" for plans whose stages say more than their counts. Layers are
0-based; a stage at layer L means that layer L is the first to run on the reduced set. All counts are integers, resolved
for one number of image tokens V.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import (
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    computed_field,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema

from graphs.records.errors import InputError
from graphs.records.reading import read_file
from graphs.records.record import FROM_FILE, Layers, Record, Tokens, parse_record
from graphs.records.token_layout import Blocks, Grid, blocks_field, check_blocks

FORMAT: Final = "btp-plan/1"
FORMAT_2: Final = "btp-plan/2"

Importance = Literal["last-token", "mean-text", "similar-text", "random", "pivot-distance", "norm", "vision-cls"]
SpatialMetric = Literal["euclidean", "manhattan"]
Diversity = Literal["farthest", "coverage"]
Features = Literal["raw", "centred"]
Weights = Literal["none", "scores"]

ATTENTION_RULES: Final = ("last-token", "mean-text", "similar-text")  # need the layer before the stage
INPUT_RULES: Final = ("norm", "vision-cls")  # look at what enters the decoder, so only before layer 0


class Stage(Record):
    """One pruning stage; the counts are BtpSelectTokens' attributes of those names. keep 0 drops all image tokens.

    Format 2 adds: `importance`, where it is not the plan's; `diversity`, the rule by which diversity picks and the fill
    are made; `features`, what the similarity is taken of (centred: minus their mean over the stage's tokens);
    `weights`, whether coverage gains are multiplied by the scores.
    """

    layer: int = Field(ge=0)
    keep: int = Field(ge=0)
    attention_quota: int = Field(default=0, ge=0)
    pool: int = Field(default=0, ge=0)
    boundary: int = Field(default=0, ge=0)
    diversity_quota: int = Field(default=0, ge=0)
    seeds: int = Field(default=0, ge=0)
    importance: Importance | None = Field(default=None, exclude_if=lambda value: value is None)
    diversity: Diversity = Field(default="farthest", exclude_if=lambda value: value == "farthest")
    features: Features = Field(default="raw", exclude_if=lambda value: value == "raw")
    weights: Weights = Field(default="none", exclude_if=lambda value: value == "none")

    @property
    def extends(self) -> bool:
        """Whether the stage says what format 1 cannot."""
        plain = (self.importance, self.diversity, self.features, self.weights) == (None, "farthest", "raw", "none")
        return not plain

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A stage that drops everything has no counts."""
        return {"layer": self.layer, "keep": 0} if self.keep == 0 else write(self)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Of the fields: pydantic takes what a serializer gives for any dictionary."""
        return handler({name: part for name, part in schema.items() if name != "serialization"})

    @property
    def attributes(self) -> dict[str, Any]:
        """BtpSelectTokens' attributes. Those of format 2 are left out where they have their defaults.

        So a plan of format 1 gives the graphs that it always gave, byte for byte.
        """
        counts = ("keep", "attention_quota", "diversity_quota", "pool", "boundary")
        attributes: dict[str, Any] = {name: getattr(self, name) for name in counts}
        if self.diversity == "coverage":
            attributes |= {"diversity_rule": "coverage", "weighted": int(self.weights == "scores")}
        return attributes

    @property
    def needs_similarity(self) -> bool:
        """Whether the selection reads the token similarity: diversity picks, seeds, or a fill beyond the quota."""
        return self.keep > 0 and (self.diversity_quota > 0 or self.seeds > 0 or self.attention_quota < self.keep)


@dataclass(frozen=True)
class Segment:
    """Decoder layers [start, stop) that all see `image_tokens` image tokens.

    `stage` is the index of the stage right before the segment, None for the unpruned beginning.
    """

    index: int
    start: int
    stop: int
    image_tokens: int
    stage: int | None


class PruningPlan(Record):
    """Stages by rising layer and falling keep, for a decoder of L layers and V image tokens."""

    model_type: str
    num_layers: Layers
    image_tokens: Tokens
    importance: Importance = "last-token"
    grid: Grid  # rows, columns; of the finest block without its newline column where there are blocks
    blocks: Blocks = blocks_field()  # see graphs/records/token_layout.py; none: the tokens are the grid
    spatial_metric: SpatialMetric = "euclidean"
    stages: tuple[Stage, ...] = ()
    calibration: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _check_format(
        cls, data: Any, handler: ModelWrapValidatorHandler["PruningPlan"], info: ValidationInfo
    ) -> "PruningPlan":
        """`format` follows from the stages, so it is no field: a file must name it, and name one that holds them."""
        declared = None
        if isinstance(data, Mapping):
            declared = data.get("format")
            data = {key: value for key, value in data.items() if key != "format"}
            if declared is None and info.context == FROM_FILE:
                raise ValueError(f"format: Field required: {FORMAT} or {FORMAT_2}")
            if declared not in (None, FORMAT, FORMAT_2):
                raise ValueError(f"format: {declared!r} is neither {FORMAT} nor {FORMAT_2}")
        plan = handler(data)
        if declared == FORMAT and plan.format == FORMAT_2:
            extends = [f"stage {number}" for number, stage in enumerate(plan.stages) if stage.extends]
            what = extends[0] if extends else f"importance {plan.importance}"
            raise ValueError(f"{what} says more than {FORMAT} can hold: write {FORMAT_2}")
        return plan

    @model_validator(mode="after")
    def _check(self) -> "PruningPlan":
        check_blocks(self.blocks, self.grid, self.image_tokens)
        tokens, layer = self.image_tokens, -1
        for number, stage in enumerate(self.stages):
            _check_stage(number, stage, tokens=tokens, after_layer=layer, num_layers=self.num_layers)
            _check_rules(number, stage, self.importance_of(number))
            tokens, layer = stage.keep, stage.layer
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def format(self) -> str:
        """The oldest format that holds the plan."""
        new = self.importance in INPUT_RULES or any(stage.extends for stage in self.stages)
        return FORMAT_2 if new else FORMAT

    def importance_of(self, stage: int) -> Importance:
        """The rule that scores the tokens of stage number `stage`."""
        return self.stages[stage].importance or self.importance

    @property
    def needs_class_attention(self) -> bool:
        """Whether any stage scores by the vision tower's class token: the vision graph must give its attention then."""
        return any(map(self.uses_class_attention, range(len(self.stages))))

    def uses_class_attention(self, stage: int) -> bool:
        """Whether stage number `stage` scores by it."""
        return self.stages[stage].keep > 0 and self.importance_of(stage) == "vision-cls"

    @property
    def average_tokens(self) -> float:
        """Mean over layers of the image tokens each layer sees."""
        return sum(self.tokens_per_layer()) / self.num_layers

    @property
    def compression(self) -> float:
        """1 - average_tokens / V."""
        return 1.0 - self.average_tokens / self.image_tokens

    def tokens_per_layer(self) -> list[int]:
        """Image tokens seen by each of the L layers."""
        return [segment.image_tokens for segment in self.segments() for _ in range(segment.start, segment.stop)]

    def segments(self) -> list[Segment]:
        """The runs of layers between stages, in order; together they cover [0, L)."""
        bounds = [(0, self.image_tokens, None)] + [(s.layer, s.keep, i) for i, s in enumerate(self.stages)]
        stops = [bound[0] for bound in bounds[1:]] + [self.num_layers]
        runs = [(start, stop, count, i) for (start, count, i), stop in zip(bounds, stops, strict=True) if stop > start]
        return [Segment(n, start, stop, count, stage) for n, (start, stop, count, stage) in enumerate(runs)]

    def tokens_before(self, stage: int) -> int:
        """Image tokens that stage number `stage` chooses from."""
        return self.stages[stage - 1].keep if stage else self.image_tokens

    def without_stages(self) -> "PruningPlan":
        """The plan that prunes nothing, of the same model and image tokens.

        What only stages read (importance, metric) and the calibration record go too, so that all plans of one model and
        shape give the same one, with one digest.
        """
        return PruningPlan(
            model_type=self.model_type,
            num_layers=self.num_layers,
            image_tokens=self.image_tokens,
            grid=self.grid,
            blocks=self.blocks,
        )

    def to_json(self) -> str:
        """The contents of plan.json; the same plan gives the same bytes."""
        document = {"format": self.format} | self.model_dump(mode="json")
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    def digest(self) -> str:
        """sha256 of what decides the graphs: everything but the calibration record."""
        body = self.model_copy(update={"calibration": {}}).to_json()
        return hashlib.sha256(body.encode()).hexdigest()

    @staticmethod
    def from_json(text: str | bytes, *, source: Path | str = "plan.json") -> "PruningPlan":
        """Parse and validate. Raises InputError naming the key that is wrong."""
        return parse_record(PruningPlan, text, source=source, noun="pruning plan")

    @staticmethod
    def load(path: Path | str) -> "PruningPlan":
        """Read plan.json. Raises InputError if it cannot be read or is not valid."""
        noun = "plan.json or the name of a preset"
        text = read_file(Path(path), noun=noun, do="btp-export plan --list")
        return PruningPlan.from_json(text, source=path)


def rescale(plan: PruningPlan, *, image_tokens: int, grid: Grid, blocks: Blocks = ()) -> PruningPlan:
    """The same layers and shares for another number of image tokens V; the plan itself if it is for these already.

    A stage's count is its share of V, rounded; quotas, pool, boundary and seeds keep their shares of that count, so
    that a stage that divided its places among them exactly still does. What it was rescaled from goes into the
    calibration record. Raises InputError if there are too few tokens for counts that fall from stage to stage.
    """
    if (plan.image_tokens, plan.grid, plan.blocks) == (image_tokens, grid, blocks):
        return plan
    keeping = [stage for stage in plan.stages if stage.keep]
    if image_tokens <= len(keeping):
        raise InputError(
            f"a plan of {len(keeping)} stages that keep tokens, for {image_tokens} image tokens",
            wanted=f"at least {len(keeping) + 1} tokens",
            do="take a larger image size or a plan of fewer stages",
        )
    stages: list[Stage] = []
    tokens = image_tokens
    for number, stage in enumerate(plan.stages):
        least = len(keeping) - number  # one for this stage and each that keeps tokens after it
        keep = min(tokens - 1, max(least, _share(stage.keep, image_tokens, plan.image_tokens))) if stage.keep else 0
        stages.append(with_keep(stage, keep, tokens))
        tokens = keep
    origin = {
        "image_tokens": plan.image_tokens,
        "grid": list(plan.grid),
        "blocks": [list(block) for block in plan.blocks],
    }
    return PruningPlan.model_validate(
        plan.model_dump()
        | {
            "image_tokens": image_tokens,
            "grid": grid,
            "blocks": blocks,
            "stages": stages,
            "calibration": {**plan.calibration, "rescaled_from": plan.calibration.get("rescaled_from", origin)},
        }
    )


def with_keep(stage: Stage, keep: int, tokens: int) -> Stage:
    """`stage` with another count, choosing from `tokens`."""
    if keep == 0:
        return Stage(layer=stage.layer, keep=0)

    def part(count: int) -> int:
        return _share(count, keep, stage.keep)

    # Parts are cut out of one line, so that parts that filled `keep` exactly fill the new one exactly.
    attention, diversity = part(stage.attention_quota), part(stage.attention_quota + stage.diversity_quota)
    seeds = part(stage.attention_quota + stage.diversity_quota + stage.seeds) - diversity
    return stage.model_copy(
        update={
            "keep": keep,
            "attention_quota": attention,
            "pool": max(attention, min(tokens, part(stage.pool))),
            "boundary": min(tokens, part(stage.boundary)),
            "diversity_quota": diversity - attention,
            "seeds": seeds,
        }
    )


def _share(count: int, new: int, old: int) -> int:
    """count * new / old, rounded half up in whole numbers."""
    return (2 * count * new + old) // (2 * old)


def _check_rules(number: int, stage: Stage, importance: Importance) -> None:
    """Raise ValueError for rules that a stage at this layer cannot follow, or that would do nothing."""
    if stage.keep == 0:
        if stage.extends:
            raise ValueError(f"stage {number}: keep 0 drops every token by no rule")
        return
    scored = stage.attention_quota > 0 or stage.weights == "scores"
    if stage.layer == 0 and scored and importance in ATTENTION_RULES:
        raise ValueError(f"stage {number} at layer 0 has no layer before it to take attention from")
    if stage.layer > 0 and importance in INPUT_RULES:
        raise ValueError(f"stage {number} at layer {stage.layer} scores by {importance}, which is for layer 0")
    if stage.weights == "scores" and stage.diversity != "coverage":
        raise ValueError(f"stage {number}: weights are for coverage, and its diversity is {stage.diversity}")


def _check_stage(number: int, stage: Stage, *, tokens: int, after_layer: int, num_layers: int) -> None:
    """Raise ValueError (pydantic turns it into a validation error) for a stage that cannot run on `tokens` tokens."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(f"stage {number}: {message}")

    require(after_layer < stage.layer, f"layer {stage.layer} does not come after layer {after_layer}")
    require(stage.layer < num_layers, f"layer {stage.layer} of a decoder with {num_layers} layers")
    require(stage.keep < tokens, f"keep {stage.keep} is not below the {tokens} tokens it chooses from")
    if stage.keep == 0:
        used = stage.attention_quota or stage.pool or stage.boundary or stage.diversity_quota or stage.seeds
        require(not used, "keep 0 drops every token and takes no quotas")
        return
    require(stage.attention_quota <= stage.keep, f"attention_quota {stage.attention_quota} > keep {stage.keep}")
    require(stage.diversity_quota <= stage.keep, f"diversity_quota {stage.diversity_quota} > keep {stage.keep}")
    require(stage.attention_quota <= stage.pool, f"attention_quota {stage.attention_quota} > pool {stage.pool}")
    require(stage.pool <= tokens, f"pool {stage.pool} > {tokens} tokens")
    require(stage.boundary <= tokens, f"boundary {stage.boundary} > {tokens} tokens")
    require(stage.seeds <= stage.keep, f"seeds {stage.seeds} > keep {stage.keep}")
    require(stage.seeds == 0 or number == 0, "the spatial set is fixed on the full grid, so only stage 0 can use it")
