"""Shifts during training by the Trainer of transformers. The only file of this room that needs transformers."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from galenic.flatten.shifts import choose_rows
from galenic.flatten.training import TrainingShift, unwrapped
from galenic.ranks import rank, ranks
from galenic.runtime import UserError


class ShiftCallback(TrainerCallback):
    """Shifts at the ends of epochs, before the epoch's evaluation and checkpoint.

    Example, from half of the training on:

        shift = TrainingShift(model, ["lm_head"], accuracy=0.5, rank=64)
        Trainer(model, arguments, train_dataset=data, callbacks=[ShiftCallback(shift)]).train()

    The Trainer knows no training accuracy: `accuracy` stands for the share of epochs that are done. A resumed run
    shifts at the same epochs and by the same samples. Each shift adds a row to the Trainer's log history.

    Args:
        shift: of the same model that the Trainer gets.
        batches: number of batches of training samples, of the Trainer's batch size on each process, drawn anew each
            time by the Trainer's seed.
    """

    def __init__(self, shift: TrainingShift, batches: int = 8) -> None:
        if batches < 1:
            raise UserError(f"batches: {batches} is less than 1")
        self.shift, self.batches = shift, batches

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts the epochs that a resumed run has behind it."""
        for epoch in range(1, int(state.epoch or 0) + 1):
            self.shift.due(epoch, min(1.0, epoch / state.num_train_epochs))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shifts at an epoch's last step; at `on_epoch_end` that step's checkpoint would be written already."""
        epoch = round(state.epoch or 0)
        if state.epoch != epoch or not self.shift.due(epoch, min(1.0, epoch / state.num_train_epochs)):
            return
        if unwrapped(kwargs["model"]) is not self.shift.model:
            raise UserError("ShiftCallback: its TrainingShift was made for another model than the Trainer's")
        batches = self._batches(args, epoch, kwargs["train_dataloader"])
        shifts = self.shift.shift(batches, kwargs["optimizer"])
        before, after = (
            sum(getattr(shift, key) ** 2 for shift in shifts.values()) ** 0.5
            for key in ("norm_before", "norm_after")
        )
        row = {"shifted_layers": len(shifts), "shift_norm_before": before, "shift_norm_after": after}
        state.log_history.append({"epoch": state.epoch, "step": state.global_step, **row})

    def _batches(self, args: TrainingArguments, epoch: int, loader: Any) -> Iterator[dict[str, Any]]:
        """Yields this process's batches. They do not come out of the loader: its order must stay the training's."""
        if isinstance(loader.dataset, torch.utils.data.IterableDataset):
            raise UserError(
                "ShiftCallback: samples of an IterableDataset cannot be drawn; call shift yourself"
            )
        total, size = len(loader.dataset), args.train_batch_size
        generator = torch.Generator().manual_seed(args.seed + epoch)
        count = min(total // ranks(), self.batches * size)
        if not count:
            raise UserError(f"ShiftCallback: {total} training samples for {ranks()} processes are too few")
        own = choose_rows(total, count * ranks(), generator=generator)[rank() :: ranks()].tolist()
        for start in range(0, count, size):
            samples = [loader.dataset[index] for index in own[start : start + size]]
            batch = loader.collate_fn(samples)
            yield {k: v.to(args.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
