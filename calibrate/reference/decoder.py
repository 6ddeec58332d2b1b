"""transformers' own decoder over a checkpoint's files, with the weights of one layer in memory at a time.

The modelling code is transformers' (`AutoModel.from_config` on the meta device), the weights come from the checkpoint's
safetensors files through memory maps.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from calibrate.reference.side_by_side import Each, side_by_side
from graphs import dtypes
from graphs.files.checkpoint import Checkpoint, TensorRef
from graphs.files.packed_weights import read_tensor
from graphs.records.errors import InputError, UnavailableError

_ATTENTION = "btp_capture"


class _Attention(threading.local):
    """What goes into and comes out of a layer's attention beside its rows; threads share the layer."""

    # Keys and values of earlier tokens, which rows look at, too.
    past: tuple[torch.Tensor, torch.Tensor] | None = None
    # Query, key and value, as the layer made them.
    captured: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None


_attention = _Attention()
_VOCABULARY_ROWS = 16384  # rows of the output matrix in memory at a time


class LayeredDecoder:
    """A checkpoint's decoder, without weights but those of the layer that is `loaded`.

    `checkpoint.config` is the whole model's config.json; tensors are read by canonical name. `dtype` is the type of the
    maths. Raises InputError for a checkpoint that lacks a tensor or whose tensor has another shape than the
    configuration.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: str | torch.device) -> None:
        AttentionInterface.register(_ATTENTION, _capturing_attention)
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, torch.device(device)
        self.config = _whole_config(checkpoint.config)
        text = self.config.get_text_config()
        text._attn_implementation = _ATTENTION
        with torch.device("meta"):
            self._model = AutoModel.from_config(text, dtype=dtype).eval()
        # The rotary module has no weights, only tables that its constructor computes.
        self._rotary = type(self._model.rotary_emb)(config=text).to(self._device)
        self.num_layers = int(text.num_hidden_layers)

    def rotary_tables(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [1, n, D] of `position_ids` [1, n] (or [3, 1, n]) from transformers' own rotary module."""
        like = torch.empty(0, dtype=self._dtype, device=self._device)
        cos, sin = self._rotary(like, position_ids.to(self._device))
        return cos, sin

    @property
    def vocab_size(self) -> int:
        """Logits of one row."""
        return self._output_matrix.shape[0]

    def samples_at_once(self) -> AbstractContextManager[Each]:
        """`map` over samples, see calibrate/reference/side_by_side.py."""
        own = ("language_model.", "lm_head.")
        weights = sum(ref.nbytes for ref in self._checkpoint.tensors.values() if ref.name.startswith(own))
        return side_by_side(weights, self._device.type)

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

    def decode(
        self, module: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        key: torch.Tensor, value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """One loaded layer on one new row of each sample: hidden [B,1,C] after keys and values [B,K,S,D].

        Gives hidden [B,1,C] and the new key and value [B,K,1,D].
        """
        _attention.past = (key.to(hidden), value.to(hidden))
        try:
            output, _, new_key, new_value = forward_with_attention(module, hidden, cos, sin)
        finally:
            _attention.past = None
        return output, new_key, new_value

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


def forward_with_attention(
    module: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer: hidden [B,S,C] -> hidden [B,S,C], query [B,H,S,D], key and value [B,K,S,D]; causal, no padding."""
    output = module(hidden, attention_mask=None, position_embeddings=(cos, sin))
    output = output[0] if isinstance(output, tuple) else output
    captured, _attention.captured = _attention.captured, None
    assert captured is not None, "the layer's attention is the one registered here"
    return output, *captured


def forward(module: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """One loaded layer (`LayerView.module`) on hidden [B,S,C], cos and sin [1 or B,S,D]: for observers' side runs."""
    return forward_with_attention(module, hidden, cos, sin)[0]


def _capturing_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention; takes and leaves what `_Attention` says."""
    _attention.captured = (query, key, value)
    past = _attention.past
    if past is not None:
        key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output, None


def _whole_config(config: Mapping[str, Any]) -> Any:
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"config.json has model_type {model_type!r}", wanted="a model type of transformers", do="check config.json"
        )
    return CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(config)))  # transformers writes into it


def torch_device(name: str) -> str:
    """cpu, cuda or cuda:<n> as asked for; `auto` is a GPU if there is one. Raises UnavailableError if there is none."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(
            f"torch {torch.__version__} sees no GPU", wanted="a GPU and a torch built for it", do="--device cpu"
        )
    return name
