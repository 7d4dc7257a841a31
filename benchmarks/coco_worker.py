"""Counts mean average precision for `flattening_detection.py` by pycocotools, in pycocotools' own environment:

    python coco_worker.py TRUTH.json

TRUTH.json is ground truth in COCO's form. One line of JSON in, the path of a file with detections in COCO's form as a
string; one out: {"mAP", "mAP50", "classes"}: the average precision over IoU 0.50 to 0.95, at IoU 0.50, and the first of
these for each category.
"""

import contextlib
import json
import sys

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def average_precision(truth: COCO, detections: list[dict]) -> dict:
    categories = sorted(truth.getCatIds())
    if not detections:  # loadRes takes no empty list
        return {"mAP": 0.0, "mAP50": 0.0, "classes": [0.0] * len(categories)}
    evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
    evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    # (IoU thresholds, recalls, categories, areas, most detections); -1 where a category has no objects
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    each = [float(np.mean(values[values > -1])) for values in np.moveaxis(precision, 2, 0)]
    return {"mAP": float(evaluation.stats[0]), "mAP50": float(evaluation.stats[1]), "classes": each}


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):  # pycocotools prints as it goes
        truth = COCO(sys.argv[1])
    for line in sys.stdin:
        with open(json.loads(line), encoding="utf-8") as file, contextlib.redirect_stdout(sys.stderr):
            answer = average_precision(truth, json.load(file))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
