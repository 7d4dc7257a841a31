"""What can be flattened on what: kinds of models, documents, pictures, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import data_models as tiny
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from galenic import cli
from galenic.cli import parse_config
from galenic.flatten.config import FlattenConfig
from galenic.flatten.data import correct, first_rows, flat_logits, read_batches, summed_loss
from galenic.flatten.documents import class_number, hide
from galenic.flatten.flatten import plan, run
from galenic.flatten.images import load_processor
from galenic.flatten.proof import score
from galenic.flatten.statistics import run_batch, watching
from galenic.model import load_tokenizer
from galenic.model.foreign import KINDS, load_any
from galenic.pretrain.data.collate import IGNORE
from galenic.runtime import UserError, read_json

RECIPES = Path(__file__).parents[2] / "recipes" / "flattening"
SMALL = {
    "train_tokens": 320,
    "heldout_tokens": 160,
    "train_samples": 24,
    "heldout_samples": 9,
    "row_length": 16,
    "batch_rows": 4,
    "probes": 2,
    "trace_rows": 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models of every kind and data for them; read only."""
    root = tmp_path_factory.mktemp("world")
    for name in ("encoder", "classifier", "llama", "vit", "resnet"):
        (root / name).mkdir()
    tiny.bert(root / "encoder")
    tiny.bert(root / "classifier", "SequenceClassification")
    tiny.llama_classifier(root / "llama")
    tiny.vit(root / "vit")
    tiny.resnet(root / "resnet")
    tiny.write_parquet(root / "train.parquet", tiny.rows(60))
    tiny.write_jsonl(root / "heldout.jsonl", tiny.rows(20, 60))
    tiny.write_pictures(root / "train", 30)
    tiny.write_pictures(root / "heldout", 9, 30)
    return root


def config(world, out, name, **changes):
    out.mkdir(exist_ok=True)
    pictures = name in ("vit", "resnet")
    data = {
        "images" if pictures else "documents": [str(world / ("train" if pictures else "train.parquet"))],
        "heldout": [str(world / ("heldout" if pictures else "heldout.jsonl"))],
    }
    return FlattenConfig(**({"out": str(out), "model": str(world / name)} | SMALL | data | changes))


def opened(world, name):
    return load_any(world / name, attn_implementation="eager", kinds=KINDS)


# ---------------------------------------------------------------------------- the whole verb


@pytest.mark.parametrize("name", ["encoder", "classifier", "llama", "vit", "resnet"])
def test_every_kind_of_model_is_flattened(world, tmp_path, name):
    settings = config(world, tmp_path / "out", name)
    told = plan(settings)
    assert not list((tmp_path / "out").iterdir())
    counted = "9 of 9 pictures" if name in ("vit", "resnet") else "9 of 20 documents"
    assert told.facts["held-out data"] == ("160 tokens of 20 documents" if name == "encoder" else counted)
    run(settings)
    result = read_json(tmp_path / "out" / "flatten.json")
    assert len(result["layers"]) >= 5 and not all(layer["rolled_back"] for layer in result["layers"])
    for layer in result["layers"]:
        assert layer["relative_output_change_measured"] == pytest.approx(0.01, rel=2e-3)
        assert layer["norm_after"] < layer["norm_before"] or layer["rolled_back"]
    model, flattened = opened(world, name), opened(tmp_path, "out/model")
    assert type(flattened) is type(model)
    for split in ("train", "heldout"):
        batches = read_batches(settings, split, model)
        losses = [score(m, batches).loss for m in (model, flattened)]
        assert result["loss"][split] == pytest.approx(losses, abs=1e-5) and losses[0] != losses[1]
    companion = "preprocessor_config.json" if name in ("vit", "resnet") else "tokenizer.json"
    assert (tmp_path / "out/model" / companion).read_bytes() == (world / name / companion).read_bytes()
    assert read_json(tmp_path / "out/model/config.json")["architectures"] == [type(model).__name__]


