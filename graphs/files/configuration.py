"""transformers' own configuration objects of a model and its decoder, from config.json in either published form."""

import contextlib
import copy
from typing import TYPE_CHECKING, Any

from graphs.records.errors import InputError
from graphs.records.refusing import refusing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def text_config(document: dict[str, Any]) -> "PreTrainedConfig":
    """The decoder's configuration with transformers' defaults filled in.

    `document` is config.json; the decoder's settings stand in its `text_config`, or, as transformers 4 wrote some
    models (Qwen2.5-VL), beside the others. Raises InputError for an unknown decoder type or a setting that is refused.
    """
    from transformers import AutoConfig

    if document.get("text_config") is None and _is_known(document):
        text: PreTrainedConfig = whole_config(document).get_text_config()
        return text
    fields = copy.deepcopy(document.get("text_config") or {})  # transformers writes into the nested dictionaries
    model_type = fields.pop("model_type", None) or _own_decoder(document)
    with refusing_config("text_config", model_type):
        return AutoConfig.for_model(model_type, **fields)


def _own_decoder(document: dict[str, Any]) -> str:
    """The decoder's type where text_config does not name one: what transformers takes for that model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = document.get("model_type")
    return str(CONFIG_MAPPING[kind]().get_text_config().model_type) if _is_known(document) else "llama"


def whole_config(document: dict[str, Any]) -> "PreTrainedConfig":
    """The configuration of the whole model. Raises InputError for an unknown type or a setting that is refused."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = document.get("model_type")
    if not _is_known(document):
        raise InputError(
            f"config.json has model_type {model_type!r}", wanted="a model type of transformers", do="check config.json"
        )
    with refusing_config("config.json", str(model_type)):
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(document))
        return config


def _is_known(document: dict[str, Any]) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return document.get("model_type") in CONFIG_MAPPING


def refusing_config(holder: str, model_type: str) -> contextlib.AbstractContextManager[None]:
    """For calls of transformers' configuration classes, which check some values and stumble over others."""
    return refusing(holder, wanted=f"a {model_type} configuration", do="restore it")
