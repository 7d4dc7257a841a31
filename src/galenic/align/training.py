"""What the verbs of alignment share: a model is opened, trained with an objective on the loop of pre-training, written.

    model folder --open--> model (+ adapter), tokenizer --fit--> metrics.jsonl, checkpoints --write--> model folder

A verb's file holds its objective and its batches; everything that has to be right for each of them (resuming to the
same bytes, several processes, adapters, where things are written) is here once.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from galenic.align.config import TrainingConfig
from galenic.ranks import gathered, process_group, rank
from galenic.runtime import (
    Bar,
    Plan,
    UserError,
    device,
    folder_name,
    read_json,
    torch_setup,
    write_json,
)

Score = Callable[[], Mapping[str, Any]]
"""Measures the model on what is held out."""


def planned(config: TrainingConfig, facts: Mapping[str, str], *, length: str) -> Plan:
    """What a verb of alignment would do.

    Args:
        config: of the verb.
        facts: about its data and its objective.
        length: of training, in words.

    Raises:
        UserError: an input does not exist.
    """
    for path in config.reads():
        if not Path(path).exists():
            raise UserError(f"{path}: no such file or folder")
    rates = f"learning rate {config.optim.lr:g} to {config.final_lr:g} on a cosine"
    trains = f"a LoRA adapter of rank {config.lora.rank}" if config.lora else "the whole model"
    return Plan(
        reads=config.reads(),
        writes=[f"{config.out}/model"],
        facts={**facts, "training": f"{length}, {rates}", "trains": trains},
    )


class Run:
    """One run of a verb; made by `opened`.

    Attributes:
        config: of the verb.
        model: in training: with its adapter, and from `fit` on spread over the processes.
        tokenizer: its own.
        parallel: the processes.
        trainer: the loop, once `fit` has begun.
    """

    def __init__(
        self, verb: str, config: TrainingConfig, load: Callable[[str], Any], *, packed: bool = False
    ) -> None:
        from galenic.align.lora import add_adapter
        from galenic.model import load_tokenizer
        from galenic.pretrain.parallelism.parallel import Parallel

        self.verb, self.config, self.out = verb, config, Path(config.out)
        spread = config.parallel
        for name in ("context", "tensor"):
            if getattr(spread, name) > 1:
                raise UserError(f"parallel.{name}: alignment shares rows and weights only; leave it at 1")
        if spread.attention == "auto" and not packed:
            # Flex attention skips what packed documents hide, and is compiled anew for each length of a batch.
            spread = replace(spread, attention="sdpa")
        self.parallel = Parallel(spread, precision=config.precision, device=device())
        self.model, self.tokenizer = load(config.model), load_tokenizer(config.model)
        _without_dropout(self.model)
        if config.lora:
            self.model = add_adapter(self.model, config.lora, config.seed)
        self.trainer: Any = None
        self._attached: list[str] = []

    @cached_property
    def product(self) -> bool:
        """What `head_is_product` says of the model."""
        from galenic.model.head import head_is_product

        return head_is_product(self.model)

    def check_context(self, tokens: int) -> None:
        """Looks whether the model takes so many tokens.

        Raises:
            UserError: it does not.
        """
        from galenic.model.foreign import plain

        most = getattr(plain(self.model).config, "max_position_embeddings", tokens)
        if tokens > most:
            raise UserError(
                f"context: {tokens} tokens, but {self.config.model} was made for {most} "
                "(max_position_embeddings in its config.json)"
            )

    def attach(self, name: str, module: Any) -> None:
        """Adds a module to the model that is trained and in its checkpoints, but not written with it.

        Under FSDP its weights are whole from the model's forward pass to the end of the backward pass, as the head's.

        Args:
            name: `model.<name>` from now on.
            module: the same on every process.
        """
        self.model.add_module(name, module)
        self._attached.append(name)

    def fit(
        self,
        batches: Any,
        objective: Any,
        *,
        steps: int,
        score: Score | None = None,
        check: Callable[[Mapping[str, Any]], None] | None = None,
        after: Callable[[Any], Callable[[int], None]] | None = None,
        together: int = 1,
    ) -> None:
        """Trains, from where a killed run stopped, on a cosine learning rate; scores before and after.

        Args:
            batches: `galenic.pretrain.loop.Batches`; if it has `restore`, that is given what its `state` said when the
                run was written down.
            objective: `galenic.pretrain.loop.Objective`; None: the labels' likelihood.
            steps: in all.
            score: told as a row of kind `heldout` at step 0 and at the end; called on every process, in `eval()`.
            check: looks at each row, of a run that goes on at those before too, and may end the run.
            after: given the trainer, whose model is still the one that was opened, makes what is called after each
                step; see `Trainer.train`.
            together: see `Trainer.train`.

        Raises:
            UserError: the rows of a batch do not divide among the processes, or a step went wrong.
        """
        from galenic.pretrain.checkpoints.checkpoints import Checkpoints
        from galenic.pretrain.loop import Trainer, shown
        from galenic.pretrain.schedules import cosine_decay, warmup
        from galenic.pretrain.watching.watch import Watch

        config, readers = self.config, self.parallel.data_ranks
        if batches.rows % readers:
            raise UserError(
                f"rows: {batches.rows} in a batch do not divide among {readers} processes: take a multiple of {readers}"
            )
        watch = Watch(self.out, config.watch, device=device())
        timeout = config.parallel.timeout_seconds
        with (
            Checkpoints(self.out, config.checkpoints, run=self._identity(), timeout=timeout) as checkpoints,
            closing(watch),
        ):
            self.parallel.apply(self.model, config.seed)
            self.trainer = Trainer(
                self.model,
                config.optim,
                config.guard,
                self.out,
                parallel=self.parallel,
                checkpoints=checkpoints,
                watch=watch,
                micro_rows=config.parallel.micro_rows,
                objective=objective,
            )
            follow = after(self.trainer) if after else None
            if self.trainer.resume() and hasattr(batches, "restore"):
                batches.restore(self.trainer.reader)
            if check is not None:
                for row in gathered(self.trainer.rows() if rank() == 0 else [])[0]:
                    if row["kind"] == "train":
                        check(row)
            if self.trainer.step == 0:
                self._score(score, 0)

            def lr(step: int) -> float:
                warm = config.optim.lr * warmup(step, config.optim.warmup_steps)
                return min(warm, cosine_decay((step + 1) / steps, start=config.optim.lr, end=config.final_lr))

            with shown(steps, self.out.name, "steps") as shown_bar:
                bar = _Steps(shown_bar)
                bar.update(self.trainer.step)
                self.trainer.train(
                    batches, first=0, last=steps, lr=lr, bar=bar, after=follow, check=check, together=together
                )
            self._score(score, steps)

    def _score(self, score: Score | None, step: int) -> None:
        """Writes a row of what is held out, unless a run before this one did."""
        watch = self.trainer.watch
        if score is not None and step not in watch.scored:
            self.model.eval()
            watch.row({"kind": "heldout", "step": step, **score()})

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with: everything that decides which weights come out.

        Of inputs only that they were given: where they lie may change, and what is in them is the build's to know.
        """
        from galenic.evaluate.config import model_parts

        values, paths = asdict(self.config), self.config.reads()
        for name in ("out", *self.config.incidental):
            del values[name]

        def placeless(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: placeless(part) for name, part in value.items()}
            is_input = isinstance(value, str) and all(part in paths for part in model_parts(value))
            return True if is_input else value

        return {"verb": self.verb, **placeless(values)}

    def write(self, facts: Mapping[str, Any], **provenance: Any) -> None:
        """Writes the model folder (or the adapter), and with it the run is complete.

        Args:
            facts: about the data; `data.json`.
            provenance: how the model was made, beside verb, steps, adapter and base.

        Raises:
            UserError: it could not be written; on every process.
        """
        from galenic.align.lora import save_adapter
        from galenic.model.foreign import save_any
        from galenic.pretrain.checkpoints.export import Tensors, export

        config, steps, folder = self.config, self.trainer.step, self.out / "model"
        if rank() == 0:
            write_json(self.out / "data.json", {"steps": steps, **facts})
        made_of = Path(config.model) / "galenic.json"
        record = {
            "verb": self.verb,
            "steps": steps,
            **provenance,
            **({"lora": asdict(config.lora)} if config.lora else {}),
            "base": read_json(made_of) if made_of.exists() else None,
        }
        for name in self._attached:
            delattr(self.model, name)
        self.model.eval()
        save = save_adapter if config.lora else save_any

        def write(weights: Tensors) -> None:
            parents = [folder_name(config.model)]
            save(self.model, folder, base=config.model, provenance=record, parents=parents, weights=weights)

        trained_only = config.lora is not None
        export(self.model, self.parallel, folder, write, wanted=lambda p: p.requires_grad or not trained_only)
        self.trainer.finish()


