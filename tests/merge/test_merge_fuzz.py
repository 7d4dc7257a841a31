"""Damaged headers and indexes: a merge says what is wrong in one line, or works; it never leaves half a model."""

import json
import shutil

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from galenic.merge import merge
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


def survives(family, tmp_path):
    """Merges; returns whether it worked."""
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    recipe = {"merge_method": "linear", "base_model": str(family[0]), "models": [{"model": str(family[2])}]}
    try:
        merge(recipe, out)
    except UserError as error:
        assert str(error).strip() and not (out / "model").exists()
        return False
    assert load_file(out / "model" / "model.safetensors")
    return True


@SETTINGS
@given(st.data())
def test_damaged_bytes_of_a_header(family, tmp_path, data):
    file = family[0] / "model.safetensors"
    whole = tmp_path / "whole"
    if not whole.exists():
        shutil.copy(file, whole)
    raw = bytearray(whole.read_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw), len(raw) - 1, end, 8, 0]))])
    survives(family, tmp_path)


@SETTINGS
@given(name=st.sampled_from(["lm_head.weight", "new", "__metadata__"]), value=JSON)
def test_lying_headers(family, tmp_path, name, value):
    file = family[0] / "model.safetensors"
    whole = tmp_path / "whole"
    if not whole.exists():
        shutil.copy(file, whole)
    raw = whole.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header[name] = value
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    worked = survives(family, tmp_path)
    assert worked or name != "__metadata__" or not isinstance(value, dict)


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
