"""Several processes at work in one run folder: who does what, and who is still there.

Work is handed out by files that are created once and never changed, so a slow process holds nobody
up and a dead one loses nothing. It relies on two things of the file system: creating a file that
must not exist yet (O_EXCL) succeeds for one process only, and a file that is opened shows what was
closed before. Local disks, NFS (version 3 on), Lustre and GPFS keep both. There are no locks.
Should two processes do the same work all the same, answers are merged by sample: none counts twice.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

BEAT = 10.0
"""Seconds between two signs of life."""
PATIENCE = 120.0
"""Seconds without a sign of life after which a process on another machine counts as dead."""


@dataclass(frozen=True)
class Member:
    """This process among those at work in `folder`."""

    folder: Path
    name: str

    @property
    def claims(self) -> Path:
        return self.folder / "claims"

    def take(self, thing: str) -> int:
        """Take `thing` if nobody living has it; returns 0 if somebody has.

        1 says that nobody had it before. More says that it was taken over from a dead process,
        which may have done it; the next generation of a claim is a new file too.
        """
        generation = 1
        while not _create(claim := self.claims / f"{thing}.{generation}", self.name):
            if (owner := claim.read_text(encoding="utf-8")) == self.name:
                return generation if self._holds(thing, generation) else 0
            if self._lives(owner, claim):
                return 0
            generation += 1
        return generation

    def _holds(self, thing: str, generation: int) -> bool:
        """Whether nobody took over what is this process's, thinking it dead."""
        return not (self.claims / f"{thing}.{generation + 1}").exists()

    def others(self) -> list[str]:
        """Names of the other processes that are alive in the folder."""
        names = [sign.stem for sign in sorted(self.folder.glob("*.alive"))]
        return [name for name in names if name != self.name and self._lives(name)]

    def _lives(self, name: str, claim: Path | None = None) -> bool:
        """Processes of this machine are looked up, those of others judged by their signs of life.

        A claim that names nobody yet is just being written, or its writer died doing so.
        """
        sign = claim if claim and not name else self.folder / f"{name}.alive"
        try:
            text = sign.read_text(encoding="utf-8")
            if (told := _parse(text)).get("machine") == machine():
                return _runs(told["pid"], told["started"])
            return self._now() - sign.stat().st_mtime < PATIENCE
        except FileNotFoundError:
            return False

    def _now(self) -> float:
        """The time by the clock of the file system, which all machines share."""
        sign_life(self.folder / f"{self.name}.alive")
        return (self.folder / f"{self.name}.alive").stat().st_mtime


@contextmanager
def join(folder: Path) -> Iterator[Member]:
    """Be at work in `folder` until the end of the block, with a sign of life every BEAT seconds.

    The last one out clears the claims away.
    """
    member = Member(folder, f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    sign, gone = folder / f"{member.name}.alive", threading.Event()
    sign_life(sign)
    beats = threading.Thread(target=_beat, args=(sign, gone), daemon=True)
    beats.start()
    try:
        yield member
    finally:
        gone.set()
        beats.join()
        sign.unlink(missing_ok=True)
        if not member.others():
            shutil.rmtree(member.claims, ignore_errors=True)
            for dead in folder.glob("*.alive"):
                dead.unlink(missing_ok=True)
        with suppress(OSError):
            sign.unlink(missing_ok=True)  # looking at others may have written it again
            folder.rmdir()


def sign_life(sign: Path) -> None:
    """Write who this process is, anew each time: a file's age is that of its last writing."""
    started = psutil.Process().create_time()
    who = {"machine": machine(), "pid": os.getpid(), "started": started}
    sign.parent.mkdir(parents=True, exist_ok=True)
    sign.write_text(json.dumps(who), encoding="utf-8")


def machine() -> str:
    """Where process ids mean the same: the machine since its last start, and its namespace."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    start = boot.read_text().strip() if boot.exists() else f"{uuid.getnode():x}"
    within = os.readlink(namespace) if namespace.exists() else ""
    return " ".join([platform.node(), start, within])


def _parse(text: str) -> dict[str, Any]:
    """What a sign of life says; nothing while it is being written."""
    try:
        told = json.loads(text)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _beat(sign: Path, gone: threading.Event) -> None:
    """A missed beat (full disk, network break) costs at worst that work is done a second time."""
    while not gone.wait(BEAT):
        with suppress(OSError):
            sign_life(sign)


def _create(path: Path, text: str) -> bool:
    """Make the file if it is not there; exactly one of many processes succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _runs(pid: int, started: float) -> bool:
    """Whether the process still runs; another one may have got its number since."""
    try:
        process = psutil.Process(pid)
        same = bool(abs(process.create_time() - started) < 5)
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
