"""What the verb `evaluate` can be told. Torch-free."""

import os
import re
from dataclasses import dataclass, field
from typing import Literal

from galenic.runtime import UserError, nearest

from .benchmarks.config import BenchmarksConfig
from .probes.config import ProbesConfig

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def model_parts(model: str) -> list[str]:
    """Returns the folders a model is made of: itself, or a base and a LoRA adapter written `base+adapter`."""
    return [model] if "+" not in model or os.path.exists(model) else model.split("+", 1)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measures models on held-out text, conversations and multiple-choice questions."""

    out: str
    """Output folder: results.json and items/."""
    models: dict[str, str]
    """Name -> model folder, or `base+adapter` for a LoRA adapter; evaluated and reported in this order."""
    groups: dict[str, Literal["base", "expert", "merge", "aligned", "flattened"]] = field(
        default_factory=dict
    )
    """Model name -> its part in the pipeline; the report colours by it. Models left out are `other`."""
    tokens: str | None = None
    """Tokenizer step folder: the tokenizer, and tokens/<source>.heldout.* for the bits per byte. Without it the
    models' own tokenizer is used, and bits per byte are those of the conversations' answers only."""
    questions: str | None = None
    """Folder of <kind>.jsonl question files; without it no accuracy is measured."""
    conversations: str | None = None
    """Folder of <set>.heldout.jsonl conversations; without it answers are not measured."""
    experts: dict[str, str] = field(default_factory=dict)
    """Question kind -> model that is the expert of that kind; the normalised average divides by its accuracy."""
    questions_per_kind: int = 600
    """At most so many questions of each kind, a sample fixed by the seed."""
    kind_limits: dict[str, int] = field(default_factory=dict)
    """Question kind -> its own limit in place of questions_per_kind."""
    heldout_tokens: int = 6000
    """At most about so many held-out tokens of each source (whole documents, sampled by the seed)."""
    conversations_per_set: int = 100
    """At most so many held-out conversations of each set."""
    answer: dict[str, Literal["likelihood", "option", "numeric"]] = field(default_factory=dict)
    """Question kind -> how it is answered: by the options' `likelihood` right after the question (the default), or in
    at most `written_tokens` tokens of the model's own, of which the `option` named or the `numeric` result counts."""
    prompt: Literal["plain", "chat"] = "plain"
    """`plain`: <s>Question: ... Answer: and the option; `chat`: <B_SYS>...<C_Q>...<C_A> and the option, or the chat
    template of a tokenizer that is not ours."""
    system: str | None = None
    """System message of the chat prompt; none takes the chat format's own."""
    scoring: Literal["total", "per_byte", "pmi"] = "per_byte"
    """Which score picks the option in the headline accuracy; all three are computed and recorded."""
    shown: int = 10
    """Questions kept in results.json with every model's pick, for the report."""
    written_tokens: int = 0
    """Tokens at most that each model writes as its own answer to these and to kinds whose `answer` is written, the
    likeliest each time. Default: nothing."""
    probes: ProbesConfig | None = None
    """Measures of our own: long context, safety, calibration, position bias, contamination. Default: none."""
    batch_tokens: int = 2048
    """Tokens in one forward pass: bounds the memory of the logits."""
    benchmarks: BenchmarksConfig | None = None
    """Rows of the report's table and tasks of lm-eval; see docs/evaluation-benchmarks.md."""
    threads: int | None = None
    """Torch threads; none leaves torch's choice."""
    seed: int = 0
    """Fixes which questions, documents and conversations are sampled."""

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        optional = (self.tokens, self.questions, self.conversations)
        models = [part for model in self.models.values() for part in model_parts(model)]
        nested = [*(part.reads() for part in (self.benchmarks, self.probes) if part is not None)]
        named = [*models, *(path for path in optional if path is not None)]
        return list(dict.fromkeys([*named, *(path for paths in nested for path in paths)]))

    def rule(self, kind: str) -> str | None:
        """By which rule the written answers to a kind of questions are checked; none if nothing is written."""
        found = self.answer.get(kind, "likelihood")
        return None if found == "likelihood" else found

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError(
                "models: name at least one model folder, such as models: {base: RUN/30-pretrain/...}"
            )
        for name in self.models:
            if not SAFE_NAME.fullmatch(name):
                raise UserError(f"models: '{name}' names a file; use letters, digits, '.', '_' and '-' only")
        for name in self.groups:
            if name not in self.models:
                raise UserError(f"groups: no model is called '{name}'{nearest(name, self.models)}")
        for kind, name in self.experts.items():
            if name not in self.models:
                raise UserError(f"experts.{kind}: no model is called '{name}'{nearest(name, self.models)}")
        parts = (self.tokens, self.questions, self.conversations, self.benchmarks, self.probes)
        if not any(parts):
            raise UserError(
                "nothing to evaluate on: name tokens, questions, conversations, benchmarks or probes"
            )
        if self.probes and self.questions is None and (needy := self.probes.need_questions()):
            raise UserError(f"probes.{needy[0]} needs questions: it is measured on them")
        if self.experts and self.questions is None:
            raise UserError("experts needs questions: the normalised average is over their accuracies")
        if self.answer and self.questions is None:
            raise UserError("answer needs questions: it says how each kind of them is answered")
        for kind in self.answer:
            if self.rule(kind) and not self.written_tokens:
                raise UserError(
                    f"answer.{kind} is {self.answer[kind]}, which is written: say in written_tokens how many tokens an "
                    "answer may have, such as 64"
                )
        if self.system is not None and self.prompt != "chat":
            raise UserError(f"system is used by prompt=chat only; prompt is {self.prompt}")
        limits = {
            "questions_per_kind": self.questions_per_kind,
            "heldout_tokens": self.heldout_tokens,
            "conversations_per_set": self.conversations_per_set,
            "batch_tokens": self.batch_tokens,
            **{f"kind_limits.{kind}": limit for kind, limit in self.kind_limits.items()},
        }
        if self.threads is not None:
            limits["threads"] = self.threads
        for name, value in limits.items():
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.shown < 0:
            raise UserError(f"shown is {self.shown}; it must be 0 or more")
        if self.written_tokens < 0:
            raise UserError(f"written_tokens is {self.written_tokens}; it must be 0 or more")