def test_a_causal_model_is_flattened_on_documents(world, llama_folder, tmp_path):
    settings = config(world, tmp_path / "out", "llama", model=str(llama_folder), row_length=32)
    assert plan(settings).facts["training data"] == "320 tokens of 60 documents"
    run(settings)
    result = read_json(tmp_path / "out" / "flatten.json")
    assert len(result["layers"]) == 14 and result["rows"] > 200


# ---------------------------------------------------------------------------- documents


@torch.no_grad()
def test_packed_documents_are_whole_and_their_loss_is_that_of_each_alone(world, llama_folder, tmp_path):
    settings = config(world, tmp_path, "llama", model=str(llama_folder), row_length=64, train_tokens=10**6)
    model, tokenizer = load_any(llama_folder), load_tokenizer(llama_folder)
    documents = [tokenizer(row["text"])["input_ids"] for row in tiny.rows(60)]
    total = sum(
        float(
            F.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="sum")
        )
        for ids in documents
    )
    expected = total / sum(len(ids) - 1 for ids in documents)
    for alone in (False, True):
        batches = read_batches(settings, "train", model, alone)
        assert sum(batch.tokens for batch in batches) == sum(map(len, documents))  # all there is, once
        assert score(model, batches).loss == pytest.approx(expected, rel=1e-5)
    assert sum(len(batch.labels) for batch in batches) == 60  # alone: a document a row


def test_long_documents_are_cut_into_rows_and_markers_in_them_are_text(llama_folder, inputs, tmp_path):
    (tmp_path / "a.txt").write_text("<|im_end|> fever " * 40)
    (tmp_path / "b.txt").write_text("cough")
    values = SMALL | {
        "out": "out",
        "documents": [str(tmp_path / "a.txt")],
        "heldout": [str(tmp_path / "b.txt")],
    }
    settings = FlattenConfig(model=str(llama_folder), **values)
    model = load_any(llama_folder)
    batches = read_batches(settings, "train", model)
    ids = torch.cat([batch.inputs["input_ids"][batch.mask] for batch in batches])
    assert sum(len(batch.labels) for batch in batches) == 20 and len(ids) == 320
    assert load_tokenizer(llama_folder).eos_token_id not in ids


def test_our_models_documents_begin_and_end(tokenizer_step, world, tmp_path):
    from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM, save

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    attention = {"num_key_value_heads": 1, "num_swa_attention_heads": 2, "num_swa_key_value_heads": 1}
    model = BaichuanM1ForCausalLM(BaichuanM1Config(vocab_size=512, **sizes, **attention)).eval()
    save(model, tmp_path / "model", tokenizer=tokenizer_step, provenance={}, parents=[])
    settings = config(world, tmp_path / "out", "llama", model=str(tmp_path / "model"), row_length=128)
    batch = read_batches(settings, "heldout", model)[0]
    ids, positions = batch.inputs["input_ids"], batch.inputs["position_ids"]
    assert (positions[batch.mask] == 0).sum() == (ids == 1).sum() == (ids == 2).sum() > 1
    assert (positions[ids == 1] == 0).all()


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_both_forms_of_a_table_hold_the_same_documents(world, tmp_path, ending):
    write = tiny.write_parquet if ending == "parquet" else tiny.write_jsonl
    file = write(
        tmp_path / f"train.{ending}", [{"body": r["text"], "kind": r["label"]} for r in tiny.rows(60)]
    )
    model = opened(world, "classifier")
    changes = {
        "documents": [file],
        "text_column": "body",
        "label_column": "kind",
        "heldout": [str(tmp_path / "x.txt")],
    }
    ours = read_batches(config(world, tmp_path / "o", "classifier", **changes), "train", model)
    theirs = read_batches(config(world, tmp_path / "o", "classifier"), "train", model)
    assert len(ours) == 6
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
        assert torch.equal(one.labels, other.labels)


