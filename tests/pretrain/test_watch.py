import json
import os
import sys
import types

import heldout_worker
import pytest
import torch

from galenic.pretrain.config import GuardConfig, OptimConfig, WatchConfig
from galenic.pretrain.loop import Trainer
from galenic.pretrain.watching import watch as module
from galenic.pretrain.watching.sinks import MODULES, run_name, scalars
from galenic.pretrain.watching.watch import (
    Watch,
    matmul_peak,
    memory_gb,
    model_flops_utilisation,
    seconds_left,
)
from galenic.runtime import UserError, peak_memory_bytes


def train_row(step, *, phase="p", tokens=10, seconds=0.5, **more):
    return {
        "kind": "train",
        "phase": phase,
        "step": step,
        "tokens": step * tokens,
        "loss": 3.0 / step,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "skipped": False,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        **more,
    }


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------- numbers, worked by hand


def test_mfu_is_the_models_own_flops_over_what_the_devices_could():
    # 1000 tokens/s x 6 GFLOP = 6 TFLOP/s; two devices of 10 TFLOP/s: 6 of 20
    assert model_flops_utilisation(1000.0, 6e9, devices=2, peak=10e12) == pytest.approx(0.3)


def test_time_left_counts_later_phases_by_their_flops():
    # 40 tokens of 2 FLOP at 20 FLOP/s take 4 s; 50 of 4 FLOP take 10 s
    assert seconds_left([(40, 2.0), (50, 4.0)], 20.0) == pytest.approx(14.0)


def test_the_peak_is_the_median_of_several_products(monkeypatch):
    # two for warming up, then 0.1 0.5 0.2 seconds
    durations = iter([9.0, 9.0, 0.1, 0.5, 0.2])
    now = 0.0
    ends = False

    def clock():
        nonlocal now, ends
        now += next(durations) if ends else 0.0
        ends = not ends
        return now

    monkeypatch.setattr(module.time, "perf_counter", clock)
    assert matmul_peak("cpu", torch.float32, size=10, repeats=3) == pytest.approx(2 * 10**3 / 0.2)


def test_the_peak_of_this_machine_is_plausible_and_draws_no_random_number():
    state = torch.get_rng_state()
    peak = matmul_peak("cpu", torch.float32, size=256)
    assert 1e8 < peak < 1e14
    assert torch.equal(torch.get_rng_state(), state)


def test_memory_is_the_most_this_process_has_held():
    assert memory_gb("cpu") == pytest.approx(peak_memory_bytes() / 1e9, rel=0.05)


# ---------------------------------------------------------------------------- rows


