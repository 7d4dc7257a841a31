"""What each row asks and what is right, from the rows of its data set in the set's own schema.

The wording is ours, after what the report says about its prompts; it lies in `prompts/`. An item whose answer cannot
be right (an index outside the options, an unknown label, limits that do not hold the answer) is refused by file and
line: it would count against every model.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from galenic.corpus.synthesis.filling import fill
from galenic.runtime import UserError

from . import scoring
from .files import Doc, read
from .rows import ROWS

LETTERS = "ABCDEFGHIJ"
Kind = Literal["option", "label", "number", "date", "weeks", "diagnosis", "principal", "judge"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question of a row."""

    id: str
    prompt: str
    """All that the model reads, in a user's turn."""
    kind: Kind
    answer: tuple[str, ...]
    """What is right: letters of options; a label; a number's two limits; a day; weeks and days; accepted names; a
    reference text."""
    options: dict[str, str] = field(default_factory=dict)
    """Letter -> text of an option."""
    labels: tuple[str, ...] = ()
    """Of which the answer is one."""
    question: str = ""
    """What was asked, without instructions: for a judge."""


def score(item: Item, text: str) -> scoring.Verdict:
    """Scores an answer by the item's rule.

    Raises:
        ValueError: only a judge can score it.
    """
    match item.kind:
        case "option":
            return scoring.score_option(text, item.options, item.answer)
        case "label":
            return scoring.score_label(text, item.labels, item.answer[0])
        case "number":
            return scoring.score_number(text, float(item.answer[0]), float(item.answer[1]))
        case "date":
            return scoring.score_date(text, datetime.date.fromisoformat(item.answer[0]))
        case "weeks":
            return scoring.score_weeks(text, (int(item.answer[0]), int(item.answer[1])))
        case "diagnosis":
            return scoring.score_diagnosis(text, item.answer)
        case "principal":
            return scoring.score_diagnosis(text, item.answer, most=1)
        case "judge":
            raise ValueError("no rule can score a text that may be right in many ways")


def load(row: str, place: str, key: str | None = None) -> list[Item]:
    """Reads the items of a row.

    Args:
        row: its name in `ROWS`.
        place: file, folder or Hub data set; see `files.read`.
        key: of the config, for messages.

    Raises:
        UserError: it cannot be read, a column is missing, or an answer is impossible; file and line named.
    """
    key = key or f"rows.{row}"
    header = ("question", "A", "B", "C", "D", "answer") if row.startswith("MMLU") else None
    docs = read(place, key, header)
    if header and "question" in docs[0].row and docs[0].row["question"] == "question":
        docs = docs[1:]
    found = list(_SCHEMAS[row](docs))
    if not found:
        raise UserError(f"{key}: there are no items of this row in {place}")
    ids = [item.id for item in found]
    if len(set(ids)) < len(ids):  # some number each of their files anew
        found = [replace(item, id=str(n)) for n, item in enumerate(found)]
    return found


# ---------------------------------------------------------------------------- what schemas share


@cache
def _prompt(name: str) -> str:
    return (Path(__file__).parent / "prompts" / f"{name}.md").read_text(encoding="utf-8").strip()


def _of(doc: Doc, *columns: str) -> Any:
    """Returns the first of some columns that a row has.

    Raises:
        UserError: it has none of them, or nothing in it.
    """
    for column in columns:
        value = doc.row.get(column)
        if value is not None and (not isinstance(value, str) or value.strip()):
            return value
    wanted = " or ".join(f"'{column}'" for column in columns)
    raise UserError(f"{doc.where}: {wanted} is missing or empty; there are: {', '.join(map(str, doc.row))}")


def _text(doc: Doc, *columns: str) -> str:
    value = _of(doc, *columns)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value).strip()
    raise UserError(f"{doc.where}: '{columns[0]}' must be a text, got {type(value).__name__}")


def _id(doc: Doc, number: int, *columns: str) -> str:
    value = next((doc.row[c] for c in columns if doc.row.get(c) not in (None, "")), number)
    return str(value)