# ---------------------------------------------------------------------------- encoders


def test_masked_tokens_are_hidden_as_bert_hides_them():
    tokenizer, generator = tiny.tokenizer(), np.random.default_rng(0)
    ids = np.concatenate([[2], np.resize(np.arange(5, 20), 40_000), [3]])
    own = np.ones(len(ids), dtype=bool)
    own[[0, -1]] = False
    seen, labels = hide(ids, own, tokenizer, generator)
    hidden = labels != IGNORE
    assert hidden.sum() == 6000 and not hidden[[0, -1]].any()
    assert (labels[hidden] == ids[hidden]).all() and (seen[~hidden] == ids[~hidden]).all()
    masked, same = (seen[hidden] == 4).mean(), (seen[hidden] == ids[hidden]).mean()
    # Of the tenth that becomes any of the 20 tokens, a twentieth each is the mask or the token itself.
    assert masked == pytest.approx(0.805, abs=0.02) and same == pytest.approx(0.105, abs=0.02)
    short = hide(np.array([2, 7, 3]), np.array([False, True, False]), tokenizer, generator)[1]
    assert short.tolist() == [IGNORE, 7, IGNORE]  # at least one


@torch.no_grad()
def test_an_encoders_loss_is_that_of_its_documents_without_padding(world, tmp_path):
    model = opened(world, "encoder")
    batches = read_batches(config(world, tmp_path, "encoder"), "train", model)
    assert {batch.task for batch in batches} == {"masked token"}
    total = count = 0
    for batch in batches:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        assert torch.equal(mask, batch.mask) and torch.equal(mask, ids != 0)
        assert (ids[:, 0] == 2).all() and (batch.labels[~mask] == IGNORE).all()
        for row, kept, labels in zip(ids, mask, batch.labels, strict=True):
            logits = model(input_ids=row[kept][None]).logits[0]
            hidden = labels[kept] != IGNORE
            total += float(F.cross_entropy(logits[hidden], labels[kept][hidden], reduction="sum"))
            count += int(hidden.sum())
    assert score(model, batches).loss == pytest.approx(total / count, rel=1e-5)
    tokens = sum(batch.tokens for batch in batches)
    assert 320 <= tokens < 320 + 16 and tokens == sum(int(b.mask.sum()) for b in batches)


def test_the_choice_is_the_seeds(world, tmp_path):
    model = opened(world, "encoder")
    one, again, other = (
        read_batches(config(world, tmp_path, "encoder", seed=seed), "train", model) for seed in (0, 0, 1)
    )
    assert all(
        torch.equal(x.inputs["input_ids"], y.inputs["input_ids"]) and torch.equal(x.labels, y.labels)
        for x, y in zip(one, again, strict=True)
    )
    assert not torch.equal(one[0].labels, other[0].labels)


@pytest.mark.parametrize("name", ["encoder", "classifier", "llama"])
def test_statistics_leave_padding_out(world, tmp_path, name):
    """Against statistics of the documents one by one, which need no padding."""
    model = opened(world, name)
    batches = read_batches(config(world, tmp_path, name), "train", model)
    assert any(not batch.mask.all() for batch in batches)
    heads = {"encoder": [], "classifier": ["classifier", "bert.pooler.dense"], "llama": ["score"]}[name]
    inner = "model.layers.1.mlp.down_proj" if name == "llama" else "bert.encoder.layer.1.output.dense"
    layers, sums = [inner, *heads], {}
    for padded in (True, False):
        with torch.no_grad(), watching(model, layers) as statistics:
            for batch in batches:
                if padded:
                    run_batch(model, batch.inputs, statistics, batch.mask)
                    continue
                for row, kept in zip(batch.inputs["input_ids"], batch.mask, strict=True):
                    run_batch(model, {"input_ids": row[kept][None]}, statistics)
        sums[padded] = {layer: (statistics.count(layer), statistics.gram(layer)) for layer in layers}
    tokens, samples = (sum(int(b.mask.sum()) for b in batches), sum(len(b.labels) for b in batches))
    assert sums[True][inner][0] == tokens
    for layer in layers:
        assert sums[True][layer][0] == sums[False][layer][0]
        torch.testing.assert_close(sums[True][layer][1], sums[False][layer][1], rtol=1e-4, atol=1e-4)
    for head in heads:
        assert sums[True][head][0] == (tokens if head == "score" else samples)


