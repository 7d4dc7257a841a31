import json
import os

import pytest

from galenic.merge import magnitudes, merge, statistics
from galenic.merge.cache import remembered


def recipe(family, **numbers):
    models = [{"model": str(folder)} for folder in family[1:]]
    return {"base_model": str(family[0]), "models": models} | numbers


def told(out):
    return json.loads((out / "merge.json").read_text())


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes over the weights that the statistics take."""
    taken = []
    real = statistics.in_order
    for module in (statistics, magnitudes):
        monkeypatch.setattr(module, "in_order", lambda *a, **k: (taken.append(1), real(*a, **k))[1])
    return taken


def test_a_sweep_reads_the_weights_once(family, tmp_path, passes):
    merge(recipe(family), tmp_path / "a")
    assert len(passes) == 1
    for i, numbers in enumerate(({"norm_power": 1.0}, {"scope": "layer"}, {"max_coefficient": 0.5})):
        merge(recipe(family, parameters=numbers), tmp_path / f"b{i}")
    merge(recipe(family, merge_method="linear"), tmp_path / "c")
    assert len(passes) == 1
    merge(recipe(family), tmp_path / "again")
    assert told(tmp_path / "again") == told(tmp_path / "a")


def test_thresholds_and_trimmed_norms_are_remembered_by_what_they_depend_on(family, tmp_path, passes):
    trimmed = {"trim": "ties", "density": 0.5, "norms": "after_trim"}
    merge(recipe(family, parameters=trimmed), tmp_path / "a")
    assert len(passes) == 4  # Gram, two for the thresholds, Gram of what is left
    merge(recipe(family, parameters=trimmed | {"norm_power": 1.0}), tmp_path / "b")
    assert len(passes) == 4
    merge(recipe(family, parameters=trimmed | {"density": 0.3}), tmp_path / "c")
    assert len(passes) == 5  # the usual thresholds are found together; what is left is another Gram matrix
    merge(recipe(family, parameters=trimmed | {"density": 0.31}), tmp_path / "c2")
    assert len(passes) == 8
    dropped = {"trim": "dare", "density": 0.5, "norms": "after_trim"}
    merge(recipe(family, parameters=dropped), tmp_path / "d")
    merge(recipe(family, parameters=dropped, seed=1), tmp_path / "e")
    assert len(passes) == 10
    assert told(tmp_path / "d")["coefficients"] != told(tmp_path / "e")["coefficients"]


def test_a_sweep_over_densities_of_ties_reads_the_weights_once(family, tmp_path, passes):
    for i in range(1, 20):
        words = {"merge_method": "ties", "parameters": {"density": i / 20}}
        merge(recipe(family, **words), tmp_path / f"{i}")
        merge(recipe(family, **words), tmp_path / "again")
        assert told(tmp_path / f"{i}") == told(tmp_path / "again")
    assert len(passes) == 3  # Gram, and two for all thresholds


def test_other_contents_are_noticed_though_size_and_time_are_the_same(family, tmp_path, passes):
    merge(recipe(family), tmp_path / "a")
    file = family[1] / "model.safetensors"
    status, data = file.stat(), bytearray(file.read_bytes())
    data[-2:] = b"\x00\x3f"
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    merge(recipe(family), tmp_path / "b")
    assert len(passes) == 2 and told(tmp_path / "a")["norms"] != told(tmp_path / "b")["norms"]


def test_experts_in_another_order_are_other_statistics(family, tmp_path):
    merge(recipe(family), tmp_path / "a")
    merge(recipe([family[0], *family[:0:-1]]), tmp_path / "b")
    assert told(tmp_path / "a")["norms"] == told(tmp_path / "b")["norms"]
    assert list(told(tmp_path / "a")["norms"]) != list(told(tmp_path / "b")["norms"])


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "\xff"])
def test_a_damaged_cache_is_as_good_as_none(tmp_path, content):
    file = tmp_path / "cache.json"
    file.write_bytes(content.encode("latin-1"))
    assert remembered(file, "a", lambda: [1.5]) == [1.5]
    assert remembered(file, "a", lambda: [2.5]) == [1.5]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert remembered(tmp_path / "file" / "cache.json", "a", lambda: 3) == 3
