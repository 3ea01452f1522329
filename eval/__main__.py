"""python -m eval COMMAND: runs, scores, tables, and what is measured of the library itself."""

from __future__ import annotations

import argparse
import errno
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.cli import score as benchmarks
from eval.errors import EvalError
from eval.reports import compare, export, plot, table
from eval.runs import config, ray_engine, runner
from eval.runs.workers import Engine, answer_here
from eval.studies import demo, sweep
from vlm_patch import PatchError, UnsupportedModelError

ROOM = ": what was written is kept; make room and give the same command again"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 1 after an error (said on stderr), 130 if the user stopped it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    names = (*benchmarks.SCORES, "run", "-h", "--help")
    if words[:1] == ["score"] and words[1:] and words[1] not in names:
        words.insert(1, "run")
    options = parser().parse_args(words)
    try:
        options.command(options)
    except (EvalError, UnsupportedModelError, PatchError, OSError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        print(f"error: {error}{ROOM if full else ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one ended", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m eval", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="generate answers by a configuration and score them")
    run.add_argument("config", type=Path, help="a YAML file, see configs/")
    run.add_argument(
        "--out", type=Path, required=True, help="the run folder; an interrupted run goes on"
    )
    run.add_argument("--limit", type=int, help="only so many images a split and task")
    run.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for example gift.alpha=4"
    )
    run.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="where models are loaded"
    )
    run.add_argument("--workers", type=int, help="of ray (default: one per accelerator, or 1)")
    run.set_defaults(command=_run)

    _add_score(
        commands.add_parser("score", help="score a run folder, or files made elsewhere; no model")
    )

    benchmarks.add_data(commands.add_parser("data", help="fetch a benchmark's files"))
    benchmarks.add_commands(commands)

    _add_compare(commands.add_parser("compare", help="two runs on the same images, in pairs"))
    _add_table(commands.add_parser("table", help="runs side by side"))

    _add_sweep(commands.add_parser("sweep", help="tune the methods on some images, report others"))

    show = commands.add_parser("demo", help="pocket model: baseline, VAR, GIFT, VHR and all three")
    show.add_argument("--out", type=Path, default=Path("runs/demo"))
    show.add_argument("--all", action="store_true", help="print every row of the table")
    show.add_argument("--device", help="cpu, cuda ... (default: the accelerator if there is one)")
    show.set_defaults(command=lambda given: demo.demo(given.out, given.device, given.all))

    _add_models(commands.add_parser("models", help="which model families are supported, measured"))
    _add_speed(commands.add_parser("speed", help="what the methods cost beside the stock model"))
    ways = commands.add_parser("modes", help="every way of generating, against the slow reference")
    ways.add_argument("--json", action="store_true", help="print one JSON list")
    ways.add_argument("--out", type=Path, metavar="FILE", help="write it there too")
    ways.add_argument("--docs", action="store_true", help="write it into docs/generation.md")
    ways.set_defaults(command=_modes)
    return top


def _add_table(tables: argparse.ArgumentParser) -> None:
    tables.add_argument("folders", type=Path, nargs="+", metavar="RUN")
    tables.add_argument("--format", default="markdown", help=" | ".join(export.FORMATS))
    tables.add_argument("--plot", type=Path, metavar="FILE.png", help="needs the extra `plot`")
    tables.set_defaults(command=_table)


def _add_compare(pairs: argparse.ArgumentParser) -> None:
    pairs.add_argument("before", type=Path, metavar="RUN_A")
    pairs.add_argument("after", type=Path, metavar="RUN_B")
    pairs.add_argument("--json", action="store_true", help="print one JSON object")
    pairs.set_defaults(command=_compare)


def _add_sweep(tries: argparse.ArgumentParser) -> None:
    tries.add_argument("config", type=Path, help="a YAML file, see configs/")
    tries.add_argument("--out", type=Path, required=True, help="an interrupted sweep goes on")
    tries.add_argument(
        "--grid", action="append", default=[], metavar="KEY=VALUE,VALUE", help="may be repeated"
    )
    tries.add_argument("--grid-heads", metavar="layers|heads", help="methods on in one at a time")
    tries.add_argument("--measure", help="what is tuned (default: the main one of the first task)")
    tries.add_argument("--tune-split", help="default: one half of the images of each split")
    tries.add_argument("--limit", type=int, help="only so many images a split and task")
    tries.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    tries.set_defaults(command=_sweep)


