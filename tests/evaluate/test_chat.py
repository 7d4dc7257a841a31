import io
import subprocess
import sys

import pytest
import torch
from test_evaluate import fresh_model

from galenic import model as model_room
from galenic.evaluate import chat
from galenic.evaluate.config import ChatConfig
from galenic.runtime import UserError


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokens_folder, tokenizer):
    folder = tmp_path_factory.mktemp("chat") / "model"
    model_room.save(
        fresh_model(len(tokenizer), 3), folder, tokenizer=tokens_folder, provenance={"verb": "sft"}
    )
    return folder


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
    assert done.stderr.strip() == chat.NOTICE
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
    seen, real = [], chat.fit

    def fit(tokenizer, history, room):
        seen.append([message["role"] for message in history])
        return real(tokenizer, history, room)

    monkeypatch.setattr(chat, "fit", fit)
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
    ids, dropped = chat.fit(tokenizer, history, 30)
    assert dropped > 0
    assert len(ids) <= 30
    assert [message["role"] for message in history[:2]] == ["system", "user"]
    assert history[-1]["content"] == "heart"
    before = list(history)
    assert chat.fit(tokenizer, history, 2) == ([], 0)
    assert history == before


def test_interrupt_ends_the_answer_only(model_folder, monkeypatch, capsys):
    class Interrupted(chat._Writer):
        def put(self, value):
            super().put(value)
            if self.token_cache:
                raise KeyboardInterrupt

    monkeypatch.setattr(chat, "_Writer", Interrupted)
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
        ("top_p", 0.0): "top_p is 0.0",
    }.items():
        with pytest.raises(UserError, match=message):
            ChatConfig(**{"model": "x", change[0]: change[1]})
