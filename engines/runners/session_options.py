"""What ONNX Runtime is told, for those who need no other part of it."""

from typing import Final

FOLDER_OPTION: Final = (
    "session.model_external_initializers_file_folder_path"  # where a model from memory has its weights
)
LARGE: Final = 2**23  # elements from which sessions share the matrix of a plain product (packed_files.py)