def _multiple_choice(
    doc: Doc, number: int, question: str, options: Mapping[str, str], answer: str, language: str, column: str
) -> Item:
    """Makes an item of a question with options; `answer`: the right letters."""
    options = {letter: str(text).strip() for letter, text in options.items() if str(text).strip()}
    right = tuple(sorted(set(re.sub(r"[\s,、;]+", "", answer))))
    if not right or not set(right) <= set(options) or list(options) != list(LETTERS[: len(options)]):
        raise UserError(
            f"{doc.where}: '{column}' must be of the options {', '.join(options) or '(none)'}, got {answer!r}"
        )
    one, several = {
        "en": ("the letter of the single correct option", "the letters of all correct options"),
        "zh": ("唯一正确选项的字母", "所有正确选项的字母"),
    }[language]
    shown = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    places = {"what": one if len(right) == 1 else several, "question": question, "options": shown}
    return Item(
        id=_id(doc, number, "id", "_id"),
        prompt=fill(_prompt(f"option.{language}"), places),
        kind="option",
        answer=right,
        options=options,
        question=f"{question}\n{shown}",
    )


def _letters(texts: Sequence[Any]) -> dict[str, str]:
    return dict(zip(LETTERS, texts, strict=False))


def _index(doc: Doc, column: str, count: int) -> str:
    """Returns the letter of an answer that is an index from 0, or a letter."""
    value = _of(doc, column)
    if isinstance(value, str) and value.strip().upper() in list(LETTERS[:count]):
        return value.strip().upper()
    try:
        index = int(value)
    except (TypeError, ValueError):
        index = -1
    if isinstance(value, bool) or not 0 <= index < count:
        raise UserError(
            f"{doc.where}: '{column}' must be the index of the right option, 0 to {count - 1}, got {value!r}"
        )
    return LETTERS[index]


def _label(
    doc: Doc, number: int, column: str, labels: tuple[str, ...], prompt: str, places: dict[str, str]
) -> Item:
    answer = _text(doc, column).lower()
    if answer not in labels:
        raise UserError(f"{doc.where}: '{column}' must be {', '.join(labels)}, got {answer!r}")
    choice = ", ".join(labels[:-1]) + " or " + labels[-1]
    return Item(
        id=_id(doc, number, "id", "pairID", "pubid", "PMID"),
        prompt=fill(_prompt(prompt), {**places, "labels": choice}),
        kind="label",
        answer=(answer,),
        labels=labels,
        question="\n".join(places.values()),
    )


def _diagnosis(id: str, case: str, accepted: Sequence[str], prompt: str) -> Item:
    return Item(
        id=id,
        prompt=fill(_prompt(prompt), {"case": case}),
        kind="principal" if prompt.startswith("principal") else "diagnosis",
        answer=tuple(dict.fromkeys(name.strip() for name in accepted if name.strip())),
        question=case,
    )


def _names(doc: Doc, column: str) -> list[str]:
    """Returns further accepted names, where an item lists them."""
    value = doc.row.get(column) or []
    return [str(name) for name in (value if isinstance(value, list) else str(value).split("|"))]


# ---------------------------------------------------------------------------- multiple choice


def _medqa(docs: Sequence[Doc]) -> Iterator[Item]:
    """MedQA: question, options {letter: text}, answer_idx."""
    for number, doc in enumerate(docs):
        options = _options(doc)
        yield _multiple_choice(
            doc, number, _text(doc, "question"), options, _text(doc, "answer_idx"), "en", "answer_idx"
        )


def _mediq(docs: Sequence[Doc]) -> Iterator[Item]:
    """MediQ: as MedQA, and `context`: the case's sentences. All of them are shown; nobody is asked for them."""
    for number, doc in enumerate(docs):
        context = _of(doc, "context")
        if not isinstance(context, list | str):
            raise UserError(f"{doc.where}: 'context' must be a list of sentences")
        sentences = [context] if isinstance(context, str) else [str(part).strip() for part in context]
        case = " ".join(part if part.endswith((".", "!", "?")) else part + "." for part in sentences if part)
        question = f"{case}\n{_text(doc, 'question')}"
        yield _multiple_choice(
            doc, number, question, _options(doc), _text(doc, "answer_idx"), "en", "answer_idx"
        )


