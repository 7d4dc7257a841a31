"""Every lie of an endpoint has its reason."""

import json

import pytest
from synthesis_helpers import prose

from galenic.corpus.synthesis.checks import (
    FEEDBACK,
    Problem,
    fields_problem,
    foreign_quote,
    language_of,
    missing_numbers,
    read_reply,
    refuses,
    repeats,
    repeats_itself,
    speaks,
    text_problem,
)
from galenic.corpus.synthesis.seeds import passages_of
from galenic.corpus.synthesis.steps import fill, load_prompts

ID = "0a1b2c3d"


@pytest.mark.parametrize(
    "text",
    [
        '{"id": "0a1b2c3d", "points": ["a"]}',
        'Sure!\n```json\n{"id": "0a1b2c3d", "points": ["a"]}\n```\nAnything else?',
        '<think>{"id": "no"}</think>\n{"id": "0A1B2C3D", "points": ["a"]}',
    ],
)
def test_json_is_found(text):
    assert read_reply(text, "stop", ID, as_json=True) == ({"points": ["a"]}, None)


def test_markdown_after_the_id_stays():
    assert read_reply("ID: 0a1b2c3d\n# Title\n- a", "stop", ID, as_json=False) == ("# Title\n- a", None)
    assert read_reply("ID: 0a1b2c3d (a) is", "stop", ID, as_json=False) == ("(a) is", None)


def test_line_breaks_inside_json_strings_are_forgiven():
    content, problem = read_reply('{"id": "0a1b2c3d", "x": "one\ntwo"}', "stop", ID, as_json=True)
    assert problem is None and content == {"x": "one\ntwo"}


@pytest.mark.parametrize(
    "line", ["ID: 0a1b2c3d", "**ID:** `0a1b2c3d`", "编号：0a1b2c3d", "id：0A1B2C3D.", "ID: 0a1b2c3d "]
)
def test_text_after_its_id(line):
    assert read_reply(f"{line}\n\nThe answer.", "stop", ID, as_json=False) == ("The answer.", None)


@pytest.mark.parametrize(
    ("text", "finish", "as_json", "reason"),
    [
        ("", "stop", True, "empty"),
        ("  \n", "stop", False, "empty"),
        ("ID: 0a1b2c3d\n", "stop", False, "empty"),
        ('{"id": "0a1b2c3d"}', "stop", True, "empty"),
        ("<think>hm</think>", "stop", False, "empty"),
        ('{"id": "0a1b2c3d", "points": [', "length", True, "cut off"),
        ("ID: 0a1b2c3d\nThe answer", "length", False, "cut off"),
        ("", "content_filter", True, "refusal"),
        ("I'm sorry, but I can't help with that.", "stop", True, "refusal"),
        ("ID: 0a1b2c3d\nI’m sorry, but I can’t assist with this request.", "stop", False, "refusal"),
        ("抱歉，我无法提供医疗建议。", "stop", False, "refusal"),
        ("作为一个人工智能，我不能回答。", "stop", True, "refusal"),
        ("The points are: fever and cough.", "stop", True, "not JSON"),
        ("[1, 2]", "stop", True, "not JSON"),
        ('{"id": "0a1b2c3d", "points": [}', "stop", True, "not JSON"),
        ("{" * 100_000, "stop", True, "not JSON"),
        ('{"points": ["a"]}', "stop", True, "no id"),
        ("The answer.", "stop", False, "no id"),
        ('{"id": "ffffffff", "points": ["a"]}', "stop", True, "another item's answer"),
        ("ID: the one asked for\nThe answer.", "stop", False, "no id"),
        ("ID: ffffffff\nThe answer.", "stop", False, "another item's answer"),
    ],
)
def test_form(text, finish, as_json, reason):
    content, problem = read_reply(text, finish, ID, as_json)
    assert content is None and problem.reason == reason
    for language in FEEDBACK:
        assert problem.told(language)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry to hear that your child has a fever. Give fluids and see a doctor.",
        "The patient cannot walk. We cannot exclude a fracture.",
        "患者无法行走，不能排除骨折。",
        "The answer follows from the dose. " * 10 + "I cannot provide more.",
    ],
)
def test_doctors_do_not_refuse(text):
    assert not refuses(text)


def test_fields():
    fields = {"score": (int, float), "points": list, "text": str}
    good = {"score": 0, "points": [], "text": "a"}
    assert fields_problem(good, fields) is None
    for change in ({"score": "7"}, {"score": True}, {"points": "a"}, {"text": " "}, {"text": None}):
        (name,) = change
        assert fields_problem(good | change, fields) == Problem("missing field", name)
    assert fields_problem({}, fields) == Problem("missing field", "score")


