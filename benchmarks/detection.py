"""Scenes composed of Fashion-MNIST objects, and a small detector of one stage without anchors.

Scenes are 64 x 64 grey canvases with clutter and one to four objects of 14 to 28 pixels. The detector has a grid of
8 x 8 cells, each with a score for each class and a box: FCOS (Tian et al. 2019) in little, with scores that fall off
from an object's centre as CenterNet's do (Zhou et al. 2019).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fashion_mnist import CLASSES
from torch import Tensor, nn
from tqdm import tqdm

SIZE, CELL, MOST = 64, 8, 4
"""Pixels of a canvas and of a cell, objects at most."""
EPOCHS, BATCH = 12, 32


# ---------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scenes:
    """N scenes; an absent object has class -1."""

    images: Tensor
    """(N, 1, SIZE, SIZE) in [0, 1]."""
    boxes: Tensor
    """(N, MOST, 4): left, top, right, bottom in pixels."""
    labels: Tensor
    """(N, MOST)."""

    def part(self, count: int) -> "Scenes":
        return Scenes(self.images[:count], self.boxes[:count], self.labels[:count])


def uniform(low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand((), generator=generator)


def compose(count: int, objects: tuple[Tensor, Tensor], seed: int) -> Scenes:
    """Draws scenes: slanting light, dim rectangles, objects that overlap little, noise. Boxes are tight."""
    source, classes = objects
    generator = torch.Generator().manual_seed(seed)
    order = iter(torch.randperm(len(source), generator=generator).tolist())
    ramp = torch.linspace(-1, 1, SIZE)
    images = torch.empty(count, 1, SIZE, SIZE)
    boxes, labels = torch.zeros(count, MOST, 4), torch.full((count, MOST), -1)
    for scene in range(count):
        level, across, down = (
            uniform(low, high, generator) for low, high in ((0.15, 0.5), (-0.1, 0.1), (-0.1, 0.1))
        )
        canvas = level + across * ramp + down * ramp[:, None]
        for _ in range(4):
            left, top = torch.randint(0, SIZE - 8, (2,), generator=generator).tolist()
            width, height = torch.randint(3, 24, (2,), generator=generator).tolist()
            canvas[top : top + height, left : left + width] += uniform(-0.15, 0.15, generator)
        wanted = int(torch.randint(1, MOST + 1, (), generator=generator))
        for place in range(wanted):
            index, size = next(order), int(torch.randint(14, 29, (), generator=generator))
            pixels = source[index][None, None].float() / 255
            thing = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0, 0]
            rows, columns = ((thing > 0.1).any(axis).nonzero().flatten() for axis in (1, 0))
            extent = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            for _ in range(20):
                left, top = torch.randint(0, SIZE - size + 1, (2,), generator=generator).tolist()
                box = extent + torch.tensor([left, top, left, top])
                if (overlap(box.float(), boxes[scene, :place]) < 0.15).all():
                    break
            else:
                continue  # no room: an absent object, with a box of no size
            opacity = (thing * 5).clamp(max=1)
            patch = canvas[top : top + size, left : left + size]
            patch.copy_(patch * (1 - opacity) + thing * opacity)
            boxes[scene, place], labels[scene, place] = box, classes[index]
        images[scene, 0] = canvas + 0.05 * torch.randn(SIZE, SIZE, generator=generator)
    return Scenes(images.clamp(0, 1), boxes, labels)


def with_wrong_classes(scenes: Scenes, share: float, seed: int) -> Scenes:
    """Gives a share of the objects one of the other classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = scenes.labels
    wrong = (torch.rand(labels.shape, generator=generator) < share) & (labels >= 0)
    others = (labels + torch.randint(1, len(CLASSES), labels.shape, generator=generator)) % len(CLASSES)
    return Scenes(scenes.images, scenes.boxes, torch.where(wrong, others, labels))


# ---------------------------------------------------------------------------- boxes


