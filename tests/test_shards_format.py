"""docs/format.md says what the files are: its example and its reader hold against real files."""

import json
import re
import struct
import subprocess
import sys

import numpy as np
from conftest import REPOSITORY

from shards.arrays import map_arrays, save_arrays
from shards.checksum import row_checksums
from shards.column import ImageColumn, TextColumn, column_from_json

DOCUMENT = (REPOSITORY / "docs" / "format.md").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, flags=re.S | re.M)


def test_the_reader_of_the_document_reads_what_we_write(tmp_path, make_latent_dataset):
    dataset = make_latent_dataset(tmp_path / "latents", [5, 7], dropped=2, too_small=1)
    reader = tmp_path / "reader.py"
    (program,) = code_blocks("python")
    reader.write_text(program)
    image, text = dataset.image_column(64), dataset.text_column()
    for shard, row in (("00000", 0), ("00001", 6)):
        columns = (image.column_id, text.column_id)
        # -I -S: the standard library alone
        command = [sys.executable, "-I", "-S", reader, dataset.path, *columns, shard, str(row)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        latents, captions = image.map_shard(shard), text.map_shard(shard)
        np.testing.assert_array_equal(found["moments"], latents["moments"][row].ravel())
        states = captions["states"][captions["caption"][latents["row"][row]]]
        np.testing.assert_array_equal(found["states"], states.ravel())


def test_the_worked_example_is_the_file_that_we_write(tmp_path):
    moments = np.array([1, 2, 3, 4, -1, -1, -1, -1], np.float16).reshape(1, 2, 2, 2)
    arrays = {
        "moments": moments,
        "checksum": row_checksums([moments]),
        "row": np.array([3], np.int32),
    }
    path = tmp_path / "example.safetensors"
    save_arrays(path, arrays)
    (example,) = [block for block in code_blocks("") if "L = 184" in block]
    written = b""
    for line in example.splitlines():
        if line.startswith(("{", '"')):
            written += line.encode()
        else:
            written += bytes.fromhex(re.match(r"(?:[0-9a-f]{2} ?)+", line)[0])
    assert path.read_bytes() == written
    assert f"{len(written)} bytes" in DOCUMENT
    assert struct.unpack("<Q", written[:8]) == (184,)
    np.testing.assert_array_equal(map_arrays(path)["moments"], moments)


def test_the_document_names_every_field_and_array(latent_dataset):
    def is_named(name: str) -> bool:
        return f"`{name}`" in DOCUMENT or f'"{name}"' in DOCUMENT

    names = set()
    for path in latent_dataset.glob("*/*.json"):
        receipt = json.loads(path.read_bytes())
        names |= receipt.keys() | receipt["stats"].keys() | (receipt["column"] or {}).keys()
        if receipt["column"]:
            spec = column_from_json(receipt["column"], path)
            assert isinstance(spec, (ImageColumn, TextColumn))
            names |= map_arrays(path.with_suffix(".safetensors")).keys()
    manifest = json.loads((latent_dataset / "dataset.json").read_bytes())
    names |= manifest.keys()
    assert len(names) > 30
    assert not [name for name in sorted(names) if not is_named(name)]
