import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from galenic.pretrain.checkpoints import Checkpoints
from galenic.pretrain.config import CheckpointConfig, GuardConfig, OptimConfig
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
    with pytest.raises(UserError, match=r"step 0: loss .* is not finite.*drawn:3"):
        trainer.train_step(Drawn(), 0, 1e-3)
    assert torch.equal(weights(trainer), before)
