"""What all verbs share: parts and processes change nothing, what is written is what was trained, wrong runs stop."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align_helpers import foreign, our_folder, ours, pairs, rows, told, write_lines
from galenic.align import tdpo
from galenic.align.config import LimitsConfig, LoraConfig, ReferenceConfig, TdpoConfig
from galenic.align.pairs import Pair, Pairs
from galenic.align.policy import Reference
from galenic.align.training import Run, opened
from galenic.model.foreign import load_any
from galenic.pretrain.checkpoints.checkpoints import Checkpoints
from galenic.pretrain.config import CheckpointConfig, GuardConfig, OptimConfig, ParallelConfig
from galenic.pretrain.loop import Silent, Trainer
from galenic.runtime import UserError, read_json


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_step):
    return our_folder(tmp_path_factory.mktemp("base") / "model", tokenizer_step)


@pytest.fixture(scope="module")
def pair_file(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pairs())


def make_config(out, base, pair_file, **changes):
    Path(out).mkdir(parents=True, exist_ok=True)
    values = {
        "out": str(out),
        "model": str(base),
        "pairs": pair_file,
        "heldout_share": 0.2,
        "rows": 4,
        "context": 64,
        "optim": OptimConfig(lr=3e-3, warmup_steps=1),
        "checkpoints": CheckpointConfig(seconds=0, asynchronous=False),
    }
    return TdpoConfig(**{**values, **changes})


def weights(out):
    (file,) = Path(out).glob("model/*.safetensors")
    return load_file(file)


# ---------------------------------------------------------------------------- parts of a batch


def encoded(count=24, vocabulary=64):
    """Pairs of answers whose lengths are very different, as token ids."""
    generator = torch.Generator().manual_seed(5)

    def drawn(length):
        return torch.randint(4, vocabulary, (length,), generator=generator).tolist()

    found = []
    for number in range(count):
        prompt = drawn(2 + number % 3)
        chosen, rejected = (prompt + drawn(1 + (number * factor) % 9) for factor in (1, 4))
        found.append(Pair(id=f"pair:{number}", chosen=chosen, rejected=rejected, prompt=len(prompt)))
    return found


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (lambda: ours(64).double(), 1e-12),
        (lambda: foreign("llama").double(), 1e-10),  # some of its steps are in float32
        (lambda: foreign("gemma2").double(), 1e-6),  # and its norms too
    ],
    ids=["ours", "llama", "gemma2"],
)
def test_eight_parts_of_one_row_are_one_of_eight(tmp_path, make, tolerance):
    def gradients(micro_rows):
        model = make()
        config = make_config(tmp_path / "none", "base", "pairs")
        reference = Reference(model, ReferenceConfig(), base="base")
        with torch.no_grad():  # away from the reference, so that every term counts
            for number, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        objective = tdpo.TdpoObjective(config, reference, product=reference.product)
        out = tmp_path / str(micro_rows)
        trainer = Trainer(
            model, config.optim, GuardConfig(max_skips=0), out, micro_rows=micro_rows, objective=objective
        )
        out.mkdir()
        found = {}
        trainer._clip = lambda norm: found.update({n: p.grad.clone() for n, p in model.named_parameters()})
        batches = Pairs(encoded(), rows=8, epochs=1, context=16, seed=0)
        return found, trainer.train_step(batches, 1, 0.0)

    whole, row = gradients(0)
    assert row["kl"] > 0.01 and row["loss"] > 0
    assert all(gradient.abs().max() > 0 for gradient in whole.values())
    for micro_rows in (1, 3):
        parts, other = gradients(micro_rows)
        for name in ("loss", "grad_norm", *tdpo.TdpoObjective.measures):
            assert other[name] == pytest.approx(row[name], rel=tolerance), name
        for name, gradient in whole.items():
            assert (parts[name] - gradient).norm() < tolerance * gradient.norm(), name


class Nothing:
    """An objective and its batches: the loss is the model's mean weight."""

    steps, rows, context, domains = 100, 2, 4, ()
    measures = ("kl",)

    def batch(self, step, rows):
        return {"input_ids": torch.zeros(len(rows), 4, dtype=torch.long)}

    def documents(self, step):
        return [f"nothing:{step}"]

    def state(self, step):
        return {}

    def units(self, part):
        return len(part["input_ids"])

    def __call__(self, model, part, units):
        size = len(part["input_ids"])
        loss = sum(parameter.mean() for parameter in model.parameters()) * size / units
        return loss, {"kl": (3.0 * size, size)}


