"""How the work of a step is spread over devices. One process: nothing to do."""

from collections.abc import Iterable
from typing import Any

import torch

from galenic.pretrain.config import ArchitectureConfig, ParallelConfig


class Parallel:
    """One process that holds everything."""

    def __init__(
        self, config: ParallelConfig | None = None, *, precision: str = "float32", device: str = "cpu"
    ) -> None:
        self.config = config or ParallelConfig()
        self.precision, self.device = precision, device
        self.data_rank, self.data_ranks, self.loss_scale, self.mesh = 0, 1, 1, None

    def check(self, architecture: ArchitectureConfig, rows: int, context: int) -> None:
        """Refuses what does not divide."""

    def apply(self, model: Any) -> None:
        """Changes the model in place for the way it is computed."""
        model.to(self.device)

    def rows(self, total: int) -> list[int]:
        """Returns this rank's rows of a global batch."""
        return list(range(self.data_rank, total, self.data_ranks))

    def local(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns this rank's tokens of a batch."""
        return batch

    def added(self, sums: torch.Tensor) -> torch.Tensor:
        """Returns the sum over all ranks that hold other tokens."""
        return sums

    def norm(self, parameters: Iterable[torch.nn.Parameter]) -> float:
        """Returns the global norm of the gradients."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))
