"""The safetensors format as its own library has it, and headers that lie."""

import json

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from lslm_jax.convert import safetensors_io
from lslm_jax.convert.safetensors_io import Source
from lslm_jax.errors import DataError, InputMissing

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.arange(4, dtype=np.float16),
    "c": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float32),
}


def source(array):
    return Source(array.dtype, array.shape, lambda: array)


def test_what_the_library_writes_is_read_and_what_is_written_the_library_reads(tmp_path):
    directory = epath.Path(tmp_path)
    save_file(ARRAYS, tmp_path / "model.safetensors")
    found = safetensors_io.open_directory(directory)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name].read(), array)
        assert found[name].dtype == array.dtype
    assert safetensors_io.write_directory(directory, {k: source(v) for k, v in ARRAYS.items()}) == ["model.safetensors"]
    for name, array in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_bfloat16_survives(tmp_path):
    array = np.array([1.0, -3.5, 1e30], ml_dtypes.bfloat16)
    safetensors_io.write_directory(epath.Path(tmp_path), {"a": source(array)})
    assert safetensors_io.open_directory(epath.Path(tmp_path))["a"].read().tobytes() == array.tobytes()


def test_many_tensors_are_spread_over_files_with_an_index(tmp_path):
    directory = epath.Path(tmp_path)
    files = safetensors_io.write_directory(directory, {k: source(v) for k, v in ARRAYS.items()}, limit=30)
    assert files == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)] + ["model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    found = safetensors_io.open_directory(directory)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name].read(), array)


def raw(path, header, payload=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + payload)


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES = {
    "length beyond the file": ({}, b"", 1 << 40, "its header cannot be 1099511627776 bytes long"),
    "no header": (b"", b"", None, "its header cannot be 0 bytes long"),
    "not JSON": (b"{nonsense", b"", None, "its header is malformed"),
    "a list": (b"[1, 2]", b"", None, "its header is malformed"),
    "deeper than any stack": (b"[" * 100_000, b"", None, "its header is malformed"),
    "an array cut short": ({"a": entry(0, 16, [4])}, b"1234", None, "has 74 bytes where its header promises 86"),
    "bytes that nobody owns": ({"a": entry(0, 4, [1])}, b"12345678", None, "where its header promises"),
    "a size that its shape contradicts": (
        {"a": entry(0, 8, [4])},
        b"12345678",
        None,
        "a has 8 bytes, not those of F32",
    ),
    "an overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, b"12345678", None, "does not begin where"),
    "a hole": ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"1" * 12, None, "b does not begin where"),
    "a negative place": ({"a": entry(-4, 0, [1])}, b"", None, "not of whole numbers"),
    "a fraction": ({"a": entry(0, 4, [1.0])}, b"1234", None, "not of whole numbers"),
    "an unknown type": ({"a": entry(0, 4, [1], "F7")}, b"1234", None, "a is of type F7"),
    "no type": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234", None, "its header is malformed"),
}


@pytest.mark.parametrize(("header", "payload", "length", "message"), LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused(header, payload, length, message, tmp_path):
    raw(tmp_path / "model.safetensors", header, payload, length)
    with pytest.raises(DataError, match=r"model\.safetensors") as error:
        safetensors_io.open_directory(epath.Path(tmp_path))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "../../etc/passwd"}, "names '../../etc/passwd', which is not a safetensors file beside it"),
        ({"a": "/etc/passwd.safetensors"}, "which is not a safetensors file beside it"),
        ({"a": "weights.bin"}, "which is not a safetensors file beside it"),
        ({"b": "one.safetensors"}, "says that one.safetensors holds b, which it does not"),
        ({"a": 7}, "has no weight_map from tensors to files"),
        (None, "has no weight_map from tensors to files"),
    ],
)
def test_an_index_that_lies_is_refused(places, message, tmp_path):
    save_file({"a": ARRAYS["a"]}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(DataError, match=r"index\.json") as error:
        safetensors_io.open_directory(epath.Path(tmp_path))
    assert message in str(error.value)


def test_pickled_or_missing_weights_are_told_with_advice(tmp_path):
    with pytest.raises(InputMissing, match=r"holds no model.safetensors$"):
        safetensors_io.open_directory(epath.Path(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(InputMissing, match=r"names gone.safetensors, which is missing"):
        safetensors_io.open_directory(epath.Path(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputMissing, match=r"pickled weights can run code, so they are never opened; take"):
        safetensors_io.open_directory(epath.Path(tmp_path))


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    found = safetensors_io.open_directory(epath.Path(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(DataError, match="is cut short"):
        found["a"].read()
