"""Verb `pretrain`: token shards in, a model folder at each phase's end out.

Source: Baichuan-M1 report, section 4.2: three phases (general; medical basic; medical advanced) under one optimizer
state, warm-up then constant learning rate, cosine decay, longer context and a larger RoPE base in the last phase,
AdamW (0.9, 0.95), weight decay 0.1, clip 1.0, Algorithm 1's gradient guard.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from galenic.corpus.mixtures.mixture_tree import mixture_preview
from galenic.corpus.tokens.shards import Shard, read_meta, read_shard, special_tokens
from galenic.pretrain.config import ArchitectureConfig, PhaseConfig, PretrainConfig
from galenic.ranks import gathered, process_group, rank, ranks
from galenic.runtime import (
    Bar,
    Plan,
    UserError,
    device,
    human,
    human_bytes,
    progress,
    sha256_file,
    torch_setup,
)

# ---------------------------------------------------------------------------- plan


def plan(config: PretrainConfig) -> Plan:
    """What the verb would do: parameters, steps, repeats per source, FLOPs, memory."""
    import torch

    meta = read_meta(config.tokenizer)
    with torch.device("meta"):
        model = build_model(config.architecture, meta, config.phases[0])
    total = sum(parameter.numel() for parameter in model.parameters())
    matmul = total - model.get_input_embeddings().weight.numel()
    tokens = sum(phase.tokens for phase in config.phases)
    facts = {
        "parameters": f"{human(total)} ({human(matmul)} in matrix products)",
        "tokens": human(tokens),
        "FLOPs": f"{human(6 * matmul * tokens)} (6 x parameters x tokens)",
        "state": f"{human_bytes(16 * total)} (weights, gradients, two moments in float32)",
    }
    for phase in config.phases:
        steps = phase.tokens // (phase.context * phase.rows)
        shares = sum(phase.mixture.values())
        repeats = []
        for source, share in phase.mixture.items():
            if source not in meta["sources"]:
                raise UserError(
                    f"phases: '{phase.name}' names source '{source}', which the shards do not have"
                )
            size = meta["sources"][source]["train"]["tokens"]
            repeats.append(f"{source} {phase.tokens * share / shares / max(size, 1):.2g}x")
        end = phase.final_lr if phase.final_lr is not None else config.optim.lr
        facts[phase.name] = (
            f"{steps} steps of {phase.rows} x {phase.context} tokens, RoPE base {phase.rope_theta:g}, "
            f"learning rate {config.optim.lr:g} to {end:g}; {', '.join(repeats)}; "
            f"{_packing(config, phase)}"
        )
    return Plan(
        reads=config.reads(),
        writes=[f"{config.out}/{phase.name}" for phase in config.phases],
        facts=facts,
    )


# ---------------------------------------------------------------------------- model and data


def build_model(architecture: ArchitectureConfig, meta: dict[str, Any], phase: PhaseConfig) -> Any:
    """Makes a randomly initialised network for the shards' vocabulary and a phase's context and RoPE base."""
    from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM

    layers, special = architecture.num_hidden_layers, special_tokens(meta)
    config = BaichuanM1Config(
        vocab_size=meta["vocab_size"],
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=architecture.num_attention_heads,
        num_key_value_heads=architecture.num_key_value_heads,
        num_swa_attention_heads=architecture.num_swa_attention_heads,
        num_swa_key_value_heads=architecture.num_swa_key_value_heads,
        sliding_window=architecture.sliding_window,
        sliding_window_layers=list(range(1, layers, 2)),
        conv_window=architecture.conv_window,
        max_position_embeddings=phase.context,
        rope_theta=phase.rope_theta,
        initializer_range=architecture.initializer_range,
        bos_token_id=special["bos"],
        eos_token_id=special["eos"],
        pad_token_id=special["pad"],
    )
    return BaichuanM1ForCausalLM(config)


def set_context(model: Any, phase: PhaseConfig) -> None:
    """Gives a model the context length and RoPE base of a phase; weights stay."""
    model.config.max_position_embeddings = phase.context
    model.config.rope_theta = phase.rope_theta


def packed_rows(config: PretrainConfig, phase: PhaseConfig, shards: dict[str, Shard]) -> Any:
    """Returns the rows of a phase in training order."""
    from galenic.pretrain.packing import phase_rows

    return phase_rows(
        shards, phase.mixture, tokens=phase.tokens, context=phase.context, seed=config.seed, name=phase.name
    )


def preview(config: PretrainConfig) -> list[str]:
    """The mixture of all phases as a tree: tokens, documents, repeats and fingerprints of groups and sources."""
    return mixture_preview(config.tokenizer, config.phases)


def _packing(config: PretrainConfig, phase: PhaseConfig) -> str:
    """Packs a phase as training will and tells what that costs."""
    from galenic.pretrain.packing import packing_report

    shards = {source: read_shard(config.tokenizer, source, "train") for source in phase.mixture}
    return str(packing_report(packed_rows(config, phase, shards), phase.context))


# ---------------------------------------------------------------------------- run


def run(config: PretrainConfig) -> None:
    """Trains through the phases; continues where a killed run stopped, to the same bytes."""
    with process_group():
        _train(config)


def _train(config: PretrainConfig) -> None:
    from galenic.pretrain.checkpoints import Checkpoints
    from galenic.pretrain.curriculum import PhaseBatches
    from galenic.pretrain.export import export_model
    from galenic.pretrain.heldout import heldout_bits
    from galenic.pretrain.loop import Trainer
    from galenic.pretrain.parallel import Parallel
    from galenic.pretrain.schedules import rate
    from galenic.pretrain.watch import Watch

    torch_setup(config.seed)
    out, meta = Path(config.out), read_meta(config.tokenizer)
    # What process 0 sees decides for all, or some would wait for others that left.
    there = gathered([phase.name for phase in config.phases if (out / phase.name).exists()])[0]
    data = sha256_file(Path(config.tokenizer) / "tokens" / "meta.json")
    checkpoints = Checkpoints(out, config.checkpoints, run=_identity(config, data))
    if len(there) == len(config.phases):
        checkpoints.finish()
        return
    shards = {}
    for phase in config.phases:
        for source in phase.mixture:
            shards.setdefault(source, read_shard(config.tokenizer, source, "train"))
    stages = [PhaseBatches(config, phase, shards) for phase in config.phases]
    steps = [batches.steps for batches in stages]

    # ---- the network, spread over the devices
    parallel = Parallel(config.parallel, precision=config.precision, device=device())
    for phase in config.phases:
        parallel.check(config.architecture, phase.rows, phase.context)
    model = build_model(config.architecture, meta, config.phases[0])
    parallel.apply(model)
    trainer = Trainer(
        model,
        config.optim,
        config.guard,
        out,
        parallel=parallel,
        checkpoints=checkpoints,
        watch=Watch(out, config.watch, flops_per_token=0.0, devices=ranks(), device=device()),
        micro_rows=config.parallel.micro_rows,
    )
    if not trainer.resume():
        trainer.save()  # the seeded start itself, so that a resume never draws weights again
    scored = set(gathered([row["step"] for row in trainer.rows() if row["kind"] == "heldout"])[0])

    def score(phase: PhaseConfig) -> None:
        """Tells the held-out bits per byte of where the run is, unless a run before this one did."""
        if trainer.step not in scored:
            model.eval()
            bits = heldout_bits(model, config, phase.context)
            row = {"kind": "heldout", "phase": phase.name, "step": trainer.step, "bits_per_byte": bits}
            if rank() == 0:
                trainer.watch.row(row)
            scored.add(trainer.step)

    sizes = {source: counts["train"]["tokens"] for source, counts in meta["sources"].items()}
    first = 0
    learned: dict[str, str] = {}  # source -> licence, of what the network has read so far
    for number, (phase, batches) in enumerate(zip(config.phases, stages, strict=True)):
        for source in sorted(source for source, share in phase.mixture.items() if share):
            learned[source] = meta["sources"][source].get("licence", "unknown")
        last = first + batches.steps
        set_context(model, phase)

        def after(step: int, phase: PhaseConfig = phase, last: int = last) -> None:
            every = config.watch.heldout_steps
            if every and step % every == 0 and step < last:
                score(phase)

        def lr(step: int, number: int = number) -> float:
            return rate(config, steps, number, step)

        if trainer.step < last:
            with _bar(batches, phase.name) as bar:
                bar.update((trainer.step - first) * phase.rows * phase.context)
                trainer.train(
                    batches,
                    first=first,
                    last=last,
                    lr=lr,
                    bar=bar,
                    after=after,
                    sizes=sizes,
                    phase=phase.name,
                )
        if trainer.step == last and phase.name not in there:
            # ---- the phase's end: held-out losses, checkpoint, model folder
            score(phase)
            model.eval()
            trainer.save(phase_end=phase.name)
            trainer.checkpoints.wait()
            provenance = {
                "verb": "pretrain",
                "phase": phase.name,
                "tokens": trainer.tokens,
                "steps": trainer.step,
                "data": data,
                "licences": dict(sorted(learned.items())),
            }
            export_model(model, parallel, out / phase.name, config.tokenizer, provenance)
        first = last
    trainer.finish()


def _identity(config: PretrainConfig, data: str) -> dict[str, Any]:
    """What a checkpoint must agree with: everything that decides which weights come out."""
    values = asdict(config)
    for name in (*config.incidental, "out", "tokenizer"):
        del values[name]
    return {**values, "data": data}


@contextmanager
def _bar(batches: Any, label: str) -> Iterator[Bar]:
    """Shows the progress of a phase, on one process."""
    from galenic.pretrain.loop import Silent

    if rank() > 0:
        yield Silent()
        return
    with progress(batches.steps * batches.rows * batches.context, label, "tokens") as bar:
        yield bar