def _add_models(families: argparse.ArgumentParser) -> None:
    families.add_argument("--types", help="names with commas between (default: every one)")
    families.add_argument("--json", action="store_true", help="print JSON")
    families.add_argument("--out", type=Path, help="write it to this file too")
    families.add_argument("--docs", action="store_true", help="write it into docs/models.md")
    families.set_defaults(command=_models)


def _add_speed(costs: argparse.ArgumentParser) -> None:
    costs.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    costs.add_argument(
        "--shapes", help="names with commas between, or all (default: the quick ones)"
    )
    costs.add_argument("--methods", help="of var,gift,vhr,all, or import paths (default: those)")
    costs.add_argument("--repeats", type=int, default=25, help="pairs at most (default: 25)")
    costs.add_argument("--device", help="cpu or cuda (default: the accelerator if there is one)")
    costs.add_argument("--out", type=Path, default=Path("runs/speed"))
    costs.set_defaults(command=_speed)


def _add_score(score: argparse.ArgumentParser) -> None:
    """`score FOLDER` (short for `score run FOLDER`), and `score NAME ...` for every benchmark."""
    kinds = score.add_subparsers(required=True, metavar=f"RUN | {' | '.join(benchmarks.SCORES)}")

    folder = kinds.add_parser("run", help="score a run folder again and write its metrics.json")
    folder.add_argument("folder", type=Path, metavar="RUN")
    folder.set_defaults(command=_score)
    benchmarks.add_scores(kinds)


def _run(options: argparse.Namespace) -> None:
    limit = [] if options.limit is None else [f"limit={options.limit}"]
    settings = config.load(options.config, [*options.set, *limit])
    runner.run(settings, options.out, engine=_engine(options))
    if _prints():
        print(table.markdown([options.out]))


def _engine(options: argparse.Namespace) -> Engine:
    if options.engine == "ray":
        return functools.partial(ray_engine.answer, workers=options.workers)
    if options.workers is not None:
        raise EvalError(
            f"--workers {options.workers} needs --engine ray; for as many processes without Ray: "
            f"accelerate launch --num_processes {options.workers} -m eval run ..."
        )
    return answer_here


def _score(options: argparse.Namespace) -> None:
    runner.score(options.folder)
    print(table.markdown([options.folder]))


def _models(options: argparse.Namespace) -> None:
    from eval.support import families  # builds a model of every type, which no other command needs

    families.models(options.types, options.json, options.out, options.docs)


def _speed(options: argparse.Namespace) -> None:
    from eval.speed import measure  # models of many sizes, which no other command needs

    measure.speed(
        options.out,
        options.shapes,
        options.methods,
        options.repeats,
        options.threads,
        options.device,
    )


def _modes(options: argparse.Namespace) -> None:
    from eval.support import modes  # runs models, which no other command needs

    modes.modes(options.json, options.out, options.docs)


def _sweep(options: argparse.Namespace) -> None:
    limit = [] if options.limit is None else [f"limit={options.limit}"]
    wanted = sweep.Sweep(
        options.config,
        (*options.set, *limit),
        tuple(options.grid),
        options.grid_heads,
        options.measure,
        options.tune_split,
    )
    found = sweep.sweep(wanted, options.out)
    if _prints():
        print(sweep.markdown(found, options.out))


def _prints() -> bool:
    """Of the processes that a launcher started, one speaks."""
    return os.environ.get("RANK", "0") == "0"


def _table(options: argparse.Namespace) -> None:
    print(export.write(options.folders, options.format))
    if options.plot is not None:
        plot.plot(options.folders, options.plot)


def _compare(options: argparse.Namespace) -> None:
    found = compare.compare(options.before, options.after)
    print(json.dumps(found, indent=2) if options.json else compare.markdown(found))


if __name__ == "__main__":
    sys.exit(main())