def _options(doc: Doc) -> dict[str, str]:
    options = _of(doc, "options", "option")
    if isinstance(options, list):
        options = _letters([o.get("value", "") if isinstance(o, dict) else o for o in options])
    if not isinstance(options, dict):
        raise UserError(f"{doc.where}: 'options' must be an object of letter: text")
    return dict(sorted(options.items()))


def _medbullets(docs: Sequence[Doc]) -> Iterator[Item]:
    """MedBullets: question, opa, opb, opc, opd (ope), answer_idx (a letter)."""
    for number, doc in enumerate(docs):
        columns = ("opa", "opb", "opc", "opd", *(["ope"] if doc.row.get("ope") else []))
        options = _letters([_text(doc, column) for column in columns])
        yield _multiple_choice(
            doc, number, _text(doc, "question"), options, _text(doc, "answer_idx"), "en", "answer_idx"
        )


def _redis_qa(docs: Sequence[Doc]) -> Iterator[Item]:
    """ReDis-QA: question, opa, opb, opc, opd, cop (an index from 0)."""
    for number, doc in enumerate(docs):
        options = _letters([_text(doc, column) for column in ("opa", "opb", "opc", "opd")])
        yield _multiple_choice(
            doc, number, _text(doc, "question"), options, _index(doc, "cop", 4), "en", "cop"
        )


def _mmlu(docs: Sequence[Doc]) -> Iterator[Item]:
    """MMLU: question, choices, answer (an index); or the original CSV without a header, its answer a letter."""
    for number, doc in enumerate(docs):
        choices = doc.row.get("choices")
        if not isinstance(choices, list):
            choices = [_text(doc, letter) for letter in "ABCD"]
        yield _multiple_choice(
            doc,
            number,
            _text(doc, "question"),
            _letters(choices),
            _index(doc, "answer", len(choices)),
            "en",
            "answer",
        )


def _chinese_exam(docs: Sequence[Doc]) -> Iterator[Item]:
    """CMExam (Question, Options: lines "A text", Answer) or CMB-Exam (question, option {letter: text}, answer)."""
    for number, doc in enumerate(docs):
        question = _text(doc, "Question", "question")
        given = _of(doc, "Options", "option", "options")
        if isinstance(given, str):
            parts = [
                re.match(r"\s*([A-J])[\s.、:：]*(.*)", line) for line in given.splitlines() if line.strip()
            ]
            if not parts or not all(parts):
                raise UserError(f"{doc.where}: 'Options' must be lines such as 'A text', got {given[:80]!r}")
            options = {part[1]: part[2] for part in parts if part}
        else:
            options = _options(doc)
        answer = _text(doc, "Answer", "answer")
        yield _multiple_choice(doc, number, question, options, answer, "zh", "Answer")


# ---------------------------------------------------------------------------- labels


def _pubmedqa(docs: Sequence[Doc]) -> Iterator[Item]:
    """PubMedQA: QUESTION, CONTEXTS, final_decision; on the Hub question, context.contexts, final_decision."""
    for number, doc in enumerate(docs):
        contexts = _of(doc, "CONTEXTS", "context")
        if isinstance(contexts, dict):
            contexts = contexts.get("contexts")
        if not isinstance(contexts, list) or not contexts:
            raise UserError(f"{doc.where}: 'CONTEXTS' must be a list of texts")
        places = {"question": _text(doc, "QUESTION", "question"), "context": "\n".join(map(str, contexts))}
        yield _label(doc, number, "final_decision", ("yes", "no", "maybe"), "abstract.en", places)


def _mednli(docs: Sequence[Doc]) -> Iterator[Item]:
    """MedNLI: sentence1 (premise), sentence2 (hypothesis), gold_label, pairID."""
    for number, doc in enumerate(docs):
        places = {"premise": _text(doc, "sentence1"), "hypothesis": _text(doc, "sentence2")}
        yield _label(doc, number, "gold_label", ("entailment", "contradiction", "neutral"), "nli.en", places)


# ---------------------------------------------------------------------------- calculations


