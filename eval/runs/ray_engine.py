"""An engine on a Ray cluster: one actor per accelerator, each with the model loaded once.

This process, the driver, hands out batches and alone writes into the run folder.
"""

import importlib
import os
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from eval.errors import EvalError
from eval.runs import splitting
from eval.runs import workers as answering
from eval.runs.batches import Batch
from eval.runs.config import Config
from eval.runs.samples import notice
from eval.runs.workers import Answered, Answers, Load

RESTARTS = 3
"""How often Ray starts an actor again."""
TRIES = 3
"""How many actors a batch may end before the run stops."""
OBJECT_STORE = 2**27
"""Bytes of shared memory for a cluster of this machine; only prompts and answers travel."""


def answer(
    batches: Sequence[Batch], config: Config, load: Load, workers: int | None = None
) -> Answers:
    """Answers of `workers` actors (None: one per accelerator, or one on a CPU).

    The cluster is the one that RAY_ADDRESS names (`auto`: the one of this machine), else one is
    started for this run.
    """
    ray = _import(config)
    try:
        _connect(ray)
        count, accelerators = _size(ray, config, workers)
        remote = ray.remote(max_restarts=RESTARTS, num_gpus=accelerators)(Actor)
        actors = [remote.remote(config, load, os.getcwd()) for _ in range(count)]
        notice(f"{count} Ray actors, {accelerators} accelerators each")
        yield from hand_out(ray, actors, batches)
    finally:
        ray.shutdown()


class Actor:
    """One loaded model in a process of the cluster; relative paths mean what the driver means."""

    def __init__(self, config: Config, load: Load, folder: str) -> None:
        os.chdir(folder)
        self.config, self.load, self.stack = config, load, ExitStack()
        self.worker: answering.Worker | None = None

    def ready(self) -> None:
        """Load the model, unless that is done; apart from __init__, whose errors Ray repacks."""
        if self.worker is None:
            self.worker = self.stack.enter_context(answering.worker(self.config, self.load))

    def answer(self, batch: Batch) -> Answered:
        assert self.worker is not None
        return self.worker.answer(batch)


PAUSE = 0.5
"""Seconds between two questions whether an actor is there again."""


def hand_out(ray: Any, actors: Sequence[Any], batches: Sequence[Batch]) -> Answers:
    """What the actors answer, as it comes; each gets a batch when it is done with its last one.

    The batch of an actor that died goes to the next that is free. Ray starts the actor again, which
    is free when it has loaded the model.
    """
    pool, left = Pool(ray, actors, batches), len(batches)
    while left:
        if (answered := pool.step()) is not None:
            left -= 1
            yield answered


class Pool:
    """The actors of a run, and the batches that wait for them.

    queue: batches that no actor has
    busy: actor and batch (None: it loads the model) by the reference of what comes of them
    free: actors without a batch
    absent: actors that died and are not there again
    deaths: of each actor
    tries: how many actors each batch ended, by its id
    """

    def __init__(self, ray: Any, actors: Sequence[Any], batches: Sequence[Batch]) -> None:
        self.ray, self.queue = ray, deque(batches)
        self.busy: dict[Any, tuple[Any, Batch | None]] = {}
        self.free: list[Any] = []
        self.absent: set[Any] = set()
        self.deaths, self.tries, self.reason = Counter[Any](), Counter[int](), ""
        for actor in actors:
            self._load(actor)

    def _load(self, actor: Any) -> None:
        self.busy[actor.ready.remote()] = actor, None

    def step(self) -> Answered | None:
        """Hand out what can be, and wait for the next actor; None where it answers no batch."""
        while self.queue and self.free:
            actor, batch = self.free.pop(), self.queue.popleft()
            self.busy[actor.answer.remote(batch)] = actor, batch
        if not self.busy:
            raise EvalError(
                f"every Ray actor died {RESTARTS + 1} times, the last one so: {self.reason} "
                f"The answers so far are kept, and the same command resumes from there"
            )
        (done,), _ = self.ray.wait([*self.busy], num_returns=1)
        actor, current = self.busy.pop(done)
        try:
            answered: Answered = self.ray.get(done)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause or error from error
        except self.ray.exceptions.RayError as error:
            self._died(actor, current, error)
            return None
        self.free.append(actor)
        self.absent.discard(actor)
        return None if current is None else answered

    def _died(self, actor: Any, batch: Batch | None, error: Exception) -> None:
        """Put the batch back, and wait for the actor if Ray starts it again."""
        self.reason = str(error).strip().rpartition("\n")[2].strip()
        if actor not in self.absent:
            notice(f"a Ray actor died: {self.reason}")
        self.absent.add(actor)
        if batch is None and isinstance(error, self.ray.exceptions.ActorUnavailableError):
            time.sleep(PAUSE)  # it is being restarted; one that is dead says so otherwise
            self._load(actor)
            return
        if batch is not None:
            self.tries[id(batch)] += 1
            _check_tries(batch, self.tries[id(batch)], self.reason)
            self.queue.appendleft(batch)
        self.deaths[actor] += 1
        if self.deaths[actor] <= RESTARTS:
            self._load(actor)


def _check_tries(batch: Batch, tries: int, reason: str) -> None:
    if tries == TRIES:
        raise EvalError(
            f"the batch of {batch.samples[0].name} ended its Ray actor {tries} times ({reason}): "
            f"run it without --engine ray to see of what; the answers so far are kept"
        )


def _import(config: Config) -> Any:
    """The module ray; EvalError where it is missing or the wrong engine for the run."""
    if splitting.processes().num_processes > 1:
        raise EvalError(
            "--engine ray starts its own processes: give the command without accelerate launch"
        )
    if config.tp_plan is not None:
        raise EvalError(
            "tp_plan divides one model among the processes of a launcher, and --engine ray loads "
            "one into each: use accelerate launch, or drop tp_plan"
        )
    if os.environ.get("RAY_ADDRESS"):  # its 20 attempts to connect take a quarter of an hour
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise EvalError(
            f'--engine ray needs the extra `ray` ({error}): pip install -e ".[eval,ray]"'
        ) from error


def _connect(ray: Any) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # this very code, not a copy that is installed where the actor runs
    paths = [os.getcwd(), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, paths))}}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address=address, runtime_env=environment)
        except ConnectionError as error:
            raise EvalError(
                f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); start one with "
                f"ray start --head, or unset RAY_ADDRESS to use this machine alone"
            ) from error
    else:
        # not the default, which takes whatever cluster was started here last
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE,
            runtime_env=environment,
        )


def _size(ray: Any, config: Config, workers: int | None) -> tuple[int, int]:
    """How many actors, and how many accelerators each holds."""
    there = 0 if config.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    count = (there or 1) if workers is None else workers
    if count < 1 or 0 < there < count:
        raise EvalError(
            f"--workers {count}: expected at least 1"
            + (f" and at most {there}, one per accelerator of the cluster" if there else "")
        )
    return count, 1 if there else 0
