"""One contender of `pretrain.py`, in a process of its own: trains some steps whenever a line asks for it.

    python pretrain_worker.py CONTENDER SIZE

reads {"steps": n} from standard input and answers with seconds, processor seconds and the peak of memory. Between two
lines it waits without computing.
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from galenic.runtime import peak_memory_bytes  # before torch: it keeps waiting threads from burning cores

# isort: split
import torch
from pretrain_sizes import CONTENDERS, SIZES, Size

from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM

BATCHES = 64
RATE = 1e-4
MEAN_LOG, SPREAD_LOG = 5.1, 0.5  # of a document's tokens: 186 on average, as in the starter's shards

Answer = Callable[[], None]


# ---------------------------------------------------------------------------- the same model and batches for all


def network(size: Size) -> BaichuanM1ForCausalLM:
    torch.manual_seed(0)
    config = BaichuanM1Config(**size.shape, max_position_embeddings=size.context, rope_theta=1e5)
    return BaichuanM1ForCausalLM._from_config(config, attn_implementation="sdpa")


class Batches:
    """Random tokens in documents packed into rows; `Batches` of the training loop, repeated without end."""

    domains: Sequence[str] = ()

    def __init__(self, size: Size) -> None:
        self.steps, self.rows, self.context = 10**9, size.rows, size.context
        generator = torch.Generator().manual_seed(1)
        self.made = [self._make(size, generator) for _ in range(BATCHES)]

    def _make(self, size: Size, generator: torch.Generator) -> dict[str, torch.Tensor]:
        shape = (size.rows, size.context)
        ids = torch.randint(size.shape["vocab_size"], shape, generator=generator)
        positions = torch.stack([self._positions(size.context, generator) for _ in range(size.rows)])
        return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}

    @staticmethod
    def _positions(context: int, generator: torch.Generator) -> torch.Tensor:
        pieces: list[torch.Tensor] = []
        left = context
        while left:
            drawn = math.exp(MEAN_LOG + SPREAD_LOG * float(torch.randn((), generator=generator)))
            pieces.append(torch.arange(min(left, max(2, round(drawn)))))
            left -= len(pieces[-1])
        return torch.cat(pieces)

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return {name: tensor[list(rows)] for name, tensor in self.made[step % BATCHES].items()}

    def documents(self, step: int) -> list[str]:
        return []

    def state(self, step: int) -> dict[str, Any]:
        return {"step": step}


# ---------------------------------------------------------------------------- contenders


def galenic(size: Size, turn: "Turns", *, compiled: bool, onednn: bool) -> None:
    """Galenic's own loop: guard, metrics row and all."""
    from galenic.pretrain.checkpoints.checkpoints import Checkpoints
    from galenic.pretrain.config import CheckpointConfig, GuardConfig, OptimConfig, ParallelConfig
    from galenic.pretrain.loop import Silent, Trainer
    from galenic.pretrain.parallelism.parallel import Parallel
    from galenic.products import prefer_onednn
    from galenic.runtime import torch_setup

    if onednn:
        torch_setup(0)
    else:
        torch.set_flush_denormal(True)
    device = size.device
    parallel = Parallel(ParallelConfig(compile=compiled), precision="auto", device=device)
    model = network(size)
    turn.parameters = sum(p.numel() for p in model.parameters())
    parallel.apply(model)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        checkpoints = Checkpoints(out, CheckpointConfig(seconds=1e9))
        optim = OptimConfig(lr=RATE)
        trainer = Trainer(model, optim, GuardConfig(), out, parallel=parallel, checkpoints=checkpoints)
        batches = Batches(size)
        turn.note = f"oneDNN: {prefer_onednn()}" if onednn else ""
        while steps := turn.next():
            first = trainer.step
            trainer.train(batches, first=0, last=first + steps, lr=lambda _: RATE, bar=Silent())
            turn.loss = trainer.rows()[0]["loss"] if first == 0 else turn.loss
        checkpoints.close()


def trainer(size: Size, turn: "Turns", *, compiled: bool, skip_logits: bool) -> None:
    """`transformers.Trainer`: fused AdamW, nothing logged or saved, rows stacked in this process."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    torch.set_flush_denormal(True)
    model = network(size)
    turn.parameters = sum(p.numel() for p in model.parameters())
    batches = Batches(size)
    names = list(batches.made[0])
    rows = [{n: batch[n][row] for n in names} for batch in batches.made for row in range(size.rows)]

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        batch: dict[str, Any] = {name: torch.stack([row[name] for row in rows]) for name in names}
        return batch | {"skip_logits": True} if skip_logits else batch

    class InTurn(Trainer):
        """Rows in the order in which Galenic reads them; remembers the first loss."""

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 0:
                turn.loss = float(loss)
            return loss

    class Waits(TrainerCallback):
        left = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ask(control)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.left -= 1
            if not self.left:
                self.ask(control)

        def ask(self, control: Any) -> None:
            self.left = turn.next()
            if not self.left:
                control.should_training_stop = True
                os._exit(0)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size.rows,
            max_steps=10**6,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            torch_compile=compiled,
            use_cpu=size.device == "cpu",
            bf16=size.device == "cuda",
        )
        InTurn(
            model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Waits()]
        ).train()


def plain(size: Size, turn: "Turns", *, compiled: bool) -> None:
    """A plain Llama of the same width, depth, vocabulary and number of parameters, in a plain loop."""
    from plain_llama import PlainLlama

    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    shape = size.shape
    model = PlainLlama(
        vocabulary=shape["vocab_size"],
        width=shape["hidden_size"],
        inner=shape["intermediate_size"],
        layers=shape["num_hidden_layers"],
        heads=shape["num_attention_heads"],
        kv_heads=shape["num_key_value_heads"],
        context=size.context,
    )
    turn.parameters = sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if id(p) not in chosen], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    call = torch.compile(model) if compiled else model
    batches, step = Batches(size), 0
    targets = [torch.nn.functional.pad(b["input_ids"][:, 1:], (0, 1), value=-100) for b in batches.made]
    while steps := turn.next():
        for _ in range(steps):
            loss = call(batches.made[step % BATCHES]["input_ids"], targets[step % BATCHES])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            turn.loss = float(loss) if step == 0 else turn.loss
            step += 1


# ---------------------------------------------------------------------------- the conversation


class Turns:
    """What the contender answers with between its turns."""

    def __init__(self) -> None:
        self.parameters, self.loss, self.note = 0, math.nan, ""
        self.started: tuple[float, float] | None = None

    def next(self) -> int:
        """Tells of the last turn and waits for the next; 0: no more."""
        if self.started is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds, processor = perf_counter() - self.started[0], process_time() - self.started[1]
            tell = {"seconds": seconds, "processor": processor, "peak": peak_memory_bytes()}
            tell |= {"parameters": self.parameters, "loss": self.loss, "note": self.note}
            if torch.cuda.is_available():
                tell["peak"] = torch.cuda.max_memory_allocated()
            print(json.dumps(tell), flush=True)
        line = sys.stdin.readline()
        self.started = (perf_counter(), process_time())
        return json.loads(line)["steps"] if line else 0


def main() -> None:
    contender, size = CONTENDERS[sys.argv[1]], SIZES[sys.argv[2]]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    options = dict(contender)
    {"galenic": galenic, "trainer": trainer, "plain": plain}[options.pop("loop")](size, Turns(), **options)


if __name__ == "__main__":
    main()