def _medcalc(docs: Sequence[Doc]) -> Iterator[Item]:
    """MedCalc-Bench: Patient Note, Question, Output Type, Ground Truth Answer, Lower Limit, Upper Limit."""
    for number, doc in enumerate(docs):
        kind, truth = _text(doc, "Output Type").lower(), _text(doc, "Ground Truth Answer")
        answer, form = _calculated(doc, kind, truth)
        note, question = _text(doc, "Patient Note"), _text(doc, "Question")
        places = {"note": note, "question": question, "form": form}
        rule: Kind = "date" if len(answer) == 1 else "weeks" if "week" in form else "number"
        yield Item(
            id=_id(doc, number, "Row Number"),
            prompt=fill(_prompt("number.en"), places),
            kind=rule,
            answer=answer,
            question=f"{note}\n{question}",
        )


def _calculated(doc: Doc, kind: str, truth: str) -> tuple[tuple[str, ...], str]:
    """Returns what is right, and what the answer is to look like."""
    if kind == "date":
        days = scoring.dates(truth)
        if len(days) != 1:
            raise UserError(f"{doc.where}: 'Ground Truth Answer' must be a date, got {truth!r}")
        return (days[0].isoformat(),), "the date (MM/DD/YYYY)"
    spans = scoring.weeks(truth)
    if spans:
        return (str(spans[0][0]), str(spans[0][1])), "the weeks and days (such as 17 weeks, 4 days)"
    try:
        value = float(truth)
        low, high = float(_text(doc, "Lower Limit")), float(_text(doc, "Upper Limit"))
    except ValueError:
        raise UserError(f"{doc.where}: answer and limits must be numbers, got {truth!r}") from None
    if not min(low, high) <= value <= max(low, high):
        raise UserError(f"{doc.where}: the answer {truth} is not inside its limits [{low:g}, {high:g}]")
    return (repr(low), repr(high)), "the number"


# ---------------------------------------------------------------------------- diagnoses


def _rare_arena(tests: bool) -> Callable[[Sequence[Doc]], Iterator[Item]]:
    """RareArena: case_report (RDC: and test_results), diagnosis, Orpha_name; `hypernyms`, if a file adds them."""

    def items(docs: Sequence[Doc]) -> Iterator[Item]:
        for number, doc in enumerate(docs):
            case = _text(doc, "case_report") + (" " + _text(doc, "test_results") if tests else "")
            accepted = [_text(doc, "diagnosis"), str(doc.row.get("Orpha_name") or "")]
            yield _diagnosis(_id(doc, number, "_id"), case, accepted + _names(doc, "hypernyms"), "rare.en")

    return items


def _rare_bench(docs: Sequence[Doc]) -> Iterator[Item]:
    """RareBench: Phenotype (HPO codes), RareDisease (OMIM, ORPHA ... codes), read by the set's mapping files.

    They are looked for in `mapping/` beside the data or one folder above.
    """
    tables = _mappings(docs[0])
    for number, doc in enumerate(docs):
        signs, diseases = _of(doc, "Phenotype"), _of(doc, "RareDisease")
        if not isinstance(signs, list) or not isinstance(diseases, list):
            raise UserError(f"{doc.where}: 'Phenotype' and 'RareDisease' must be lists of codes")
        told = [tables[0][code] for code in signs if code in tables[0]]
        accepted = [name for code in diseases for name in tables[1].get(code, "").split("/")]
        if not told or not any(accepted):
            raise UserError(
                f"{doc.where}: no code of 'Phenotype' or of 'RareDisease' is in the mapping files"
            )
        yield _diagnosis(str(number), "; ".join(told), accepted, "rare.en")


def _mappings(doc: Doc) -> tuple[dict[str, str], dict[str, str]]:
    names = ("phenotype_mapping.json", "disease_mapping.json")
    places = [] if doc.folder is None else [doc.folder / "mapping", doc.folder.parent / "mapping"]
    for place in places:
        if all((place / name).is_file() for name in names):
            tables = [json.loads((place / name).read_text(encoding="utf-8-sig")) for name in names]
            return tables[0], tables[1]
    raise UserError(
        f"{doc.where}: RareBench's codes need its mapping/{names[0]} and {names[1]} beside the data (both are in its "
        "repository)"
    )