# ---------------------------------------------------------------------------- classes


@torch.no_grad()
@pytest.mark.parametrize("name", ["classifier", "llama"])
def test_a_classifiers_loss_and_hits_are_those_of_its_documents(world, tmp_path, name):
    model = opened(world, name)
    batches = read_batches(config(world, tmp_path, name), "heldout", model)
    assert [len(batch.labels) for batch in batches] == [4, 4, 1] and batches[0].tokens == 4
    known = {row["text"]: row["label"] for row in tiny.rows(20, 60)}
    tokenizer = load_tokenizer(world / name)
    total = 0.0
    for batch in batches:
        logits = model(**batch.inputs).logits
        hits = correct(logits, batch)
        for i, row in enumerate(batch.inputs["input_ids"]):
            label = known[tokenizer.decode(row, skip_special_tokens=True)]
            assert tiny.CLASSES[int(batch.labels[i])] == label
            alone = model(input_ids=row[batch.mask[i]][None]).logits[0]
            total -= float(alone.log_softmax(-1)[batch.labels[i]])
            assert bool(hits[i]) == (tiny.CLASSES[int(alone.argmax())] == label)
    assert score(model, batches).loss == pytest.approx(total / 9, rel=1e-5)


@pytest.mark.parametrize("name", ["encoder", "classifier", "vit"])
def test_flat_logits_are_the_rows_of_the_loss(world, tmp_path, name):
    model = opened(world, name)
    batches = read_batches(config(world, tmp_path, name), "train", model)
    batch = first_rows(batches, 3)[0]
    logits = model(**batch.inputs).logits
    rows, targets = flat_logits(logits, batch)
    loss, count = summed_loss(logits, batch)
    assert len(rows) == len(targets) == count > 0 and rows.shape[1] == logits.shape[-1]
    torch.testing.assert_close(F.cross_entropy(rows, targets, reduction="sum"), loss)
    assert (correct(logits, batch) is None) == (name == "encoder")
    assert len(batch.labels) == 3 and all(len(v) == 3 for v in batch.inputs.values())


def test_classes_go_by_name_or_number(world):
    settings = opened(world, "classifier").config
    assert [class_number(label, "x", settings) for label in ("skin", 0, "1", True)] == [2, 0, 1, 1]
    for label in (3, -1, "3", 0.5, None, "Heart"):
        with pytest.raises(UserError, match=r"x: label .* none of the model's 3 classes.*heart, lung, skin"):
            class_number(label, "x", settings)


# ---------------------------------------------------------------------------- pictures


def test_pictures_of_folders_and_of_tables_are_the_same(world, tmp_path):
    files = [tiny.picture(i, mode="L" if i % 4 == 0 else "RGB") for i in range(30)]
    order = sorted(range(30), key=lambda i: (tiny.CLASSES[i % 3], i))
    table = [{"image": {"bytes": tiny.png(files[i]), "path": None}, "label": i % 3} for i in order]
    tiny.write_parquet(tmp_path / "train.parquet", table)
    tiny.write_parquet(
        tmp_path / "plain.parquet", [{"photo": r["image"]["bytes"], "label": r["label"]} for r in table]
    )
    model = opened(world, "vit")
    folders = read_batches(config(world, tmp_path / "o", "vit"), "train", model)
    for name, column in (("train", "image"), ("plain", "photo")):
        changes = {"images": [str(tmp_path / f"{name}.parquet")], "image_column": column}
        tables = read_batches(config(world, tmp_path / "o", "vit", **changes), "train", model)
        for one, other in zip(folders, tables, strict=True):
            assert torch.equal(one.inputs["pixel_values"], other.inputs["pixel_values"])
            assert torch.equal(one.labels, other.labels)
    assert type(load_processor(str(world / "vit"))).__name__ == "ViTImageProcessorPil"  # not torchvision's
    assert folders[0].mask is None and folders[0].inputs["pixel_values"].shape == (4, 3, 16, 16)
    assert [batch.tokens for batch in folders] == [4] * 6


