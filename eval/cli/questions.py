"""python -m eval questions: POPE questions of any COCO-format annotation."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from eval.benchmarks.coco import Vocabulary, named_truth
from eval.benchmarks.pope import STRATEGIES, build_questions
from eval.cli import Commands


def add(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("questions", help="POPE questions of any COCO-format annotation")
    parser.add_argument("--truth", type=Path, required=True, metavar="OBJECTS.json|COCO_DIR")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="where they go")
    parser.add_argument(
        "--images", type=int, default=500, help="drawn of those with enough objects"
    )
    parser.add_argument(
        "--per-image", type=int, default=3, help="yes questions an image (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--synonyms", type=Path, help="object vocabulary (default: what ships)")
    parser.set_defaults(command=questions)


def questions(options: argparse.Namespace) -> None:
    """Write one file of questions per strategy, in the official form."""
    truth = named_truth(options.truth, Vocabulary.load(options.synonyms))
    options.to.mkdir(parents=True, exist_ok=True)
    for strategy in STRATEGIES:
        path = options.to / f"coco_pope_{strategy}.json"
        drawn = build_questions(truth, strategy, options.images, options.per_image, options.seed)
        rows = (
            {"question_id": q.question_id, "image": q.image, "text": q.text, "label": q.label}
            for q in drawn
        )
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(drawn)} questions on {options.images} images")
