"""Checkpoints: the same bytes after a resume, whole or not at all, from any number of ranks."""

import json
import os
import shutil
import threading
import time

import pytest
import torch
from ranks_worker import make, states, take_step, train, whole_state
from safetensors.torch import load_file

from galenic.model import load, save
from galenic.pretrain.checkpoints import checkpoints as module
from galenic.pretrain.checkpoints.checkpoint_folder import differences, one_line, write_tensors
from galenic.pretrain.checkpoints.checkpoints import Checkpoints
from galenic.pretrain.checkpoints.export import export_model
from galenic.pretrain.config import CheckpointConfig
from galenic.pretrain.parallelism.parallel import Parallel
from galenic.runtime import UserError
from rank_helpers import Ranks


def run(
    out, last, *, matches=None, seconds=60.0, keep=1, keep_phase_ends=False, asynchronous=True, **options
):
    config = CheckpointConfig(
        seconds=seconds, keep=keep, keep_phase_ends=keep_phase_ends, asynchronous=asynchronous
    )
    with Checkpoints(out, config, run=matches) as checkpoints:
        return train(checkpoints, Parallel(), last, **options)[1]


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def visible(out):
    return sorted(path.name for path in out.iterdir())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), 9)


# ---------------------------------------------------------------------------- one process


@pytest.mark.parametrize("asynchronous", [True, False])
def test_resumed_it_ends_with_the_same_bytes(tmp_path, uninterrupted, asynchronous):
    for last in (1, 5, 9):
        state = run(tmp_path, last, asynchronous=asynchronous)
    assert same(state, uninterrupted)
    assert not same(run(tmp_path / "other", 8), uninterrupted)
    assert visible(tmp_path) == ["checkpoint-00000009", "other"]


def test_a_start_without_moments_is_a_checkpoint_too(tmp_path):
    model, optimizer = make(Parallel())
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.load(model, optimizer) is None
        checkpoints.save(0, model=model, optimizer=optimizer, **states(0))
    other, fresh = make(Parallel(), seed=1)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        found = checkpoints.load(other, fresh)
    assert found == {"step": 0, "phase_end": None, **states(0)} and not fresh.state
    assert same(dict(model.state_dict()), dict(other.state_dict()))


def test_what_is_written_is_the_state_at_the_time(tmp_path, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(module, "write_tensors", lambda *a: (gate.wait(), write_tensors(*a)))
    parallel = Parallel()
    model, optimizer = make(parallel)
    reader = {"row": 1}
    take_step(parallel, model, optimizer, 0)
    expected = whole_state(parallel, model, optimizer)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, model=model, optimizer=optimizer, **{**states(1), "reader": reader})
        take_step(parallel, model, optimizer, 1)
        reader["row"] = 2
        gate.set()
        checkpoints.wait()
        found = checkpoints.load(model, optimizer)
    assert found is not None and found["reader"] == {"row": 1}
    assert same(whole_state(parallel, model, optimizer), expected)


def test_the_last_ones_stay_and_phase_ends(tmp_path):
    run(tmp_path, 6, keep=2)
    assert visible(tmp_path) == ["checkpoint-00000005", "checkpoint-00000006"]
    run(tmp_path, 8, keep=5)
    assert visible(tmp_path) == [f"checkpoint-0000000{i}" for i in (5, 6, 7, 8)]
    shutil.rmtree(tmp_path / "checkpoint-00000007")
    out = tmp_path / "phases"
    run(out, 6, phase_ends=(2, 4), keep_phase_ends=True)
    assert visible(out) == [f"checkpoint-0000000{i}" for i in (2, 4, 6)]
    assert json.loads((out / "checkpoint-00000002/run.json").read_text())["phase_end"] == "phase-2"
    run(out, 6, keep_phase_ends=True, finish=True)
    assert visible(out) == ["checkpoint-00000002", "checkpoint-00000004"]
    run(out, 6, phase_ends=(2, 4), finish=True)
    assert visible(out) == []


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rubbish(path):
    path.write_text('{"step": 5}' if path.name == "run.json" else "{")


TENSORS = "model/shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("name", "harm", "says"),
    [
        (TENSORS, truncate, "damaged \\(\\d+ bytes, \\d+ were written\\)"),
        (
            TENSORS.replace("model/", "optimizer/"),
            flip,
            "damaged \\(its bytes are not those that were written\\)",
        ),
        (TENSORS, lambda path: path.unlink(), "missing"),
        ("reader.json", rubbish, "damaged"),
        ("run.json", rubbish, "damaged"),
        ("run.json", truncate, "not valid JSON"),
        ("run.json", lambda path: path.unlink(), "no such file"),
    ],
)
def test_a_damaged_newest_one_is_told_and_the_one_before_taken(
    tmp_path, uninterrupted, capsys, name, harm, says
):
    run(tmp_path, 5, keep=2)
    harm(tmp_path / "checkpoint-00000005" / name)
    state = run(tmp_path, 9, keep=2)
    told = capsys.readouterr().err
    assert (
        f"checkpoint-00000005/{name}" in told and "continuing from" in told and "checkpoint-00000004" in told
    )
    assert same(state, uninterrupted)
    assert visible(tmp_path) == [f"checkpoint-0000000{i}" for i in ("5.damaged", "8", "9")]
    for newest in ("8", "9"):
        target = tmp_path / f"checkpoint-0000000{newest}" / name
        if target.exists():
            harm(target)
    with pytest.raises(
        UserError, match=f"checkpoint-00000009/{name}.*{says}.*no older whole checkpoint"
    ) as caught:
        run(tmp_path, 9)
    assert "\n" not in str(caught.value)
    assert "checkpoint-00000009" in visible(tmp_path)


