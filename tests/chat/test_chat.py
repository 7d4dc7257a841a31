import io
import json
import subprocess
import sys

import pytest
import torch

from galenic import model as model_room
from galenic.chat import chat, local
from galenic.chat.config import ChatConfig
from galenic.runtime import UserError, read_jsonl


def talk(monkeypatch, capsys, text, **options):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    chat.run(ChatConfig(**options))
    return capsys.readouterr()


def test_piped_from_the_command_line(model_folder):
    """One process, stdin and stdout as pipes: answers only on stdout, the notice once on stderr, no noise."""
    code = "import sys; from galenic.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["chat", str(model_folder), "--max_new_tokens", "12", "--temperature", "0"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input="What is fever?\n\n/reset\nWhat is fever?\n/quit\nnever asked\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.splitlines() == [chat.NOTICE, chat.CUT, chat.CUT]
    assert "medical advice" in done.stderr
    half = len(done.stdout) // 2
    assert done.stdout[:half] == done.stdout[half:]  # the second question met an empty history
    assert done.stdout.endswith("\n")


def test_greedy_answer_is_the_likeliest_continuation(model_folder, monkeypatch, capsys, tokenizer):
    out = talk(
        monkeypatch, capsys, "What is fever?\n", model=str(model_folder), temperature=0, max_new_tokens=8
    ).out
    model = model_room.load(model_folder)
    messages = [{"role": "user", "content": "What is fever?"}]
    ids = tokenizer.encode(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        add_special_tokens=False,
    )
    new = []
    with torch.inference_mode():
        for _ in range(8):
            logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1]
            new.append(int(logits.argmax()))
            if new[-1] == 2:
                break
    assert out == tokenizer.decode(new, skip_special_tokens=True) + "\n"


def test_history_and_seed(model_folder, monkeypatch, capsys, tokenizer):
    seen, real = [], local.fit

    def fit(tokenizer, history, room):
        seen.append([message["role"] for message in history])
        return real(tokenizer, history, room)

    monkeypatch.setattr(local, "fit", fit)
    options = {"model": str(model_folder), "max_new_tokens": 5, "system": "Be brief.", "seed": 7}
    first = talk(monkeypatch, capsys, "Fever?\nWhy?\n/reset\nFever?\n", **options).out
    assert seen == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert talk(monkeypatch, capsys, "Fever?\nWhy?\n/reset\nFever?\n", **options).out == first


def test_oldest_turns_are_forgotten_when_the_context_is_full(model_folder, monkeypatch, capsys):
    text = "What is the blood pressure?\n" * 6
    found = talk(monkeypatch, capsys, text, model=str(model_folder), max_new_tokens=10)
    assert "forgot the oldest" in found.err
    assert len(found.out.splitlines()) >= 6
    found = talk(
        monkeypatch, capsys, "blood " * 200 + "\nFever?\n", model=str(model_folder), max_new_tokens=10
    )
    assert "[too long: the model reads at most 86 tokens]" in found.err
    assert found.out.strip()


def test_fit_drops_pairs_and_keeps_the_system_message(tokenizer):
    history = [{"role": "system", "content": "a"}]
    for _ in range(4):
        history += [{"role": "user", "content": "blood"}, {"role": "assistant", "content": "fever"}]
    history.append({"role": "user", "content": "heart"})
    ids, dropped = local.fit(tokenizer, history, 30)
    assert dropped > 0
    assert len(ids) <= 30
    assert [message["role"] for message in history[:2]] == ["system", "user"]
    assert history[-1]["content"] == "heart"
    before = list(history)
    assert local.fit(tokenizer, history, 2) == ([], 0)
    assert history == before


def test_interrupt_ends_the_answer_only(model_folder, monkeypatch, capsys):
    class Interrupted(local._Writer):
        def put(self, value):
            super().put(value)
            if self.token_cache:
                raise KeyboardInterrupt

    monkeypatch.setattr(local, "_Writer", Interrupted)
    found = talk(monkeypatch, capsys, "Fever?\nFever?\n", model=str(model_folder), max_new_tokens=20)
    assert found.out.count("\n") == 2


