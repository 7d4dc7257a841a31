"""The verb `evaluate`: every model, the same text and the same questions.

Models go one after another. A model's rows and numbers appear at once when it is done, so a killed run begins again
with the first model that is not.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from galenic.model import load_tokenizer
from galenic.runtime import (
    Bar,
    Plan,
    UserError,
    folder_name,
    human,
    human_bytes,
    progress,
    read_json,
    read_jsonl,
    torch_setup,
    write_json,
    write_jsonl,
)

from . import inputs, multiple_choice, written
from .benchmarks import benchmarks
from .benchmarks.items import Item
from .bits_per_byte import Scored, bits_per_byte, conversation
from .config import EvaluateConfig, model_parts
from .models import open_model, weight_files
from .multiple_choice import Prompted, PromptFormat
from .probes import probes
from .statistics import normalised_average, wilson
from .written import Writer


def plan(config: EvaluateConfig) -> Plan:
    """Checks every input and counts the work.

    Raises:
        UserError: a model folder, question, conversation or held-out shard that is missing or malformed.
    """
    questions = inputs.load_questions(config)
    conversations = inputs.load_conversations(config)
    sources = inputs.heldout_sources(config)
    heldout = sum(min(entry["heldout"]["tokens"], config.heldout_tokens) for entry in sources.values())
    weights = [weight_files(name, path) for name, path in config.models.items()]
    scored = sum(len(rows) for kind, rows in questions.items() if config.rule(kind) is None)
    answers = sum(len(rows) for kind, rows in questions.items() if config.rule(kind))
    answers += sum(config.rule(kind) is None for kind, _ in _chosen(config, questions))
    facts = {
        "models": f"{len(config.models)} ({human_bytes(sum(f.stat().st_size for w in weights for f in w))} of weights)",
        "held-out text": f"about {human(heldout)} tokens of {len(sources)} sources, each model",
        "questions": ", ".join(f"{len(rows)} {kind}" for kind, rows in questions.items()) or "none",
        "conversations": ", ".join(f"{len(rows)} {name}" for name, rows in conversations.items()) or "none",
        "options scored": human(4 * scored * len(config.models)),
        **(
            {"answers written": f"{answers} of at most {config.written_tokens} tokens, each model"}
            if config.written_tokens
            else {}
        ),
        **_probes_planned(config, questions),
        **(benchmarks.facts(config.benchmarks) if config.benchmarks else {}),
    }
    return Plan(
        reads=config.reads(),
        writes=[f"{config.out}/results.json", f"{config.out}/items/"],
        facts=facts,
    )


def _probes_planned(config: EvaluateConfig, questions: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Returns the plan's fact about probes."""
    if config.probes is None:
        return {}
    probes.check(config.probes)
    counts = probes.prompts(config.probes, questions)
    return {"probes": ", ".join(f"{name} ({n} prompts)" if n else name for name, n in counts.items())}


def run(config: EvaluateConfig) -> None:
    """Evaluates every model of the config; finished ones are kept.

    Raises:
        UserError: see `plan`; also a model that was trained with another tokenizer.
    """
    torch_setup(config.seed)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    for name, path in config.models.items():
        weight_files(name, path)  # a wrong path is refused before any work
    material = _load(config)
    items = Path(config.out) / "items"
    with progress(len(config.models) * material.work, "evaluate", unit="tokens") as bar:
        for name in config.models:
            if (items / f"{name}.json").exists():
                bar.update(material.work, f"{name} is done")
                continue
            numbers, rows = _evaluate(config, name, material, bar)
            write_jsonl(items / f"{name}.jsonl", rows)
            write_json(items / f"{name}.json", numbers)
    write_json(Path(config.out) / "results.json", _results(config, material, items))


# ---------------------------------------------------------------------------- what is evaluated


