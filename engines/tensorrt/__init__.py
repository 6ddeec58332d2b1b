"""From a bundle to TensorRT engines: versions and their rules, prepared graphs, checks before and after the build.

    versions.py   what each TensorRT version can and cannot, with trtexec_options.py
    prepare/      a bundle's graphs for one version, do they suit it, memory and disk before anything is built;
                  build_plan.py is all of that for a target and a user's wishes
    kit/          engines/<target>/ for a device without Python: scripts, recorded inputs
    build/        the folder brought up to date, engine by engine, each in a process of its own
    run/          an engine as a runner, and the weights that engines share
    records.py    engines.json
    installed.py  the TensorRT of this machine
    trtexec.py    running it and reading what it exports
    messages.py   what TensorRT says while it builds or runs

prepare/, kit/ and records.py need no TensorRT; build/builder.py, build/child.py, run/session.py and installed.py do.
"""
