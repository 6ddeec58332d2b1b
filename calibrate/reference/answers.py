"""The full model's own answers, generated greedily one layer at a time.

    one pass over the prompts leaves every layer's keys and values; then, for each new token,
    for each decoder layer: read its weights -> one row of every unfinished sample -> free it

A prompt's keys and values are 300 MB for a 7B in half precision: where there are many, they lie in the work folder as
float16 and are read back layer by layer. Rounding may turn a choice between two nearly equal tokens. That does no harm
to a calibration: whatever the answer, a later pass computes the full model's distribution at each of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from calibrate.reference.observers import LayerView
from calibrate.reference.recording import read
from calibrate.reference.records import ReferenceInput
from calibrate.reference.side_by_side import Each
from calibrate.reference.streamed_model import StreamedReference
from graphs.files.resume import KeptArray, Work
from graphs.records.plan import PruningPlan
from graphs.records.progress import Report

ANSWER_TOKENS = 16  # at most so many tokens of an answer are looked at
_BATCH = 8  # samples of equal length that go through a layer together: their keys and values are in memory


def greedy_answers(
    reference: StreamedReference,
    inputs: Sequence[ReferenceInput],
    unpruned: PruningPlan,
    *,
    tokens: int = ANSWER_TOKENS,
    ends: Sequence[int] = (),
    progress: Report | None = None,
) -> list[tuple[int, ...]]:
    """At least one token of each answer, until one of `ends` (which is part of it) or `tokens` of them.

    `progress(done, all)` counts layers over the most passes there may be. Raises InputError as StreamedReference.run.
    """
    memory = KeysAndValues(reference.work, spilled=_bytes(reference, inputs) > reference.spill_above)
    layers, passes = reference.num_layers, tokens

    def tell(number: int, done: int, total: int) -> None:
        if progress is not None:
            progress(layers * number + layers * done // total, layers * passes)

    runs = reference.run(
        inputs, unpruned, observers=(memory,), progress=lambda done, total, text="": tell(0, done, total)
    )
    answers = [[run.next_tokens[0]] for run in runs]
    with torch.inference_mode(), reference.samples_at_once() as each:
        decoder = _Decoder(reference, inputs, memory, unpruned.grid, tokens, each)
        for number in range(1, tokens):
            open_ = [sample for sample, answer in enumerate(answers) if answer[-1] not in ends]
            if not open_:
                break
            last = {sample: answers[sample][-1] for sample in open_}
            logits = decoder.step(last, number - 1, partial(tell, number, total=layers))
            for sample in open_:
                answers[sample].append(int(logits[sample].argmax()))
    return [tuple(answer) for answer in answers]


def _bytes(reference: StreamedReference, inputs: Sequence[ReferenceInput]) -> int:
    """Of all keys and values in float32."""
    return 4 * reference.key_value_width * reference.num_layers * sum(len(sample.input_ids) for sample in inputs)


@dataclass
class KeysAndValues:
    """Every layer's keys and values [K,S,D] of every prompt; in `work`, as float16, if they are `spilled`."""

    work: Work | None
    spilled: bool
    arrays: dict[tuple[int, int, str], np.ndarray | KeptArray] = field(default_factory=dict)  # by run, layer and kind

    def see(self, view: LayerView) -> None:
        """Take down one layer of one run."""
        for kind, tensor in (("key", view.key), ("value", view.value)):
            array = tensor[0].float().cpu().numpy()
            place = (view.run, view.layer, kind)
            if self.work is None or not self.spilled:
                self.arrays[place] = array
            else:
                self.arrays[place] = self.work.keep(f"answer-{view.run}-{view.layer}-{kind}", array.astype(np.float16))

    def finish(self, head: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Nothing is left to do after the last layer."""

    def state(self) -> tuple[dict[str, torch.Tensor], Any]:
        """What was taken down so far, see calibrate/reference/pass_checkpoints.py."""
        tensors, kept = {}, []
        for (run, layer, kind), array in self.arrays.items():
            if isinstance(array, np.ndarray):
                tensors[f"{run}.{layer}.{kind}"] = torch.from_numpy(array)
            else:
                kept.append([run, layer, kind, array.reference])
        return tensors, kept

    def restore(self, tensors: Mapping[str, torch.Tensor], rest: Any) -> None:
        """Take up such a state. Raises ValueError if a file of it is gone or was changed."""
        arrays: dict[tuple[int, int, str], np.ndarray | KeptArray] = {}
        for name, tensor in tensors.items():
            run, layer, kind = name.split(".")
            arrays[int(run), int(layer), kind] = tensor.numpy()
        for run, layer, kind, reference in rest:
            if self.work is None:
                raise ValueError(f"the {kind} of run {run}, layer {layer} is gone")
            arrays[run, layer, kind] = self.work.kept(reference)
        self.arrays = arrays

    def read(self, run: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value [K,S,D] of a prompt, float32."""
        key, value = (np.asarray(read(self.arrays[run, layer, kind]), np.float32) for kind in ("key", "value"))
        return torch.from_numpy(key), torch.from_numpy(value)


class _Decoder:
    """Tokens after the prompts, one at a time for all samples; their own keys and values stay in memory."""

    def __init__(
        self,
        reference: StreamedReference,
        inputs: Sequence[ReferenceInput],
        prompts: KeysAndValues,
        grid: tuple[int, int],
        tokens: int,
        each: Each,
    ) -> None:
        self._reference, self._inputs, self._prompts, self._each = reference, inputs, prompts, each
        self._new: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # by sample and layer: [1,K,n,D] each
        self._tables = [reference.rotary_after(prompt, grid, tokens) for prompt in inputs]  # cos and sin [1, tokens, D]

    def step(self, last: Mapping[int, int], number: int, report: Callable[[int], None]) -> dict[int, torch.Tensor]:
        """Logits [vocabulary] after token number `number` of each sample; `last` maps samples to those tokens."""
        reference = self._reference
        rows = reference.embed(torch.tensor(list(last.values()), dtype=torch.int64))
        hidden = {sample: rows[place][None, None] for place, sample in enumerate(last)}  # [1,1,C] each
        for layer in range(reference.num_layers):
            with reference.loaded(layer) as module:
                step = partial(self._layer, module, layer, hidden, number)
                for _ in self._each(step, self._batches(last)):
                    pass
            report(layer + 1)
        logits = reference.head(torch.cat([hidden[sample][0] for sample in last])).float().cpu()
        return dict(zip(last, logits, strict=True))

    def _batches(self, samples: Mapping[int, int]) -> list[list[int]]:
        """Samples of one length together, a few at a time."""
        by_length: dict[int, list[int]] = {}
        for sample in samples:
            by_length.setdefault(len(self._inputs[sample].input_ids), []).append(sample)
        return [group[at : at + _BATCH] for group in by_length.values() for at in range(0, len(group), _BATCH)]

    def _layer(
        self, module: torch.nn.Module, layer: int, hidden: dict[int, torch.Tensor], number: int, batch: Sequence[int]
    ) -> None:
        """One layer on one row of each sample of the batch, which then have a key and a value more."""
        past = [self._past(sample, layer) for sample in batch]
        key, value = (torch.cat([cached[part] for cached in past]) for part in range(2))
        cos, sin = (
            torch.cat([self._tables[sample][part][:, number : number + 1] for sample in batch]) for part in range(2)
        )
        rows = torch.cat([hidden[sample] for sample in batch])
        out, new_key, new_value = self._reference.decode(module, rows, cos, sin, key, value)
        for place, sample in enumerate(batch):
            hidden[sample] = out[place : place + 1]
            row = (new_key[place : place + 1], new_value[place : place + 1])
            before = self._new.get((sample, layer))
            joined = row if before is None else tuple(torch.cat(pair, dim=2) for pair in zip(before, row, strict=True))
            self._new[sample, layer] = (joined[0], joined[1])

    def _past(self, sample: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1,K,S+n,D] before the present row."""
        prompt = [tensor[None] for tensor in self._prompts.read(sample, layer)]
        new = self._new.get((sample, layer))
        if new is None:
            return prompt[0], prompt[1]
        return torch.cat([prompt[0].to(new[0]), new[0]], 2), torch.cat([prompt[1].to(new[1]), new[1]], 2)
