"""What `pretrain` would do, told without doing it: one block a phase, then the whole."""

import textwrap
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from galenic.corpus.mixtures.mixture_tree import mixture_preview
from galenic.pretrain.config import PhaseConfig, PretrainConfig
from galenic.pretrain.planning import budget, memory
from galenic.pretrain.planning.estimate import (
    Machines,
    PhasePlan,
    has_shards,
    machines,
    meta_of,
    model_config,
    phase_memory,
    phase_plans,
)
from galenic.runtime import Plan, human, human_bytes

WIDTH = 78
"""Characters of a line's text."""

FITS = 0.9
"""Of a device's memory: the rest is for what the allocator loses and the kernels' own."""


def plan(config: PretrainConfig) -> Plan:
    """What the verb would do: per phase steps, rates, repeats, FLOPs, memory, time; the parallel layout; the whole.

    Raises:
        UserError: whatever would stop the run.
    """
    from galenic.pretrain.parallelism.parallel import degrees, describe

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
    ways: list[dict[str, Any]] = [
        {"micro_rows": 1},
        {"micro_rows": 1, "activation_checkpointing": "selective"},
        {"micro_rows": 1, "activation_checkpointing": "full"},
    ]
    for changes in ways:
        other = replace(config, parallel=replace(config.parallel, **changes))
        peak = phase_memory(other, shape, spread, phase, cuda=on.cuda).peak
        if peak <= FITS * on.memory:
            words = ", ".join(f"{name}: {value}" for name, value in changes.items())
            return f"parallel {{{words}}} needs {human_bytes(peak)}"
    return "share it among more devices (parallel.shard, parallel.context), or take a smaller network"