def test_no_checkpoint_falls_between_steps_that_belong_together(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Trainer, "save", lambda self: saved.append(self.step))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(seconds=0))
    trainer = Trainer(
        ours(),
        OptimConfig(),
        GuardConfig(max_skips=0),
        tmp_path,
        checkpoints=checkpoints,
        objective=Nothing(),
    )
    trainer.train(Nothing(), first=0, last=8, lr=lambda step: 1e-3, bar=Silent(), together=3)
    assert saved == [3, 6]
    assert [row["kl"] for row in trainer.rows()] == [3.0] * 8


def test_a_check_sees_every_row_and_ends_the_run(tmp_path):
    seen = []

    def check(row):
        seen.append(row["step"])
        if row["step"] == 3:
            raise UserError("far enough")

    trainer = Trainer(ours(), OptimConfig(), GuardConfig(max_skips=0), tmp_path, objective=Nothing())
    with pytest.raises(UserError, match="far enough"):
        trainer.train(Nothing(), first=0, last=8, lr=lambda step: 1e-3, bar=Silent(), check=check)
    assert seen == [1, 2, 3]
    assert [row["step"] for row in trainer.rows()] == [1, 2, 3]  # the row that tells why is there


# ---------------------------------------------------------------------------- a run


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("folder", ["base", "llama_folder"])
def test_a_run_learns_and_repeats_itself(request, folder, pair_file, tmp_path, lora):
    model = request.getfixturevalue(folder)
    for name in ("a", "b"):
        tdpo.run(make_config(tmp_path / name, model, pair_file, lora=lora, epochs=3))
    one, other = (tmp_path / name for name in ("a", "b"))
    assert told(one) == told(other) and told(one, "heldout") == told(other, "heldout")
    for file in sorted((one / "model").iterdir()):
        assert file.read_bytes() == (other / "model" / file.name).read_bytes(), file.name
    first, last = rows(one, "heldout")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)  # the policy is its reference
    assert first["kl"] < 1e-6 < last["kl"]
    assert sum(row["loss"] for row in rows(one)[-5:]) < 5 * 0.66
    assert not list(one.glob("checkpoint-*")) and not list(one.glob(".*"))
    assert read_json(one / "model" / "galenic.json")["verb"] == "tdpo"


def test_what_is_written_is_what_was_trained(base, pair_file, tmp_path):
    from galenic.evaluate.models import open_model

    config = make_config(tmp_path / "a", base, pair_file)
    with opened("tdpo", config) as run:
        run.fit(Nothing(), Nothing(), steps=5)
        expected = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        run.write({"pairs": 1}, pairs="p.jsonl")
    found = load_any(tmp_path / "a" / "model").state_dict()
    start = load_any(base).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not any(torch.equal(found[name], start[name]) for name in found)
    assert read_json(tmp_path / "a" / "data.json") == {"steps": 5, "pairs": 1}

    config = make_config(tmp_path / "b", base, pair_file, lora=LoraConfig(rank=2))
    with opened("tdpo", config) as run:

        class OfAdapter(Nothing):
            def __call__(self, model, part, units):
                trained = [p for p in model.parameters() if p.requires_grad]
                return sum(p.mean() for p in trained) * len(part["input_ids"]) / units, {}

        run.fit(Nothing(), OfAdapter(), steps=5)
        run.model.eval()
        ids = torch.arange(4, 20)[None]
        logits = run.model(input_ids=ids).logits
        run.write({})
    again = open_model(f"{base}+{tmp_path / 'b' / 'model'}")
    torch.testing.assert_close(again(input_ids=ids).logits, logits, atol=1e-4, rtol=1e-4)


def test_an_attached_module_is_trained_and_saved_but_not_written(base, pair_file, tmp_path):
    class Valued(Nothing):
        def __call__(self, model, part, units):
            return model.value_head.weight.sum() * len(part["input_ids"]) / units, {}

    def run_to(last, steps):
        config = make_config(tmp_path / "a", base, pair_file)
        with opened("ppo", config) as run:
            torch.manual_seed(1)
            run.attach("value_head", torch.nn.Linear(32, 1, bias=False))
            start = run.model.value_head.weight.detach().clone()
            run.fit(Nothing(), Valued(), steps=steps)
            head = run.model.value_head.weight.detach().clone()
            if last:
                run.write({})
            return start, head

    def stop(self):
        raise KeyboardInterrupt

    start, _ = run_to(False, 6)  # without `write` its checkpoint of step 5 stays
    saved = next((tmp_path / "a").glob("checkpoint-00000005")) / "model"
    names = [name for file in saved.iterdir() for name in load_file(file)]
    assert "value_head.weight" in names
    _, head = run_to(True, 6)
    assert not torch.equal(start, head)
    assert not any("value" in name for name in weights(tmp_path / "a"))
    load_any(tmp_path / "a" / "model")


