"""The selection kernel beside its indices (see tests/graphs/ops): waiting, workspace, seeds that are no tokens."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from graphs.ops import select_tokens
from graphs.ops.select_tokens.cases import Case, cases
from tests.engines.native import builds
from tests.engines.native.ort_host import gpu_host
from tests.graphs.ops.native_backends import backend


def test_no_order_of_blocks_and_no_shared_workspace_can_hang_the_kernel() -> None:
    """In a process of its own, which can be ended."""
    script = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).check_waiting())"
    command = [sys.executable, "-c", script, str(builds.emulated_kernels())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


RULES: list[dict[str, Any]] = [{}, {"diversity_rule": "coverage"}, {"diversity_rule": "coverage", "weighted": 1}]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seeds", [[-4], [24, 2**30, -1], [24, 5]])
def test_seeds_that_name_no_token_leave_an_empty_base(seeds: list[int], rule: dict[str, Any]) -> None:
    """The host cannot look at seeds on a device: those outside are skipped; without quotas that is from nothing."""
    case = next(case for case in cases() if case.name == "all-picks")
    counts = {"keep": 12, "attention_quota": 0, "diversity_quota": 0, "pool": 0, "boundary": 0}
    inputs = case.inputs | {"seeds": np.int32(seeds)}
    inside = torch.tensor([seed for seed in seeds if 0 <= seed < 24], dtype=torch.int32)
    scores, similarity = torch.from_numpy(case.inputs["scores"]), torch.from_numpy(case.inputs["similarity"])
    wanted = select_tokens.reference(scores, similarity, inside, **counts, **rule)
    np.testing.assert_array_equal(backend("cuda-kernel-emulated").select(inputs, counts | rule), wanted.numpy())


def test_coverage_of_more_tokens_than_a_thread_has_room_for_in_its_small_form() -> None:
    """V above 4096 gives a thread 8 tokens in place of 4. Few different similarities: many ties."""
    tokens = 4102
    random = np.random.default_rng(0)
    codes = random.integers(0, 60, tokens)
    table = random.integers(-3, 9, (60, 60)).astype(np.float32) / 8
    scores = random.integers(0, 3, (1, tokens)).astype(np.float32)
    counts = {"keep": 14, "attention_quota": 5, "diversity_quota": 4, "pool": 9, "boundary": tokens // 2}
    attributes = counts | {"diversity_rule": "coverage", "weighted": 1}
    similarity = np.ascontiguousarray(table[codes][:, codes][None])
    inputs = {"scores": scores, "similarity": similarity, "seeds": np.int32([4101, 7])}
    wanted = select_tokens.reference(*map(torch.from_numpy, inputs.values()), **attributes).numpy()
    np.testing.assert_array_equal(backend("cuda-kernel-emulated").select(inputs, attributes), wanted)


SMALL = [case for case in cases() if case.scores.shape[1] <= 48]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_onnx_runtime_on_cuda_equals_the_reference_and_takes_memory_of_its_stream(case: Case) -> None:
    """KernelContext_GetAllocator's Alloc carries no stream: two runs at once could be given the same workspace."""
    tensors = {name: torch.from_numpy(array.copy()) for name, array in case.inputs.items()}
    wanted = select_tokens.reference(**tensors, **case.attributes).numpy()
    np.testing.assert_array_equal(gpu_host().select(case.inputs, case.attributes), wanted)
    assert gpu_host().without_stream == 0
    assert not gpu_host().scratch, "all of it was given back"


def test_onnx_runtime_on_cuda_refuses_attributes_in_words() -> None:
    case = next(case for case in SMALL if case.name == "all-picks")
    with pytest.raises(RuntimeError, match='diversity_rule is "nearest", wanted "farthest" or "coverage"'):
        gpu_host().select(case.inputs, case.attributes | {"diversity_rule": "nearest"})
    with pytest.raises(RuntimeError, match="weighted is 2, wanted 0 or 1"):
        gpu_host().select(case.inputs, case.attributes | {"weighted": 2})
    with pytest.raises(RuntimeError, match="BtpSelectTokens: attribute keep is missing"):
        gpu_host().select(case.inputs, {name: value for name, value in case.attributes.items() if name != "keep"})
