"""Shifts during training: every few epochs, optimizer and processes included."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from galenic.flatten.apply import default_budget, install, propose, put, whole
from galenic.flatten.layers import is_transposed, select_layers, weight_of
from galenic.flatten.shifts import Shift, check_amount, shift_moments
from galenic.flatten.statistics import Method, Statistics, collect
from galenic.ranks import gathered, process_group, ranks
from galenic.runtime import UserError

FIRST_MOMENTS = ("momentum_buffer", "exp_avg")
"""Means of gradients in an optimizer's state: of SGD, RMSprop and Muon, and of the Adam family."""

LEFT_ALONE = ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "sum", "acc_delta")
"""What scales the steps entry by entry; no linear map of the weight acts on it."""


class TrainingShift:
    """Shifts layers in the course of training; the optimizer's momentum goes along.

    Example, stochastic optimum shifting of a classifier's head on 100 samples after each epoch of the terminal phase:

        shift = TrainingShift(model, ["head"], method="qr", output_budget=0.0)
        for epoch in range(epochs):
            accuracy = train_one_epoch(model, optimizer)
            if shift.due(epoch, accuracy):
                rows = choose_rows(len(x), 100, labels=y, generator=generator)
                shift.shift([x[rows]], optimizer)

    When: after an optimizer's step, with SAM after its second one. A model average (`AveragedModel`) is shifted
    between two calls of `update_bn`, without an optimizer. Where a script has several processes, all of them call
    `shift` with batches of their own and get the same shift: `DistributedDataParallel` is looked through, and of
    `fully_shard` each writes its share.

    What lasts: with SGD the shifted weight stays in the span of the training inputs, for so are all gradients. Adam
    scales each entry by itself (`exp_avg_sq`, which no shift can map) and leaves that span again with the next step.

    Args:
        model: to be trained.
        layers: names or patterns, see `select_layers`.
        every: epochs (or steps) from one shift to the next.
        accuracy: training accuracy at which the terminal phase begins; None or 0: training begins with it. Where there
            is none to speak of, any number from 0 to 1 that grows: the share of steps that are done.
        method: `gram` or `qr`, see `Statistics`.
        output_budget: see `galenic.flatten.shift`, as the following ones.
        rank: see there.
        energy: see there.
        free_bias: see there.
        base: see there.

    Attributes:
        start: the epoch at which the terminal phase began, None before.

    Raises:
        UserError: an unknown or unsuitable layer, a number out of range, a base without one of the layers.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] = ("*",),
        *,
        every: int = 1,
        accuracy: float | None = 0.99,
        method: Method = "gram",
        output_budget: float | None = None,
        rank: int | None = None,
        energy: float | None = None,
        free_bias: bool = False,
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        if every < 1:
            raise UserError(f"every: {every} is less than 1")
        if accuracy is not None:
            _check_accuracy(accuracy)
        Statistics(method)  # refuses what it does not know
        self.output_budget = default_budget(output_budget, rank, energy)
        check_amount(self.output_budget, rank, energy)
        self.model = unwrapped(model)
        self.layers = select_layers(self.model, [layers] if isinstance(layers, str) else layers)
        missing = [name for name in self.layers if base is not None and name not in base]
        if missing:
            raise UserError(f"base: lacks layer '{missing[0]}'")
        self.every, self.accuracy, self.method = every, accuracy, method
        self.rank, self.energy, self.free_bias, self.base = rank, energy, free_bias, base
        self.start = None if accuracy else 0

    def due(self, epoch: int, accuracy: float | None = None) -> bool:
        """Says whether to shift after an epoch: in the terminal phase, at its first and every `every`-th.

        A run that was resumed asks for the epochs before once more, or sets `start`.

        Args:
            epoch: its number, whichever one counting starts at.
            accuracy: training accuracy in it, in [0, 1].

        Raises:
            UserError: the accuracy is missing though the terminal phase depends on it, or is no share.
        """
        if accuracy is not None:
            _check_accuracy(accuracy)
        if self.start is None:
            if accuracy is None:
                raise UserError("accuracy: say the epoch's, or make TrainingShift with accuracy=None")
            if accuracy < (self.accuracy or 0):
                return False
            self.start = epoch
        return epoch >= self.start and (epoch - self.start) % self.every == 0

    @torch.no_grad()
    def shift(
        self, batches: Iterable[Any], optimizer: torch.optim.Optimizer | None = None
    ) -> dict[str, Shift]:
        """Shifts the layers in place by what these batches make their inputs.

        The model runs in eval mode (no dropout, running statistics used and left as they are) without gradients, and
        gets its modes back. Gradients that are there stay.

        Args:
            batches: as for `collect`; with several processes this one's share.
            optimizer: its first moments (`momentum_buffer`, `exp_avg`) go through the same map as the weights.

        Returns:
            Layer name -> what was done. Nothing is changed unless all can be.

        Raises:
            UserError: no batches, an optimizer of other parameters or with a state that is not understood, layers that
                cannot be shifted, inputs with NaN or infinity.
        """
        if isinstance(batches, Tensor | Mapping):
            raise UserError("batches: give a list of batches, of one if need be: [batch]")
        base_optimizer = getattr(optimizer, "base_optimizer", optimizer)  # SAM keeps its own state elsewhere
        select_layers(self.model, self.layers)  # refuses what became tied or parametrised since
        sharded = self._sharded()
        moments = self._moments(base_optimizer)
        with process_group():
            _check_processes()
            statistics = collect(
                self.model,
                _in_step(batches) if sharded and ranks() > 1 else batches,
                self.layers,
                method=self.method,
                across_ranks=ranks() > 1,
            )
            for module in sharded:  # the outermost keeps its weights gathered after a forward pass
                module.reshard()
            shifts = propose(
                self.model,
                statistics,
                self.output_budget,
                self.base,
                rank=self.rank,
                energy=self.energy,
                free_bias=self.free_bias,
            )
            for name, shift in shifts.items():
                bias = shift.bias if shift.bias is None else _of_first(shift.bias)
                shifts[name] = replace(shift, weight=_of_first(shift.weight), bias=bias)
                install(self.model, name, shifts[name])
                inputs = statistics.spectrum(name, centred=bias is not None)
                for of_weight, of_bias in moments.get(name, []):
                    mapped = shift_moments(
                        shift, inputs, whole(of_weight), None if of_bias is None else whole(of_bias)
                    )
                    put(of_weight, _of_first(mapped[0]))
                    if of_bias is not None and mapped[1] is not None:
                        put(of_bias, _of_first(mapped[1]))
        return shifts

    def _sharded(self) -> list[Any]:
        """Returns the modules that processes share by `fully_shard`.

        Raises:
            UserError: they share them in another way.
        """
        if not torch.distributed.is_available():
            return []
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        if any(isinstance(module, FullyShardedDataParallel) for module in self.model.modules()):
            raise UserError(
                "FullyShardedDataParallel hides the layers' weights; shard the model by fully_shard (FSDP2)"
            )
        found = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        for module in found:
            module.reshard()
        for name in self.layers:
            weight = weight_of(self.model, name)
            placements = getattr(weight, "placements", ())
            if placements and (not found or sum(place.is_shard() for place in placements) > 1):
                raise UserError(
                    f"layer '{name}' is split by tensor parallelism: its inputs are not whole here; leave it out"
                )
        return found

    def _moments(self, optimizer: Any) -> dict[str, list[tuple[Tensor, Tensor | None]]]:
        """Returns layer -> first moments of its weight, each with its bias's of the same kind.

        Raises:
            UserError: the optimizer has other parameters, or a state that is not understood.
        """
        if optimizer is None:
            return {}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        weights = {name: self.model.get_parameter(f"{name}.weight") for name in self.layers}
        if not any(id(weight) in held for weight in weights.values()):
            raise UserError(
                "optimizer: it has none of the shifted layers' weights; give the one of this model"
            )
        moments = {}
        for name, weight in weights.items():
            state = optimizer.state.get(weight, {})
            bias = getattr(self.model.get_submodule(name), "bias", None)
            of_bias = {} if bias is None else optimizer.state.get(bias, {})
            for key, value in state.items():
                if not isinstance(value, Tensor) or value.numel() == 1 or key in LEFT_ALONE:
                    continue
                if key not in FIRST_MOMENTS or value.shape != weight.shape:
                    raise UserError(
                        f"optimizer: how a shift maps its state '{key}' of layer '{name}' is not known; "
                        f"known are {', '.join(FIRST_MOMENTS)}"
                    )
            turned = is_transposed(self.model.get_submodule(name))
            moments[name] = [
                (state[k].T if turned else state[k], of_bias.get(k))
                for k in FIRST_MOMENTS
                if state.get(k) is not None
            ]
        return moments


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model inside data parallelism, compilation and model averages, so that names are its own."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel
    from torch.optim.swa_utils import AveragedModel

    while True:
        if isinstance(model, DataParallel | DistributedDataParallel | AveragedModel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model = inner
        else:
            return model


def _check_accuracy(accuracy: float) -> None:
    if not 0 <= accuracy <= 1:
        raise UserError(f"accuracy: {accuracy} is not in [0, 1]; 0.99 stands for 99%")


def _check_processes() -> None:
    """Refuses processes that cannot talk here: each would shift by its own data, and replicas would part.

    Raises:
        UserError: what is missing.
    """
    distributed = torch.distributed
    count = 1
    if distributed.is_available() and distributed.is_initialized():
        count = distributed.get_world_size()
    if count != ranks():
        raise UserError(
            f"there are {count} processes, but WORLD_SIZE says {ranks()}: start them with torchrun, or set RANK and "
            "WORLD_SIZE"
        )
    try:
        gathered(None)
    except RuntimeError as error:
        raise UserError(
            f"processes must be able to share tensors in main memory: init_process_group('cpu:gloo,cuda:nccl') "
            f"({str(error).splitlines()[0]})"
        ) from None


def _in_step(batches: Iterable[Any]) -> Iterator[Any]:
    """Yields batches as long as every process has one: in a sharded model's forward pass each waits for the others.

    Raises:
        UserError: some have more than others.
    """
    end, iterator = object(), iter(batches)
    while True:
        batch = next(iterator, end)
        more = gathered(batch is not end)
        if not any(more):
            return
        if not all(more):
            raise UserError("batches: of a sharded model every process needs equally many")
        yield batch


def _of_first(tensor: Tensor) -> Tensor:
    """Returns the first process's value to all, so that copies stay equal whatever each computes on."""
    if ranks() == 1:
        return tensor
    shared = tensor.cpu().contiguous()
    torch.distributed.broadcast(shared, 0)
    return shared.to(tensor.device)
