"""Verb `pretrain`: token shards in, a model folder at each phase's end out.

Source: Baichuan-M1 report, section 4.2: three phases (general; medical basic; medical advanced) under one optimizer
state, warm-up then constant learning rate, cosine decay, longer context and a larger RoPE base in the last phase,
AdamW (0.9, 0.95), weight decay 0.1, clip 1.0, Algorithm 1's gradient guard. `plan` tells what `run` would do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from galenic.corpus.tokens.shards import Shard, read_meta, read_shard, special_tokens
from galenic.pretrain.config import ArchitectureConfig, PhaseConfig, PretrainConfig
from galenic.pretrain.plan import plan as plan
from galenic.pretrain.plan import preview as preview
from galenic.ranks import gathered, process_group, rank, ranks
from galenic.runtime import Bar, device, progress, sha256_file, torch_setup

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
