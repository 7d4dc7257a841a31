"""The numbers of a plan: steps, rates, repeats, FLOPs, memory and time of every phase.

Sizes come from the token shards or, while there are none, from `expected`; devices are those of `cluster` or, without
it, this machine's. No weights are made.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galenic.corpus.mixtures.mixture_tree import (
    Node,
    check_repeats,
    expected,
    held,
    tree,
)
from galenic.corpus.tokens.shards import read_meta
from galenic.pretrain.config import ParallelConfig, PhaseConfig, PretrainConfig
from galenic.pretrain.planning import budget, memory
from galenic.pretrain.schedules import rate
from galenic.ranks import ranks
from galenic.runtime import UserError, device, human_bytes

EXPECTED_MFU = {"cpu": 0.47, "cuda": 0.35}
"""Share of a large matrix product's speed that training is expected to reach on this machine: on CPUs as
`benchmarks/scaling.py` measured it, on CUDA `benchmarks/alignment_cuda.py --pretrain` (docs/scaling.md)."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The devices that a plan is for."""

    devices: int
    name: str
    cuda: bool
    peak_tflops: float
    mfu: float
    memory: float
    """Bytes of one."""

    def __str__(self) -> str:
        return (
            f"{self.devices:,} x {self.name}: {self.peak_tflops:.3g} TFLOP/s and {human_bytes(self.memory)} each, "
            f"{self.mfu:.0%} of the peak expected"
        )


# ---------------------------------------------------------------------------- what there is


def machines(config: PretrainConfig) -> Machines:
    """Returns the cluster of a plan, or this machine with the speed of a short matrix product."""
    if config.cluster is not None:
        given = config.cluster
        return Machines(
            devices=given.devices,
            name=given.device,
            cuda=True,
            peak_tflops=given.peak_tflops,
            mfu=given.mfu,
            memory=given.memory_gb * 1e9,
        )
    import torch

    from galenic.pretrain.watching.watch import matmul_peak
    from galenic.products import prefer_onednn

    kind = device()
    cuda = kind == "cuda"
    peak = config.watch.peak_tflops
    if peak is None:
        prefer_onednn()  # as training does
        peak = matmul_peak(kind, torch.bfloat16 if cuda else torch.float32, repeats=3) / 1e12
    return Machines(
        devices=ranks(),
        name=torch.cuda.get_device_name() if cuda else "this machine's CPU",
        cuda=cuda,
        peak_tflops=peak,
        mfu=EXPECTED_MFU[kind],
        memory=torch.cuda.get_device_properties(0).total_memory if cuda else _host_memory(),
    )


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def has_shards(config: PretrainConfig) -> bool:
    """Whether the token shards exist."""
    return (Path(config.tokenizer) / "tokens" / "meta.json").exists()


def meta_of(config: PretrainConfig) -> dict[str, Any]:
    """Returns what the shards say of themselves, or the same of `expected` while there are none.

    Raises:
        UserError: neither is there.
    """
    if config.expected is None or has_shards(config):
        return read_meta(config.tokenizer)
    sources = {source: {"train": {"tokens": held}} for source, held in config.expected.tokens.items()}
    return {"vocab_size": config.expected.vocab_size, "sources": sources}


def mixture(config: PretrainConfig, meta: Mapping[str, Any]) -> Node:
    """Returns the tree of the curriculum.

    Raises:
        UserError: an unknown or empty source, or one that would be read too often.
    """
    if config.expected is None or has_shards(config):
        sizes = held(meta)
    else:
        sizes = expected(config.expected.tokens)
    root = tree(sizes, config.phases)
    check_repeats(root, config.most_repeats)
    return root


# ---------------------------------------------------------------------------- one phase


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """The numbers of one phase."""

    phase: PhaseConfig
    steps: int
    warmup: int
    """Steps of it that belong to the warm-up."""
    rates: tuple[float, float]
    """Learning rate of its first and last step."""
    repeats: dict[str, tuple[float, float]]
    """Source -> share of the phase's tokens, times that it is read in the phase."""
    flops: budget.Flops
    """Of a token."""
    hardware_flops: float
    """Of a token, with what is computed again."""
    memory: memory.Memory
    seconds: float
    tokens_per_second: float
    packing: str

    @property
    def tokens(self) -> int:
        """Places in rows, padding included."""
        return self.steps * self.phase.rows * self.phase.context

    @property
    def work(self) -> float:
        """FLOPs of the phase."""
        return self.tokens * self.flops.trained


