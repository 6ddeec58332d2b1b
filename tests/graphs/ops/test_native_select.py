"""BtpSelectTokens: the CUDA kernel (its source, emulated) and the ONNX Runtime operator equal the reference."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu_ort import one_node
from graphs.ops import select_tokens
from graphs.ops.select_tokens.cases import Case, cases
from graphs.records.errors import InputError
from tests.graphs.ops.native_backends import BACKENDS, Array, backend

CASES = cases()


def expected(case: Case) -> Array:
    inputs = {name: torch.from_numpy(array.copy()) for name, array in case.inputs.items()}
    indices: Array = select_tokens.reference(**inputs, **case.attributes).numpy()
    return indices


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.scores.shape[1]}")
def test_equals_the_reference(case: Case, name: str) -> None:
    np.testing.assert_array_equal(backend(name).select(case.inputs, case.attributes), known(case.name))


@functools.cache
def known(name: str) -> Array:
    """What is expected of a case, for both backends."""
    return expected(next(case for case in CASES if case.name == name))


SPECIAL = np.float32([0.0, -0.0, 1.0, -1.0, 0.5, np.inf, -np.inf, np.nan, 1e-8, 3e38])


RULES: list[dict[str, Any]] = [
    {},
    {"diversity_rule": "farthest", "weighted": 1},
    {"diversity_rule": "coverage"},
    {"diversity_rule": "coverage", "weighted": 1},
]


SMALL = st.integers(1, 70)


@st.composite
def selections(draw: Any, tokens: st.SearchStrategy[int] = SMALL) -> Case:
    """Any legal call: sizes, quotas beyond keep, ties, NaN and infinities, asymmetric similarity, repeated seeds."""
    size, batch = draw(tokens), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    quota = st.integers(0, size)
    attributes = {
        "keep": draw(st.integers(1, size)),
        "attention_quota": draw(quota),
        "diversity_quota": draw(quota),
        "boundary": draw(st.integers(0, size + 2)),
    }
    attributes["pool"] = draw(st.integers(attributes["attention_quota"], size + 3))
    attributes |= draw(st.sampled_from(RULES))
    kind = draw(st.sampled_from(["smooth", "ties", "special"]))
    shape = (batch, size, size)
    if kind == "smooth":
        scores, similarity = random.standard_normal(shape[:2]), np.tanh(random.standard_normal(shape))
    elif kind == "ties":
        scores, similarity = random.integers(0, 3, shape[:2]), random.integers(-2, 3, shape) / 2
    else:
        scores, similarity = random.choice(SPECIAL, shape[:2]), random.choice(SPECIAL, shape)
    if not draw(st.booleans()):
        attributes["diversity_quota"] = 0
        return Case("drawn", scores.astype(np.float32), None, None, attributes)
    with np.errstate(over="ignore"):
        similarity = similarity.astype(draw(st.sampled_from([np.float32, np.float16])))
    seeds = random.integers(0, size, draw(st.integers(0, 2 * size))).astype(np.int32) if draw(st.booleans()) else None
    return Case("drawn", scores.astype(np.float32), similarity, seeds, attributes)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(case=selections())
def test_equals_the_reference_on_drawn_calls(case: Case, name: str) -> None:
    np.testing.assert_array_equal(backend(name).select(case.inputs, case.attributes), expected(case))


@pytest.mark.parametrize("tokens", [1025, 3840, 4097, 4100])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_form_of_the_kernel(tokens: int, name: str) -> None:
    """The kernel has two forms for each of two ranges of V; few picks keep the emulation short."""
    random = np.random.default_rng(tokens)
    features = random.standard_normal((1, tokens, 8)).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    counts = {"keep": 40, "attention_quota": 20, "diversity_quota": 6, "pool": 60, "boundary": tokens // 2}
    seeds = np.arange(0, tokens, tokens // 10, dtype=np.int32)
    scores = random.integers(0, 50, (1, tokens)).astype(np.float32)
    case = Case("large", scores, features @ features.transpose(0, 2, 1), seeds, counts)
    np.testing.assert_array_equal(backend(name).select(case.inputs, case.attributes), expected(case))


@pytest.mark.parametrize(("tokens", "names"), [(1025, BACKENDS[:1]), (4100, BACKENDS[1:]), (8192, BACKENDS)])
def test_coverage_of_many_tokens(tokens: int, names: tuple[str, ...]) -> None:
    """Smooth similarities in the first half of the tokens; ties, negative ones and weights of 0 in the second."""
    random = np.random.default_rng(tokens)
    features = random.standard_normal((1, tokens, 8)).astype(np.float32)
    features[:, tokens // 2 :] = random.integers(-1, 2, (1, tokens - tokens // 2, 8))
    features /= np.linalg.norm(features, axis=-1, keepdims=True) + np.float32(1e-9)
    scores = random.integers(-2, 9, (1, tokens)).astype(np.float32)
    counts = {"keep": 40, "attention_quota": 6, "diversity_quota": 12, "pool": 60, "boundary": tokens // 2}
    attributes = counts | {"diversity_rule": "coverage", "weighted": 1}
    case = Case("large", scores, features @ features.transpose(0, 2, 1), np.arange(3, dtype=np.int32), attributes)
    wanted = expected(case)
    for name in names:
        np.testing.assert_array_equal(backend(name).select(case.inputs, case.attributes), wanted)


@settings(max_examples=3, deadline=None)
@given(case=selections(tokens=st.integers(1000, 3000)))
def test_the_custom_op_on_large_drawn_calls(case: Case) -> None:
    np.testing.assert_array_equal(backend("ort-custom-op").select(case.inputs, case.attributes), expected(case))


@pytest.mark.parametrize("threads", [1, 2])
def test_runs_at_the_same_time_do_not_disturb_each_other(threads: int) -> None:
    """One session, called from four threads, with one and with two threads of its own."""
    from concurrent.futures import ThreadPoolExecutor

    import onnxruntime as ort

    chosen = {case.name: case for case in CASES}["coverage-576-127"]
    model = one_node("BtpSelectTokens", chosen.inputs, chosen.attributes, np.dtype(np.int32), 2)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(backend("ort-custom-op").library))  # type: ignore[attr-defined]
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = expected(chosen)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: session.run(None, chosen.inputs)[0], range(24)):
            np.testing.assert_array_equal(got, wanted)


COUNTS = {"keep": 4, "attention_quota": 2, "diversity_quota": 1, "pool": 3, "boundary": 4}
SCORES, SIMILARITY = np.zeros((1, 6), np.float32), np.eye(6, dtype=np.float32)[None]
WRONG = [
    ({"keep": 7}, "keep is 7, wanted 1 to 6"),
    ({"keep": 0}, "keep is 0, wanted 1 to 6"),
    ({"attention_quota": 7, "pool": 9}, "attention_quota is 7, wanted 0 to 6"),
    ({"diversity_quota": -1}, "diversity_quota is -1"),
    ({"pool": 1}, "pool is 1, wanted at least attention_quota = 2"),
    ({"boundary": -1}, "boundary is -1"),
    ({"weighted": 2}, "weighted is 2, wanted 0 or 1"),
]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda value: "-".join(value) if value else "")
def test_refuses_settings_that_do_not_fit(name: str, change: dict[str, Any], message: str) -> None:
    inputs = {"scores": SCORES, "similarity": SIMILARITY}
    with pytest.raises((InputError, RuntimeError), match=message):
        backend(name).select(inputs, COUNTS | change)


@pytest.mark.parametrize("name", BACKENDS)
def test_diversity_needs_similarity(name: str) -> None:
    with pytest.raises((InputError, RuntimeError), match="diversity_quota is 1, wanted 0, because there is no simil"):
        backend(name).select({"scores": SCORES}, COUNTS)


def test_the_custom_op_refuses_wrong_shapes_and_seeds() -> None:
    ort = backend("ort-custom-op")
    with pytest.raises(RuntimeError, match=r"similarity has shape \[1,5,5\], wanted \[1,6,6\]"):
        ort.select({"scores": SCORES, "similarity": SIMILARITY[:, :5, :5].copy()}, COUNTS)
    with pytest.raises(RuntimeError, match="seed 6 is outside 0 to 5"):
        ort.select({"scores": SCORES, "similarity": SIMILARITY, "seeds": np.int32([1, 6])}, COUNTS)
    with pytest.raises(Exception, match='diversity_rule is "nearest", wanted "farthest" or "coverage"'):
        ort.select({"scores": SCORES, "similarity": SIMILARITY}, COUNTS | {"diversity_rule": "nearest"})
    with pytest.raises(RuntimeError, match="there are seeds"):
        ort.select({"scores": SCORES, "seeds": np.int32([1])}, COUNTS | {"diversity_quota": 0})


def test_the_kernel_reads_a_similarity_at_any_address() -> None:
    """Rows that a wide read would fit by their length but not by their address."""
    emulated = backend("cuda-kernel-emulated")
    case = next(case for case in CASES if case.name == "all-picks")
    assert case.similarity is not None and case.similarity.shape[-1] % 4 == 0
    room = np.zeros(case.similarity.size + 1, np.float32)
    shifted = room[1:].reshape(case.similarity.shape)
    shifted[...] = case.similarity
    assert shifted.ctypes.data % 16 != case.similarity.ctypes.data % 16
    got = emulated.select(case.inputs | {"similarity": shifted}, case.attributes)
    np.testing.assert_array_equal(got, expected(case))


def test_the_kernel_skips_seeds_outside_the_tokens() -> None:
    """The host cannot look at them; memory stays safe and the others count."""
    emulated = backend("cuda-kernel-emulated")
    counts = COUNTS | {"attention_quota": 0, "diversity_quota": 0, "pool": 0, "keep": 2}
    inputs = {"scores": SCORES, "similarity": SIMILARITY, "seeds": np.int32([-4, 3, 6, 2**30, 5])}
    assert emulated.select(inputs, counts).tolist() == [[3, 5]]


def test_a_session_prefers_the_library_to_the_function_body() -> None:
    """The body of this model is wrong on purpose: only the library can give the right answer."""
    import onnxruntime as ort
    from onnx import helper

    case = next(case for case in CASES if case.similarity is None)
    names = ["scores", "similarity", "seeds"]
    zero = helper.make_node("Constant", [], ["z"], value_ints=[0])
    cast = helper.make_node("Cast", ["z"], ["indices"], to=6)
    opsets = [helper.make_opsetid("", 18)]
    wrong = helper.make_function("btp", "BtpSelectTokens", names, ["indices"], [zero, cast], opsets, list(COUNTS))
    model = one_node("BtpSelectTokens", case.inputs, case.attributes, np.dtype(np.int32), 2, [wrong])
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(backend("ort-custom-op").library))  # type: ignore[attr-defined]
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, case.inputs)[0], expected(case))
