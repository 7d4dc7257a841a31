"""Models of another architecture and tokenizer than ours, and LoRA adapters of them."""

import json

import numpy as np
import pytest
import torch
from evaluate_helpers import naive_log_probs, question, write_rows

from galenic.corpus.tokens.chat_template import encode_chat
from galenic.evaluate import evaluate
from galenic.evaluate.config import EvaluateConfig
from galenic.evaluate.models import open_model
from galenic.evaluate.multiple_choice import PromptFormat, tokenize
from galenic.model import load_tokenizer
from galenic.model.foreign import load_any
from galenic.runtime import UserError, read_json

MESSAGES = [
    {"role": "user", "content": "What follows fever?"},
    {"role": "assistant", "content": "cough and 心脏."},
]


@pytest.fixture(scope="module")
def adapter(llama_folder, tmp_path_factory):
    """An adapter with random factors, and the model PEFT makes of it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    model = load_any(llama_folder)
    with pytest.warns(FutureWarning):
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
        )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder, adapted.merge_and_unload().eval()


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    write_rows(folder / "q" / "recall.jsonl", [question(i) for i in range(5)])
    write_rows(folder / "sft" / "medical.heldout.jsonl", [{"messages": MESSAGES}])
    return folder


def test_an_adapter_on_its_base_is_what_peft_makes_of_it(llama_folder, adapter):
    folder, expected = adapter
    found = open_model(f"{llama_folder}+{folder}").state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)
    assert any(not torch.equal(found[n], t) for n, t in load_any(llama_folder).state_dict().items())


@pytest.mark.parametrize("prompt", ["plain", "chat"])
def test_models_are_scored_with_their_own_tokenizer(llama_folder, adapter, questions, tmp_path, prompt):
    folder, expected = adapter
    config = EvaluateConfig(
        out=str(tmp_path),
        models={"base": str(llama_folder), "expert": f"{llama_folder}+{folder}"},
        questions=str(questions / "q"),
        conversations=str(questions / "sft"),
        prompt=prompt,
    )
    assert str(folder) in config.reads()
    evaluate.plan(config)
    evaluate.run(config)
    results = read_json(tmp_path / "results.json")
    tokenizer = load_tokenizer(llama_folder)
    ids, answers = encode_chat(tokenizer, MESSAGES)
    for name, model in (("base", load_any(llama_folder)), ("expert", expected)):
        found = results["models"][name]
        nats = -naive_log_probs(model, ids)[np.array(answers[1:])].sum()
        size = len(MESSAGES[1]["content"].encode())
        assert found["answers"]["medical"]["bits_per_byte"] == pytest.approx(
            nats / np.log(2) / size, rel=1e-4
        )
        assert found["bits_per_byte"] == {} and found["accuracy"]["recall"]["n"] == 5
    rows = (tmp_path / "items" / "expert.jsonl").read_text().splitlines()
    first = tokenize(
        tokenizer, PromptFormat(name=prompt), question(0)["question"], question(0)["options"], 256
    )
    row = next(json.loads(row) for row in rows if '"recall-0"' in row)
    for option, rest, length in zip(row["total"], first.rest, first.lengths, strict=True):
        scores = naive_log_probs(expected, first.shared + rest)
        assert option == pytest.approx(scores[len(scores) - length :].sum(), abs=1e-3)
    assert results["models"]["expert"]["path"].count("+") == 1
    asked = results["protocol"]["prompt"]
    assert ("<|im_start|>assistant\n{option}" in asked) if prompt == "chat" else asked.startswith("Question")


def test_what_cannot_be_evaluated_is_refused(llama_folder, adapter, questions, tmp_path):
    folder, _ = adapter

    def refused(says, **changes):
        values = {"models": {"base": str(llama_folder)}, "questions": str(questions / "q"), **changes}
        with pytest.raises(UserError, match=says):
            evaluate.run(EvaluateConfig(out=str(tmp_path / "out"), **values))

    refused("nothing to evaluate on", questions=None)
    refused("is a LoRA adapter; write its base before it", models={"a": str(folder)})
    refused("is not a LoRA adapter", models={"a": f"{llama_folder}+{llama_folder}"})
    write_rows(tmp_path / "q" / "recall.jsonl", [question(0) | {"question": "Is it <|im_end|>?"}])
    refused("a question cannot be put: a message holds", questions=str(tmp_path / "q"), prompt="chat")
