"""Damaged headers and indexes: a merge says what is wrong in one line, or works; it never leaves half a model."""

import json
import shutil
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from galenic.merge import merge
from galenic.merge.io import Checkpoint
from galenic.runtime import UserError

SETTINGS = settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
INDEX = "model.safetensors.index.json"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "weight_map", "metadata", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@pytest.fixture(autouse=True)
def no_hang():
    """A merge that takes a minute here hangs: it is interrupted, and the test fails."""

    def interrupt(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def survives(family, tmp_path):
    """Merges; returns whether it worked. It refuses in one line and leaves nothing, or leaves a whole model."""
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    recipe = {"merge_method": "linear", "base_model": str(family[0]), "models": [{"model": str(family[2])}]}
    signal.alarm(60)
    try:
        merge(recipe, out)
    except UserError as error:
        assert str(error).strip() and not any(out.iterdir())
        return False
    finally:
        signal.alarm(0)
    found = load_file(out / "model" / "model.safetensors")
    with Checkpoint(family[0], "base") as base:
        assert {n: tuple(v.shape) for n, v in found.items()} == {n: i.shape for n, i in base.tensors.items()}
    assert {path.name for path in out.iterdir()} == {"model", "merge.json", "merge-report.html"}
    return True


def base_file(family, tmp_path):
    """The base's file, which an earlier example has damaged, and the bytes it had at first."""
    file, whole = family[0] / "model.safetensors", tmp_path / "whole"
    if not whole.exists():
        shutil.copy(file, whole)
    return file, whole.read_bytes()


@SETTINGS
@given(st.data())
def test_damaged_bytes_of_a_header(family, tmp_path, data):
    file, raw = base_file(family, tmp_path)
    raw = bytearray(raw)
    end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw), len(raw) - 1, end, 8, 0]))])
    survives(family, tmp_path)


@SETTINGS
@given(name=st.sampled_from(["lm_head.weight", "new", "__metadata__"]), value=JSON)
def test_lying_headers(family, tmp_path, name, value):
    file, raw = base_file(family, tmp_path)
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header[name] = value
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    worked = survives(family, tmp_path)
    assert worked or name != "__metadata__" or not isinstance(value, dict)


@SETTINGS
@given(st.data())
def test_headers_whose_fields_are_exchanged(family, tmp_path, data):
    """Offsets, shapes and types that are each possible, at the wrong tensor."""
    file, raw = base_file(family, tmp_path)
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    names = sorted(header.keys() - {"__metadata__"})
    for _ in range(data.draw(st.integers(1, 3))):
        name, key = (
            data.draw(st.sampled_from(names)),
            data.draw(st.sampled_from(["dtype", "shape", "data_offsets"])),
        )
        numbers = st.integers(-1, 2**65) | st.integers(0, len(raw) - end)
        kinds = st.sampled_from(["F64", "BF16", "I32", "BOOL", "F8_E4M3"])
        anything = kinds if key == "dtype" else st.lists(numbers, max_size=3)
        header[name][key] = data.draw(st.sampled_from([header[other][key] for other in names]) | anything)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    if survives(family, tmp_path):
        load_file(file)  # what we read, the safetensors library reads too


@SETTINGS
@given(
    st.one_of(
        JSON,
        st.fixed_dictionaries({"weight_map": JSON}),
        st.dictionaries(
            st.sampled_from(["lm_head.weight", "scale", "new"]),
            st.sampled_from(
                ["../base/model.safetensors", "/etc/passwd", "model-00001-of-00002.safetensors", "x", "", "."]
            ),
        ).map(lambda places: {"weight_map": places}),
    )
)
def test_lying_indexes(family, tmp_path, index):
    (family[2] / INDEX).write_text(json.dumps(index))
    assert not survives(family, tmp_path)


@SETTINGS
@given(st.data())
def test_damaged_bytes_of_an_index(family, tmp_path, data):
    path = family[2] / INDEX
    whole = tmp_path / "whole.json"
    if not whole.exists():
        shutil.copy(path, whole)
    raw = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw), len(raw) // 2]))])
    survives(family, tmp_path)


@SETTINGS
@given(st.data())
def test_indexes_that_send_tensors_elsewhere(family, tmp_path, data):
    """Tensors left out, added, or sent to another shard, an existing file or nowhere."""
    path = family[2] / INDEX
    whole = tmp_path / "whole.json"
    if not whole.exists():
        shutil.copy(path, whole)
    places = json.loads(whole.read_text())["weight_map"]
    files = [
        *sorted(set(places.values())),
        "../base/model.safetensors",
        "model.safetensors",
        "gone.safetensors",
        "",
    ]
    before = dict(places)
    for name in data.draw(st.lists(st.sampled_from([*places, "new"]), min_size=1, max_size=3)):
        place = data.draw(st.none() | st.sampled_from(files))
        places.pop(name, None)
        places |= {name: place} if place is not None else {}
    path.write_text(json.dumps({"weight_map": places}))
    assert survives(family, tmp_path) == (places == before)


@SETTINGS
@given(st.binary(max_size=60))
def test_indexes_that_are_no_json(family, tmp_path, raw):
    (family[2] / INDEX).write_bytes(raw)
    assert not survives(family, tmp_path)


def test_deep_nesting_and_loops_of_links(family, tmp_path):
    (family[2] / INDEX).write_text("[" * 100_000)
    assert not survives(family, tmp_path)
    (family[2] / INDEX).unlink()
    (family[2] / INDEX).symlink_to(INDEX)
    assert not survives(family, tmp_path)
