"""Options that several commands share: changes of the configuration, and the engine of the runs."""

import functools
from dataclasses import dataclass
from typing import Literal

from eval.errors import EvalError
from eval.runs import ray_engine
from eval.runs.workers import Engine, answer_here
from eval.schema import check_names


@dataclass(frozen=True)
class Changes:
    """What the command line changes of a configuration.

    limit: only so many images a split and task
    set_ (KEY=VALUE): for example gift.alpha=4
    """

    limit: int | None = None
    set_: list[str] | None = None

    @property
    def settings(self) -> list[str]:
        """The changes as KEY=VALUE."""
        return [*(self.set_ or ()), *([] if self.limit is None else [f"limit={self.limit}"])]


@dataclass(frozen=True)
class Engines:
    """What answers the batches of the runs.

    engine: where models are loaded
    workers: of ray (default: one per accelerator, or 1)
    """

    engine: Literal["local", "ray"] = "local"
    workers: int | None = None

    def open(self) -> Engine:
        """The engine; EvalError where there is none of that name, or where it takes no workers."""
        check_names("--engine", (self.engine,), ("local", "ray"))
        if self.engine == "ray":
            return functools.partial(ray_engine.answer, workers=self.workers)
        if self.workers is not None:
            raise EvalError(
                f"--workers {self.workers} needs --engine ray; for as many processes without Ray: "
                f"accelerate launch --num_processes {self.workers} -m eval run ..."
            )
        return answer_here


UNCHANGED, HERE = Changes(), Engines()
