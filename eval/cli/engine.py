"""Which engine answers the batches of a command's runs."""

import functools
from typing import Literal, TypeAlias, get_args

from eval.errors import EvalError
from eval.runs import ray_engine
from eval.runs.workers import Engine, answer_here
from eval.schema import check_names

Name: TypeAlias = Literal["local", "ray"]


def engine_of(name: str, workers: int | None) -> Engine:
    """The engine of that name; EvalError where there is none, or where it takes no workers."""
    check_names("--engine", (name,), get_args(Name))
    if name == "ray":
        return functools.partial(ray_engine.answer, workers=workers)
    if workers is not None:
        raise EvalError(
            f"--workers {workers} needs --engine ray; for as many processes without Ray: "
            f"accelerate launch --num_processes {workers} -m eval run ..."
        )
    return answer_here
