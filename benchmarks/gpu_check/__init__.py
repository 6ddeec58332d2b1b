"""What a GPU is asked, prepared beforehand: `make gpu-check`. docs/gpu-check.md describes it.

- __main__.py: the command: prepare, run, record
- calls.py: every case of every operator as a call of the kernels' C interface, with the expected output, in one file
- drawn.py: further cases: drawn ones, and large ones whose similarity is exact
- prepare.py: compiles what runs there, and puts it with the case file into build/gpu-check
- native/: the program that runs the calls, without torch or Python
- steps.py, runner.py: the steps of both calls, each with its timeout; runs them, and writes what each says at once
- native_step.py: the first step: the compiled files, carried or made there
- on_torch.py: steps in torch: products, and a 7B's layers with and without pruning
- on_ort.py: steps in ONNX Runtime: all cases, two threads, the commands of btp-export
- results.py: from what came back to benchmarks/results/<gpu>.json and a table
"""
