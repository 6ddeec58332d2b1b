"""The streamed reference: transformers' own decoder, one layer in memory at a time, pruned as a plan says.

    for each decoder layer: read its weights -> run it over every sample -> free it

The modelling code is transformers' (`AutoModel.from_config` on the meta device), the weights come from the checkpoint's
safetensors files through memory maps, and the selection between layers is the operators' reference. So a 7B decoder
needs the memory of one layer and of the samples' hidden states, and nothing here can share a fault with the graphs.

Samples are unpadded and run one at a time: shapes are [1, S, C] with S = P + V + the text's own length.

Generated tokens are checked in the same pass. Their ids are appended to the prompt; under a causal mask no row before
them changes, and the selection asks the prompt's last token, so the pruned caches are the ones generation would have
built. The logits at the rows last .. last+N-1 then are those of N steps of greedy generation: if the first argmax is
the first appended id, the second row saw what the second step would have seen, and so on by induction.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from calibrate.reference.pass_checkpoints import PassCheckpoints
from calibrate.reference.positions import position_rule
from calibrate.reference.pruning_stage import StageRecord, apply_stage
from calibrate.reference.recording import SPILL_BYTES, KeptSegment, OpenSegment, Recorder
from calibrate.reference.records import EmbeddedRecord, ReferenceInput, RunRecord, SegmentRecord
from graphs import dtypes
from graphs.files.checkpoint import Checkpoint, TensorRef
from graphs.files.packed_weights import read_tensor
from graphs.files.resume import Work, digest
from graphs.records.errors import InputError, UnavailableError
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report
from graphs.tf32 import torch_without_tf32

_ATTENTION = "btp_capture"
_VOCABULARY_ROWS = 16384  # rows of the output matrix in memory at a time


@dataclass(frozen=True)
class LayerView:
    """One layer of one run as observers see it: [1, S_i, C] before and after, query and key after RoPE.

    `query` [1, H, S_i, D], `key` and `value` [1, K, S_i, D], `cos` and `sin` [1, S_i, D]; `kept` [V_i] are the image
    tokens there are, in the picture's numbering.
    """

    run: int
    layer: int
    module: nn.Module
    hidden_in: torch.Tensor
    hidden_out: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    last: int
    image_start: int
    image_tokens: int
    sample: int
    plan: PruningPlan
    kept: torch.Tensor


class Observer(Protocol):
    """Sees every layer of every run, and the head once at the end."""

    def see(self, view: LayerView) -> None:
        """Look at one layer of one run; `view.module` is loaded only now."""

    def finish(self, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """All layers are done; `head` maps hidden [..., C] to logits [..., vocabulary]."""


@dataclass(frozen=True)
class Rows:
    """What one run brings to a layer: hidden [1,S,C], cos and sin [1,S,D]; its text begins at row `text`."""

    hidden: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    text: int


class LayerEdit(Protocol):
    """Changes the weights of every layer before the runs go through it: what later layers see is what it made."""

    key: str
    """A hash of all that decides the changes."""

    def __call__(self, layer: int, module: nn.Module, rows: Sequence[Rows]) -> None:
        """The layer is loaded; `rows` are what each run brings to it, pruned already."""


@dataclass
class _Run:
    """A prompt on its way through the layers; `kept` are the surviving image tokens in the unpruned numbering."""

    plan: PruningPlan
    sample: int
    image_start: int
    prompt_tokens: int
    new_tokens: int
    hidden: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    kept: torch.Tensor
    forced: Sequence[Sequence[int]] | None
    class_attention: torch.Tensor | None
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    stages: list[StageRecord] = field(default_factory=list)
    segments: list[SegmentRecord | KeptSegment] = field(default_factory=list)
    embedded: EmbeddedRecord | None = None
    open_segment: OpenSegment | None = None

    @property
    def last(self) -> int:
        """Row of the prompt's last token in the present sequence."""
        return self.hidden.shape[1] - self.new_tokens - 1

    @property
    def rows(self) -> Rows:
        """What it brings to the next layer."""
        return Rows(self.hidden, self.cos, self.sin, text=self.image_start + len(self.kept))

    def follow(self, leader: _Run, layer: int) -> None:
        """Take over what `layer` made of a run with the same past."""
        if any(stage.layer == layer for stage in self.plan.stages):
            self.stages.append(leader.stages[-1])
        self.hidden, self.cos, self.sin, self.kept = leader.hidden, leader.cos, leader.sin, leader.kept
        self.query, self.key = leader.query, leader.key