def phase_plans(config: PretrainConfig, on: Machines) -> list[PhasePlan]:
    """Works out every phase.

    Raises:
        UserError: whatever would stop the run.
    """
    from galenic.pretrain.parallelism.parallel import check, degrees

    meta = meta_of(config)
    root = mixture(config, meta)
    steps, packing = _steps(config)
    shape = model_config(config, meta)
    spread = degrees(config.parallel, on.devices)
    found = []
    for number, (phase, branch) in enumerate(zip(config.phases, root.children, strict=True)):
        check(spread, config.architecture, phase.rows, phase.context)
        if not steps[number]:
            raise UserError(f"phases: '{phase.name}' has too few tokens for one step; raise its tokens")
        leaves = [leaf for group in branch.children for leaf in group.children]
        repeats = {leaf.name: (leaf.share, leaf.repeats) for leaf in leaves}
        cost = budget.phase_flops(shape, phase, meta["sources"])
        work = steps[number] * phase.rows * phase.context * cost.trained
        # Processes of one machine share its cores: their number does not make it faster.
        seconds = budget.seconds(
            work, devices=on.devices if on.cuda else 1, peak_tflops=on.peak_tflops, mfu=on.mfu
        )
        first = sum(steps[:number])
        found.append(
            PhasePlan(
                phase=phase,
                steps=steps[number],
                warmup=min(max(config.optim.warmup_steps - first, 0), steps[number]),
                rates=(rate(config, steps, number, 0), rate(config, steps, number, steps[number] - 1)),
                repeats=repeats,
                flops=cost,
                hardware_flops=cost.computed(config.parallel.activation_checkpointing),
                memory=phase_memory(
                    config, shape, spread, phase, cuda=on.cuda, document=_mean_document(phase, meta)
                ),
                seconds=seconds,
                tokens_per_second=steps[number] * phase.rows * phase.context / seconds,
                packing=packing[number],
            )
        )
    return found


def model_config(config: PretrainConfig, meta: Mapping[str, Any]) -> Any:
    """Returns the network's configuration, checked as the network itself does.

    Raises:
        UserError: sizes that contradict each other.
    """
    import torch

    from galenic.pretrain.pretrain import build_model

    try:
        with torch.device("meta"):
            return build_model(config.architecture, dict(meta), config.phases[0]).config
    except ValueError as error:
        raise UserError(f"architecture: {' '.join(str(error).split())}") from None


def phase_memory(
    config: PretrainConfig,
    shape: Any,
    spread: Any,
    phase: PhaseConfig,
    *,
    cuda: bool,
    document: float | None = None,
) -> memory.Memory:
    """Returns the memory of one device in a phase; `document`: its mean length, if known."""
    parallel = config.parallel
    own = phase.rows // spread.data
    bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and cuda)
    return memory.memory(
        shape,
        spread,
        rows=phase.rows,
        micro=min(parallel.micro_rows or own, own),
        context=phase.context,
        recompute=parallel.activation_checkpointing,
        optimizer=config.optim.name,
        bfloat16=bfloat16,
        kernel=_kernel(parallel, cuda),
        document=document,
    )


def _kernel(parallel: ParallelConfig, cuda: bool) -> memory.Kernel:
    if parallel.attention == "flex_attention" or (parallel.attention == "auto" and cuda):
        return "flex"
    if parallel.attention == "eager":
        return "eager"
    return "masked" if cuda or parallel.context > 1 else "documents"


def _mean_document(phase: PhaseConfig, meta: Mapping[str, Any]) -> float | None:
    """Returns the mean length of the documents of a phase's longest-winded source; None if any is unknown."""
    means = []
    for source, share in phase.mixture.items():
        counts = meta["sources"][source]["train"]
        if share and not counts.get("documents"):
            return None
        if share:
            means.append(counts["tokens"] / counts["documents"])
    return max(means)


def _steps(config: PretrainConfig) -> tuple[list[int], list[str]]:
    """Returns the steps of each phase and what packing costs, counted as training will where there are shards."""
    if not has_shards(config):
        steps = [phase.tokens // (phase.rows * phase.context) for phase in config.phases]
        return steps, ["told once there are token shards" for _ in steps]
    from galenic.pretrain.data.curriculum import Curriculum, open_shards

    shards = open_shards(config)
    packed = [Curriculum(phase, shards, config.seed).packed() for phase in config.phases]
    return [steps for steps, _ in packed], [str(report) for _, report in packed]