def test_pictures_are_scaled_as_the_models_processor_says_and_stand_upright(world, tmp_path):
    from PIL import Image

    values = np.zeros((16, 16, 3), dtype=np.uint8)
    values[0] = 255  # a white line on top
    (tmp_path / "p" / "lung").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x112] = 3  # upside down, says the camera
    Image.fromarray(values).save(tmp_path / "p/lung/one.png", exif=exif)
    changes = {"images": [str(tmp_path / "p")], "trace_rows": 1}
    (batch,) = read_batches(config(world, tmp_path / "o", "vit", **changes), "train", opened(world, "vit"))
    pixels = batch.inputs["pixel_values"][0]
    for channel, mean in enumerate((0.5, 0.4, 0.3)):
        torch.testing.assert_close(pixels[channel, -1], torch.full((16,), (1 - mean) / 0.5))
        torch.testing.assert_close(pixels[channel, :-1], torch.full((15, 16), -mean / 0.5))
    assert batch.labels.tolist() == [1]


def test_a_missing_pillow_is_one_line_that_names_the_extra(world, tmp_path, monkeypatch, capsys):
    for name in ("PIL", "PIL.Image"):
        monkeypatch.setitem(sys.modules, name, None)
    data = ["--images", f"[{world / 'train'}]", "--heldout", f"[{world / 'heldout'}]"]
    assert cli.main(["flatten", "--out", str(tmp_path / "out"), "--model", str(world / "vit"), *data]) == 2
    words = capsys.readouterr().err
    assert words == "galenic: error: PIL is needed for this: pip install 'galenic[images]'\n"


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "tokens: give .* exactly one of the four, not none of them"),
        ({"documents": ["a.txt"], "images": ["b"]}, "exactly one of the four, not documents and images"),
        ({"documents": ["a.txt"]}, "heldout: documents to train on and to prove"),
        ({"images": ["a"]}, "heldout: images to train on and to prove"),
        ({"tokens": "t", "heldout": ["a"]}, "heldout: a tokenizer step has held-out text of its own"),
        (
            {"documents": ["a.txt"], "heldout": ["b.txt"], "sources": ["x"]},
            "sources: are of tokens; documents are",
        ),
        (
            {"documents": ["a.csv"], "heldout": ["b.txt"]},
            "documents: a.csv is none of .parquet, .jsonl, .txt",
        ),
        ({"documents": ["a.txt"], "heldout": ["./x/../a.txt"]}, "a.txt is also trained on"),
        ({"images": ["a"], "heldout": ["b", "a/"]}, "heldout: a/ is also trained on"),
        ({"images": ["a"], "heldout": ["b"], "train_samples": 0}, "train_samples: 0 is less than 1"),
        (
            {"images": ["a"], "heldout": ["b"], "train_samples": 3, "trace_rows": 4},
            "trace_rows: 4 is more than train_samples",
        ),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        FlattenConfig(out="out", model="m", **changes)


def refused(settings, message, acts=(plan, run)):
    for act in acts:
        with pytest.raises(UserError, match=message) as error:
            act(settings)
        assert "\n" not in str(error.value)
    assert not list(Path(settings.out).iterdir())


