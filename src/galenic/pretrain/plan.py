"""What `pretrain` would do, told without doing it: one block a phase, then the whole.

Sizes come from the token shards or, while there are none, from `expected`; devices are those of `cluster` or, without
it, this machine's. No weights are made.
"""

import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from galenic.corpus.mixtures.mixture_tree import (
    Node,
    check_repeats,
    expected,
    held,
    mixture_preview,
    tree,
)
from galenic.corpus.tokens.shards import read_meta
from galenic.pretrain import budget, memory
from galenic.pretrain.config import PhaseConfig, PretrainConfig
from galenic.pretrain.schedules import rate
from galenic.ranks import ranks
from galenic.runtime import Plan, UserError, device, human, human_bytes

EXPECTED_MFU = {"cpu": 0.55, "cuda": 0.4}
"""Share of a large matrix product's speed that training is expected to reach on this machine: on CPUs as
`benchmarks/scaling.py` measured it (docs/scaling.md); on CUDA assumed, not measured."""

WIDTH = 78
"""Characters of a line's text."""

FITS = 0.9
"""Of a device's memory: the rest is for what the allocator loses and the kernels' own."""


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

    from galenic.pretrain.watch import matmul_peak

    kind = device()
    cuda = kind == "cuda"
    peak = config.watch.peak_tflops
    if peak is None:
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
    at_hand = config.expected is None or has_shards(config)
    root = tree(held(meta) if at_hand else expected(config.expected.tokens), config.phases)
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
    from galenic.pretrain.parallel import check, degrees

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
        cost = _flops(shape, phase, {leaf.name: leaf.share for leaf in leaves}, meta)
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
                memory=phase_memory(config, shape, spread, phase, cuda=on.cuda),
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
    config: PretrainConfig, shape: Any, spread: Any, phase: PhaseConfig, *, cuda: bool
) -> memory.Memory:
    """Returns the memory of one device in a phase."""
    parallel = config.parallel
    own = phase.rows // spread.data
    bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and cuda)
    kernel = parallel.attention
    return memory.memory(
        shape,
        spread,
        rows=phase.rows,
        micro=min(parallel.micro_rows or own, own),
        context=phase.context,
        recompute=parallel.activation_checkpointing,
        optimizer=config.optim.name,
        bfloat16=bfloat16,
        grouped=kernel == "flex_attention" or (kernel == "auto" and cuda),
    )


def _flops(
    shape: Any, phase: PhaseConfig, shares: Mapping[str, float], meta: Mapping[str, Any]
) -> budget.Flops:
    """FLOPs of a token: attention within each source's mean document; unknown ones fill their rows."""
    each = []
    for source, share in shares.items():
        counts = meta["sources"][source]["train"]
        mean = counts["tokens"] / counts["documents"] if counts.get("documents") else None
        each.append(share * budget.flops(shape, phase.context, mean).attention)
    return replace(budget.flops(shape, phase.context), attention=sum(each))