class StreamedReference:
    """transformers' decoder over a checkpoint, one layer at a time.

    `config` is the whole model's config.json; tensors are read by canonical name. `dtype` is the type of the maths.
    With `work`, a long pass leaves checkpoints there, and an interrupted one continues from the last of them; records
    of more than `spill_above` bytes lie there too.
    Raises InputError for a checkpoint that lacks a tensor or whose tensor has another shape than the configuration.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        work: Work | None = None,
        spill_above: int = SPILL_BYTES,
    ) -> None:
        self.work, self.spill_above = work, spill_above
        AttentionInterface.register(_ATTENTION, _capturing_attention)
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, torch.device(device)
        config = _whole_config(checkpoint.config)
        self._image_token = int(config.image_token_id)
        self._positions = position_rule(config, self._image_token)
        text = config.get_text_config()
        text._attn_implementation = _ATTENTION
        with torch.device("meta"):
            self._model = AutoModel.from_config(text, dtype=dtype).eval()
        # The rotary module has no weights, only tables that its constructor computes.
        self._rotary = type(self._model.rotary_emb)(config=text).to(self._device)
        self.num_layers = int(text.num_hidden_layers)

    def run(
        self,
        inputs: Sequence[ReferenceInput],
        plans: PruningPlan | Sequence[PruningPlan],
        *,
        forced_kept: Sequence[Sequence[Sequence[int]]] | None = None,
        record_segments: bool = False,
        observers: Sequence[Observer] = (),
        probes: Sequence[Observer] = (),
        edit: LayerEdit | None = None,
        progress: Report | None = None,
    ) -> list[RunRecord]:
        """Every prompt under every plan, in one pass over the weights; plan by plan, then prompt by prompt.

        `forced_kept[run][stage]` replaces the selection (indices among the tokens the stage chooses from): teacher
        forcing. `observers` see every run; `probes` see runs that were pruned alike so far only once, as the first of
        them. `edit` may change a layer before the runs go through it. `progress(done, all)` is called after each run of
        each layer. Raises InputError if a plan does not fit the model, a prompt does not hold exactly V image tokens in
        one run, or a layer gives numbers that are not finite.
        """
        plans = [plans] if isinstance(plans, PruningPlan) else list(plans)
        with torch.inference_mode(), torch_without_tf32():
            runs = self._start_all(inputs, plans)
            seen = (*observers, *probes)
            recorder = self._recorder(runs) if record_segments else None
            for number, run in enumerate(runs):
                run.forced = forced_kept[number] if forced_kept is not None else None
                run.embedded = recorder.embedded(run.hidden, run.cos, run.sin, run.last) if recorder else None
            checkpoints = self._checkpoints(inputs, plans, forced_kept, record_segments, seen, edit)
            begin = checkpoints.restore(runs) if checkpoints else 0
            for layer in range(begin, self.num_layers):
                asked = any(stage.layer == layer + 1 and stage.keep for plan in plans for stage in plan.stages)
                # Plans that have pruned alike so far have the same rows: those are computed once.
                leaders: dict[Any, _Run] = {}
                with self.loaded(layer) as module:
                    if edit is not None:
                        for number, run in enumerate(runs):
                            self._enter(number, run, layer, recorder)
                        edit(layer, module, [run.rows for run in runs])
                    for number, run in enumerate(runs):
                        past = number if recorder or observers else _past(run, layer)
                        if past in leaders:
                            run.follow(leaders[past], layer)
                        else:
                            leaders[past] = run
                            self._step(number, run, layer, module, seen, recorder)
                            if not asked:
                                run.query = run.key = None
                        if progress is not None:
                            done = (layer - begin) * len(runs) + number + 1
                            progress(done, (self.num_layers - begin) * len(runs))
                if checkpoints is not None:
                    checkpoints.save(layer + 1, runs, last=layer + 1 == self.num_layers)
            for observer in seen:
                observer.finish(self.head)
            return self._finish(runs, recorder)

    def logits(
        self, inputs: Sequence[ReferenceInput], plans: Sequence[PruningPlan], *, progress: Report | None = None
    ) -> list[np.ndarray]:
        """Only the logits [answer, vocabulary] of each run, plan by plan, then prompt by prompt."""
        return [run.logits for run in self.run(inputs, plans, progress=progress)]

    def _recorder(self, runs: Sequence[_Run]) -> Recorder:
        """Records on disk if there is a work folder and they are large: keys and values of every layer."""
        rows = sum(
            len(run.plan.tokens_per_layer()) * (run.hidden.shape[1] - run.plan.image_tokens)
            + sum(run.plan.tokens_per_layer())
            for run in runs
        )
        return Recorder(self.work if 4 * self.key_value_width * rows > self.spill_above else None)

    def _checkpoints(
        self,
        inputs: Sequence[ReferenceInput],
        plans: Sequence[PruningPlan],
        forced: Sequence[Sequence[Sequence[int]]] | None,
        record: bool,
        observers: Sequence[Observer],
        edit: LayerEdit | None,
    ) -> PassCheckpoints | None:
        """Where this pass leaves checkpoints, by what decides its numbers (the model decides the work folder)."""
        if self.work is None:
            return None
        settings: list[Any] = [str(self._dtype), self._device.type, record]
        settings += [[type(observer).__name__ for observer in observers], None if edit is None else edit.key]
        kept = None if forced is None else [[[int(token) for token in stage] for stage in run] for run in forced]
        arrays = [
            array
            for sample in inputs
            for array in (
                sample.input_ids,
                sample.image_features.float(),
                sample.position_ids,
                sample.class_attention,
                torch.tensor(sample.new_tokens),
            )
            if array is not None
        ]
        name = digest(settings, [plan.digest() for plan in plans], kept, *(array.cpu().numpy() for array in arrays))
        return PassCheckpoints(self.work, f"pass-{name[:16]}", observers, self._device)

    def rotary_tables(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [1, n, D] of `position_ids` [1, n] (or [3, 1, n]) from transformers' own rotary module."""
        like = torch.empty(0, dtype=self._dtype, device=self._device)
        cos, sin = self._rotary(like, position_ids.to(self._device))
        return cos, sin

    @property
    def vocab_size(self) -> int:
        """Logits of one row."""
        return self._output_matrix.shape[0]

    @property
    def _output_matrix(self) -> TensorRef:
        tied = "lm_head.weight" not in self._checkpoint.tensors
        return self._checkpoint["language_model.embed_tokens.weight" if tied else "lm_head.weight"]

    @property
    def key_value_width(self) -> int:
        """Values that one token's key and value have in a layer, 2 K D."""
        config = self._model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_key_value_heads * head)

    def rotary_after(
        self, sample: ReferenceInput, grid: tuple[int, int], tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [1, tokens, D] of the tokens that follow a prompt."""
        positions = self._positions(sample.input_ids, tokens, grid)
        cos, sin = self.rotary_tables(positions[..., len(sample.input_ids) :].unsqueeze(-2))
        return cos, sin

    def decode(
        self, module: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        key: torch.Tensor, value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """One loaded layer on one new row of each sample: hidden [B,1,C] after keys and values [B,K,S,D].

        Gives hidden [B,1,C] and the new key and value [B,K,1,D].
        """
        attention: Any = module.self_attn
        attention.btp_past = (key.to(hidden), value.to(hidden))
        try:
            output, _, new_key, new_value = _forward(module, hidden, cos, sin)
        finally:
            del attention.btp_past
        return output, new_key, new_value

    def _start_all(self, inputs: Sequence[ReferenceInput], plans: Sequence[PruningPlan]) -> list[_Run]:
        """Plan by plan, then prompt by prompt; the plans share the embedded rows."""
        first = [self._start(plans[0], number, sample) for number, sample in enumerate(inputs)] if plans else []
        if any(plan.image_tokens != plans[0].image_tokens or plan.num_layers != self.num_layers for plan in plans):
            return [self._start(plan, number, sample) for plan in plans for number, sample in enumerate(inputs)]
        return [replace(run, plan=plan, stages=[], segments=[], open_segment=None) for plan in plans for run in first]

    def _start(self, plan: PruningPlan, number: int, sample: ReferenceInput) -> _Run:
        if plan.num_layers != self.num_layers:
            raise InputError(
                f"the plan is for {plan.num_layers} layers, the decoder has {self.num_layers}",
                wanted="a plan for this model",
                do="btp-export calibrate, or a preset",
            )
        start = image_start(sample.input_ids, self._image_token, plan.image_tokens)
        # The placeholders' rows are replaced by features, and their id may lie past the table; a generated token may
        # be the placeholder too, and is then a word like any other.
        words = torch.where(sample.input_ids == self._image_token, 0, sample.input_ids)
        ids = torch.cat([words, torch.tensor(sample.new_tokens, dtype=torch.int64)])
        hidden = self.embed(ids)
        if sample.image_features.shape != (plan.image_tokens, hidden.shape[1]):
            raise InputError(
                f"image features have shape {list(sample.image_features.shape)}",
                wanted=f"[{plan.image_tokens}, {hidden.shape[1]}]",
                do="use the vision part of the same model",
            )
        hidden[start : start + plan.image_tokens] = sample.image_features.to(hidden)
        positions = sample.position_ids
        if positions is None:
            positions = self._positions(sample.input_ids, len(sample.new_tokens), plan.grid)
        cos, sin = self.rotary_tables(positions.unsqueeze(-2))
        kept = torch.arange(plan.image_tokens, device=self._device)
        prompt = len(sample.input_ids)
        return _Run(
            plan, number, start, prompt, len(sample.new_tokens), hidden[None], cos, sin, kept, None,
            sample.class_attention,
        )  # fmt: skip

    def _step(
        self,
        number: int,
        run: _Run,
        layer: int,
        module: nn.Module,
        observers: Sequence[Observer],
        recorder: Recorder | None,
    ) -> None:
        self._enter(number, run, layer, recorder)
        before = run.hidden
        run.hidden, query, key, value = _forward(module, before, run.cos, run.sin)
        if not bool(torch.isfinite(run.hidden).all()):
            raise _not_finite(layer, self._dtype)
        if recorder is not None:
            run.open_segment = recorder.extend(
                run.open_segment, number, layer,
                before=before, cos=run.cos, sin=run.sin, query=query, key=key, value=value,
            )  # fmt: skip
        run.query, run.key = query, key
        for observer in observers:
            observer.see(
                LayerView(
                    number, layer, module, before, run.hidden, query, key, value, run.cos, run.sin, run.last,
                    run.image_start, len(run.kept), run.sample, run.plan, run.kept,
                )
            )  # fmt: skip

    def _enter(self, number: int, run: _Run, layer: int, recorder: Recorder | None) -> None:
        """Prune a run that has come to a stage, unless that was done."""
        stage = next((n for n, stage in enumerate(run.plan.stages) if stage.layer == layer), None)
        if stage is None or stage < len(run.stages):
            return
        if recorder is not None and layer > 0:
            _close_segment(run, number, recorder)
        self._prune(run, stage)

    def _prune(self, run: _Run, stage: int) -> None:
        forced = run.forced[stage] if run.forced is not None else None
        record, (run.hidden, run.cos, run.sin) = apply_stage(
            run.plan,
            stage,
            rows=(run.hidden, run.cos, run.sin),
            query=run.query,
            key=run.key,
            last=run.last,
            image_start=run.image_start,
            before=run.kept,
            forced=forced,
            class_attention=run.class_attention,
        )
        run.kept = run.kept[torch.from_numpy(record.indices).to(run.kept.device)]
        run.stages.append(record)

    def _finish(self, runs: Sequence[_Run], recorder: Recorder | None) -> list[RunRecord]:
        """The records; the head runs once, on the last rows of all runs."""
        if not runs:
            return []
        for number, run in enumerate(runs):
            if recorder is not None:
                _close_segment(run, number, recorder)
        logits = self.head(torch.cat([run.hidden[0, run.last :] for run in runs])).float().cpu()
        records = []
        ends = itertools.accumulate(run.new_tokens + 1 for run in runs)
        for run, end in zip(runs, ends, strict=True):
            part = logits[end - run.new_tokens - 1 : end]
            start, prompt = run.image_start, run.prompt_tokens
            stages, segments = tuple(run.stages), tuple(run.segments)
            records.append(RunRecord(run.plan, run.sample, start, prompt, part.numpy(), stages, segments, run.embedded))
        return records

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embedding rows [n, C] of `ids` [n]; only these rows are read."""
        table = self._checkpoint["language_model.embed_tokens.weight"]
        rows = ids.numpy()
        if rows.min(initial=0) < 0 or rows.max(initial=0) >= table.shape[0]:
            raise InputError(
                f"token ids from {int(rows.min())} to {int(rows.max())} in a vocabulary of {table.shape[0]}",
                wanted="ids of this model's tokenizer",
                do="use the processor files of the same checkpoint",
            )
        return dtypes.torch_of_numpy(table.read()[rows]).to(self._device, self._dtype)

    @contextmanager
    def loaded(self, layer: int) -> Iterator[nn.Module]:
        """A decoder layer with its weights in memory as long as the block lasts."""
        module = self._model.layers[layer]
        self._materialise(module, f"language_model.layers.{layer}.")
        try:
            yield module
        finally:
            module.to("meta")

    def _materialise(self, module: nn.Module, prefix: str) -> None:
        state: dict[str, torch.Tensor] = {}
        for name, parameter in module.state_dict().items():
            array = read_tensor(self._checkpoint, prefix + name)
            if array.shape != tuple(parameter.shape):
                raise InputError(
                    f"{prefix}{name} of {self._checkpoint.folder} has shape {list(array.shape)}",
                    wanted=f"{list(parameter.shape)}, as config.json says",
                    do="restore config.json or the weights, so that both are of the same model",
                )
            state[name] = dtypes.torch_of_numpy(array).to(self._device, self._dtype)
        module.load_state_dict(state, assign=True)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of hidden [..., C]: final norm and output matrix, a block of rows at a time."""
        norm = self._model.norm
        self._materialise(norm, "language_model.norm.")
        weights, normed = self._output_matrix.read(), norm(hidden)
        blocks = [
            normed @ dtypes.torch_of_numpy(weights[row : row + _VOCABULARY_ROWS]).to(self._device, self._dtype).T
            for row in range(0, self.vocab_size, _VOCABULARY_ROWS)
        ]
        norm.to("meta")
        return torch.cat(blocks, dim=-1)


def torch_device(name: str) -> str:
    """cpu, cuda or cuda:<n> as asked for; `auto` is a GPU if there is one. Raises UnavailableError if there is none."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(
            f"torch {torch.__version__} sees no GPU", wanted="a GPU and a torch built for it", do="--device cpu"
        )
    return name