def overlap(first: Tensor, second: Tensor, generalised: bool = False) -> Tensor:
    """Intersection over union of boxes (..., 4); generalised: less the share of the hull that neither covers."""

    def area(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp(min=0).prod(-1)

    common = area(first[..., :2].maximum(second[..., :2]), first[..., 2:].minimum(second[..., 2:]))
    union = area(first[..., :2], first[..., 2:]) + area(second[..., :2], second[..., 2:]) - common
    found = common / union.clamp(min=1e-6)
    if not generalised:
        return found
    hull = area(first[..., :2].minimum(second[..., :2]), first[..., 2:].maximum(second[..., 2:]))
    return found - (hull - union) / hull.clamp(min=1e-6)


def suppress(boxes: Tensor, classes: Tensor, threshold: float = 0.5) -> Tensor:
    """Non-maximum suppression within each class.

    Args:
        boxes: (N, K, 4), best first in each of N scenes.
        classes: (N, K).
        threshold: IoU with a kept better box of the class from which a box is dropped.

    Returns:
        (N, K) bool: which to keep.
    """
    rival = overlap(boxes[:, :, None], boxes[:, None]) > threshold
    rival &= classes[:, :, None] == classes[:, None]
    rival = rival.triu(1)
    keep = torch.ones(classes.shape, dtype=torch.bool)
    for better in range(boxes.shape[1]):
        keep &= ~(rival[:, better] & keep[:, better, None])
    return keep


# ---------------------------------------------------------------------------- the detector


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Detector(nn.Module):
    """One cell in 8 x 8 pixels: logits of the classes, and a box about the cell's centre."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(block(1, 16, 2), block(16, 32, 2), block(32, 64, 2), block(64, 64))
        self.classify = nn.Sequential(block(64, 32), nn.Conv2d(32, len(CLASSES), 3, padding=1))
        self.locate = nn.Sequential(block(64, 32), nn.Conv2d(32, 4, 3, padding=1))
        nn.init.constant_(self.classify.get_parameter("1.bias"), -4.0)  # objects are rare: a score of 0.02
        centres = CELL * (torch.arange(SIZE // CELL) + 0.5)
        rows, columns = torch.meshgrid(centres, centres, indexing="ij")
        places = torch.stack([columns, rows], -1)  # (cells, cells, 2)
        self.register_buffer("centres", places, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits (N, classes, cells, cells) and boxes (N, cells, cells, 4)."""
        features = self.backbone(images)
        raw = self.locate(features).movedim(1, -1)
        centres, half = self.centres + CELL * raw[..., :2], CELL * raw[..., 2:].exp()
        return self.classify(features), torch.cat([centres - half, centres + half], -1)


@dataclass(frozen=True)
class Targets:
    scores: Tensor
    """(N, classes, cells, cells): 1 at an object's best cell, less at cells beside it, 0 elsewhere."""
    boxes: Tensor
    """(N, cells, cells, 4): of the object the cell answers for."""


def targets(centres: Tensor, scenes: Scenes) -> Targets:
    """Gives each object the cells whose centre lies within 6 pixels of its own, each cell the nearest object."""
    middle = (scenes.boxes[..., :2] + scenes.boxes[..., 2:]) / 2  # (N, MOST, 2)
    away = (centres - middle[:, :, None, None]).abs()  # (N, MOST, cells, cells, 2)
    squares = away.square().sum(-1)
    extra = squares - squares.amin((2, 3), keepdim=True)
    usable = (away.amax(-1) < 6) & (scenes.labels >= 0)[..., None, None]
    nearest = squares.masked_fill(~usable, torch.inf).argmin(1)  # (N, cells, cells)
    score = ((-extra / 32).exp() * usable).gather(1, nearest[:, None])
    labels = scenes.labels.clamp(min=0).gather(1, nearest.flatten(1)).view_as(nearest)
    classes = F.one_hot(labels, len(CLASSES)).movedim(-1, 1)
    boxes = scenes.boxes.gather(1, nearest.flatten(1)[..., None].expand(-1, -1, 4))
    return Targets(classes * score, boxes.view(*nearest.shape, 4))


def losses(model: Detector, images: Tensor, wanted: Targets) -> Tensor:
    """Returns each scene's loss (N,): logistic over all cells and classes, and of the boxes 2 (1 - GIoU)."""
    logits, boxes = model(images)
    scores = F.binary_cross_entropy_with_logits(logits, wanted.scores, reduction="none").sum((1, 2, 3))
    misfit = 1 - overlap(boxes, wanted.boxes, generalised=True)
    return scores + 2 * (wanted.scores.sum(1) * misfit).sum((1, 2))


def train(scenes: Scenes, seed: int) -> Detector:
    torch.manual_seed(seed)
    model = Detector()
    wanted = targets(model.centres, scenes)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = EPOCHS * (len(scenes.images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in tqdm(range(EPOCHS), desc="epochs", leave=False):
        order = torch.randperm(len(scenes.images))
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            batch = Targets(wanted.scores[rows], wanted.boxes[rows])
            loss = losses(model, scenes.images[rows], batch).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def scene_losses(model: Detector, scenes: Scenes) -> Tensor:
    wanted = targets(model.centres, scenes)
    parts = zip(*(x.split(250) for x in (scenes.images, wanted.scores, wanted.boxes)), strict=True)
    return torch.cat([losses(model, images, Targets(scores, boxes)) for images, scores, boxes in parts])


@torch.inference_mode()
def detect(model: Detector, images: Tensor) -> list[dict[str, Any]]:
    """Returns detections in COCO's form: of the 60 best of a scene those that no better one suppresses."""
    logits, boxes = model(images)
    scores, best = logits.sigmoid().flatten(1).topk(60)
    classes, cells = best // (SIZE // CELL) ** 2, best % (SIZE // CELL) ** 2
    boxes = boxes.flatten(1, 2).gather(1, cells[..., None].expand(-1, -1, 4)).clamp(0, SIZE)
    rows = (suppress(boxes, classes) & (scores > 0.01)).nonzero()
    corners = torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], -1)
    return [
        {"image_id": scene + 1, "category_id": category + 1, "bbox": box, "score": score}
        for (scene, _), category, box, score in zip(
            rows.tolist(),
            classes[tuple(rows.T)].tolist(),
            corners[tuple(rows.T)].tolist(),
            scores[tuple(rows.T)].tolist(),
            strict=True,
        )
    ]


def ground_truth(scenes: Scenes) -> dict[str, Any]:
    """Returns scenes in COCO's form. Identities begin with 1: pycocotools takes a match with object 0 for none."""
    sizes = scenes.boxes[..., 2:] - scenes.boxes[..., :2]
    objects = [
        {
            "image_id": scene + 1,
            "category_id": int(scenes.labels[scene, place]) + 1,
            "bbox": [*scenes.boxes[scene, place, :2].tolist(), *sizes[scene, place].tolist()],
            "area": float(sizes[scene, place].prod()),
            "iscrowd": 0,
        }
        for scene, place in (scenes.labels >= 0).nonzero().tolist()
    ]
    return {
        "images": [{"id": 1 + i, "width": SIZE, "height": SIZE} for i in range(len(scenes.images))],
        "categories": [{"id": 1 + i, "name": name} for i, name in enumerate(CLASSES)],
        "annotations": [{"id": 1 + i} | row for i, row in enumerate(objects)],
    }
