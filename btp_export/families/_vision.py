"""What the families share on the image side: layouts of pictures, profiles, and loading towers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from graphs.files.checkpoint import Checkpoint, TensorRef
from graphs.files.configuration import whole_config
from graphs.records.errors import InputError
from graphs.records.shapes import ShapeProfile
from graphs.records.spec import ModelSpec
from graphs.records.token_layout import Blocks, Grid, count_tokens

if TYPE_CHECKING:
    import torch
    from torch import nn

HAS_CLASS_TOKEN = {"clip_vision_model": True, "siglip_vision_model": False}


@dataclass(frozen=True)
class Layout:
    """What a picture becomes: equal layouts go through the same graphs.

    size: height and width in pixels that the picture is scaled to. grid, blocks: its tokens, see
    graphs/records/token_layout.py. pixel_shape: `pixel_values` of one picture, None for [1, channels, *size]; a batch
    has B times the first dimension.
    """

    size: tuple[int, int]
    grid: Grid
    blocks: Blocks = ()
    pixel_shape: tuple[int, ...] | None = None

    @property
    def image_tokens(self) -> int:
        """V."""
        return count_tokens(self.blocks or (self.grid,))


def make_profile(
    spec: ModelSpec, layout: Layout, *, batch: int, image_size: tuple[int, int], text_tokens: int, new_tokens: int
) -> ShapeProfile:
    """The static shapes for pictures of that layout; `image_size` is what the profile is called by.

    Raises InputError for sizes that no profile has.
    """
    shape, name = layout.pixel_shape, f"b{batch}-{image_size[0]}x{image_size[1]}-t{text_tokens}-n{new_tokens}"
    try:
        return ShapeProfile(
            name=name,
            batch=batch,
            image_size=image_size,
            grid=layout.grid,
            blocks=layout.blocks,
            pixel_shape=None if shape is None else (batch * shape[0], *shape[1:]),
            prefix_tokens=spec.prefix_tokens,
            image_tokens=layout.image_tokens,
            text_tokens=text_tokens,
            new_tokens=new_tokens,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "its tokens"
        raise InputError(
            f"shape profile {name}: {where}: {first['msg']}",
            wanted="sizes that graphs have",
            do="--shape batch=1,text=64,new=128",
        ) from error


def image_side(kind: Any, config: Any) -> Any:
    """transformers' LLaVA-like model of class `kind` without a decoder, and without weights until `load_vision`."""
    import torch
    from torch import nn

    config.text_config.num_hidden_layers = 0  # only the image side is used; the decoder would cost its memory
    config.text_config.vocab_size, config.text_config.pad_token_id = 1, None
    with torch.device("meta"):
        model = kind(config).float()  # a configuration may ask for half precision
    model.language_model = nn.Identity()
    for module in model.modules():
        table = getattr(module, "position_ids", None)
        if isinstance(table, torch.Tensor):  # counts the positions; no weight, so in no checkpoint
            module.register_buffer("position_ids", torch.arange(table.shape[-1])[None], persistent=False)
    return model


def vision_state(checkpoint: Checkpoint, prefixes: tuple[str, ...]) -> dict[str, "torch.Tensor"]:
    """The tensors under these canonical prefixes in float32; old checkpoints' position_ids are no weights.

    Nothing is read of a checkpoint that is asked for shapes alone.
    """
    import torch

    def tensor(ref: TensorRef) -> torch.Tensor:
        if checkpoint.shapes_alone:
            return torch.empty(ref.shape, device="meta")
        return torch.from_numpy(np.array(ref.read(), dtype=np.float32))

    return {
        name: tensor(ref)
        for name, ref in checkpoint.tensors.items()
        if name.startswith(prefixes) and not name.endswith(".position_ids")
    }


def load_vision(module: "nn.Module", state: dict[str, "torch.Tensor"], checkpoint: Checkpoint) -> None:
    """Put the state into the module. Raises InputError naming the first tensor that does not fit."""
    parameters = module.state_dict()
    problems = [f"{name} is missing" for name in parameters.keys() - state.keys()]
    problems += [f"{name} is unknown" for name in state.keys() - parameters.keys()]
    problems += [
        f"{name} has shape {list(tensor.shape)} in place of {list(parameters[name].shape)}"
        for name, tensor in state.items()
        if name in parameters and tensor.shape != parameters[name].shape
    ]
    if problems:
        raise InputError(
            f"{checkpoint.folder}: {len(problems)} vision tensors do not fit: {min(problems)}",
            wanted="the tower and projector that config.json describes",
            do="use the config.json and the safetensors files of the same model",
        )
    module.load_state_dict(state, assign=True)