def _past(run: _Run, layer: int) -> tuple[Any, ...]:
    """What decides a run's rows after `layer`: the prompt, and what was pruned until there."""
    stages = tuple(stage for stage in run.plan.stages if stage.layer <= layer)
    forced = None if run.forced is None else tuple(tuple(kept) for kept in run.forced[: len(stages)])
    return run.sample, run.plan.importance, run.plan.grid, run.plan.spatial_metric, stages, forced


def image_start(input_ids: torch.Tensor, image_token: int, image_tokens: int) -> int:
    """P: where the run of V image placeholders begins in `input_ids` [n].

    Raises InputError unless the prompt holds exactly V of them in one run, with text after it.
    """
    places = torch.nonzero(input_ids == image_token).flatten()
    start = int(places[0]) if len(places) else 0
    whole = len(places) == image_tokens and int(places[-1]) == start + image_tokens - 1
    if not whole or start + image_tokens >= len(input_ids):
        raise InputError(
            f"the prompt holds {len(places)} image tokens" + ("" if whole else ", not in one run with text after it"),
            wanted=f"one image of {image_tokens} tokens, then text",
            do="put the image placeholder into the prompt once, before the question",
        )
    return start


def _whole_config(config: Mapping[str, Any]) -> Any:
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"config.json has model_type {model_type!r}", wanted="a model type of transformers", do="check config.json"
        )
    return CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(config)))  # transformers writes into it


