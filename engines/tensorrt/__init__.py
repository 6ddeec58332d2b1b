"""From a bundle to TensorRT engines: versions and their rules, prepared graphs, checks before and after the build.

    versions.py   what each TensorRT version can and cannot, with trtexec_options.py
    prepare.py    a bundle's graphs for one version (lower.py: a vision graph in primitives)
    lint.py       do prepared graphs suit a version?
    estimate.py   memory and disk, before anything is built
    outline.py    all of the above for a target and a user's wishes
    kit.py        engines/<target>/ for a device without Python (scripts.py, recording.py)
    records.py    engines.json

None of these needs TensorRT; library.py, builder.py, worker.py, session.py and build.py do.
"""