def test_bad_folder_and_plan(tmp_path, model_folder):
    for verb in (chat.plan, chat.run):
        with pytest.raises(UserError, match="is not a model folder"):
            verb(ChatConfig(model=str(tmp_path)))
    assert "medical advice" in chat.plan(ChatConfig(model=str(model_folder))).facts["notice"]
    for change, message in {
        ("max_new_tokens", 0): "max_new_tokens is 0",
        ("temperature", -1.0): "temperature is -1.0",
        ("temperature", float("nan")): "temperature is nan",
        ("top_p", 0.0): "top_p is 0.0",
        ("top_k", -1): "top_k is -1",
        ("repetition_penalty", 0.0): "repetition_penalty is 0.0",
        ("port", 8000): "it needs --web",
        ("url", "localhost:8000"): "is no address",
        ("api_key_env", "KEY"): "no url is given",
        ("model", None): "name a model folder",
    }.items():
        with pytest.raises(UserError, match=message):
            ChatConfig(**{"model": "x", change[0]: change[1]})


def test_a_model_of_another_architecture(llama_folder, monkeypatch, capsys):
    shown = talk(
        monkeypatch,
        capsys,
        "fever?\n<|im_end|>\nfever?\n",
        model=str(llama_folder),
        max_new_tokens=8,
        temperature=0,
    )
    assert shown.out.strip() and "<|im_" not in shown.out
    assert "holds <|im_end|>" in shown.err


def test_a_model_without_chat_format_is_refused(llama_folder, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in llama_folder.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="one cannot talk to this model: the tokenizer has no chat template"):
        chat.run(ChatConfig(model=str(folder)))


def test_commands(model_folder, monkeypatch, capsys, tmp_path):
    """Each changes what the next question meets, or the disk; none is put to the model."""
    seen, real = [], local.fit

    def fit(tokenizer, history, room):
        seen.append([(message["role"], message["content"]) for message in history])
        return real(tokenizer, history, room)

    monkeypatch.setattr(local, "fit", fit)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("mine")
    lines = ["/save first.jsonl", "/system", "/help", "Fever?", "/system Be brief.", "/system", "Why?"]
    lines += [
        "/save mine.jsonl",
        "/save talk.jsonl",
        "/save nowhere/x/talk.jsonl",
        "/rest",
        "/reset now",
        "/reset",
    ]
    lines += ["Cough?", "/save talk.jsonl", "/save /proc/none/talk.jsonl", "/save", "/quit", "Never?"]
    shown = talk(monkeypatch, capsys, "\n".join(lines), model=str(model_folder), max_new_tokens=4)
    assert [[role for role, _ in history] for history in seen] == [
        ["user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert seen[1][0][1] == seen[2][0][1] == "Be brief." and seen[2][1][1] == "Cough?"
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
    assert not (tmp_path / "first.jsonl").exists()
    (row,) = read_jsonl(tmp_path / "talk.jsonl")
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    (row,) = read_jsonl(tmp_path / "nowhere/x/talk.jsonl")
    assert [message["content"] for message in row["messages"]][1::2] == ["Fever?", "Why?"]
    for said in (
        "nothing was answered yet",
        "none of yours",
        "system message: Be brief.",
        "mine.jsonl exists",
    ):
        assert said in shown.err
    for word in ("/rest", "/reset", "/save"):
        assert f"[{word} is no command of this form" in shown.err
    assert "/proc/none" in shown.err and chat.HELP in shown.err


def test_sampling_options_reach_the_model(model_folder, monkeypatch, capsys):
    """top_k=1 is greedy at any temperature; a huge penalty never repeats a token of a greedy answer."""
    options = {"model": str(model_folder), "max_new_tokens": 12}
    greedy = talk(monkeypatch, capsys, "Fever?\n", temperature=0, **options).out
    hot = talk(monkeypatch, capsys, "Fever?\n", temperature=5, top_p=1, **options).out
    assert greedy != hot
    assert talk(monkeypatch, capsys, "Fever?\n", temperature=5, top_p=1, top_k=1, **options).out == greedy
    punished = talk(monkeypatch, capsys, "Fever?\n", temperature=0, repetition_penalty=1e6, **options).out
    assert punished != greedy


def test_an_answer_without_end_is_cut_and_said_so(model_folder, monkeypatch, capsys):
    model = model_room.load(model_folder)

    def generate(ids, **settings):  # a model that never ends: its end token is unlikely beyond all others
        return type(model).generate(model, ids, bad_words_ids=[[2]], **settings)

    monkeypatch.setattr(local, "load_any", lambda folder: model)
    monkeypatch.setattr(model, "generate", generate)
    found = talk(monkeypatch, capsys, "Fever?\n", model=str(model_folder), max_new_tokens=6)
    assert chat.CUT in found.err
