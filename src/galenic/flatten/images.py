"""Labelled pictures: folders of a folder a class, or Parquet files; as the model's own image processor makes them."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from galenic.flatten.tables import count_rows, read_columns, read_some
from galenic.model.folder import _quiet
from galenic.runtime import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

Picture = tuple[str, int, Any]
"""(folder of the class's file or Parquet file, row or -1 for a file of its own, label)"""


def list_pictures(places: list[str], image_column: str, label_column: str) -> list[Picture]:
    """Lists all pictures with their labels, without reading them.

    Raises:
        UserError: a place is missing, or holds no pictures or not the columns.
    """
    pictures: list[Picture] = []
    for place in places:
        if Path(place).is_dir():
            found = [
                (str(file), -1, file.parent.name)
                for file in sorted(Path(place).glob("*/*"))
                if file.suffix.lower() in SUFFIXES and file.is_file()
            ]
            if not found:
                raise UserError(
                    f"{place}: no pictures; they lie in a folder for each class: {place}/CLASS/NAME.png "
                    f"({', '.join(SUFFIXES)})"
                )
            pictures += found
        elif Path(place).suffix.lower() == ".parquet":
            count_rows(place, [image_column, label_column])
            labels = read_columns(place, [label_column])[0]
            pictures += [(place, row, label) for row, label in enumerate(labels)]
        elif Path(place).exists():
            raise UserError(f"{place}: neither a folder of pictures nor a .parquet file")
        else:
            raise UserError(f"{place}: no such file or folder")
    return pictures


def where(picture: Picture) -> str:
    """Says where a picture is, for errors."""
    file, row, _ = picture
    return file if row < 0 else f"{file}: row {row + 1}"


def open_pictures(pictures: list[Picture], image_column: str, mode: str) -> Iterator[Any]:
    """Yields the pictures as Pillow's, upright, in the colours that the model takes (`RGB` or `L`).

    Raises:
        UserError: one cannot be read.
    """
    tables: dict[str, list[int]] = {}
    for file, row, _ in pictures:
        if row >= 0:
            tables.setdefault(file, []).append(row)
    bytes_of = {
        (file, row): value
        for file, rows in tables.items()
        for row, value in zip(rows, read_some(file, image_column, rows), strict=True)
    }
    for picture in pictures:
        file, row, _ = picture
        source: Any = file
        if row >= 0:
            value = bytes_of[file, row]
            value = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(value, bytes):
                raise UserError(f"{where(picture)}: column '{image_column}' holds no bytes of a picture")
            source = io.BytesIO(value)
        yield _open(source, where(picture), mode)


def _open(source: Any, place: str, mode: str) -> Any:
    from PIL import Image, ImageOps

    try:
        with Image.open(source) as image:
            if image.mode[0] in "IF":
                raise UserError(
                    f"{place}: has more than 8 bits a colour, which would be cut; scale it to 8 bits"
                )
            return ImageOps.exif_transpose(image).convert(mode)
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{place}: a picture that cannot be read ({' '.join(str(error).split())})") from None


def load_processor(folder: str) -> Any:
    """Loads a model's own image processor, the one that needs Pillow alone.

    Raises:
        UserError: the folder has none that can be read.
    """
    import PIL.Image  # noqa: F401 (its absence is told by name; transformers' own words are of torchvision)
    from transformers import AutoImageProcessor

    if not any(
        (Path(folder) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")
    ):
        raise UserError(
            f"{folder}: no preprocessor_config.json, so how the model wants its pictures is not known; copy that of "
            "the model it was made from"
        )
    try:
        with _quiet():
            return AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # transformers raises whatever it meets
        words = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}/preprocessor_config.json: cannot be used ({words})") from None
