"""The streamed reference: transformers' own decoder, one layer in memory at a time, pruned as a plan says.

    for each decoder layer: read its weights -> run it over every sample -> free it

The layers are transformers' own (calibrate/reference/decoder.py), and the selection between them is the operators'
reference. So a 7B decoder needs the memory of one layer and of the samples' hidden states, and nothing here can share a
fault with the graphs.

Samples are unpadded and run one at a time: shapes are [1, S, C] with S = P + V + the text's own length. Under several
plans a sample's runs with as many rows go through a layer together, [B, S, C].

Generated tokens are checked in the same pass. Their ids are appended to the prompt; under a causal mask no row before
them changes, and the selection asks the prompt's last token, so the pruned caches are the ones generation would have
built. The logits at the rows last .. last+N-1 then are those of N steps of greedy generation: if the first argmax is
the first appended id, the second row saw what the second step would have seen, and so on by induction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from numpy import ndarray
from torch import nn

from calibrate.reference.decoder import LayeredDecoder, forward_with_attention
from calibrate.reference.observers import LayerEdit, LayerView, Observer
from calibrate.reference.pass_checkpoints import PassCheckpoints
from calibrate.reference.positions import position_rule
from calibrate.reference.recording import SPILL_BYTES, Recorder
from calibrate.reference.records import ReferenceInput, RunRecord
from calibrate.reference.runs import Run, batches, image_start, past_of, share_rows
from calibrate.reference.side_by_side import Each
from graphs.files.checkpoint import Checkpoint
from graphs.files.resume import Work, digest
from graphs.records.errors import InputError
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report
from graphs.tf32 import torch_without_tf32

_ROTARY = ("cos", "sin")


class StreamedReference(LayeredDecoder):
    """The decoder over a checkpoint, and passes of many prompts through its layers.

    With `work`, a long pass leaves checkpoints there, and an interrupted one continues from the last of them; records
    of more than `spill_above` bytes lie there too.
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
        super().__init__(checkpoint, dtype=dtype, device=device)
        self.work, self.spill_above = work, spill_above
        self._image_token = int(self.config.image_token_id)
        self._positions = position_rule(self.config, self._image_token)

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
        with torch.inference_mode(), torch_without_tf32(), self.samples_at_once() as each:
            runs = self._start_all(inputs, plans)
            seen = (*observers, *probes)
            recorder = self._recorder(runs) if record_segments else None
            for number, run in enumerate(runs):
                run.forced = forced_kept[number] if forced_kept is not None else None
                run.embedded = recorder.embedded(run.hidden, run.cos, run.sin, run.last) if recorder else None
            checkpoints = self._checkpoints(inputs, plans, forced_kept, record_segments, seen, edit)
            begin = checkpoints.restore(runs) if checkpoints else 0
            done = 0
            for layer in range(begin, self.num_layers):
                share_rows(runs, layer)
                with self.loaded(layer) as module:
                    if edit is not None:
                        for number, run in enumerate(runs):
                            self._enter(number, run, layer, recorder)
                        edit(layer, module, [run.rows for run in runs])
                    # Whoever looks at every run must be shown it, also where another has the same rows.
                    alone = recorder is not None or bool(observers)
                    for _ in self._through(layer, module, runs, seen, recorder, each, alone=alone):
                        done += 1
                        if progress is not None:
                            progress(done, (self.num_layers - begin) * len(runs))
                if checkpoints is not None:
                    checkpoints.save(layer + 1, runs, last=layer + 1 == self.num_layers)
            for observer in seen:
                observer.finish(self.head)
            return self._finish(runs, recorder)

    def _through(
        self,
        layer: int,
        module: nn.Module,
        runs: Sequence[Run],
        observers: Sequence[Observer],
        recorder: Recorder | None,
        each: Each,
        *,
        alone: bool,
    ) -> Iterator[Run]:
        """Every run through one loaded layer, sample by sample; gives each when it is done.

        Plans that have pruned alike so far have the same rows, which are computed once unless each run goes `alone`.
        """
        asked = any(stage.layer == layer + 1 and stage.keep for run in runs for stage in run.plan.stages)

        def through(numbers: Sequence[int]) -> list[Run]:
            """The runs of one sample, in the order of the plans."""
            pasts = {number: number if alone else past_of(runs[number], layer) for number in numbers}
            leaders: dict[Any, int] = {}
            for number, past in pasts.items():
                leaders.setdefault(past, number)
            for number in leaders.values():
                self._enter(number, runs[number], layer, recorder)
            for batch in batches(runs, leaders.values()):
                self._step(batch, runs, layer, module, observers, recorder)
            for number in numbers:
                runs[number].same = None  # a similarity is V x V: those of a sample are freed before the next one's
                leader = leaders[pasts[number]]
                if leader != number:
                    runs[number].follow(runs[leader], layer)
                if not asked:  # no selection follows that would look at them
                    runs[number].query = runs[number].key = None
            return [runs[number] for number in numbers]

        by_sample: dict[int, list[int]] = {}
        for number, run in enumerate(runs):
            by_sample.setdefault(run.sample, []).append(number)
        for done in each(through, by_sample.values()):
            yield from done

    def logits(
        self, inputs: Sequence[ReferenceInput], plans: Sequence[PruningPlan], *, progress: Report | None = None
    ) -> list[ndarray]:
        """Only the logits [answer, vocabulary] of each run, plan by plan, then prompt by prompt."""
        return [run.logits for run in self.run(inputs, plans, progress=progress)]

    def _recorder(self, runs: Sequence[Run]) -> Recorder:
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

    def rotary_after(
        self, sample: ReferenceInput, grid: tuple[int, int], tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [1, tokens, D] of the tokens that follow a prompt."""
        positions = self._positions(sample.input_ids, tokens, grid)
        cos, sin = self.rotary_tables(positions[..., len(sample.input_ids) :].unsqueeze(-2))
        return cos, sin

    def _start_all(self, inputs: Sequence[ReferenceInput], plans: Sequence[PruningPlan]) -> list[Run]:
        """Plan by plan, then prompt by prompt; the plans share the embedded rows."""
        first = [self._start(plans[0], number, sample) for number, sample in enumerate(inputs)] if plans else []
        if any(plan.image_tokens != plans[0].image_tokens or plan.num_layers != self.num_layers for plan in plans):
            return [self._start(plan, number, sample) for plan in plans for number, sample in enumerate(inputs)]
        return [replace(run, plan=plan, stages=[], segments=[], open_segment=None) for plan in plans for run in first]

    def _start(self, plan: PruningPlan, number: int, sample: ReferenceInput) -> Run:
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
        return Run(
            plan, number, start, prompt, len(sample.new_tokens), hidden[None], cos, sin, kept, None,
            sample.class_attention,
        )  # fmt: skip

    def _step(
        self,
        batch: Sequence[int],
        runs: Sequence[Run],
        layer: int,
        module: nn.Module,
        observers: Sequence[Observer],
        recorder: Recorder | None,
    ) -> None:
        """Runs with as many rows through one loaded layer."""
        before = [runs[number].hidden for number in batch]
        hidden, query, key, value = forward_with_attention(
            module, _joined(before), *(_joined([getattr(runs[number], name) for number in batch]) for name in _ROTARY)
        )
        if not _finite(hidden):
            raise _not_finite(layer, self._dtype)
        for place, number in enumerate(batch):
            run, one = runs[number], slice(place, place + 1)
            run.hidden, run.query, run.key = hidden[one], query[one], key[one]
            if recorder is not None:
                run.open_segment = recorder.extend(
                    run.open_segment, number, layer,
                    before=before[place], cos=run.cos, sin=run.sin, query=run.query, key=run.key, value=value[one],
                )  # fmt: skip
            for observer in observers:
                observer.see(
                    LayerView(
                        number, layer, module, before[place], run.hidden, run.query, run.key, value[one], run.cos,
                        run.sin, run.last, run.image_start, len(run.kept), run.sample, run.plan, run.kept,
                    )
                )  # fmt: skip

    def _enter(self, number: int, run: Run, layer: int, recorder: Recorder | None) -> None:
        """Prune a run that has come to a stage, unless that was done."""
        stage = next((n for n, stage in enumerate(run.plan.stages) if stage.layer == layer), None)
        if stage is None or stage < len(run.stages):
            return
        if recorder is not None and layer > 0:
            run.close_segment(number, recorder)
        run.prune(stage)

    def _finish(self, runs: Sequence[Run], recorder: Recorder | None) -> list[RunRecord]:
        """The records; the head runs once, on the last rows of all runs."""
        if not runs:
            return []
        for number, run in enumerate(runs):
            if recorder is not None:
                run.close_segment(number, recorder)
        logits = self.head(torch.cat([run.hidden[0, run.last :] for run in runs])).float().cpu()
        records = []
        ends = itertools.accumulate(run.new_tokens + 1 for run in runs)
        for run, end in zip(runs, ends, strict=True):
            part = logits[end - run.new_tokens - 1 : end]
            start, prompt = run.image_start, run.prompt_tokens
            stages, segments = tuple(run.stages), tuple(run.segments)
            records.append(RunRecord(run.plan, run.sample, start, prompt, part.numpy(), stages, segments, run.embedded))
        return records


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """[1, ...] each -> [B, ...]."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _finite(values: torch.Tensor) -> bool:
    """Whether all are. Their sum, which is far quicker to make, is finite only then; it may overflow all the same."""
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


def _not_finite(layer: int, dtype: torch.dtype) -> InputError:
    name = str(dtype).removeprefix("torch.")
    return InputError(
        f"decoder layer {layer} gives numbers that are not finite in {name}",
        wanted="weights of a whole checkpoint"
        + ("" if dtype == torch.float32 else f", and values that {name} can hold"),
        do="get the shard again that holds this layer" + ("" if dtype == torch.float32 else ", or use --maths float32"),
    )
