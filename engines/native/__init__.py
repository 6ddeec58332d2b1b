"""The native operators: their CMake build, finding and loading the libraries, and registering them with runtimes.

The sources of an operator lie in its own folder, graphs/ops/<operator>. May use graphs.
"""
