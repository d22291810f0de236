"""Token shards: what is written comes back, a killed writer goes on, damage is refused by name."""

import hashlib
import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from error_table import assert_told
from etils import epath

from lslm_jax.data.shards import Shards, ShardWriter
from lslm_jax.errors import DataError, InputMissing, SaveError
from lslm_jax.runtime import atomic_io

WRITER = """
import sys
import numpy as np
from etils import epath
from lslm_jax.data.shards import ShardWriter

writer = ShardWriter(epath.Path(sys.argv[1]), 1000, 500)
print(writer.cursor, flush=True)
for i in range(writer.cursor, 400):
    ids = np.random.default_rng(i).integers(0, 1000, i % 40)
    writer.add([ids], 3 * len(ids), i + 1)
    print(f"{i:4000}", flush=True)  # fills the pipe, so that the writer is never far ahead of its reader
writer.finish()
print("done", flush=True)
"""


def write(directory, documents, vocab_size=1000, shard_tokens=500):
    writer = ShardWriter(epath.Path(directory), vocab_size, shard_tokens)
    for i, ids in enumerate(documents):
        writer.add([np.asarray(ids, np.int64)], 3 * len(ids), i + 1)
    return writer.finish()


def some_documents(count=100, vocab_size=1000):
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab_size, length) for length in rng.integers(0, 60, count)]


def content(directory):
    return {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}


@pytest.mark.parametrize(("vocab_size", "size"), [(1000, 2), (1 << 16, 2), ((1 << 16) + 1, 4)])
def test_documents_come_back(tmp_path, vocab_size, size):
    documents = [*some_documents(vocab_size=vocab_size), [vocab_size - 1], []]
    manifest = write(tmp_path, documents, vocab_size)
    shards = Shards.open(epath.Path(tmp_path), verify=True)
    assert len(manifest["shards"]) > 3
    assert manifest["shards"][0]["size"] == size * manifest["shards"][0]["tokens"]
    assert (shards.num_documents, shards.vocab_size) == (len(documents), vocab_size)
    assert shards.num_tokens == manifest["tokens"] == sum(map(len, documents))
    for i, ids in enumerate(documents):
        np.testing.assert_array_equal(shards.take(np.arange(shards.starts[i], shards.starts[i + 1])), ids)
        assert shards.num_bytes[i] == 3 * len(ids)


def write_pairs(directory, pairs, finish=True):
    """Examples of two fields, two numbers, and a record of their own."""
    writer = ShardWriter(epath.Path(directory), 1000, 500, fields=2, numbers=2, keep_examples=True)
    for i, pair in list(enumerate(pairs))[writer.cursor :]:
        writer.add(pair, len(pair[1]), i + 1, (i, -0.5), {"id": i, "text": "\u00e9\n\u2028" * (i % 3)})
    return writer.finish() if finish else writer


def some_pairs(count=100):
    documents = some_documents(2 * count)
    return list(zip(documents[::2], documents[1::2], strict=True))


def test_examples_of_several_fields_and_numbers_come_back(tmp_path):
    pairs = [*some_pairs(), ([], [1]), ([], [])]
    pairs = [tuple(np.asarray(ids, np.int64) for ids in pair) for pair in pairs]
    manifest = write_pairs(tmp_path, pairs)
    shards = Shards.open(epath.Path(tmp_path), verify=True)
    assert len(manifest["shards"]) > 3
    assert (shards.fields, shards.num_examples, shards.num_documents) == (2, len(pairs), 2 * len(pairs))
    for i, ids in enumerate(ids for pair in pairs for ids in pair):
        np.testing.assert_array_equal(shards.take(np.arange(shards.starts[i], shards.starts[i + 1])), ids)
    assert shards.num_bytes.tolist() == [len(target) for _, target in pairs]
    assert shards.numbers.tolist() == [[i, -0.5] for i in range(len(pairs))]
    assert list(shards.examples()) == [{"id": i, "text": "\u00e9\n\u2028" * (i % 3)} for i in range(len(pairs))]


def test_plain_documents_are_examples_of_one_field_in_the_format_of_old(tmp_path):
    manifest = write(tmp_path, some_documents())
    assert manifest["version"] == 1 and not {"fields", "numbers", "keep_examples"} & manifest.keys()
    shards = Shards.open(tmp_path)
    assert (shards.fields, shards.num_examples, shards.num_documents) == (1, 100, 100)
    assert shards.numbers.shape == (100, 0)
    with pytest.raises(InputMissing, match=rf"^{tmp_path} keeps no examples as they were read"):
        next(shards.examples())