def _steps(config: PretrainConfig) -> tuple[list[int], list[str]]:
    """Returns the steps of each phase and what packing costs, counted as training will where there are shards."""
    if not has_shards(config):
        steps = [phase.tokens // (phase.rows * phase.context) for phase in config.phases]
        return steps, ["told once there are token shards" for _ in steps]
    from galenic.pretrain.curriculum import Curriculum, open_shards, phase_report

    shards = open_shards(config)
    steps = [Curriculum(phase, shards, config.seed).steps() for phase in config.phases]
    return steps, [str(phase_report(config, phase, shards)) for phase in config.phases]


# ---------------------------------------------------------------------------- telling


def plan(config: PretrainConfig) -> Plan:
    """What the verb would do: per phase steps, rates, repeats, FLOPs, memory, time; the parallel layout; the whole.

    Raises:
        UserError: whatever would stop the run.
    """
    from galenic.pretrain.parallel import degrees, describe

    on = machines(config)
    phases = phase_plans(config, on)
    meta = meta_of(config)
    shape = model_config(config, meta)
    count = budget.parameters(shape)
    spread = degrees(config.parallel, on.devices)
    state = phases[0].memory.state
    saved = memory.checkpoint_bytes(shape, config.optim.name)
    facts = {
        "parameters": f"{count.total:,}: layers {human(count.matrices + count.norms + count.taps)}, "
        f"embedding {human(count.embedding)}, head {human(count.head)}",
        "machines": str(on),
        "layout": "\n".join([str(spread), *describe(spread, config.architecture)]),
        "state": f"{human_bytes(state.total)} a device: weights {human_bytes(state.weights)}, gradients "
        f"{human_bytes(state.gradients)}, {config.optim.name} {human_bytes(state.moments)}; all float32",
        "checkpoint": f"{human_bytes(saved)} on disk"
        + (
            f"; {human_bytes(state.saved)} of the host's memory a device while it is written"
            if config.checkpoints.asynchronous
            else ""
        ),
    }
    for one in phases:
        facts[one.phase.name] = "\n".join(_lines(one, config, on))
    facts["total"] = "\n".join(_total(phases, count.total, on))
    for number, warning in enumerate(_warnings(config, shape, spread, phases, on)):
        facts["!" * (number + 1)] = warning
    return Plan(
        reads=config.reads(), writes=[f"{config.out}/{phase.name}" for phase in config.phases], facts=facts
    )


def preview(config: PretrainConfig) -> list[str]:
    """The mixture of all phases as a tree: tokens, documents, repeats and fingerprints of groups and sources."""
    return mixture_preview(config.tokenizer, config.phases) if has_shards(config) else []


def days(seconds: float) -> str:
    """Formats a long time: 90 -> '1.5 minutes', 200000 -> '2.3 days'."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size or unit == "minutes":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError


def _lines(one: PhasePlan, config: PretrainConfig, on: Machines) -> list[str]:
    phase, kept = one.phase, one.memory
    begin, end = one.rates
    warm = one.warmup * phase.rows * phase.context
    warmup = f"; warm-up {one.warmup:,} steps, {human(warm)} tokens" if one.warmup else ""
    again = one.hardware_flops / one.flops.trained - 1
    how = config.parallel.activation_checkpointing
    computed = f"; {how} activation checkpointing computes {again:.1%} more" if how != "none" else ""
    parts = {
        "state": kept.state.total,
        "whole layers": kept.gathered,
        "activations": kept.activations,
        "loss": kept.loss,
    }
    told = ", ".join(f"{name} {human_bytes(size)}" for name, size in parts.items() if size)
    data = ", ".join(f"{name} {share:.1%} ({times:.2g}x)" for name, (share, times) in one.repeats.items())
    rows = {
        "rate": f"{begin:.3g} to {end:.3g}{warmup}",
        "positions": f"RoPE base {phase.rope_theta:,.10g}, {phase.context:,} tokens",
        "FLOPs": f"{one.work:.3g}; {human(one.flops.trained)} a token{computed}",
        "memory": f"{human_bytes(kept.peak)} of {human_bytes(on.memory)} a device: {told}",
        "time": f"{days(one.seconds)} at {human(one.tokens_per_second)} tokens/s",
        "data": data,
        "packing": one.packing,
    }
    head = f"{one.steps:,} steps of {phase.rows:,} x {phase.context:,} tokens, {human(one.tokens)} tokens"
    return [head, *_table(rows)]


def _table(rows: Mapping[str, str]) -> list[str]:
    """Lays labelled texts in two columns; long ones go on below."""
    lines = []
    for label, text in rows.items():
        # Packing's one line is what other programs look for.
        wrapped = [text] if label == "packing" else textwrap.wrap(text, WIDTH, break_on_hyphens=False)
        lines += [f"{label if i == 0 else '':<11}{line}" for i, line in enumerate(wrapped)]
    return lines


def _total(phases: list[PhasePlan], parameters: int, on: Machines) -> list[str]:
    tokens, seconds = sum(one.tokens for one in phases), sum(one.seconds for one in phases)
    times: dict[str, float] = {}
    for one in phases:
        for source, (_, repeats) in one.repeats.items():
            times[source] = times.get(source, 0.0) + repeats
    rows = {
        "tokens": f"{human(tokens)} in {sum(one.steps for one in phases):,} steps",
        "FLOPs": f"{sum(one.work for one in phases):.3g}; 6 x parameters x tokens is {6 * parameters * tokens:.3g}",
        "memory": f"{human_bytes(max(one.memory.peak for one in phases))} of {human_bytes(on.memory)} a device",
        "time": days(seconds)
        + (f", {human(seconds / 3600 * on.devices)} device hours" if on.devices > 1 else ""),
        "read": ", ".join(
            f"{source} {times[source]:.2g}x" for source in sorted(times, key=lambda name: -times[name])
        ),
    }
    return _table(rows)


def _warnings(
    config: PretrainConfig, shape: Any, spread: Any, phases: list[PhasePlan], on: Machines
) -> list[str]:
    """Says what will not work out, with the way out."""
    found = []
    for one in phases:
        if one.memory.peak <= FITS * on.memory:
            continue
        says = f"{one.phase.name}: {human_bytes(one.memory.peak)} do not fit {FITS:.0%} of {human_bytes(on.memory)}"
        found.append(f"{says}; {way_out(config, shape, spread, one.phase, on)}")
    return found


def way_out(config: PretrainConfig, shape: Any, spread: Any, phase: PhaseConfig, on: Machines) -> str:
    """Names the mildest setting with which a phase fits: fewer rows at a time, less kept, more devices."""
    for changes in (
        {"micro_rows": 1},
        {"micro_rows": 1, "activation_checkpointing": "selective"},
        {"micro_rows": 1, "activation_checkpointing": "full"},
    ):
        other = replace(config, parallel=replace(config.parallel, **changes))
        peak = phase_memory(other, shape, spread, phase, cuda=on.cuda).peak
        if peak <= FITS * on.memory:
            words = ", ".join(f"{name}: {value}" for name, value in changes.items())
            return f"parallel {{{words}}} needs {human_bytes(peak)}"
    return "share it among more devices (parallel.shard, parallel.context), or take a smaller network"