@dataclass(frozen=True, kw_only=True)
class _Material:
    """Everything the models are measured on, tokenized once."""

    tokenizer: Any
    heldout: dict[str, list[Scored]]
    answers: dict[str, list[Scored]]
    questions: dict[str, list[dict[str, Any]]]
    shown: list[tuple[str, dict[str, Any]]]
    """(kind, question) of those that the report shows."""
    probed: int = 0
    """Prompts that the probes put to a model."""
    prompted: dict[int, tuple[dict[str, list[Prompted]], dict[str, Prompted]]] = field(default_factory=dict)
    """Context -> what `_prompts` made for it; models of one context share it."""
    benchmark_rows: dict[str, list[Item]] = field(default_factory=dict)

    @property
    def work(self) -> int:
        """Progress units of one model: tokens scored, a question or prompt counted as 100."""
        texts = [*self.heldout.values(), *self.answers.values()]
        asked = sum(map(len, (*self.questions.values(), *self.benchmark_rows.values()))) + self.probed
        return sum(len(text.ids) - 1 for group in texts for text in group) + 100 * asked


def _load(config: EvaluateConfig) -> _Material:
    tokenizer = load_tokenizer(_tokenizer_place(config))
    conversations = inputs.load_conversations(config)
    questions = inputs.load_questions(config)
    if config.probes is not None:
        probes.check(config.probes)
    return _Material(
        tokenizer=tokenizer,
        heldout={source: inputs.load_heldout(config, source) for source in inputs.heldout_sources(config)},
        answers={
            name: [conversation(tokenizer, messages) for messages in rows]
            for name, rows in conversations.items()
        },
        questions=questions,
        shown=_chosen(config, questions),
        probed=sum(probes.prompts(config.probes, questions).values()) if config.probes else 0,
        benchmark_rows=benchmarks.load(config.benchmarks) if config.benchmarks else {},
    )


def _tokenizer_place(config: EvaluateConfig) -> str:
    """Returns where the tokenizer of all models is: in the tokenizer step, or with the first model."""
    return config.tokens or model_parts(next(iter(config.models.values())))[0]


# ---------------------------------------------------------------------------- one model


