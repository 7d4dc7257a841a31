"""Verb `pretrain`: token shards in, a model folder at each phase's end out.

Source: Baichuan-M1 report, section 4.2: three phases (general; medical basic; medical advanced) under one optimizer
state, warm-up then constant learning rate, cosine decay, longer context and a larger RoPE base in the last phase,
AdamW (0.9, 0.95), weight decay 0.1, clip 1.0, Algorithm 1's gradient guard. `plan` tells what `run` would do.
"""

from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galenic.corpus.tokens.shards import read_meta, special_tokens
from galenic.pretrain.config import ArchitectureConfig, PhaseConfig, PretrainConfig
from galenic.pretrain.planning.plan import plan as plan
from galenic.pretrain.planning.plan import preview as preview
from galenic.ranks import gathered, process_group, ranks
from galenic.runtime import device, sha256_file, torch_setup

if TYPE_CHECKING:
    from galenic.pretrain.data.curriculum import PhaseBatches
    from galenic.pretrain.loop import Trainer

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


# ---------------------------------------------------------------------------- run


def run(config: PretrainConfig) -> None:
    """Trains through the phases; continues where a killed run stopped, to the same bytes."""
    with process_group(config.parallel.timeout_seconds):
        _train(config)


def _train(config: PretrainConfig) -> None:
    import torch

    from galenic.pretrain.checkpoints.checkpoints import Checkpoints
    from galenic.pretrain.data.curriculum import PhaseBatches, open_shards
    from galenic.pretrain.loop import Trainer
    from galenic.pretrain.parallelism.parallel import Parallel
    from galenic.pretrain.planning.budget import phase_flops
    from galenic.pretrain.watching.watch import Watch

    torch_setup(config.seed)
    out, meta = Path(config.out), read_meta(config.tokenizer)
    data = sha256_file(Path(config.tokenizer) / "tokens" / "meta.json")
    with Checkpoints(
        out,
        config.checkpoints,
        run=_identity(config, data),
        timeout=config.parallel.timeout_seconds,
    ) as checkpoints:
        # What process 0 sees decides for all, or some would wait for others that left.
        done = set(gathered([phase.name for phase in config.phases if (out / phase.name).exists()])[0])
        if len(done) == len(config.phases):
            checkpoints.finish()
            return
        parallel = Parallel(config.parallel, precision=config.precision, device=device())
        for phase in config.phases:
            parallel.check(config.architecture, phase.rows, phase.context)
        shards = open_shards(config)
        stages = [PhaseBatches(config, phase, shards) for phase in config.phases]
        with torch.device("meta"):  # weights are drawn where they belong
            model = build_model(config.architecture, meta, config.phases[0])
        watch = Watch(
            out,
            config.watch,
            flops_per_token={
                phase.name: phase_flops(model.config, phase, meta["sources"]).trained
                for phase in config.phases
            },
            tokens={
                phase.name: batches.steps * batches.rows * batches.context
                for phase, batches in zip(config.phases, stages, strict=True)
            },
            devices=ranks(),
            device=device(),
        )
        parallel.apply(model, config.seed)
        with closing(watch):
            trainer = Trainer(
                model,
                config.optim,
                config.guard,
                out,
                parallel=parallel,
                checkpoints=checkpoints,
                watch=watch,
                micro_rows=config.parallel.micro_rows,
            )
            if not trainer.resume():
                trainer.save()  # the seeded start itself, so that a resume never draws weights again
            _phases(config, stages, trainer, done, data)
            trainer.finish()


def _phases(
    config: PretrainConfig, stages: list["PhaseBatches"], trainer: "Trainer", done: set[str], data: str
) -> None:
    """Goes through the phases from where the trainer is.

    Args:
        config: of the run.
        stages: each phase's batches.
        trainer: the network and where it is.
        done: phases whose model folder is there.
        data: digest of the shards, for the models' provenance.
    """
    from galenic.pretrain.checkpoints.export import export_model
    from galenic.pretrain.loop import shown
    from galenic.pretrain.schedules import rate
    from galenic.pretrain.watching.heldout import scorer

    sources = read_meta(config.tokenizer)["sources"]
    sizes = {source: counts["train"]["tokens"] for source, counts in sources.items()}
    steps = [batches.steps for batches in stages]
    learned: dict[str, str] = {}  # source -> licence, of what the network has read so far
    last = 0
    for number, (phase, batches) in enumerate(zip(config.phases, stages, strict=True)):
        for source in sorted(source for source, share in phase.mixture.items() if share):
            learned[source] = sources[source].get("licence", "unknown")
        first, last = last, last + batches.steps
        set_context(trainer.model, phase)
        score = scorer(trainer.model, config, phase, last, trainer.watch, trainer.parallel)
        if trainer.step < last:
            batches.restore(trainer.reader)
            with shown(batches.steps * batches.rows * batches.context, phase.name, "tokens") as bar:
                bar.update((trainer.step - first) * batches.rows * batches.context)
                trainer.train(
                    batches,
                    first=first,
                    last=last,
                    lr=partial(rate, config, steps, number),
                    bar=bar,
                    after=score,
                    sizes=sizes,
                    phase=phase.name,
                )
        # ---- the phase's end: held-out losses, checkpoint, and with it on disk the model folder
        if trainer.step == last and phase.name not in done:
            score(last)
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
            folder = Path(config.out) / phase.name
            trainer.model.eval()
            export_model(trainer.model, trainer.parallel, folder, config.tokenizer, provenance)
        batches.release()


def _identity(config: PretrainConfig, data: str) -> dict[str, Any]:
    """What a checkpoint must agree with: everything that decides which weights come out."""
    values = asdict(config)
    for name in (*config.incidental, "out", "tokenizer"):
        del values[name]
    return {**values, "data": data}