def _capturing_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention; leaves query, key and value, as the layer made them, on the module.

    Where the module carries keys and values of earlier tokens (`btp_past`), the rows look at those too.
    """
    module.btp_captured = (query, key, value)  # type: ignore[assignment]
    past: Any = getattr(module, "btp_past", None)
    if past is not None:
        key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output, None


def _forward(
    module: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer: hidden [B,S,C] -> hidden [B,S,C], query [B,H,S,D], key and value [B,K,S,D]; causal, no padding."""
    output = module(hidden, attention_mask=None, position_embeddings=(cos, sin))
    output = output[0] if isinstance(output, tuple) else output
    attention: Any = module.self_attn
    query, key, value = attention.btp_captured
    del attention.btp_captured
    return output, query, key, value


def forward(module: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """One loaded layer (`LayerView.module`) on hidden [B,S,C], cos and sin [1 or B,S,D]: for observers' side runs."""
    return _forward(module, hidden, cos, sin)[0]


def _close_segment(run: _Run, number: int, recorder: Recorder) -> None:
    if run.open_segment is not None:
        run.segments.append(recorder.close(run.open_segment, number, hidden=run.hidden, last=run.last))
        run.open_segment = None


def _not_finite(layer: int, dtype: torch.dtype) -> InputError:
    name = str(dtype).removeprefix("torch.")
    return InputError(
        f"decoder layer {layer} gives numbers that are not finite in {name}",
        wanted="weights of a whole checkpoint"
        + ("" if dtype == torch.float32 else f", and values that {name} can hold"),
        do="get the shard again that holds this layer" + ("" if dtype == torch.float32 else ", or use --maths float32"),
    )
