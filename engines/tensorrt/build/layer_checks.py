"""What a built engine's layers tell of its speed, against what the graph was prepared for.

    weight inputs    every layer that reads one is a product: nothing copies or reformats a matrix in every run
    reformats        no layer that only moves data moves more than 1 MB
    accumulation     the casts around a product are in the product's own kernel
    sums             what a sum over a cache adds up stays in the sum's kernel
    attention        every attention in half precision is a kernel of its own kind, not products and a softmax
    scratch          the engine asks for about as much memory to compute in as was estimated

Nothing here is an error: the engine is right, and slower or larger than thought. What is found is kept in engines.json
and shown by `build` and `profile`. Where TensorRT gives no details of its layers nothing is found.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from engines.tensorrt.records import BEFORE, BEHIND, SUMMED, Expected
from graphs.files.atomic import size_text

LARGE: Final = 10**6  # bytes that a layer may move without computing
SLACK: Final = 64 * 2**20  # bytes by which the memory to compute in may be off
FACTOR: Final = 2.0  # and the factor
SHOWN: Final = 3  # layers that a finding names

BYTES: Final = {  # of an element, by the words of the inspector and of the log, of all versions
    "float": 4, "fp32": 4, "half": 2, "fp16": 2, "bfloat16": 2, "bf16": 2, "int64": 8, "int32": 4, "int8": 1,
    "uint8": 1, "bool": 1, "fp8": 1, "float8": 1,
}  # fmt: skip
# TensorRT names the kernels that it generates after their operations: __myl_TranMove_myl0_6.
_GENERATED: Final = re.compile(r"__myl_((?:[A-Z][a-z]+)+)_")
_MOVES: Final = frozenset({"Tran", "Move", "Resh", "Cast", "Copy", "Repl", "Slic", "Conc"})
_FREE: Final = frozenset({"Resh", "Repl"})  # of themselves they move nothing
_LAYER: Final = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,\n]*)(?:, Inputs: \[(?P<inputs>.*?)\], (?:Constants: .*?, )?"
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: .*?Metadata: (?P<nodes>.*))?$",
    re.MULTILINE,
)
_TENSOR: Final = re.compile(r"\{ Name: (.*?), .*?Dimensions: \[([\d,\s]*)\].*?(?:Datatype|Format/Datatype): ([^},]*)")
_NODE: Final = re.compile(r"\[ONNX Layer: (.*?)\]")


@dataclass(frozen=True)
class Tensor:
    """An input or output of a layer; `nbytes` is None where its size is not told."""

    name: str
    nbytes: int | None


@dataclass(frozen=True)
class LayerDetail:
    """A layer with what it reads, what it writes, and the nodes of the graph that it was made of."""

    name: str
    kind: str
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    nodes: tuple[str, ...] = ()

    @property
    def moved(self) -> int:
        """The most bytes that go in or out."""
        sides = (sum(tensor.nbytes or 0 for tensor in side) for side in (self.inputs, self.outputs))
        return max(sides)


def findings(layers: Sequence[LayerDetail], expected: Expected, scratch: int | None) -> tuple[str, ...]:
    """What is other than expected, in words; `scratch` is what the engine asks for, None where that is not known."""
    found = [*_weights(layers, expected), *_reformats(layers), *_casts(layers, expected)]
    found += [*_sums(layers, expected), *_attention(layers, expected), *_scratch(expected.scratch, scratch)]
    return tuple(found)


def _weights(layers: Sequence[LayerDetail], expected: Expected) -> list[str]:
    wrong = []
    for layer in layers:
        for tensor in layer.inputs:
            products = expected.weights.get(tensor.name)
            known = products and layer.nodes
            if products is not None and (moves_only(layer) or (known and not set(products) & set(layer.nodes))):
                wrong.append(f"{tensor.name} ({size_text(tensor.nbytes or 0)}) in {layer.name}")
    if not wrong:
        return []
    return [f"{len(wrong)} weight inputs do not go straight into their product: {_some(wrong)}"]


def _reformats(layers: Sequence[LayerDetail]) -> list[str]:
    large = sorted((layer for layer in layers if moves_only(layer) and layer.moved > LARGE), key=lambda one: -one.moved)
    if not large:
        return []
    names = _some([f"{layer.name} ({size_text(layer.moved)})" for layer in large])
    total = size_text(sum(layer.moved for layer in large))
    return [f"{len(large)} layers only move or convert data, {total} a run: {names}"]


def _casts(layers: Sequence[LayerDetail], expected: Expected) -> list[str]:
    alone = []
    for product in expected.widened:
        casts = {f"{product}{BEHIND}", *(f"{product}{BEFORE}.{number}" for number in range(3))}
        without = [layer for layer in layers if casts & set(layer.nodes) and product not in layer.nodes]
        alone += [product] if any(moves_only(layer) for layer in without) else []
    if not alone:
        return []
    return [
        f"the casts around {len(alone)} products are kernels of their own: {_some(alone)}; "
        "--accumulate native leaves them out"
    ]


def _sums(layers: Sequence[LayerDetail], expected: Expected) -> list[str]:
    apart = []
    for name in expected.sums:
        total, terms = f"{name}{SUMMED}", f"{name}{SUMMED}.terms"
        making = [layer for layer in layers if terms in layer.nodes]
        apart += [name] if making and not any(total in layer.nodes for layer in making) else []
    return [f"{len(apart)} sums over caches have what they add up in memory: {_some(apart)}"] * bool(apart)


def _attention(layers: Sequence[LayerDetail], expected: Expected) -> list[str]:
    fused = {node for layer in layers if "mha" in layer.name.lower() for node in layer.nodes}
    seen = {node for layer in layers for node in layer.nodes}
    apart = [node for node in expected.attentions if node in seen and node not in fused]
    return [f"{len(apart)} of {len(expected.attentions)} attentions are no fused kernel: {_some(apart)}"] * bool(apart)


def _scratch(estimated: int, asked: int | None) -> list[str]:
    if asked is None or asked <= max(FACTOR * estimated, estimated + SLACK):
        return []
    return [f"it computes in {size_text(asked)}, {size_text(estimated)} were estimated"]


def moves_only(layer: LayerDetail) -> bool:
    """Whether a layer copies, transposes or converts and computes nothing."""
    if "reformat" in layer.kind.lower() or layer.name.startswith(("Reformatting CopyNode", "copy_")):
        return True
    generated = _GENERATED.match(layer.name)
    if generated is None:
        return False
    operations = set(re.findall("[A-Z][a-z]+", generated[1]))
    return operations <= _MOVES and not operations <= _FREE


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


# -- reading ---------------------------------------------------------------------------------------------------------


def logged_layers(text: str) -> list[LayerDetail]:
    """The layers in the list that TensorRT logs when it has built."""
    return [
        LayerDetail(
            match["name"],
            match["kind"],
            _logged(match["inputs"]),
            _logged(match["outputs"]),
            tuple(_NODE.findall(match["nodes"] or "")),
        )
        for match in _LAYER.finditer(text.split("\nI/O Tensors:")[0])
    ]


def _logged(text: str | None) -> tuple[Tensor, ...]:
    return tuple(Tensor(name, _nbytes(shape.split(","), kind)) for name, shape, kind in _TENSOR.findall(text or ""))


def described_layers(document: Any) -> list[LayerDetail]:
    """The layers in the JSON of TensorRT's engine inspector, or of trtexec --exportLayerInfo; some are names alone."""
    found = []
    for entry in document["Layers"]:
        if isinstance(entry, str):
            found.append(LayerDetail(entry, "unknown"))
            continue
        read, written = (tuple(map(_described, entry.get(side) or ())) for side in ("Inputs", "Outputs"))
        nodes = tuple(_NODE.findall(str(entry.get("Metadata", ""))))
        found.append(LayerDetail(entry["Name"], entry.get("LayerType", "unknown"), read, written, nodes))
    return found


def _described(tensor: Any) -> Tensor:
    kind = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "")
    return Tensor(str(tensor.get("Name", "")), _nbytes(tensor.get("Dimensions") or (), kind))


def _nbytes(shape: Sequence[Any], kind: str) -> int | None:
    width = next((BYTES[word] for word in re.findall(r"[a-z]+\d*", kind.lower()) if word in BYTES), None)
    try:
        return None if width is None else width * math.prod(int(size) for size in shape)
    except (TypeError, ValueError):
        return None
