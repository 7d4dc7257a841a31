"""Tiny random models of all kinds that can be flattened, and data for them."""

import io
import json

import torch

WORDS = "fever cough asthma lung heart pain drug dose daily mild severe acute chronic child adult".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLASSES = {0: "heart", 1: "lung", 2: "skin"}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}


def text(index):
    """A document of 3 to 12 words."""
    return " ".join(WORDS[(index * 7 + i * (index % 5 + 1)) % len(WORDS)] for i in range(3 + index % 10))


def rows(count, start=0):
    """Documents with their class."""
    return [{"text": text(i), "label": CLASSES[i % 3], "number": i} for i in range(start, start + count)]


def write_jsonl(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def write_parquet(path, values, group=4):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.Table.from_pylist(values), path, row_group_size=group)
    return str(path)


def picture(index, size=(20, 17), mode="RGB"):
    from PIL import Image

    values = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(index))
    return Image.fromarray(values.to(torch.uint8).numpy()).convert(mode)


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def write_pictures(folder, count, start=0):
    """A folder of PNG files for each class; one in four is grey."""
    for index in range(start, start + count):
        place = folder / CLASSES[index % 3]
        place.mkdir(parents=True, exist_ok=True)
        picture(index, mode="L" if index % 4 == 0 else "RGB").save(place / f"{index:03d}.png")
    return str(folder)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **dict(zip(names, SPECIAL, strict=True)))


def bert(folder, head="MaskedLM"):
    import transformers

    torch.manual_seed(0)
    classes = (
        {} if head == "MaskedLM" else {"id2label": CLASSES, "label2id": {n: i for i, n in CLASSES.items()}}
    )
    config = transformers.BertConfig(
        vocab_size=len(SPECIAL + WORDS), max_position_embeddings=32, **SIZES, **classes
    )
    getattr(transformers, f"BertFor{head}")(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def llama_classifier(folder):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS), pad_token_id=0, id2label=CLASSES, num_key_value_heads=1, **SIZES
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def vit(folder):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(image_size=16, patch_size=8, id2label=CLASSES, **SIZES)
    return save_vision(
        ViTForImageClassification(config), folder, {"height": 16, "width": 16}, "ViTImageProcessor"
    )


def resnet(folder):
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=CLASSES
    )
    return save_vision(
        ResNetForImageClassification(config), folder, {"shortest_edge": 16}, "ConvNextImageProcessor"
    )


def save_vision(model, folder, size, processor):
    model.config.label2id = {name: index for index, name in CLASSES.items()}
    model.save_pretrained(folder)
    values = {
        "image_processor_type": processor,
        "size": size,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return folder