def test_a_row_is_on_disk_at_once_with_what_is_measured(tmp_path, monkeypatch):
    clock = iter([100.0, 103.0, 104.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    told = Watch(
        tmp_path,
        WatchConfig(peak_tflops=0.2),
        flops_per_token={"p": 5e9, "q": 10e9},
        tokens={"p": 40, "q": 20},
        devices=2,
    )
    told.row(train_row(1))
    (row,) = lines(tmp_path)  # before anything is closed
    assert row.items() >= train_row(1).items()
    assert row["mfu"] == pytest.approx(20 * 5e9 / (2 * 0.2e12))  # 0.25
    assert row["memory_gb"] == pytest.approx(memory_gb("cpu"), rel=0.05)
    # 20 tokens/s so far; 30 of p left and 20 of q, twice as dear: (30 + 40) / 20
    assert row["eta_seconds"] == pytest.approx(3.5)
    told.row(train_row(2))
    # by the wall clock: 20 tokens in 3.5 s (a score or a checkpoint lay between); 20 of p and 20 of q left
    assert lines(tmp_path)[1]["eta_seconds"] == pytest.approx(60 / (20 / 3.5), abs=0.05)
    told.row(train_row(3, phase="q"))
    # a phase begins: its own speed, 10 tokens in 0.5 s; 10 of q left, and p is over whatever was left of it
    assert lines(tmp_path)[2]["eta_seconds"] == pytest.approx(0.5)
    told.close()


def test_without_flops_and_phases_there_is_no_mfu_and_no_time_left(tmp_path):
    row = Watch(tmp_path).row(train_row(1))
    assert "mfu" not in row and "eta_seconds" not in row


def test_a_resumed_run_cuts_later_rows_and_a_line_cut_short(tmp_path):
    told = Watch(tmp_path)
    for step in range(1, 5):
        told.row(train_row(step, skipped=step % 2 == 0))
        told.row({"kind": "heldout", "phase": "p", "step": step, "bits_per_byte": {"a": 1.0}})
    told.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    again = Watch(tmp_path, tokens={"p": 100})
    again.resume(3)
    assert [(row["kind"], row["step"]) for row in again.rows()] == [
        *(("train", 1), ("heldout", 1), ("train", 2), ("heldout", 2), ("train", 3), ("heldout", 3)),
    ]
    assert again.scored == {1, 2, 3}
    assert again.skips == 1
    row = again.row(train_row(4, skipped=True))
    assert again.skips == 2
    assert row["eta_seconds"] == pytest.approx(
        60 / 20, rel=0.01
    )  # 40 of 100 tokens are done, 30 before the kill
    assert len(lines(tmp_path)) == 7


def test_rows_written_after_a_cut_are_in_the_new_file(tmp_path):
    told = Watch(tmp_path)
    told.row(train_row(1))
    told.row(train_row(2))
    told.resume(1)  # the file is replaced while it is open
    told.row(train_row(2, loss=7.0))
    assert [row["loss"] for row in lines(tmp_path)] == [3.0, 7.0]


def test_a_row_that_is_not_json_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\nnonsense\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not valid JSON"):
        Watch(tmp_path).resume(0)


def test_only_process_0_writes_and_all_know_what_was_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "rank", lambda: 1)
    told = Watch(tmp_path, WatchConfig(to=["tensorboard"]))
    told.row(train_row(1))
    told.row({"kind": "heldout", "phase": "p", "step": 1, "bits_per_byte": {}})
    assert list(tmp_path.iterdir()) == []
    assert told.scored == {1}
    monkeypatch.setattr(module, "gathered", lambda value: [[2, 4], value])
    told.resume(4)
    assert told.scored == {2, 4}
    assert list(tmp_path.iterdir()) == []


def test_the_note_is_short(tmp_path):
    told = Watch(tmp_path)
    row = train_row(1, tokens=6000)
    assert told.note(row) == "loss 3.000, 12k tok/s, lr 1.0e-03"
    told.row(train_row(2, skipped=True))
    assert told.note({**row, "mfu": 0.414}) == "loss 3.000, 12k tok/s, MFU 41%, 1 skipped, lr 1.0e-03"


# ---------------------------------------------------------------------------- what training tells


class TwoSources:
    """Two rows of 8 a step: three documents of two sources and padding, always the same shape."""

    steps, rows, context, domains = 3, 2, 8, ["a", "b"]
    # row 0: five tokens of a, three of b; row 1: six tokens of b, two of padding
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1]])
    of = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, -1, -1]])

    def batch(self, step, rows):
        ids = torch.randint(4, 60, (2, 8), generator=torch.Generator().manual_seed(step))
        labels = ids.masked_fill((self.position_ids == 0) | (self.of < 0), -100)
        whole = {"input_ids": ids, "position_ids": self.position_ids, "labels": labels, "domains": self.of}
        return {name: tensor[list(rows)] for name, tensor in whole.items()}

    def documents(self, step):
        return [f"a:{step}", f"b:{step}", f"b:{step + 100}"]

    def state(self, step):
        return {}


class NoBar:
    def update(self, n=1, note=""):
        self.note = note