def grid_of_patches(config: dict[str, Any]) -> tuple[int, int]:
    """Side of the tower's picture in pixels and in patches.

    Raises InputError if the tokens are not the patches, or config.json does not describe a tower and projector.
    """
    _check_tower(whole_config(config))
    vision = config.get("vision_config") or {}
    tower = vision.get("model_type", "clip_vision_model")
    strategy = config.get("vision_feature_select_strategy", "default")
    has_class_token = HAS_CLASS_TOKEN.get(tower)
    if has_class_token is None:
        raise InputError(
            f"a {tower} vision tower", wanted=f"one of {', '.join(HAS_CLASS_TOKEN)}", do="use a model with one of them"
        )
    wanted_strategy = "default" if has_class_token else "full"
    if strategy != wanted_strategy:
        raise InputError(
            f"vision_feature_select_strategy {strategy!r} with a {tower}",
            wanted=f"{wanted_strategy!r}: the image tokens are the patches, no more and no fewer",
            do="use a model with this setting",
        )
    side, patch = _side(vision, "image_size", 336), _side(vision, "patch_size", 14)
    return side, side // patch


def has_class_token(config: dict[str, Any]) -> bool:
    """Whether a CLIP-like tower has a class token whose attention says what matters in the picture.

    Not if the image tokens are the tower's embeddings themselves: no layer makes them.
    """
    tower = (config.get("vision_config") or {}).get("model_type", "clip_vision_model")
    if not HAS_CLASS_TOKEN.get(tower, False):
        return False
    whole = whole_config(config)
    states = whole.vision_config.num_hidden_layers + 1
    return any(layer % states for layer in PatchFeatures(whole).layers)


def refuse_class_attention(name: str) -> InputError:
    """For a tower without a class token."""
    return InputError(
        f"the class token's attention of {name}",
        wanted="a vision tower with a class token",
        do="a plan that does not score by vision-cls: importance norm, for example",
    )


def _check_tower(config: Any) -> None:
    from transformers.activations import ACT2FN

    for part, key in ((config.vision_config, "hidden_act"), (config, "projector_hidden_act")):
        if (name := getattr(part, key)) not in ACT2FN:
            raise InputError(f"config.json sets {key} to {name!r}", wanted="a function that transformers knows")
    states = config.vision_config.num_hidden_layers + 1  # the embeddings first
    for layer in PatchFeatures(config).layers:
        if not -states <= layer < states:
            raise InputError(
                f"config.json sets vision_feature_layer to {config.vision_feature_layer}",
                wanted=f"layers of the tower, {-states} to {states - 1}",
                do="restore config.json",
            )


def _side(vision: dict[str, Any], key: str, default: int) -> int:
    side = vision.get(key, default)
    if not isinstance(side, int) or side < 1:
        raise InputError(f"vision_config sets {key} to {side!r}", wanted="a number of pixels", do="restore config.json")
    return side


def image_token_id(config: dict[str, Any]) -> int:
    """The placeholder's id, by the name of transformers 5 or 4."""
    token: int = config.get("image_token_id", config.get("image_token_index", 32000))
    return token


class PatchFeatures:
    """Which hidden states of a CLIP-like tower become image tokens, as LLaVA's configuration says."""

    def __init__(self, config: Any) -> None:
        layers = config.vision_feature_layer
        self.layers: list[int] = [layers] if isinstance(layers, int) else list(layers)
        self.first = 1 if config.vision_feature_select_strategy == "default" else 0

    def trim(self, tower: Any) -> None:
        """Take from the tower, whose weights are loaded, the layers behind those whose states become image tokens.

        LLaVA's take the last state but one: nothing reads what the last layer makes of it.
        """
        layers = tower.encoder.layers
        self.layers = [layer % (len(layers) + 1) for layer in self.layers]
        del layers[max(1, *self.layers) :]  # state 0 is what the first layer is given

    def __call__(self, tower: "nn.Module", pixel_values: "torch.Tensor") -> "torch.Tensor":
        """Pixels [N,3,h,w] -> [N, patches, width of the layers side by side]."""
        return self._joined(tower(pixel_values, output_hidden_states=True).hidden_states)

    def with_class_attention(self, tower: Any, pixel_values: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        """The same, and how much the class token attends to each patch, [N, patches] float32: the mean over the heads.

        In the layer that makes the last hidden state of those taken, as VisionZip reads it (arXiv 2412.04467); only the
        class token's row of it is computed.
        """
        states = tower(pixel_values, output_hidden_states=True).hidden_states
        before = max(layer % len(states) for layer in self.layers) - 1
        layer = tower.encoder.layers[before]
        rows = layer.layer_norm1(states[before])
        heads = layer.self_attn.num_heads
        query, key = layer.self_attn.q_proj(rows[:, :1]), layer.self_attn.k_proj(rows)
        query, key = (part.float().unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key))  # [N,H,n,D]
        weights = ((query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)).softmax(-1)
        return self._joined(states), weights.mean(1)[:, 0, 1:]

    def _joined(self, states: Sequence["torch.Tensor"]) -> "torch.Tensor":
        import torch

        return torch.cat([states[layer][:, self.first :] for layer in self.layers], dim=-1)
