"""How a model's training is spread over processes, from outside: the network's own code knows nothing of it.

    processes = replicate x shard x context x tensor, the last one's neighbours being neighbours
        tensor      share each matrix (tensor_parallel.py)                  the same tokens
        context     share each row (context_parallel.py)                    other tokens of the same rows
        shard       FSDP2 shares weights, gradients and moments             other rows
        replicate   whole copies of that: hybrid sharding                   other rows

Weights are the same for all processes of one context group, so FSDP2 shards over shard x context. In bfloat16 it keeps
the weights in float32, gathers them in bfloat16 and adds up gradients in float32; that is why a single process goes
through it as well then.

Sources: FSDP2 (PyTorch's `fully_shard`; ZeRO, arXiv 1910.02054), hybrid sharding (arXiv 2304.11277 section 3.2.2).
"""

import atexit
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed

from galenic.model.foreign import plain
from galenic.pretrain.config import ArchitectureConfig, ParallelConfig
from galenic.pretrain.parallelism.initial import draw_weights
from galenic.pretrain.parallelism.tensor_parallel import (
    official_rows,
    regrouped_rows,
    splits_attention,
    splits_mlp,
)
from galenic.ranks import rank, ranks
from galenic.runtime import UserError


@dataclass(frozen=True)
class Degrees:
    """How many processes share what; the product is their number."""

    replicate: int
    shard: int
    context: int
    tensor: int

    @property
    def data(self) -> int:
        """Processes that read different rows."""
        return self.replicate * self.shard

    @property
    def shards(self) -> int:
        """Processes that share the weights of a copy."""
        return self.shard * self.context

    def __str__(self) -> str:
        return (
            f"replicate {self.replicate} x shard {self.shard} x context {self.context} x tensor {self.tensor}"
        )


