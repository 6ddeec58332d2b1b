"""A module `tensorrt` for child processes: the stand-in on a GPU in host memory. PYTHONPATH names the folder above."""

from tests.engines.runners.host_cuda import HostCuda
from tests.engines.tensorrt.run import host_tensorrt

globals().update(vars(host_tensorrt.module(HostCuda())))
