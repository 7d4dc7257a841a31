"""Optimum shifting in the course of fine-tuning; the section `shift` of `sft`."""

from collections.abc import Callable, Sequence
from typing import Any

from galenic.align.config import ShiftConfig
from galenic.corpus.tokens.chat_format import PAD
from galenic.flatten.apply import whole
from galenic.flatten.layers import select_layers, weight_of
from galenic.flatten.training import TrainingShift
from galenic.pretrain.data.collate import collate
from galenic.pretrain.loop import Trainer
from galenic.ranks import rank
from galenic.runtime import append_jsonl


def shifter(
    config: ShiftConfig, trainer: Trainer, steps: range, rows: Callable[[int], Sequence[list[Any]]]
) -> Callable[[int], None]:
    """Makes what `Trainer.train` calls after each step. It depends on the step alone, so that a run can resume.

    Args:
        config: what to do.
        trainer: before it resumes: the model is still the one that shifts are anchored to.
        steps: after which to shift.
        rows: step -> the rows trained on, each as its samples (token ids, labels).

    Raises:
        UserError: the model has no such layers.
    """
    names = select_layers(trainer.model, config.layers)
    start = {
        name: whole(weight_of(trainer.model, name).detach()).clone() for name in names if config.anchored
    }
    shift = TrainingShift(
        trainer.model,
        names,
        accuracy=None,
        method=config.method,
        output_budget=config.output_budget,
        rank=config.rank,
        base=start if config.anchored else None,
    )

    def inputs(row: list[Any]) -> dict[str, Any]:
        """A row without the filling at its end: that is no text."""
        batch = collate([row], sum(len(ids) for ids, _ in row), PAD)
        names = ("input_ids", "position_ids")
        return {name: batch[name].to(trainer.device) for name in names} | {"use_cache": False}

    def after(step: int) -> None:
        if step not in steps:
            return
        latest = [rows(index) for index in range(max(0, step - config.batches), step)]
        own = (inputs(batch[row]) for batch in latest for row in trainer.parallel.rows(len(batch)))
        done = shift.shift(own, trainer.optimizer)
        layers = {
            name: {
                "rank": s.rank,
                "dimension": s.dimension,
                "output_change": s.rounded_change,
                "norm_before": s.norm_before,
                "norm_after": s.norm_after,
            }
            for name, s in done.items()
        }
        if rank() == 0:
            append_jsonl(trainer.out / "metrics.jsonl", {"kind": "shift", "step": step, "layers": layers})

    return after
