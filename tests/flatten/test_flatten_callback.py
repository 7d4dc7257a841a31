"""The Trainer of transformers shifts at the ends of epochs, and a resumed run does the same."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from galenic.flatten import ShiftCallback, TrainingShift
from galenic.runtime import UserError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.drop, self.head = nn.Linear(4, 20), nn.Dropout(0.5), nn.Linear(20, 2)
        self.trained, self.passes = [], []

    def forward(self, x, labels):
        (self.trained if self.training else self.passes).append(x)
        logits = self.head(self.drop(torch.tanh(self.body(x))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def samples(count=12):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": torch.tensor(number % 2)} for number, row in enumerate(x)]


def run(out, *, epochs=4, resume=None, batches=2, data=None, model=None, options=None, **arguments):
    model = model or Model()
    shift = TrainingShift(model, ["head"], **{"accuracy": 0.5, "output_budget": 0.0, **(options or {})})
    settings = TrainingArguments(
        str(out),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        seed=3,
        **{"optim": "sgd", "optim_args": "momentum=0.9", "report_to": [], "use_cpu": True},
        **{"disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False, **arguments},
    )
    trainer = Trainer(
        model, settings, train_dataset=data or samples(), callbacks=[ShiftCallback(shift, batches)]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, model


def shifted_at(trainer):
    return [row["step"] for row in trainer.state.log_history if "shifted_layers" in row]


def test_it_shifts_at_epoch_ends_from_the_share_given(tmp_path):
    trainer, model = run(tmp_path)  # 3 steps an epoch
    assert shifted_at(trainer) == [6, 9, 12]
    rows = [row for row in trainer.state.log_history if "shifted_layers" in row]
    assert all(row["shift_norm_after"] < 0.99 * row["shift_norm_before"] for row in rows)
    # Eight of the twelve samples, others each time; the head is in the span of the last ones.
    passes = [torch.cat(model.passes[i : i + 2]) for i in (0, 2, 4)]
    data = torch.stack([sample["x"] for sample in samples()])
    for drawn in passes:
        assert len(drawn) == 8 and all((data == row).all(1).any() for row in drawn)
        assert len(drawn.unique(dim=0)) == 8
    assert not torch.equal(passes[0], passes[1])
    with torch.no_grad():
        basis = torch.linalg.svd(torch.tanh(model.body(passes[2])), full_matrices=False)[2]
        for matrix in (model.head.weight, trainer.optimizer.state[model.head.weight]["momentum_buffer"]):
            assert float((matrix - matrix @ basis.T @ basis).norm()) < 1e-6 * float(matrix.norm())


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_a_resumed_run_shifts_alike(tmp_path, strategy):
    options = {"every": 2, "accuracy": 0.3}  # epochs 2 and 4 of 5
    keep = {"save_strategy": strategy, "save_steps": 3, "epochs": 5, "options": options}
    whole, model = run(tmp_path / "whole", **keep)
    assert shifted_at(whole) == [6, 12]
    for step in (6, 9):  # just after a shift, and between two
        resumed, again = run(tmp_path / f"{step}", resume=str(tmp_path / f"whole/checkpoint-{step}"), **keep)
        assert shifted_at(resumed) == [6, 12]  # the first from the checkpoint's history
        assert len(again.passes) == len(model.passes) // 2
        for one, other in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(one, other)


def test_training_that_ends_within_an_epoch_does_not_shift_there(tmp_path):
    assert shifted_at(run(tmp_path, max_steps=8)[0]) == [6]


def test_drawing_samples_leaves_the_order_of_training_alone(tmp_path):
    orders = []
    for accuracy in (None, 1.0):  # at every epoch's end, at the last alone
        trainer, model = run(tmp_path / str(accuracy), options={"accuracy": accuracy})
        assert len(shifted_at(trainer)) == (4 if accuracy is None else 1)
        orders.append((torch.cat(model.trained), torch.get_rng_state()))
    assert all(torch.equal(one, other) for one, other in zip(*orders, strict=True))


def test_mistakes_are_told(tmp_path):
    shift = TrainingShift(Model(), accuracy=None)
    with pytest.raises(UserError, match="batches: 0"):
        ShiftCallback(shift, 0)
    settings = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, num_train_epochs=1, save_strategy="no"
    )
    trainer = Trainer(Model(), settings, train_dataset=samples(), callbacks=[ShiftCallback(shift)])
    with pytest.raises(UserError, match="made for another model"):
        trainer.train()