def test_languages():
    english = (
        "The dose of the drug is to be halved for patients with kidneys that fail, as this is not safe. " * 4
    )
    french = (
        "Le patient présente une fièvre élevée depuis trois jours avec une toux sèche et des douleurs. " * 4
    )
    chinese = "患者发热三天，伴有干咳，胸部CT（HRCT）提示肺炎。"
    assert speaks(english, "en") and not speaks(english, "zh")
    assert speaks(chinese, "zh") and not speaks(chinese, "en")
    assert not speaks(french, "en")
    assert not speaks("Пациент жалуется на кашель и высокую температуру", "en")
    assert speaks("12.5 mg", "zh") and speaks("", "en")
    assert (language_of(chinese), language_of(english), language_of("")) == ("zh", "en", "en")


def test_repetition():
    text = prose("a", "en", 80)
    assert not repeats_itself(text) and repeats_itself("the dose is 5 mg each day " * 20)
    assert repeats(text, f"Do this: {text}") and not repeats(text, prose("b", "en", 80))
    assert repeats("Fever and cough.", "Write about fever and cough.") and not repeats(
        "42.", "What is 6 x 7?"
    )


def test_numbers():
    question = "A child of 12.5 kg gets 15 mg/kg every 6 hours. How much is 1,000 mg?"
    assert missing_numbers(question, "12.5 kg times 15 is 187.5 mg; 1000 mg is too much.") == []
    assert missing_numbers(question, "The heart has 4 chambers.") == ["1000", "12.5", "15", "6"]
    assert missing_numbers("What is fever?", "A sign.") == []


def test_quotes():
    text = "On day 3, the fever fell (38.1 °C). 第三天体温下降。"
    assert foreign_quote(["the Fever fell (38.1", "体温下降"], text) == ""
    assert foreign_quote(["the fever rose"], text) == "the fever rose"
    assert foreign_quote(["ever fell"], text) == "ever fell"  # whole words
    assert foreign_quote([" "], text) == "(nothing)"


def test_texts():
    text = prose("a", "en", 80)
    assert text_problem(text, "en") is None
    assert text_problem(text, "zh").reason == "another language"
    assert text_problem(text, "en", prompt=text).reason == "repeats the prompt"
    assert text_problem(text, "en", question="7001 and 7002").reason == "numbers missing"
    assert text_problem("As an AI language model, ...", "en").reason == "refusal"


def test_passages_hold_the_whole_text():
    text = "A first line.\n\n" + "Second sentence. " * 30 + "\n\n" + "x" * 500 + "\n\nEnd."
    cut = passages_of(text, 200)
    assert "".join(cut) == text and max(map(len, cut)) <= 200
    assert passages_of("short", 200) == ["short"]
    chinese = "患者发热三天。" * 100
    assert "".join(passages_of(chinese, 70)) == chinese


# ---------------------------------------------------------------------------- prompts


def test_prompts_are_the_same_steps_in_both_languages():
    prompts = load_prompts()
    names = {name for name, _ in prompts}
    assert names == {"encyclopaedia", "cases", "knowledge_graph", "papers", "online_qa", "judge"}
    for name in names:
        english, chinese = prompts[name, "en"], prompts[name, "zh"]
        assert list(english) == list(chinese)
        for step in english:
            assert "{id}" in english[step] and "{id}" in chinese[step]


def test_a_value_cannot_open_a_place():
    assert fill("{text} {id}", {"text": "{id} {unknown}", "id": "7"}) == "{id} {unknown} 7"


def test_prompts_of_the_users_own(tmp_path):
    from galenic.runtime import UserError

    (tmp_path / "papers.en.md").write_text(
        "# findings\n{id} {text} mine\n\n# analysis\n{id}{evidence}{conclusions}\n"
    )
    assert load_prompts(str(tmp_path))["papers", "en"]["findings"] == "{id} {text} mine"
    (tmp_path / "papers.en.md").write_text("# findings\n{id} mine\n")
    with pytest.raises(UserError, match=r"findings.*\{text\}"):
        load_prompts(str(tmp_path))
    (tmp_path / "papers.en.md").write_text("# findings\n{id} {text} {more}\n")
    with pytest.raises(UserError, match=r"findings.*cannot have \{more\}"):
        load_prompts(str(tmp_path))
    (tmp_path / "papers.fr.md").write_text("")
    (tmp_path / "papers.en.md").unlink()
    with pytest.raises(UserError, match="no such prompt"):
        load_prompts(str(tmp_path))


def test_a_reply_as_asked_for_is_json():
    for steps in load_prompts().values():
        for text in steps.values():
            last = text.splitlines()[-1]
            if last.startswith("{"):
                assert json.loads(last)["id"] == "{id}"