def test_another_configuration_is_refused_with_what_differs(tmp_path):
    matches = {
        "seed": 0,
        "optim": {"lr": 0.1, "betas": (0.9, 0.95)},
        "phases": [{"name": "a"}, {"name": "b"}],
    }
    run(tmp_path, 2, matches=matches)
    run(tmp_path, 3, matches=matches)
    other = {"seed": 1, "optim": {"lr": 0.2, "betas": (0.9, 0.95)}, "phases": [{"name": "a"}, {"name": "c"}]}
    with pytest.raises(UserError) as caught:
        run(tmp_path, 4, matches=other)
    for difference in ("seed: 1 given, 0 found", "optim.lr: 0.2 given, 0.1 found"):
        assert difference in str(caught.value)
    assert 'phases[1].name: "c" given, "b" found' in str(caught.value) and "betas" not in str(caught.value)
    assert visible(tmp_path) == ["checkpoint-00000003"]


def test_differences_are_found_whatever_the_shape():
    assert differences({"a": [1]}, {"a": [1]}) == []
    assert differences({"a": [1]}, {"a": [1, 2]}) == ["a: [1, 2] given, [1] found"]
    assert differences({}, {"a": 1}) == ["a: 1 given, null found"]
    assert differences({"a": 1}, {}) == ["a: null given, 1 found"]
    assert differences({"a": {"b": 1}}, {"a": 2}) == ['a: 2 given, {"b": 1} found']


def test_clocks_do_not_matter(tmp_path, uninterrupted, monkeypatch):
    run(tmp_path, 4, keep=2)
    # The older one looks newer by its files' times, and the clock has gone back by a year.
    past = time.time() - 400 * 86400
    os.utime(tmp_path / "checkpoint-00000004", (past, past))
    for path in (tmp_path / "checkpoint-00000004").rglob("*"):
        os.utime(path, (past, past))
    monkeypatch.setattr(time, "time", lambda: past)
    state = run(tmp_path, 9)
    assert same(state, uninterrupted)


def test_never_due(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(seconds=float("inf")))
    assert not any(checkpoints.due() for _ in range(20))
    checkpoints.close()


def test_due_follows_the_monotonic_clock_and_asks_seldom(tmp_path, monkeypatch):
    now, asked = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: -now[0])
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(seconds=60.0))
    real = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: (asked.append(now[0]), real(*a, **k))[1])
    due = []
    for _ in range(100):
        now[0] += 1.0
        due.append(checkpoints.due())
    # Steps of a second: it is found out within one step, and with few questions on the way.
    assert due.index(True) == 59
    assert len([at for at in asked if at <= 160.0]) <= 13
    checkpoints.close()
    always = Checkpoints(tmp_path, CheckpointConfig(seconds=0.0))
    assert [always.due() for _ in range(3)] == [True] * 3
    always.close()


def test_what_a_kill_leaves_is_tidied(tmp_path, uninterrupted):
    run(tmp_path, 5)
    partial = tmp_path / ".checkpoint-00000006.partial"
    (partial / "model").mkdir(parents=True)
    (partial / "model/shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    os.replace(tmp_path / "checkpoint-00000005", tmp_path / "checkpoint-00000005.replaced")
    assert same(run(tmp_path, 9), uninterrupted)
    assert visible(tmp_path) == ["checkpoint-00000009"]


def test_the_same_step_again_takes_the_place(tmp_path):
    parallel = Parallel()
    model, optimizer = make(parallel)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(3, model=model, optimizer=optimizer, **states(3))
        checkpoints.save(3, model=model, optimizer=optimizer, phase_end="a", **states(3))
        checkpoints.wait()
        found = checkpoints.load(model, optimizer)
    assert found is not None and found["phase_end"] == "a"
    assert visible(tmp_path) == ["checkpoint-00000003"]


def test_an_error_of_the_background_comes_out_at_the_next_call(tmp_path, monkeypatch):
    parallel = Parallel()
    model, optimizer = make(parallel)

    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="step 1 is kept: no space left on device"):
        with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
            checkpoints.save(1, model=model, optimizer=optimizer, **states(1))
            checkpoints.wait()
            monkeypatch.setattr(module, "write_tensors", full)
            checkpoints.save(2, model=model, optimizer=optimizer, **states(2))
            checkpoints.save(3, model=model, optimizer=optimizer, **states(3))
    assert visible(tmp_path) == ["checkpoint-00000001"]
    with pytest.raises(UserError, match="there is none before it"):
        with Checkpoints(tmp_path / "new", CheckpointConfig()) as checkpoints:
            checkpoints.save(1, model=model, optimizer=optimizer, **states(1))
    with pytest.raises(KeyError):  # the first error counts
        with Checkpoints(tmp_path / "new", CheckpointConfig()) as checkpoints:
            checkpoints.save(1, model=model, optimizer=optimizer, **states(1))
            raise KeyError


