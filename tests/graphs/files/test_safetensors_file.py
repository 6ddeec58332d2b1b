import json

import ml_dtypes
import numpy as np
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs.files.checkpoint import open_checkpoint
from graphs.files.safetensors_file import tensor_offsets, write_tensors

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int8, np.uint8, np.bool_]
NAMES = st.text(st.sampled_from('abc.09_é"/'), min_size=1, max_size=6).filter(lambda name: name != "__metadata__")
ENTRIES = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=8
)


def arrays(entries):
    result = {}
    for number, (name, (dtype, shape)) in enumerate(entries.items()):
        result[name] = (np.arange(int(np.prod(shape, dtype=int))) + number).reshape(shape).astype(dtype)
    return result


@settings(max_examples=80, deadline=None)
@given(ENTRIES)
def test_bytes_are_the_librarys(tmp_path_factory, entries):
    path = tmp_path_factory.getbasetemp() / "own.safetensors"
    tensors = arrays(entries)
    write_tensors(path, tensors)
    assert path.read_bytes() == safetensors.numpy.save(tensors)


def test_offsets_point_at_the_tensors(tmp_path):
    tensors = arrays({"b": (np.float32, [3, 2]), "a": (np.float16, [5]), "scalar": (np.float32, [])})
    write_tensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps({}))
    checkpoint = open_checkpoint(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    for name, offset in tensor_offsets(tensors).items():
        assert checkpoint[name].offset == offset
        assert data[offset : offset + tensors[name].nbytes] == tensors[name].tobytes()