def test_a_finished_run_leaves_nothing_behind_and_does_nothing_again(base, pair_file, tmp_path):
    config = make_config(tmp_path / "a", base, pair_file)
    tdpo.run(config)
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    shutil.copytree(tmp_path / "a" / "model", tmp_path / "a" / "checkpoint-00000003")  # a kill left it
    tdpo.run(config)
    assert before == {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------- to continue


def cut_after(step, monkeypatch):
    """Lets a run end as by a kill after a step's checkpoint."""
    save = Trainer.save

    def saved(self):
        save(self)
        if self.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", saved)


def test_inputs_may_move_but_not_change(base, pair_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_after(3, patch)
        tdpo.run(make_config(out, base, pair_file))
    moved = shutil.copytree(base, tmp_path / "moved" / "model")
    copied = shutil.copyfile(pair_file, tmp_path / "copied.jsonl")
    for changes, says in (
        ({"beta": 0.2}, "beta: 0.2 given, 0.1 found"),
        ({"reference": ReferenceConfig(model=str(moved))}, "reference.model: true given, null found"),
        ({"lora": LoraConfig()}, "lora"),
    ):
        with pytest.raises(UserError, match=says):
            tdpo.run(make_config(out, base, pair_file, **changes))
    assert list(out.glob("checkpoint-00000003"))
    tdpo.run(make_config(out, moved, str(copied), parallel=ParallelConfig(micro_rows=4)))
    tdpo.run(make_config(tmp_path / "whole", base, pair_file))
    assert [row["loss"] for row in rows(out)] == [row["loss"] for row in rows(tmp_path / "whole")]
    ours, others = weights(out), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], others[name]) for name in others)


# ---------------------------------------------------------------------------- what is refused


def test_rows_that_do_not_divide_are_refused(base, pair_file, tmp_path):
    with opened("tdpo", make_config(tmp_path / "a", base, pair_file)) as run:
        run.parallel.data_ranks = 4
        with pytest.raises(UserError, match="rows: 2 in a batch do not divide among 4 processes"):
            run.fit(Nothing(), Nothing(), steps=1)


def test_a_run_gone_astray_stops_and_keeps_its_last_checkpoint(base, pair_file, tmp_path):
    out, limits = tmp_path / "a", LimitsConfig(kl=1e-9, steps=3)
    for _ in range(2):  # the same command again finds the same
        with pytest.raises(UserError, match=r"step 3: .* more than limits.kl 1e-09: lower optim.lr"):
            tdpo.run(make_config(out, base, pair_file, limits=limits))
        assert (
            list(out.glob("checkpoint-*")) == [out / "checkpoint-00000002"] and not (out / "model").exists()
        )


@pytest.mark.parametrize("name", ["context", "tensor"])
def test_only_rows_and_weights_are_shared(base, pair_file, tmp_path, name):
    config = make_config(tmp_path / "a", base, pair_file, parallel=ParallelConfig(**{name: 2}))
    with pytest.raises(UserError, match=f"parallel.{name}: alignment shares rows and weights only"):
        Run("tdpo", config, load_any)


def test_a_step_draws_no_random_number(tmp_path, tokenizer_step):
    folder = tmp_path / "gpt2"
    model = foreign("gpt2", vocab_size=512, attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3)
    model.save_pretrained(folder)
    shutil.copyfile(tokenizer_step / "tokenizer.json", folder / "tokenizer.json")
    config = make_config(tmp_path / "a", folder, "pairs")
    with opened("tdpo", config) as run:
        run.model.train()
        ids = torch.arange(4, 20)[None]
        state = torch.get_rng_state()
        one, other = (run.model(input_ids=ids).logits for _ in range(2))
        assert torch.equal(one, other) and torch.equal(state, torch.get_rng_state())
    assert json.loads((folder / "config.json").read_text())["resid_pdrop"] == 0.3