def test_another_network_is_refused_though_the_configuration_says_nothing(tmp_path):
    run(tmp_path, 1)
    model = torch.nn.Linear(2, 2)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        with pytest.raises(UserError, match="this run trains no such parameter"):
            checkpoints.load(model, torch.optim.AdamW(model.parameters()))


def test_errors_are_told_in_one_line():
    assert one_line(ValueError("a\nb")) == "ValueError: a b"
    assert one_line(OSError(13, "Permission denied", "x")) == "[Errno 13] Permission denied: 'x'"


# ---------------------------------------------------------------------------- several


@pytest.fixture(scope="module")
def ranks():
    started = Ranks("ranks_worker")
    yield started
    started.close()


def run_on(ranks, count, out, last, **options):
    out.mkdir(exist_ok=True)
    codes, told = ranks.run(count, "ranks_worker:main", {"out": str(out), "last": last, **options})
    assert codes == [0] * count, told
    return load_file(out / "state.safetensors")


def close(one, other):
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5) for name in one)


def test_resharded_on_the_way_it_ends_as_one_process_does(tmp_path, ranks, uninterrupted):
    for count, last in ((2, 3), (1, 6), (3, 9)):
        state = run_on(ranks, count, tmp_path, last, every=0, config={"seconds": 0.0})
    assert close(state, uninterrupted)
    assert not close(state, run(tmp_path / "shorter", 8))
    assert visible(tmp_path)[0] == "checkpoint-00000009"


@pytest.mark.slow
def test_another_tensor_degree_regroups_rows(tmp_path, ranks, uninterrupted):
    split = {"tensor": 2}
    state = run_on(ranks, 2, tmp_path, 3, parallel=split)
    about = json.loads((tmp_path / "checkpoint-00000003/run.json").read_text())
    assert about["tensor"] == 2 and about["ranks"] == 2
    assert same(run_on(ranks, 1, tmp_path, 3), state)
    state = run_on(ranks, 1, tmp_path, 6)
    assert same(run_on(ranks, 2, tmp_path, 6, parallel=split), state)
    assert close(run_on(ranks, 2, tmp_path, 9, parallel=split), uninterrupted)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_export_gives_the_same_bytes_from_any_number_of_ranks(tmp_path, ranks):
    run(tmp_path, 2)
    model, optimizer = make(Parallel(), seed=1)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.load(model, optimizer)
    provenance = {"verb": "test"}
    save(model, tmp_path / "plain", tokenizer=None, provenance=provenance)
    export_model(model, Parallel(), tmp_path / "one", None, provenance)
    run_on(ranks, 3, tmp_path, 2, export=str(tmp_path / "three"))
    run_on(ranks, 2, tmp_path, 2, export=str(tmp_path / "two"), parallel={"tensor": 2})
    expected = contents(tmp_path / "plain")
    assert "model.safetensors" in expected and "README.md" in expected
    for name in ("one", "two", "three"):
        assert contents(tmp_path / name) == expected, name
    assert same(dict(load(tmp_path / "three").state_dict()), dict(model.state_dict()))


def test_export_that_fails_on_rank_0_fails_on_all(tmp_path, ranks):
    (tmp_path / "file").write_text("")
    options = {"out": str(tmp_path), "last": 1, "export": str(tmp_path / "file/model")}
    codes, told = ranks.run(2, "ranks_worker:main", options)
    assert codes == [2, 2] and told.count("file/model: not written") == 2, told


def test_a_full_disk_on_one_rank_stops_all(tmp_path, ranks, uninterrupted):
    options = {"out": str(tmp_path), "last": 9, "full": {"rank": 1, "step": 4}}
    codes, told = ranks.run(2, "ranks_worker:main", options)
    assert codes == [2, 2], told
    lines = told.splitlines()
    assert len(lines) == 2 and len(set(lines)) == 1
    assert "checkpoint-00000004: not written, that of step 3 is kept: no space left on device" in lines[0]
    assert visible(tmp_path) == ["checkpoint-00000003"]
    assert close(run_on(ranks, 2, tmp_path, 9), uninterrupted)