def test_a_writer_of_examples_goes_on_to_the_same_bytes(tmp_path):
    pairs = some_pairs()
    for count in (30, 55, 80):
        write_pairs(tmp_path / "killed", pairs[:count], finish=False)
    (tmp_path / "killed" / "documents-00002.bin").write_bytes(b"cut")
    write_pairs(tmp_path / "killed", pairs)
    write_pairs(tmp_path / "whole", pairs)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    with pytest.raises(DataError, match="was written with version 2, not 1; remove"):
        ShardWriter(epath.Path(tmp_path / "whole"), 1000, 500)


def test_tokens_are_taken_in_any_shape_and_order(tmp_path):
    documents = some_documents()
    write(tmp_path, documents)
    index = np.random.default_rng(1).integers(0, sum(map(len, documents)), (7, 11))
    np.testing.assert_array_equal(Shards.open(tmp_path).take(index), np.concatenate(documents)[index])


def test_a_killed_writer_goes_on_to_the_same_bytes(tmp_path):
    def run(directory, stop_after):
        command = [sys.executable, "-c", WRITER, str(directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            lines = [line for _, line in zip(range(stop_after), process.stdout, strict=False)]
            process.send_signal(signal.SIGKILL)
        return [line.strip() for line in lines]

    assert run(tmp_path / "whole", 1000)[-1] == "done"
    cursors = [int(run(tmp_path / "killed", lines)[0]) for lines in (61, 87, 112, 3)]
    assert cursors[0] == 0 and sorted(set(cursors)) == cursors
    with pytest.raises(InputMissing, match="half prepared"):
        Shards.open(tmp_path / "killed")
    assert run(tmp_path / "killed", 1000)[-1] == "done"
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_shard_lost_before_the_writer_goes_on_is_written_again(tmp_path):
    documents, directory = some_documents(), epath.Path(tmp_path) / "lost"
    writer = ShardWriter(directory, 1000, 500)
    for i, ids in enumerate(documents[:70]):
        writer.add([ids], 3 * len(ids), i + 1)
    (directory / "tokens-00001.bin").write_bytes(b"cut")
    writer = ShardWriter(directory, 1000, 500)
    assert 0 < writer.cursor < 40
    for i, ids in enumerate(documents[writer.cursor :], writer.cursor):
        writer.add([ids], 3 * len(ids), i + 1)
    writer.finish()
    write(tmp_path / "whole", documents)
    assert content(directory) == content(tmp_path / "whole")


def test_a_finished_set_stays_as_it_is(tmp_path):
    manifest = write(tmp_path, some_documents())
    before = content(tmp_path)
    writer = ShardWriter(epath.Path(tmp_path), 1000, 500)
    assert writer.cursor == 100
    assert writer.finish() == manifest
    with pytest.raises(DataError, match="is complete"):
        writer.add([np.zeros(1, np.int32)], 1, 101)
    with pytest.raises(DataError, match="with vocab_size 1000, not 1001; remove"):
        ShardWriter(epath.Path(tmp_path), 1001, 500)
    assert content(tmp_path) == before


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tokens-00009.bin.tmp").write_text("a killed writer's")
    write(tmp_path, some_documents())
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob("*.tmp"))


def test_the_index_of_an_empty_set_is_written(tmp_path):
    write(tmp_path, [])
    assert Shards.open(tmp_path, verify=True).num_documents == 0


def truncate(directory):
    path = directory / "tokens-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])


def lengthen(directory):
    path = directory / "starts.bin"
    path.write_bytes(path.read_bytes() + b"x")


def remove(directory):
    (directory / "tokens-00001.bin").unlink()
    (directory / "num_bytes.bin").unlink()


def flip(directory):
    path = directory / "tokens-00002.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def scribble(directory):
    (directory / "manifest.json").write_text("{")


def escape(directory):
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace("tokens-00000.bin", "../tokens-00000.bin"))


def forget(directory):
    path = directory / "manifest.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "tokens"}))


def age(directory):
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 9'))