def test_tables_that_cannot_be_read_are_refused(world, tmp_path):
    def with_file(name, content, message, acts=(plan, run), **changes):
        (tmp_path / name).write_bytes(content)
        changes = {"documents": [str(tmp_path / name)]} | changes
        refused(config(world, tmp_path / "out", "classifier", **changes), message, acts)

    for name in ("none.parquet", "none.jsonl", "none.txt"):
        changes = {"documents": [str(tmp_path / name)]}
        refused(config(world, tmp_path / "out", "classifier", **changes), f"{name}: no such file")
    with_file("a.jsonl", b"", "a.jsonl: is empty")
    with_file(
        "b.jsonl",
        b'{"txt": "fever", "label": 0}\n',
        r"b.jsonl: row 1: no column 'text' \(did you mean 'txt'\?\)",
    )
    with_file("c.jsonl", b"{", "c.jsonl:1: not valid JSON")
    with_file("d.jsonl", b"\xff\n", "d.jsonl: not UTF-8 text")
    with_file(
        "e.jsonl", b'{"text": 3, "label": 0}\n', "e.jsonl: row 1: column 'text' holds int, not text", (run,)
    )
    with_file("f.jsonl", b'{"text": " \\n", "label": 0}\n', "f.jsonl: row 1: a text of zero tokens", (run,))
    with_file("g.txt", b"fever", "g.txt: a text has no column 'label'")
    with_file("h.parquet", b"PAR1 and nothing more", "h.parquet: not a readable Parquet file")
    table = tiny.write_parquet(tmp_path / "i.parquet", [{"text": "fever", "labels": "lung"}])
    words = r"i.parquet: no column 'label' \(did you mean 'labels'\?\); it has text, labels"
    refused(config(world, tmp_path / "out", "classifier", documents=[table]), words)
    table = tiny.write_parquet(tmp_path / "j.parquet", [{"text": "fever", "label": "hearth"}])
    words = r"j.parquet: row 1: label 'hearth' is none of the model's 3 classes \(did you mean 'heart'\?\)"
    refused(config(world, tmp_path / "out", "classifier", documents=[table]), words, (run,))
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"text": pa.array([], pa.string()), "label": []}), tmp_path / "k.parquet")
    changes = {"documents": [str(tmp_path / "k.parquet")]}
    refused(config(world, tmp_path / "out", "classifier", **changes), "k.parquet: is empty")


def test_pictures_that_cannot_be_read_are_refused(world, tmp_path):
    from PIL import Image

    def with_images(place, message, acts=(plan, run), **changes):
        changes = {"images": [str(tmp_path / place)], "trace_rows": 1} | changes
        refused(config(world, tmp_path / "out", "vit", **changes), message, acts)

    with_images("none", "none: no such file or folder")
    (tmp_path / "flat").mkdir()
    tiny.picture(0).save(tmp_path / "flat" / "a.png")  # without a folder for its class
    with_images("flat", "flat: no pictures; they lie in a folder for each class")
    (tmp_path / "a.tar").write_bytes(b"")
    with_images("a.tar", "a.tar: neither a folder of pictures nor a .parquet file")
    tiny.write_pictures(tmp_path / "cut", 1)
    file = tmp_path / "cut" / "heart" / "000.png"
    file.write_bytes(file.read_bytes()[:200])
    with_images("cut", "cut/heart/000.png: a picture that cannot be read", (run,))
    file.write_bytes(b"no picture")
    with_images("cut", "cut/heart/000.png: a picture that cannot be read", (run,))
    Image.fromarray(np.full((20, 20), 4000, dtype=np.uint16)).save(file)
    with_images("cut", "000.png: has more than 8 bits a colour", (run,))
    shutil.move(tmp_path / "cut" / "heart", tmp_path / "cut" / "lungs")
    with_images("cut", r"label 'lungs' is none of .* \(did you mean 'lung'\?\)", (run,))
    tiny.write_parquet(tmp_path / "a.parquet", [{"image": {"bytes": b"x", "path": "a"}, "label": 0}])
    with_images("a.parquet", "a.parquet: row 1: a picture that cannot be read", (run,))
    with_images("a.parquet", r"no column 'img' .*it has image, label", image_column="img")
    tiny.write_parquet(tmp_path / "b.parquet", [{"image": {"bytes": None, "path": "a"}, "label": 0}])
    with_images("b.parquet", "b.parquet: row 1: column 'image' holds no bytes", (run,))