def _nejmqa(docs: Sequence[Doc]) -> Iterator[Item]:
    """NEJMQA was not published; a file of our own shape: question (the case), answer, synonyms (a list, or `a|b`)."""
    for number, doc in enumerate(docs):
        accepted = [_text(doc, "answer"), *_names(doc, "synonyms")]
        yield _diagnosis(_id(doc, number, "id"), _text(doc, "question"), accepted, "diagnosis.en")


def _clinical_bench(task: str) -> Callable[[Sequence[Doc]], Iterator[Item]]:
    """ClinicalBench: clinical_case_summary, clinical_department, principal_diagnosis, treatment_plan; Chinese ones.

    The departments to choose from are those of the file. At the desk there are no examinations yet: the case ends
    before them.
    """

    def items(docs: Sequence[Doc]) -> Iterator[Item]:
        docs = [doc for doc in docs if doc.row.get("language", "zh") == "zh"]
        departments = tuple(sorted({_text(doc, "clinical_department") for doc in docs}))
        for number, doc in enumerate(docs):
            id, case = _id(doc, number, "clinical_case_uid", "id"), _text(doc, "clinical_case_summary")
            if task == "department":
                case = re.split(r"体格检查|辅助检查", case)[0].strip()
                places = {"case": case, "labels": "、".join(departments)}
                yield Item(
                    id=id,
                    prompt=fill(_prompt("department.zh"), places),
                    kind="label",
                    answer=(_text(doc, "clinical_department"),),
                    labels=departments,
                    question=case,
                )
            elif task == "diagnosis":
                yield _diagnosis(id, case, [_text(doc, "principal_diagnosis")], "principal.zh")
            else:
                prompt = fill(_prompt("treatment.zh"), {"case": case})
                plan = _text(doc, "treatment_plan")
                yield Item(id=id, prompt=prompt, kind="judge", answer=(plan,), question=case)

    return items


def _cmb_clin(docs: Sequence[Doc]) -> Iterator[Item]:
    """CMB-Clin: description, QA_pairs of question and answer (or solution); each question is asked by itself."""
    for number, doc in enumerate(docs):
        pairs = _of(doc, "QA_pairs")
        if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, dict) for pair in pairs):
            raise UserError(f"{doc.where}: 'QA_pairs' must be a list of question and answer")
        for place, pair in enumerate(pairs):
            inner = Doc(f"{doc.where}, QA pair {place + 1}", pair, doc.folder)
            case, question = _text(doc, "description"), _text(inner, "question")
            yield Item(
                id=f"{_id(doc, number, 'id')}/{place}",
                prompt=fill(_prompt("clinical.zh"), {"case": case, "question": question}),
                kind="judge",
                answer=(_text(inner, "answer", "solution"),),
                question=f"{case}\n{question}",
            )


_SCHEMAS: Mapping[str, Callable[[Sequence[Doc]], Iterator[Item]]] = {
    "CMBClin": _cmb_clin,
    "ClinicalBench-Diagnosis": _clinical_bench("diagnosis"),
    "ClinicalBench-Department": _clinical_bench("department"),
    "ClinicalBench-Treatment": _clinical_bench("treatment"),
    "RareArena-rdc": _rare_arena(tests=True),
    "RareArena-rds": _rare_arena(tests=False),
    "RareBench": _rare_bench,
    "NEJMQA": _nejmqa,
    "CMExam": _chinese_exam,
    "Erke": _chinese_exam,
    "Neike": _chinese_exam,
    "Quanke": _chinese_exam,
    "USMLE": _medqa,
    "MedBullets": _medbullets,
    "MediQ": _mediq,
    "PubMedQA": _pubmedqa,
    "ReDis-QA": _redis_qa,
    "MedNLI-Dis": _mednli,
    "MedCalc": _medcalc,
    "MMLU-anatomy": _mmlu,
    "MMLU-virology": _mmlu,
    "MMLU-genetics": _mmlu,
}
assert _SCHEMAS.keys() == ROWS.keys()