def unfinish(directory):
    (directory / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (truncate, DataError, "DIR/tokens-00001.bin is truncated: 1074 bytes, manifest.json says 1076"),
        (lengthen, DataError, "DIR/starts.bin is too long: 809 bytes, manifest.json says 808"),
        (remove, DataError, "DIR lacks tokens-00001.bin, num_bytes.bin of its manifest.json: restore or prepare again"),
        (flip, DataError, "DIR/tokens-00002.bin was altered: its sha256 is not the one in manifest.json"),
        (scribble, DataError, "DIR/manifest.json is not JSON"),
        (escape, DataError, "DIR/manifest.json names '../tokens-00000.bin', which is not a file beside it"),
        (forget, DataError, "DIR/manifest.json lacks tokens"),
        (age, DataError, "DIR/manifest.json has version 9, this program reads 1 and 2"),
        (unfinish, InputMissing, "DIR holds no prepared shards (no manifest.json): run prepare"),
    ],
)
def test_damage_is_refused_in_one_line_by_name(tmp_path, damage, error, message):
    write(tmp_path, some_documents())
    damage(tmp_path)
    with pytest.raises(error) as caught:
        Shards.open(tmp_path, verify=True)
    assert str(caught.value).startswith(message.replace("DIR", str(tmp_path)))
    assert "\n" not in str(caught.value)


def change(**values):
    """A manifest with other values, all else consistent."""

    def damage(directory):
        path = directory / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def rewrite(name, spoil):
    """A file with other numbers, whose size and sha256 are those of the manifest."""

    def damage(directory):
        path, manifest = directory / name, json.loads((directory / "manifest.json").read_text())
        array = np.fromfile(path, "<i8" if name == "starts.bin" else "<u2")
        spoil(array)
        array.tofile(path)
        for entry in manifest["shards"] + manifest["index"]:
            if entry["file"] == name:
                entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (directory / "manifest.json").write_text(json.dumps(manifest))

    return damage


def put(place, value):
    return lambda array: array.__setitem__(place, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *[
            (change(dtype=dtype), f"manifest.json has dtype {dtype!r}; tokens of this vocabulary are uint16")
            for dtype in ("O", "S1", "U1", "f2", "float64", "int8", "uint32", ["O"], None)
        ],
        (change(vocab_size=1 << 20), "manifest.json has dtype 'uint16'; tokens of this vocabulary are uint32"),
        (change(vocab_size=-1), "manifest.json has vocab_size -1, not a whole number from 1 on"),
        (change(documents=10**30), "manifest.json has documents 1000000000000000000000000000000, not a whole"),
        (change(tokens="many"), "manifest.json has tokens 'many', not a whole number"),
        (change(shards=5), "manifest.json has shards that do not list files"),
        (change(index=[{"file": "starts.bin"}]), "manifest.json has index that do not list files"),
        (rewrite("starts.bin", put(0, 1)), "starts.bin begins with 1, not with 0"),
        (rewrite("starts.bin", put(3, -7)), "starts.bin falls at document 2"),
        (rewrite("starts.bin", put(3, 10**6)), "starts.bin falls at document 3"),
        (rewrite("tokens-00001.bin", put(5, 60_000)), "token 60000 in shard 1 of"),
    ],
)
def test_no_type_shape_or_count_that_a_manifest_names_is_trusted(tmp_path, damage, message):
    write(tmp_path, some_documents())
    Shards.open(tmp_path, verify=True)
    damage(tmp_path)
    with pytest.raises(DataError) as caught:
        Shards.open(tmp_path, verify=True)
    assert message in str(caught.value)


def test_a_token_outside_the_vocabulary_is_not_written(tmp_path):
    with pytest.raises(DataError, match=f"token 1000 in document 1 of {tmp_path}, vocabulary 1000"):
        write(tmp_path, [[1, 2], [3, 1000]])


def test_a_refusing_disk_is_told_with_its_path_and_reason(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match=f"could not write {tmp_path}/file/train: Not a directory"):
        write(tmp_path / "file" / "train", [[1]])
    writer = ShardWriter(epath.Path(tmp_path), 1000, 500)
    full = lambda path, flags, mode: open("/dev/full" if "tokens" in path.name else path, mode)
    monkeypatch.setattr(atomic_io, "open_plain", full)
    with pytest.raises(SaveError, match=r"could not write .*tokens-00000\.bin: ") as error:
        for i in range(100):
            writer.add([np.arange(900)], 900, i + 1)
    assert_told("A full disk", error.value.exit_code, str(error.value))


def test_a_remote_set_is_copied_once_and_read_from_the_copy(tmp_path, monkeypatch):
    documents = some_documents()
    write(tmp_path / "remote", documents)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(atomic_io, "is_remote", lambda path: True)
    for _ in range(2):
        shards = Shards.open(tmp_path / "remote", verify=True)
        np.testing.assert_array_equal(shards.take(np.arange(shards.num_tokens)), np.concatenate(documents))
    (copy,) = (tmp_path / "cache" / "lslm_jax" / "shards").iterdir()
    cached = content(tmp_path / "remote")
    del cached["manifest.json"]
    assert content(copy) == cached
