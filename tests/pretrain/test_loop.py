import json
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM
from galenic.pretrain.checkpoints.checkpoints import Checkpoints
from galenic.pretrain.config import CheckpointConfig, GuardConfig, OptimConfig
from galenic.pretrain.data.collate import collate
from galenic.pretrain.loop import Silent, Trainer
from galenic.runtime import UserError


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


class Drawn:
    """Batches of random tokens, one seed a step."""

    steps, rows, context = 1000, 4, 16
    domains = ()

    def batch(self, step, rows):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 64, (self.rows, self.context), generator=generator)[list(rows)]
        return {"input_ids": ids, "labels": ids}

    def documents(self, step):
        return [f"drawn:{step * self.rows + row}" for row in range(self.rows)]

    def state(self, step):
        return {"row": step * self.rows}


def make_trainer(out, micro_rows=0, model=None, **guard):
    out.mkdir(exist_ok=True)
    return Trainer(
        model or tiny(),
        OptimConfig(lr=1e-2, warmup_steps=3),
        GuardConfig(**guard),
        out,
        checkpoints=Checkpoints(out, CheckpointConfig(seconds=1e9), run={}),
        micro_rows=micro_rows,
    )


def train(trainer, last):
    trainer.train(Drawn(), first=0, last=last, lr=lambda step: 1e-2 * (step + 1) / 20, bar=Silent())


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_a_step_is_adamw_after_clipping(tmp_path):
    trainer = make_trainer(tmp_path)
    oracle = tiny()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in oracle.named_parameters() if "_proj" in n], "weight_decay": 0.1},
            {"params": [p for n, p in oracle.named_parameters() if "_proj" not in n], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    for step in range(3):
        lr = 1e-2 * (step + 1) / 20
        for group in optimizer.param_groups:
            group["lr"] = lr
        oracle(**Drawn().batch(step, range(4))).loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in oracle.parameters()))
        for p in oracle.parameters():
            p.grad.mul_(min(1.0, 1.0 / (norm + 1e-6)))
        optimizer.step()
        optimizer.zero_grad()
        row = trainer.train_step(Drawn(), step, lr)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
    expected = torch.cat([p.detach().flatten() for p in oracle.parameters()])
    torch.testing.assert_close(weights(trainer), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cut", [1, 5, 9])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, cut):
    whole = make_trainer(tmp_path / "whole", history=4)
    train(whole, 10)

    first = make_trainer(tmp_path / "cut", history=4)
    train(first, cut)
    first.save()
    train(first, min(cut + 2, 10))  # steps after the checkpoint are lost to the kill ...
    first.checkpoints.wait()
    second = make_trainer(tmp_path / "cut", history=4)
    assert second.resume()
    assert second.step == cut
    assert [row["step"] for row in second.rows()] == list(range(1, cut + 1))  # ... and their rows too
    train(second, 10)
    assert torch.equal(weights(second), weights(whole))
    assert list(second.guard.norms) == list(whole.guard.norms)
    losses = [[row["loss"] for row in trainer.rows()] for trainer in (whole, second)]
    assert losses[0] == losses[1]


def test_only_the_newest_checkpoint_stays_and_none_after_the_end(tmp_path):
    trainer = make_trainer(tmp_path)
    for last in (1, 2, 3):
        train(trainer, last)
        trainer.save()
        trainer.checkpoints.wait()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000003"]
    trainer.finish()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_skipped_step_changes_nothing_but_the_record(tmp_path):
    trainer = make_trainer(tmp_path, history=1, factor=0.0, offset=0.0)  # every later norm is a spike
    train(trainer, 1)
    before = weights(trainer)
    train(trainer, 2)
    assert torch.equal(weights(trainer), before)
    train(trainer, 3)
    assert not torch.equal(weights(trainer), before)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [False, True, False]
    assert [row.get("documents") for row in rows] == [None, Drawn().documents(1), None]


def test_a_row_cut_short_by_a_kill_is_dropped(tmp_path):
    trainer = make_trainer(tmp_path)
    train(trainer, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "tr')
    assert [row["step"] for row in trainer.rows()] == [1, 2]


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("inf")
    before = weights(trainer)
    with pytest.raises(UserError, match=r"step 1: loss .* is not finite.*drawn:3"):
        trainer.train_step(Drawn(), 0, 1e-3)
    assert torch.equal(weights(trainer), before)


def test_nothing_not_finite_reaches_the_optimizer_and_the_documents_are_named(tmp_path):
    """The loss is finite, a gradient is not; the run goes on from its checkpoint once the cause is gone."""
    whole = make_trainer(tmp_path / "whole")
    train(whole, 5)
    trainer = make_trainer(tmp_path / "cut")
    train(trainer, 2)
    trainer.save()
    train(trainer, 3)
    before = weights(trainer), [s["step"].item() for s in trainer.optimizer.state.values()]
    hook = trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(
        UserError, match=r"step 4: loss [\d.]+ or gradient norm (inf|nan) .*drawn:12, drawn:13"
    ):
        train(trainer, 5)
    hook.remove()
    assert torch.equal(weights(trainer), before[0])
    assert [s["step"].item() for s in trainer.optimizer.state.values()] == before[1]
    row = trainer.rows()[-1]
    assert (row["kind"], row["step"], row["documents"]) == ("stopped", 4, Drawn().documents(3))
    again = make_trainer(tmp_path / "cut")
    assert again.resume() and again.step == 2
    train(again, 5)
    assert torch.equal(weights(again), weights(whole))
    assert [row["kind"] for row in again.rows()] == ["train"] * 5


def test_adam_s_counters_stand_still_on_a_skip_and_the_schedule_goes_on(tmp_path):
    trainer = make_trainer(tmp_path, history=1, factor=0.0, offset=0.0)  # every later norm is a spike
    train(trainer, 6)
    rows = trainer.rows()
    assert [row["skipped"] for row in rows] == [False, True] * 3
    assert [row["lr"] for row in rows] == pytest.approx([1e-2 * (step + 1) / 20 for step in range(6)])
    assert {state["step"].item() for state in trainer.optimizer.state.values()} == {3.0}


# ---------------------------------------------------------------------------- micro-batches


class Packed:
    """Rows of very different numbers of targets, one without any; two domains."""

    steps, rows, context = 1000, 8, 32
    domains = ("one", "other")

    def batch(self, step, rows):
        drawn = np.random.default_rng(step)
        lengths = [drawn.integers(1, [33, 12, 4, 2, 33, 20, 2, 30][row], 2) for row in range(self.rows)]
        ids = [[drawn.integers(0, 64, n) for n in row] for row in lengths]
        laid, domains = [], np.full((self.rows, self.context), -1)
        for row, documents in enumerate(ids):
            documents = documents if sum(map(len, documents)) <= self.context else documents[:1]
            laid.append([(tokens, tokens) for tokens in documents])
            filled = np.repeat(np.arange(len(documents)), [len(tokens) for tokens in documents])
            domains[row, : len(filled)] = filled
        batch = {**collate(laid, self.context, 0), "domains": torch.from_numpy(domains)}
        return {name: tensor[list(rows)] for name, tensor in batch.items()}

    def documents(self, step):
        return [f"packed:{step}"]

    def state(self, step):
        return {}


def ours(dtype=torch.float32):
    torch.manual_seed(0)
    config = BaichuanM1Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_swa_attention_heads=2,
        num_swa_key_value_heads=1,
        sliding_window=8,
        sliding_window_layers=[1],
    )
    return BaichuanM1ForCausalLM(config).to(dtype)


def gradients(trainer, step, batches):
    """Gradients of a batch before clipping, and its row."""
    found = {}
    trainer._clip = lambda norm: found.update(
        {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    )
    row = trainer.train_step(batches, step, 0.0)
    return found, row


@pytest.mark.parametrize(
    ("make", "dtype", "tolerance"),
    [(ours, torch.float64, 1e-12), (ours, torch.float32, 1e-5), (tiny, torch.float32, 1e-5)],
    ids=["float64", "float32", "foreign"],
)
def test_eight_micro_batches_of_one_row_are_one_of_eight(tmp_path, make, dtype, tolerance):
    found = [
        gradients(make_trainer(tmp_path / f"{rows}", rows, make().to(dtype)), 1, Packed())
        for rows in (0, 1, 3)
    ]
    whole, row = found[0]
    assert all(value.abs().max() > 0 for value in whole.values())
    for parts, other in found[1:]:
        assert other["loss"] == pytest.approx(row["loss"], rel=tolerance)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=tolerance)
        for name, value in whole.items():
            error = (parts[name] - value).norm() / value.norm()
            assert error < tolerance, (name, float(error))


@pytest.mark.parametrize("micro_rows", [0, 1])
def test_loss_and_domains_are_means_over_their_own_targets(tmp_path, micro_rows):
    trainer = make_trainer(tmp_path, micro_rows, ours(torch.float64))
    batch = Packed().batch(5, range(8))
    domains = batch.pop("domains")
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = trainer.model(**batch, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    wanted, of = labels[:, 1:].flatten() != -100, domains[:, :-1].flatten()
    row = trainer.train_step(Packed(), 5, 1e-3)
    assert row["loss"] == pytest.approx(float(losses[wanted].mean()), rel=1e-6)
    assert list(row["domains"]) == ["one", "other"]
    for number, name in enumerate(Packed.domains):
        expected = losses[wanted & (of == number)].mean()
        assert row["domains"][name] == pytest.approx(float(expected), rel=1e-6)
    assert trainer.read == {name: int((domains == k).sum()) for k, name in enumerate(Packed.domains)}


def test_a_batch_without_any_target_changes_nothing(tmp_path):
    class Empty(Packed):
        def batch(self, step, rows):
            batch = super().batch(step, rows)
            return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    # Among other processes, each has to take part in every pass.
    for name, make, sharded in (("ours", ours, False), ("foreign", tiny, False), ("shared", tiny, True)):
        trainer = make_trainer(tmp_path / name, 1, make())
        trainer.parallel.sharded = sharded
        trainer.optimizer.param_groups[0]["weight_decay"] = 0.0
        before = weights(trainer)
        row = trainer.train_step(Empty(), 0, 1e-3)
        assert (row["loss"], row["grad_norm"]) == (0.0, 0.0)
        assert torch.equal(weights(trainer), before)
