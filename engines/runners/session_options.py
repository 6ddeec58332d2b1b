"""Names of ONNX Runtime's session options, for those who need no other part of it."""

from typing import Final

FOLDER_OPTION: Final = (
    "session.model_external_initializers_file_folder_path"  # where a model from memory has its weights
)