@contextmanager
def opened(
    verb: str, config: TrainingConfig, load: Callable[[str], Any] | None = None, *, packed: bool = False
) -> Iterator[Run | None]:
    """Opens the run of a verb; None if its model is there already.

    Args:
        verb: its name.
        config: its own.
        load: opens its model's folder. Default: any causal language model.
        packed: whether a row holds several texts.

    Raises:
        UserError: the model cannot be loaded, or processes are not what was asked for.
    """
    from galenic.model.foreign import load_any
    from galenic.pretrain.checkpoints.checkpoints import Checkpoints

    with process_group(config.parallel.timeout_seconds):
        torch_setup(config.seed)
        done = (Path(config.out) / "model").exists()
        if gathered(done)[0]:  # what process 0 sees decides for all
            Checkpoints(config.out, config.checkpoints).finish()  # a kill may have left them
            yield None
            return
        yield Run(verb, config, load or load_any, packed=packed)


def _without_dropout(model: Any) -> None:
    """Switches dropout off: a step draws no random number, so that a resumed run repeats it, and policies compare."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


class _Steps:
    """The loop counts tokens; what is shown here are its steps."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar

    def update(self, n: float = 1, note: str = "") -> None:
        """Advances by one step for a batch, however many tokens it has."""
        self.bar.update(1 if note else n, note)
