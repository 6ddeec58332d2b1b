"""What the native and TensorRT forms of several operators share."""
