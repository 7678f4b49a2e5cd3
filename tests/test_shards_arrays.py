"""Arrays go to disk and come back bit for bit; a damaged file is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shards.arrays import Arrays, map_arrays, save_arrays
from shards.errors import CorruptFileError


def all_sorts_of_arrays() -> Arrays:
    rng = np.random.default_rng(0)
    halves = rng.integers(0, 1 << 16, (5, 8, 3, 2), dtype=np.uint16).view(np.float16)
    return {
        "moments": halves,  # every bit pattern, NaNs and infinities too
        "row": np.array([0, -1, 2**31 - 1, -(2**31)], dtype=np.int32),
        "input_ids": np.array([[0, 65535], [1, 2]], dtype=np.uint16),
        "scales": rng.standard_normal((3, 1)).astype(np.float32),
        "quantised": rng.integers(-128, 128, (4, 4), dtype=np.int8),
        "long": np.array([-(2**63), 2**63 - 1]),
        "no rows": np.empty((0, 8, 4, 4), np.float16),
        "one number": np.array(7, dtype=np.int32),
    }


def assert_equal_bits(found: Arrays, wanted: Arrays) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def rewrite_header(path: Path, header: bytes) -> None:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[start:])


@pytest.fixture
def array_file(tmp_path: Path) -> Path:
    path = tmp_path / "00000.safetensors"
    save_arrays(path, all_sorts_of_arrays())
    return path


def test_arrays_round_trip_bit_for_bit(array_file):
    assert_equal_bits(map_arrays(array_file), all_sorts_of_arrays())


def test_the_safetensors_library_reads_what_we_write(array_file):
    assert_equal_bits(load_file(array_file), all_sorts_of_arrays())


def test_we_read_what_the_safetensors_library_writes_with_its_metadata(tmp_path):
    save_file(all_sorts_of_arrays(), tmp_path / "x.safetensors", metadata={"format": "np"})
    assert_equal_bits(map_arrays(tmp_path / "x.safetensors"), all_sorts_of_arrays())


def test_arrays_of_no_rows_alone_round_trip(tmp_path):
    empty = {"moments": np.empty((0, 8, 4, 4), np.float16), "row": np.empty(0, np.int32)}
    save_arrays(tmp_path / "x.safetensors", empty)
    assert_equal_bits(map_arrays(tmp_path / "x.safetensors"), empty)


def test_an_array_that_is_a_view_is_written_as_it_reads(tmp_path):
    turned = np.arange(12, dtype=np.int32).reshape(3, 4).T[::-1]
    save_arrays(tmp_path / "x.safetensors", {"row": turned})
    assert map_arrays(tmp_path / "x.safetensors")["row"].tolist() == turned.tolist()


def test_equal_arrays_make_equal_files(tmp_path):
    for name in "ab":
        save_arrays(tmp_path / name, all_sorts_of_arrays())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_mapped_array_cannot_change_the_file(array_file):
    with pytest.raises(ValueError, match="read-only"):
        map_arrays(array_file)["moments"][0] = 0


def test_a_missing_file_is_named_with_a_remedy(tmp_path):
    with pytest.raises(CorruptFileError, match=r"nowhere\.safetensors: is missing.*Remedy: "):
        map_arrays(tmp_path / "nowhere.safetensors")


def test_a_file_cut_short_anywhere_is_refused_by_name(array_file):
    whole = array_file.read_bytes()
    for length in [*range(0, 40), *range(40, len(whole), 37), len(whole) - 1]:
        array_file.write_bytes(whole[:length])
        with pytest.raises(CorruptFileError, match=array_file.name):
            map_arrays(array_file)


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"[]",
        b"3",
        b'"text"',
        b"null",
        b'{"row": null}',
        b'{"row": 3}',
        b'{"row": {}}',
        b'{"row": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"row": {"dtype": "I32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"row": {"dtype": "I32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"row": {"dtype": "I32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"row": {"dtype": "I32", "shape": [1], "data_offsets": [0]}}',
        b'{"row": {"dtype": "I32", "shape": 1, "data_offsets": [0, 4]}}',
        b'{"row": {"dtype": "I32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"row": {"dtype": "I32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        b'{"row": {"dtype": "I32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"row": {"dtype": "I32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"row": {"dtype": "I32", "shape": [1], "data_offsets": [999999, 1000003]}}',
        b'{"row": {"dtype": "I32", "shape": [1], "data_offsets": ["0", "4"]}}',
        b'{"\xff": {}}',
        b"[" * 100_000,
    ],
    ids=range(22),
)
def test_a_broken_header_is_refused_by_name(array_file, header):
    rewrite_header(array_file, header)
    with pytest.raises(CorruptFileError, match=array_file.name):
        map_arrays(array_file)


def test_a_header_length_beyond_the_file_is_refused(array_file):
    whole = array_file.read_bytes()
    for length in (0, 1, len(whole), 2**62, 2**64 - 1):
        array_file.write_bytes(length.to_bytes(8, "little") + whole[8:])
        with pytest.raises(CorruptFileError, match="no safetensors header"):
            map_arrays(array_file)


def test_a_flipped_byte_in_the_header_never_ends_in_another_error(array_file):
    whole = array_file.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    assert json.loads(whole[8:header_end])
    rng = np.random.default_rng(0)
    for place in range(header_end):
        damaged = bytearray(whole)
        damaged[place] ^= int(rng.integers(1, 256))
        array_file.write_bytes(damaged)
        try:
            map_arrays(array_file)  # some flips only rename an array; the hash finds those
        except CorruptFileError as error:
            assert array_file.name in str(error)  # noqa: PT017 - any other error fails the test
