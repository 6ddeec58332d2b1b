"""Native code: the CMake build, finding and loading the libraries, registering operators with runtimes, btp_host.

The sources of an operator lie in its own folder, graphs/ops/<operator>. May use graphs.
"""
