"""What all operators have in common: their ONNX domain, its version, and how TensorRT finds a node's plugin."""

from typing import Final

DOMAIN: Final = "btp"
VERSION: Final = 1
# Attributes with which TensorRT finds the plugin of a node; every operator takes them: name -> default, purpose.
PLUGIN: Final = {
    "plugin_version": ("1", "version of the TensorRT plugin"),
    "plugin_namespace": ("", "namespace of the TensorRT plugin"),
}