def degrees(config: ParallelConfig, processes: int) -> Degrees:
    """Returns the degrees for a number of processes; `shard: 0` takes all that are left.

    Raises:
        UserError: the processes are not what was asked for.
    """
    fixed = config.replicate * config.context * config.tensor
    found = Degrees(
        config.replicate, config.shard or max(1, processes // fixed), config.context, config.tensor
    )
    asked = fixed * found.shard
    if asked == processes:
        return found
    start = f"start {asked} processes (torchrun --nproc-per-node)"
    if asked > processes:
        raise UserError(
            f"parallel: {found} needs {asked} devices, there are {processes}, fewer than asked: "
            f"{start}, or lower one of the four"
        )
    rest = "set parallel.shard to 0, which takes all that are left" if config.shard else start
    raise UserError(f"parallel: {found} takes {asked} devices, but there are {processes}: {rest}")


def check(degrees: Degrees, architecture: ArchitectureConfig, rows: int, context: int) -> None:
    """Looks whether a phase's batch and the network divide.

    Args:
        degrees: how many processes share what.
        architecture: of the network.
        rows: rows of a global batch.
        context: tokens in a row.

    Raises:
        UserError: something does not divide.
    """
    if rows % degrees.data:
        raise UserError(
            f"phases: {rows} rows do not divide among {degrees.data} data ranks (replicate {degrees.replicate} x "
            f"shard {degrees.shard}): set rows to a multiple of {degrees.data}, or share rows with parallel.context"
        )
    chunks = 2 * degrees.context
    if degrees.context > 1 and (context % chunks or context // chunks < architecture.conv_window - 1):
        raise UserError(
            f"phases: a context of {context} tokens does not divide into 2 x {degrees.context} chunks "
            f"(parallel.context: {degrees.context}): set it to a multiple of {chunks}"
            + (f" of at least {chunks * (architecture.conv_window - 1)}" if not context % chunks else "")
        )
    if degrees.tensor == 1:
        return
    sliding = architecture.num_hidden_layers > 1
    heads = [
        splits_attention(architecture, kind, degrees.tensor)
        for kind in ((False, True) if sliding else (False,))
    ]
    if not any(heads) and not splits_mlp(architecture, degrees.tensor):
        raise UserError(
            f"parallel.tensor: {degrees.tensor} divides neither the key/value heads "
            f"({architecture.num_key_value_heads} global, {architecture.num_swa_key_value_heads} sliding-window) nor "
            f"intermediate_size {architecture.intermediate_size}: take a divisor of one of them"
        )


def describe(degrees: Degrees, architecture: ArchitectureConfig) -> list[str]:
    """Tells what is shared by whom, a line each; a single process has nothing to tell."""
    lines = []
    if degrees.data > 1 or degrees.context > 1:
        copies = f"{degrees.replicate} copies, each " if degrees.replicate > 1 else ""
        lines.append(
            f"weights, gradients and moments: {copies}in {degrees.shards} shards (FSDP2), layer by layer"
        )
    if degrees.data > 1:
        lines.append(f"rows: 1/{degrees.data} of each batch to a data rank")
    if degrees.context > 1:
        lines.append(
            f"tokens: chunks i and {2 * degrees.context - 1} - i of {2 * degrees.context} to rank i of "
            f"{degrees.context}; keys and values gathered"
        )
    if degrees.tensor > 1:
        parts = degrees.tensor
        layers = {False: (architecture.num_hidden_layers + 1) // 2, True: architecture.num_hidden_layers // 2}
        names = {False: "global", True: "sliding-window"}
        for kind, count in layers.items():
            kv_heads = architecture.num_swa_key_value_heads if kind else architecture.num_key_value_heads
            if not count:
                continue
            how = (
                f"split {parts} ways, {kv_heads // parts} key/value heads each"
                if splits_attention(architecture, kind, parts)
                else f"whole on each device: {kv_heads} key/value heads do not divide by {parts}"
            )
            lines.append(f"attention of the {count} {names[kind]} layers: {how}")
        how = f"split {parts} ways" if splits_mlp(architecture, parts) else "whole on each device"
        lines.append(f"feed-forward layers: {how}; norms, embedding and head: whole on each device")
    return lines


def compile_layer(layer: Any, backend: str = "inductor") -> None:
    """Compiles a layer for training, in place; in `eval()`, where texts of any length come by, it stays as it was.

    Batches of a phase have one shape, so nothing is made dynamic (with DTensors that fails in torch 2.13).
    """
    plain = layer.forward
    compiled = torch.compile(plain, backend=backend, dynamic=False)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if layer.training else plain)(*args, **kwargs)

    layer.forward = forward


def decoder_layers(model: Any) -> list[tuple[str, Any]]:
    """Returns a language model's layers with their names; none where they cannot be told."""
    count = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return [(f"{name}.{number}", layer) for number, layer in enumerate(module)]
    return []


class Parallel:
    """The processes of a run and what each of them does.

    Args:
        config: how the work is spread.
        precision: of matrix products: `float32`, `bfloat16`, or `auto`: bfloat16 on CUDA.
        device: where to compute, `cpu` or `cuda`.

    Attributes:
        degrees: how many processes share what.
        mesh: of dimensions replicate, shard (x context), tensor; None for a plain model in one process.
        data_rank: which of the processes that read different rows.
        data_ranks: how many they are.
        loss_scale: what each process multiplies its part of the mean loss by: FSDP averages gradients over that many.

    Raises:
        UserError: the processes or devices are not what was asked for.
    """

    def __init__(
        self, config: ParallelConfig | None = None, *, precision: str = "float32", device: str = "cpu"
    ) -> None:
        self.config = config or ParallelConfig()
        self.device = torch.device(device).type
        self.degrees = degrees(self.config, ranks())
        if precision == "auto":
            precision = "bfloat16" if self.device == "cuda" else "float32"
        self.precision = precision
        kernel = self.config.attention
        self.attention = (
            ("flex_attention" if self.device == "cuda" else "sdpa") if kernel == "auto" else kernel
        )
        if self.device == "cpu" and self.attention == "flex_attention":
            raise UserError(
                "parallel.attention: flex_attention cannot train on a CPU: choose auto, sdpa or eager"
            )
        position = rank()
        self.tensor_rank = position % self.degrees.tensor
        self.context_rank = position // self.degrees.tensor % self.degrees.context
        self.data_rank = position // (self.degrees.tensor * self.degrees.context)
        self.data_ranks = self.degrees.data
        self.sharded = ranks() > 1 or precision == "bfloat16"
        self.loss_scale = float(self.degrees.data * self.degrees.context)
        self.model_config: Any = None
        self.mesh: Any = None
        self.pieces: Any = None
        if self.sharded:
            self._connect()

    def _connect(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        if not distributed.is_initialized():  # one process, for FSDP's mixed precision
            backend = "cpu:gloo,cuda:nccl" if self.device == "cuda" else "gloo"
            distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
            atexit.register(_disconnect)
        split = self.degrees
        shape = (split.replicate, split.shards, split.tensor)
        self.mesh = init_device_mesh(self.device, shape, mesh_dim_names=("replicate", "shard", "tensor"))
        if split.context > 1:
            from galenic.pretrain.parallelism.context_parallel import Pieces

            shape = (split.data, split.context, split.tensor)
            rows = init_device_mesh(self.device, shape, mesh_dim_names=("data", "context", "tensor"))
            self.pieces = Pieces(rows["context"].get_group(), split.context, self.context_rank)

    def check(self, architecture: ArchitectureConfig, rows: int, context: int) -> None:
        """Looks whether a phase's batch and the network divide; see `check`."""
        check(self.degrees, architecture, rows, context)

    def describe(self, architecture: ArchitectureConfig) -> list[str]:
        """Tells what is shared by whom; see `describe`."""
        return describe(self.degrees, architecture)

    # ------------------------------------------------------------------------ the model

    def apply(self, model: Any, seed: int = 0) -> None:
        """Spreads a language model over the processes, in place, and puts it on the device.

        Layers are drawn and go to the device one after the other, so that neither the machine nor the device ever
        holds more than its shards and one whole layer.

        Args:
            model: with the same weights on every process, or made on the meta device. Ours or any of transformers',
                whose attention stays as it is; with a PEFT adapter or without.
            seed: that the weights of a model on the meta device are drawn from.
        """
        inner = plain(model)
        self.model_config = inner.config
        split, how = self.degrees, self.config
        if split.context > 1:
            from galenic.pretrain.parallelism.context_parallel import split_rows

            split_rows(inner, self.pieces, self.attention)
        elif inner.config.model_type == "baichuan_m1":
            inner.set_attn_implementation(self.attention)
        for name, layer in decoder_layers(inner):
            draw_weights(inner, layer, name, seed)
            layer.to(self.device)
            if split.tensor > 1:
                from galenic.pretrain.parallelism.tensor_parallel import split_layer

                split_layer(layer, self.mesh["tensor"])
            if how.activation_checkpointing != "none":
                from galenic.pretrain.parallelism.recompute import recompute

                recompute(layer, how.activation_checkpointing, compiled=how.compile)
            if how.compile:
                compile_layer(layer)
            self._shard(layer)
        draw_weights(inner, inner, "", seed)
        model.to(self.device)
        self._shard(model)

    def _shard(self, module: torch.nn.Module) -> None:
        """Hands a layer or the rest of the model to FSDP2."""
        if not self.sharded:
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        half = self.precision == "bfloat16"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32 if half else None,
            # Hidden states are bfloat16 from the embedding on; the rotary tables stay float32.
            cast_forward_inputs=False,
        )
        mesh = self.mesh["shard"] if self.degrees.replicate == 1 else self.mesh["replicate", "shard"]
        fully_shard(module, mesh=mesh, mp_policy=policy)

    def official_rows(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Brings a whole tensor of the applied model to the published order of rows, for export."""
        return official_rows(name, tensor, self.model_config, self.degrees.tensor)

    def regrouped_rows(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Brings a whole tensor in the published order of rows to that of the applied model."""
        return regrouped_rows(name, tensor, self.model_config, self.degrees.tensor)

    def between_copies(self, model: Any, add: bool) -> None:
        """Says whether the next backward pass adds up gradients across the copies of hybrid sharding.

        It need not before the last micro-batch: until then each copy keeps its own sums, in shards.
        """
        if self.degrees.replicate > 1:
            model.set_requires_all_reduce(add)

    # ------------------------------------------------------------------------ the data

    def rows(self, total: int) -> list[int]:
        """Returns which of a global batch's rows this process computes."""
        own = total // self.data_ranks
        return list(range(self.data_rank * own, (self.data_rank + 1) * own))

    def local(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns this process' tokens of its rows; with context parallelism, `labels` become `shift_labels`."""
        if self.degrees.context == 1:
            return batch
        from galenic.pretrain.parallelism.context_parallel import own_piece

        return own_piece(batch, self.degrees.context, self.context_rank)

    # ------------------------------------------------------------------------ sums over all processes

    def added(self, sums: torch.Tensor) -> torch.Tensor:
        """Adds up numbers of all processes that hold different tokens: the same bits everywhere.

        Args:
            sums: [...] float64, this process' own.

        Returns:
            The same shape, on the same device.
        """
        return self._total(sums if self.tensor_rank == 0 else torch.zeros_like(sums))

    def _total(self, own: torch.Tensor) -> torch.Tensor:
        """Gathers, then adds in the order of ranks, so that no reduction's own order can tell processes apart."""
        if ranks() == 1:
            return own
        sent = own.to(self.device).contiguous()
        every = sent.new_empty((ranks(), *sent.shape))
        distributed.all_gather_into_tensor(every.view(-1), sent.view(-1))
        return every.sum(0).to(own.device)

    def norm(self, parameters: Iterable[torch.nn.Parameter]) -> float:
        """Returns the norm of the whole gradient, the same bits on every process.

        What several processes hold alike counts once.
        """
        split, whole = [], []
        for parameter in parameters:
            if parameter.grad is not None:
                over_tensor = _is_split(parameter)
                gradient = getattr(parameter.grad, "_local_tensor", parameter.grad)
                (split if over_tensor else whole).append(gradient)
        first_copy = self.data_rank < self.degrees.shard
        counted = (split if first_copy else []) + (whole if first_copy and self.tensor_rank == 0 else [])
        own = torch.nn.utils.get_total_norm(counted) if counted else torch.zeros(())
        return float(self._total(own.to(self.device, torch.float64).square()).sqrt())


def _disconnect() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _is_split(parameter: torch.Tensor) -> bool:
    """Whether the processes of a tensor group hold different parts of it."""
    mesh = getattr(parameter, "device_mesh", None)
    return mesh is not None and "tensor" in (mesh.mesh_dim_names or ()) and mesh["tensor"].size() > 1