def test_training_tells_each_sources_loss_and_how_often_it_was_read(tmp_path, tokenizer_step):
    config = heldout_worker.configured(tokenizer_step, 8)
    model = heldout_worker.network(config)
    batches, wanted = TwoSources(), {}
    for step in range(2):  # the mean over each source's targets, document by document; lr 0 changes nothing
        ids = batches.batch(step, [0, 1])["input_ids"]
        sums = {}
        for name, document in (("a", ids[0, :5]), ("b", ids[0, 5:]), ("b", ids[1, :6])):
            logits = model(document[None]).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, document[1:], reduction="none")
            sums.setdefault(name, []).extend(losses.tolist())
        wanted[step + 1] = {name: sum(values) / len(values) for name, values in sums.items()}
    optim = OptimConfig(lr=1e-9, weight_decay=0.0)
    guard = GuardConfig(history=1, factor=0.0, offset=0.0, max_skips=1)  # every other step at most is skipped
    trainer = Trainer(model, optim, guard, tmp_path, watch=Watch(tmp_path))
    bar = NoBar()
    trainer.train(batches, first=0, last=2, lr=lambda step: 0.0, bar=bar, sizes={"a": 20, "b": 36}, phase="p")
    rows = lines(tmp_path)
    for row in rows:
        assert row["domains"] == pytest.approx(wanted[row["step"]], rel=1e-5)
    # 5 of a's 20 and 9 of b's 36 tokens a step; padding is nobody's
    assert [row["repeats"] for row in rows] == [{"a": 0.25, "b": 0.25}, {"a": 0.5, "b": 0.5}]
    assert [row["skipped"] for row in rows] == [False, True]
    assert rows[1]["documents"] == ["a:1", "b:1", "b:101"] and "documents" not in rows[0]
    assert bar.note.endswith("tok/s, 1 skipped, lr 0.0e+00")


# ---------------------------------------------------------------------------- sinks


class FakeRun:
    """Stands in for a run of wandb or trackio, and for TensorBoard's writer."""

    def __init__(self, **options):
        self.options, self.rows, self.closed = options, [], False

    def log(self, values, step):
        self.rows.append((step, values))

    def add_scalar(self, tag, value, step):
        self.rows.append((step, {tag: value}))

    def finish(self):
        self.closed = True

    close = finish


@pytest.fixture
def fakes(monkeypatch):
    """Fake packages; returns {name: the runs that were opened}."""
    opened = {"tensorboard": [], "wandb": [], "trackio": []}

    def opener(name):
        def init(log_dir=None, **options):
            opened[name].append(FakeRun(log_dir=log_dir, **options))
            return opened[name][-1]

        return init

    wandb = types.SimpleNamespace(init=opener("wandb"), Settings=lambda **options: options)
    board = types.SimpleNamespace(SummaryWriter=opener("tensorboard"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=opener("trackio")))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    for name in ("WANDB_MODE", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, "x")  # so that it is as before after the test
        monkeypatch.delenv(name)
    return opened


ALL = WatchConfig(to=["tensorboard", "wandb", "trackio"], project="mine", peak_tflops=1.0)


def test_numbers_have_names_and_words_stay_behind():
    row = train_row(2, skipped=True, domains={"hpo": 2.0, "mesh": 1}, documents=["hpo:7"])
    found = scalars(row)
    assert found["train/domains/hpo"] == 2.0 and found["train/domains/mesh"] == 1.0
    assert found["train/skipped"] == 1.0
    assert not {"train/kind", "train/phase", "train/step", "train/documents"} & found.keys()
    heldout = {"kind": "heldout", "phase": "p", "step": 3, "bits_per_byte": {"hpo": 1.5}}
    assert scalars(heldout) == {"heldout/bits_per_byte/hpo": 1.5}


def test_every_sink_gets_the_rows_of_the_file(tmp_path, fakes):
    told = Watch(tmp_path, ALL)
    told.resume(0)
    row = told.row(train_row(1, domains={"a": 2.0}))
    told.close()
    assert lines(tmp_path) == [row]
    wanted = scalars(row)
    for name, (run,) in fakes.items():
        assert {step for step, _ in run.rows} == {1}, name
        assert {key: value for _, values in run.rows for key, value in values.items()} == wanted, name
        assert run.closed
    assert fakes["tensorboard"][0].options["log_dir"] == str(tmp_path / "tensorboard")
    assert fakes["wandb"][0].options["project"] == fakes["trackio"][0].options["project"] == "mine"