def test_models_and_data_that_do_not_belong_together_are_refused(
    world, llama_folder, conversations, tmp_path
):
    talks = {"conversations": [str(conversations)], "heldout": ["other.jsonl"], "documents": []}
    refused(
        config(world, tmp_path / "o", "encoder", **talks),
        "is of kind masked language model, which reads documents",
    )
    text = {"documents": [str(world / "train.parquet")], "heldout": [str(world / "heldout.jsonl")]}
    changes = {"images": []} | text
    refused(
        config(world, tmp_path / "o", "vit", **changes), "is of kind image classifier, which reads images"
    )
    changes = {"images": [str(world / "train")], "documents": [], "model": str(llama_folder)}
    refused(config(world, tmp_path / "o", "llama", **changes), "reads tokens or conversations or documents")
    changes = {"row_length": 64}
    refused(
        config(world, tmp_path / "o", "encoder", **changes),
        "row_length: 64 is more than the 32 positions",
        (run,),
    )


def changed(folder, to, **settings):
    """Copies a model folder with other words in its config; None takes one out."""
    shutil.copytree(folder, to)
    values = json.loads((to / "config.json").read_text()) | settings
    (to / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return str(to)


def test_models_that_cannot_be_flattened_are_refused(world, tmp_path):
    def refuses(name, message, acts=(plan, run), **settings):
        place = changed(world / name, tmp_path / f"m{len(list(tmp_path.iterdir()))}", **settings)
        refused(config(world, tmp_path / "out", name, model=place), message, acts)

    refuses("encoder", "no 'architectures' in it, so the head is not known", architectures=None)
    refuses(
        "encoder",
        r"BertModel has no head .* save the model with one: .*ForMaskedLM",
        architectures=["BertModel"],
    )
    refuses("encoder", "BertForTokenClassification has no head", architectures=["BertForTokenClassification"])
    auto_map = {"AutoModelForMaskedLM": "evil.Model"}
    refuses("encoder", "code that lies in the folder", model_type="evil", auto_map=auto_map)
    refuses("classifier", "does not choose one of several classes", (run,), problem_type="regression")
    refuses("llama", "no pad_token_id", (run,), pad_token_id=None)
    place = tmp_path / "bare"
    shutil.copytree(world / "vit", place)
    (place / "preprocessor_config.json").unlink()
    refused(config(world, tmp_path / "out", "vit", model=str(place)), "no preprocessor_config.json", (run,))
    (place / "preprocessor_config.json").write_text('{"image_processor_type": "Unheard"}')
    refused(
        config(world, tmp_path / "out", "vit", model=str(place)),
        "preprocessor_config.json: cannot be used",
        (run,),
    )
    with pytest.raises(
        UserError, match="is of kind masked language model; here only causal language model will do"
    ):
        load_any(world / "encoder")


def test_an_encoders_other_heads_are_left_out_with_a_word(world, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    shutil.copytree(world / "encoder", tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    more = {"cls.seq_relationship.weight": torch.zeros(2, 16)}
    save_file(tensors | more, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    load_any(tmp_path / "model", kinds=KINDS)
    assert "such as cls.seq_relationship.weight: not part of a BertForMaskedLM" in capsys.readouterr().err


# ---------------------------------------------------------------------------- ready recipes


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_ready_recipes_are_understood(file):
    settings, _ = parse_config("flatten", ["--config", str(file), "--out", "flattened"])
    assert settings.out == "flattened" and all(place.startswith("path/to/") for place in settings.reads())


def test_there_are_ready_recipes():
    assert len(list(RECIPES.glob("*.yaml"))) >= 4