def _evaluate(
    config: EvaluateConfig, name: str, material: _Material, bar: Bar
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns a model's numbers and its rows, one a question."""
    path = config.models[name]
    parts = model_parts(path)
    model = open_model(path)
    if load_tokenizer(parts[0]).get_vocab() != material.tokenizer.get_vocab():
        raise UserError(
            f"models.{name}: {path} has another tokenizer than {_tokenizer_place(config)}; their tokens differ"
        )
    context = int(model.config.max_position_embeddings)

    def measure(texts: list[Scored]) -> dict[str, float]:
        value, size = bits_per_byte(
            model,
            texts,
            context=context,
            batch_tokens=config.batch_tokens,
            advance=lambda n: bar.update(n, name),
        )
        return {"value": value, "bytes": size}

    heldout = {source: measure(texts) for source, texts in material.heldout.items()}
    answers = {
        label: {"bits_per_byte": (found := measure(texts))["value"], "bytes": found["bytes"]}
        for label, texts in material.answers.items()
    }
    writer = Writer(
        model=model,
        tokenizer=material.tokenizer,
        prompt=PromptFormat(name=config.prompt, system=config.system),
        context=context,
        tokens=config.written_tokens,
    )
    rows, accuracy = _answer(config, model, writer, material, bar, name)
    said = _said(config, writer, material)
    for row in rows:
        if (row["kind"], row["id"]) in said:
            row["said"] = said[row["kind"], row["id"]]
    numbers = {
        "path": "+".join(map(folder_name, parts)),
        "group": config.groups.get(name, "other"),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bits_per_byte": heldout,
        "answers": answers,
        "accuracy": accuracy,
    }

    def advance(items: int) -> None:
        bar.update(100 * items, name)

    if config.benchmarks:
        numbers["benchmarks"], more = benchmarks.measure(
            config.benchmarks,
            material.benchmark_rows,
            model,
            material.tokenizer,
            name,
            Path(config.out),
            advance,
        )
        rows += more
    if config.probes is not None:
        numbers["probes"], more = probes.measure(
            config.probes,
            model,
            material.tokenizer,
            name,
            Path(config.out),
            advance,
            prompt=PromptFormat(name=config.prompt, system=config.system),
            batch_tokens=config.batch_tokens,
            questions=material.questions,
            files=inputs.question_files(config),
            rows=rows,
            scoring=config.scoring,
        )
        rows = [*rows, *more]
    return numbers, rows


def _answer(
    config: EvaluateConfig, model: Any, writer: Writer, material: _Material, bar: Bar, name: str
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Returns the rows of all questions and the accuracy of each kind."""
    rows: list[dict[str, Any]] = []
    accuracy: dict[str, dict[str, Any]] = {}
    prompted, bare_prompts = _prompts(config, material, writer.context)
    priors = multiple_choice.option_log_probs(
        model, list(bare_prompts.values()), batch_tokens=config.batch_tokens
    )
    bare = {text: value for text, (value,) in zip(bare_prompts, priors, strict=True)}
    for kind, questions in material.questions.items():
        if rule := config.rule(kind):
            found, accuracy[kind] = written.answered(
                writer, kind, questions, rule, advance=lambda n: bar.update(100 * n, name)
            )
            rows += found
            continue
        totals = multiple_choice.option_log_probs(
            model,
            prompted[kind],
            batch_tokens=config.batch_tokens,
            advance=lambda n: bar.update(100 * n, name),
        )
        right = dict.fromkeys(multiple_choice.SCORINGS, 0)
        for row, total in zip(questions, totals, strict=True):
            scores = multiple_choice.scores(
                total, [bare[option] for option in row["options"]], row["options"]
            )
            picks = {scoring: multiple_choice.best(values) for scoring, values in scores.items()}
            for scoring, pick in picks.items():
                right[scoring] += pick == row["answer"]
            rounded = {scoring: [round(value, 6) for value in values] for scoring, values in scores.items()}
            told = {"picks": picks, "right": float(picks[config.scoring] == row["answer"]), **rounded}
            rows.append({"kind": kind, "id": row["id"], "answer": row["answer"], **told})
        accuracy[kind] = _accuracy(right, len(questions), config.scoring)
        accuracy[kind]["truncated"] = sum(prompt.truncated for prompt in prompted[kind])
    return rows, accuracy


def _said(config: EvaluateConfig, writer: Writer, material: _Material) -> dict[tuple[str, str], str]:
    """Returns what a model itself answers to the questions that are shown: (kind, id) -> text.

    Those of kinds whose answers are written have theirs already.
    """
    if not config.written_tokens:
        return {}
    shown = [(kind, row) for kind, row in material.shown if config.rule(kind) is None]
    found = writer([row["question"] for _, row in shown])
    return {(kind, row["id"]): answer.text for (kind, row), answer in zip(shown, found, strict=True)}


def _prompts(
    config: EvaluateConfig, material: _Material, context: int
) -> tuple[dict[str, list[Prompted]], dict[str, Prompted]]:
    """Tokenizes the questions of each kind, and every option after the bare prompt.

    Siblings recur as options of many questions, so each text is scored after the bare prompt once.
    """
    if context not in material.prompted:
        prompt = PromptFormat(name=config.prompt, system=config.system)
        tokenizer = material.tokenizer
        scored = {kind: rows for kind, rows in material.questions.items() if config.rule(kind) is None}
        texts = sorted({option for rows in scored.values() for row in rows for option in row["options"]})
        material.prompted[context] = (
            {
                kind: [
                    multiple_choice.tokenize(tokenizer, prompt, row["question"], row["options"], context)
                    for row in rows
                ]
                for kind, rows in scored.items()
            },
            {text: multiple_choice.tokenize(tokenizer, prompt, None, [text], context) for text in texts},
        )
    return material.prompted[context]


def _accuracy(right: dict[str, int], n: int, scoring: str) -> dict[str, Any]:
    low, high = wilson(right[scoring], n)
    scorings = {name: count / n for name, count in right.items()}
    return {
        "value": right[scoring] / n,
        "low": low,
        "high": high,
        "n": n,
        "chance": 0.25,
        "scorings": scorings,
    }


# ---------------------------------------------------------------------------- all models


def _results(config: EvaluateConfig, material: _Material, items: Path) -> dict[str, Any]:
    """Joins the finished models, compares them with the experts, and picks the questions that are shown."""
    models = {name: read_json(items / f"{name}.json") for name in config.models}
    experts = {kind: models[expert]["accuracy"][kind]["value"] for kind, expert in config.experts.items()}
    for numbers in models.values():
        scores = {kind: found["value"] for kind, found in numbers["accuracy"].items()}
        numbers["normalised_average"] = normalised_average(scores, experts)
    return {
        "models": models,
        "experts": config.experts,
        "shared_words": {
            kind: _shared_words(rows)
            for kind, rows in material.questions.items()
            if config.rule(kind) != "numeric"  # whose options are not shown
        },
        "shown": _shown(config, material, items),
        "protocol": _protocol(config, material),
    }


def _shared_words(rows: list[dict[str, Any]]) -> float:
    """Accuracy of picking the option that shares most words with the question."""
    right = [
        multiple_choice.most_shared_words(row["question"], row["options"]) == row["answer"] for row in rows
    ]
    return sum(right) / len(right)


def _chosen(
    config: EvaluateConfig, questions: dict[str, list[dict[str, Any]]]
) -> list[tuple[str, dict[str, Any]]]:
    """Picks questions of every kind in turn, by a hash that knows nothing of how the models did."""
    queues = [
        [
            (kind, row)
            for row in inputs.sample(rows, [row["id"] for row in rows], config.shown, config.seed + 1)
        ]
        for kind, rows in questions.items()
    ]
    turns = max((len(queue) for queue in queues), default=0)
    return [queue[turn] for turn in range(turns) for queue in queues if turn < len(queue)][: config.shown]


def _shown(config: EvaluateConfig, material: _Material, items: Path) -> list[dict[str, Any]]:
    """Returns the questions that are shown, with every model's pick and what it wrote."""
    keys = [(kind, row["id"]) for kind, row in material.shown]
    picks: dict[tuple[str, str], dict[str, int | None]] = {key: {} for key in keys}
    said: dict[tuple[str, str], dict[str, str]] = {key: {} for key in keys}
    for name in config.models:
        for row in read_jsonl(items / f"{name}.jsonl"):
            key = row["kind"], row["id"]
            if key in picks:
                picks[key][name] = row["picks"][config.scoring] if "picks" in row else row["pick"]
                if "said" in row:
                    said[key][name] = row["said"]
    return [
        {
            "kind": kind,
            **{part: row[part] for part in ("question", "options", "answer")},
            "source": row.get("source", ""),
            "picks": picks[key],
            **({"said": said[key]} if said[key] else {}),
        }
        for key, (kind, row) in zip(keys, material.shown, strict=True)
    ]


def _protocol(config: EvaluateConfig, material: _Material) -> dict[str, str]:
    """Says in words how each number was measured."""
    prompt = PromptFormat(name=config.prompt, system=config.system)

    def show(question: str | None) -> str:
        ids, text = prompt.parts(material.tokenizer, question)
        return material.tokenizer.decode(ids) + text + prompt.join + "{option}"

    documents = {
        "bits_per_byte": "sum over text tokens of -log2 p, divided by the UTF-8 bytes of the text; <s> and </s> are "
        "not counted; documents longer than the context are scored in windows that advance by half a context; whole "
        f"held-out documents, sampled by seed {config.seed} until {config.heldout_tokens} tokens a source"
    }
    put = show("{question}").removesuffix(prompt.join + "{option}")
    said = (
        f"the likeliest token each time after {put!r}, at most {config.written_tokens}; no options are shown"
    )
    rules = {kind: rule for kind in material.questions if (rule := config.rule(kind))}
    return {
        **(documents if material.heldout else {}),
        "answers": "bits per byte of the assistant's turns in the chat format, given all before them; the end-of-turn "
        f"token counts in the bits, not in the bytes; at most {config.conversations_per_set} conversations a set",
        "accuracy": f"the option with the highest score '{config.scoring}' after the prompt; the first of equals; "
        "95% interval by Wilson",
        "prompt": show("{question}"),
        "total": "log-likelihood of the option given the prompt",
        "per_byte": "total divided by the option's UTF-8 bytes",
        "pmi": f"total minus the option's log-likelihood after the bare prompt {show(None)!r}",
        "normalised_average": "mean over question kinds of the accuracy divided by the accuracy of that kind's expert "
        "(MetaGPT, arXiv 2406.11385, section 4)",
        "scoring": config.scoring,
        **{
            f"accuracy of {kind}": written.protocol(rule, put, config.written_tokens)
            for kind, rule in rules.items()
        },
        **({"said": said} if config.written_tokens else {}),
        **(probes.protocol(config.probes) if config.probes else {}),
        **(benchmarks.protocol(config.benchmarks) if config.benchmarks else {}),
    }