def test_a_resumed_run_goes_on_in_the_same_place_and_no_row_is_there_twice(tmp_path, fakes):
    told = Watch(tmp_path, ALL)
    told.resume(0)
    for step in range(1, 6):
        told.row(train_row(step))
    again = Watch(tmp_path, ALL)
    again.resume(3)
    for step in range(4, 8):
        again.row(train_row(step))
    for name in ("wandb", "trackio"):
        first, second = fakes[name]
        assert [step for run in (first, second) for step, _ in run.rows] == list(range(1, 8)), name
        assert first.options["name"] == second.options["name"] == run_name(tmp_path)
        assert second.options["resume"] == "allow"
    assert fakes["wandb"][0].options["id"] == fakes["wandb"][1].options["id"]
    first, second = fakes["tensorboard"]
    assert second.options["purge_step"] == 4  # TensorBoard forgets what it was told of step 4 and later
    assert {step for step, _ in second.rows} == {4, 5, 6, 7}


def test_another_run_has_another_name(tmp_path):
    names = set()
    for place in ("one", "other"):
        (tmp_path / place / "30-pretrain").mkdir(parents=True)
        names.add(run_name(tmp_path / place / "30-pretrain"))
    assert len(names) == 2 and all(name.startswith("30-pretrain-") for name in names)


def test_wandb_is_offline_unless_the_user_says_otherwise(tmp_path, fakes, monkeypatch):
    Watch(tmp_path, WatchConfig(to=["wandb"])).resume(0)
    assert os.environ["WANDB_MODE"] == "offline"
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    monkeypatch.setenv("WANDB_MODE", "online")
    Watch(tmp_path, WatchConfig(to=["wandb"])).resume(0)
    assert os.environ["WANDB_MODE"] == "online"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named_with_the_way_out(tmp_path, fakes, monkeypatch, name):
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    with pytest.raises(UserError, match=rf"watch.to: '{name}' needs .* pip install 'galenic\[watch\]'"):
        Watch(tmp_path, WatchConfig(to=["tensorboard", "trackio", "wandb"])).resume(0)
    assert list(tmp_path.iterdir()) == []  # nothing half-made


def test_a_sink_that_fails_does_not_end_the_training(tmp_path, fakes, capsys):
    told = Watch(tmp_path, ALL)
    told.resume(0)
    fakes["wandb"][0].log = None
    told.row(train_row(1))
    told.row(train_row(2))
    told.close()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]
    assert [step for step, _ in fakes["trackio"][0].rows] == [1, 2]
    assert capsys.readouterr().err.count("no more rows go to wandb") == 1


def test_the_real_tensorboard_shows_each_step_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for back, steps in ((0, range(1, 6)), (3, range(4, 8))):
        told = Watch(tmp_path, WatchConfig(to=["tensorboard"]))
        told.resume(back)
        for step in steps:
            told.row(train_row(step))
        told.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 8))


def test_the_real_trackio_keeps_each_step_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    import sqlite3

    out = tmp_path / "run"
    out.mkdir()
    for back, steps in ((0, range(1, 6)), (3, range(4, 8))):
        told = Watch(out, WatchConfig(to=["trackio"]))
        told.resume(back)
        for step in steps:
            told.row(train_row(step))
        told.close()
    with sqlite3.connect(next((tmp_path / "trackio").glob("*.db"))) as store:
        found = store.execute("select run_name, step from metrics order by step").fetchall()
    assert found == [(run_name(out), step) for step in range(1, 8)]


def test_the_real_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for back, steps in ((0, range(1, 4)), (2, range(3, 6))):
        told = Watch(tmp_path, WatchConfig(to=["wandb"]))
        told.resume(back)
        for step in steps:
            told.row(train_row(step))
        told.close()
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert {file.stem for file in files} == {f"run-{run_name(tmp_path)}"}
