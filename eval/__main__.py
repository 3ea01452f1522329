"""python -m eval run | score | table | demo | speed | modes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval import config, demo, runs, scoring, table
from eval.errors import EvalError
from vlm_patch import PatchError, UnsupportedModelError

BENCHMARKS = ("chair", "pope")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 1 after an error (said on stderr), 130 if the user stopped it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if (
        words[:1] == ["score"]
        and words[1:]
        and words[1] not in (*BENCHMARKS, "run", "-h", "--help")
    ):
        words.insert(1, "run")
    options = parser().parse_args(words)
    try:
        options.command(options)
    except (EvalError, UnsupportedModelError, PatchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one ended", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    commands = top.add_subparsers(
        required=True, metavar="run | score | table | demo | speed | modes"
    )

    run = commands.add_parser("run", help="generate answers by a configuration and score them")
    run.add_argument("config", type=Path, help="a YAML file, see configs/")
    run.add_argument(
        "--out", type=Path, required=True, help="the run folder; an interrupted run goes on"
    )
    run.add_argument("--limit", type=int, help="only so many images a split and task")
    run.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for example gift.alpha=4"
    )
    run.set_defaults(command=_run)

    _add_score(
        commands.add_parser("score", help="score a run folder, or files made elsewhere; no model")
    )

    tables = commands.add_parser("table", help="runs side by side, in Markdown")
    tables.add_argument("folders", type=Path, nargs="+", metavar="RUN")
    tables.set_defaults(command=_table)

    show = commands.add_parser("demo", help="pocket model: baseline, VAR, GIFT, VHR and all three")
    show.add_argument("--out", type=Path, default=Path("runs/demo"))
    show.set_defaults(command=lambda options: demo.demo(options.out))

    _add_speed(commands.add_parser("speed", help="what the methods cost beside the stock model"))
    ways = commands.add_parser("modes", help="every way of generating, against the slow reference")
    ways.add_argument("--json", action="store_true", help="print one JSON list")
    ways.add_argument("--out", type=Path, metavar="FILE", help="write it there too")
    ways.set_defaults(command=_modes)
    return top


def _add_speed(costs: argparse.ArgumentParser) -> None:
    costs.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    costs.add_argument(
        "--shapes", help="names with commas between, or all (default: the quick ones)"
    )
    costs.add_argument("--methods", help="of var,gift,vhr,all (default: every one)")
    costs.add_argument("--repeats", type=int, default=9, help="pairs at most (default: 9)")
    costs.add_argument("--device", help="cpu or cuda (default: the accelerator if there is one)")
    costs.add_argument("--out", type=Path, default=Path("runs/speed"))
    costs.set_defaults(command=_speed)


def _add_score(score: argparse.ArgumentParser) -> None:
    """`score FOLDER` (short for `score run FOLDER`), `score chair ...` and `score pope ...`."""
    kinds = score.add_subparsers(required=True, metavar="RUN | chair | pope")

    folder = kinds.add_parser("run", help="score a run folder again and write its metrics.json")
    folder.add_argument("folder", type=Path, metavar="RUN")
    folder.set_defaults(command=_score)

    chair = kinds.add_parser("chair", help="captions made elsewhere, against COCO objects")
    chair.add_argument("--captions", type=Path, required=True, help="JSON list or JSON lines")
    chair.add_argument("--truth", type=Path, required=True, metavar="OBJECTS.json|COCO_DIR")
    chair.add_argument(
        "--synonyms", type=Path, help="object vocabulary (default: the one that ships)"
    )
    chair.add_argument(
        "--rules", default="pattern", help="how captions are read (default: pattern)"
    )
    chair.add_argument("--json", action="store_true", help="print one JSON object")
    chair.set_defaults(command=_score_chair)

    pope = kinds.add_parser("pope", help="yes/no answers made elsewhere, against POPE questions")
    pope.add_argument(
        "--answers", type=Path, required=True, help="JSON lines, in the questions' order"
    )
    pope.add_argument("--questions", type=Path, required=True, help="JSON lines with labels")
    pope.add_argument("--json", action="store_true", help="print one JSON object")
    pope.set_defaults(command=_score_pope)


def _run(options: argparse.Namespace) -> None:
    limit = [] if options.limit is None else [f"limit={options.limit}"]
    runs.run(config.load(options.config, [*options.set, *limit]), options.out)
    print(table.markdown([options.out]))


def _score(options: argparse.Namespace) -> None:
    runs.score(options.folder)
    print(table.markdown([options.folder]))


def _score_chair(options: argparse.Namespace) -> None:
    result = scoring.score_chair(options.captions, options.truth, options.synonyms, options.rules)
    scoring.print_result(result, options.json)


def _score_pope(options: argparse.Namespace) -> None:
    scoring.print_result(scoring.score_pope(options.answers, options.questions), options.json)


def _speed(options: argparse.Namespace) -> None:
    from eval import speed  # models of many sizes, which no other command needs

    speed.speed(
        options.out,
        options.shapes,
        options.methods,
        options.repeats,
        options.threads,
        options.device,
    )


def _modes(options: argparse.Namespace) -> None:
    from eval import modes  # runs models, which no other command needs

    modes.modes(options.json, options.out)


def _table(options: argparse.Namespace) -> None:
    print(table.markdown(options.folders))


if __name__ == "__main__":
    sys.exit(main())
