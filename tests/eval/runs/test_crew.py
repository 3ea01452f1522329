"""Processes at work in one folder: claims, signs of life, and what is taken over from the dead."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eval.runs import crew
from eval.runs.crew import Member, join

FAR = {"machine": "another one", "pid": 1, "started": 0.0}


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Member]:
    with join(tmp_path / "work") as member:
        yield member


def stranger(folder: Path, name: str, **sign: object) -> Member:
    """Another process, with this sign of life."""
    (folder / f"{name}.alive").write_text(json.dumps(sign))
    return Member(folder, name)


def test_each_thing_is_taken_by_one_of_many(here: Member) -> None:
    """Sixteen threads in the roles of processes; creating a file is what decides."""
    crowd = [
        stranger(here.folder, f"m{n}", **json.loads(_sign(here).read_text())) for n in range(16)
    ]
    things = [f"batch{n}" for n in range(30)]
    with ThreadPoolExecutor(16) as pool:
        taken = list(pool.map(lambda member: [member.take(thing) for thing in things], crowd))
    assert [sum(row[place] for row in taken) for place in range(len(things))] == [1] * len(things)


def _sign(member: Member) -> Path:
    return member.folder / f"{member.name}.alive"


def test_what_one_has_it_keeps(here: Member) -> None:
    assert here.take("batch") == 1
    assert here.take("batch") == 1
    other = stranger(here.folder, "other", **FAR)
    assert other.take("batch") == 0


def test_what_a_killed_process_had_is_taken_over_at_once(here: Member, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from eval.crew import join\n"
        "with join(Path(sys.argv[1])) as member:\n"
        "    print(member.take('batch'), flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(here.folder)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "1\n"
        assert here.take("batch") == 0, "its owner is alive"
        process.kill()
    assert here.take("batch") == 2
    assert here.take("batch") == 2, "and then it is kept"


def test_a_process_number_that_came_round_again_is_no_sign_of_life(here: Member) -> None:
    mine = json.loads(_sign(here).read_text())
    old = stranger(here.folder, "old", **(mine | {"started": mine["started"] - 1000}))
    assert old.take("batch") == 1
    assert here.take("batch") == 2


def test_processes_of_another_machine_are_judged_by_their_signs(here: Member) -> None:
    far = stranger(here.folder, "far", **FAR)
    assert far.take("batch") == 1
    assert here.take("batch") == 0
    silent = time.time() - crew.PATIENCE - 1
    os.utime(_sign(far), (silent, silent))
    assert here.take("batch") == 2
    assert far.take("batch") == 0, "it comes back, and finds that another one has it now"
    _sign(far).write_text('{"mach')
    assert far.take("next") == 1
    assert here.take("next") == 0, "a sign that is just being written is fresh"


def test_a_process_that_left_holds_nothing(here: Member) -> None:
    with join(here.folder) as other:
        assert other.take("batch") == 1
        assert here.take("batch") == 0
    assert here.take("batch") == 2


def test_a_claim_whose_writer_died_before_its_name_counts_until_it_is_old(here: Member) -> None:
    assert here.take("before") == 1
    claim = here.claims / "batch.1"
    claim.touch()
    assert here.take("batch") == 0
    silent = time.time() - crew.PATIENCE - 1
    os.utime(claim, (silent, silent))
    assert here.take("batch") == 2


def test_signs_of_life_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "BEAT", 0.01)
    with join(tmp_path) as member:
        os.utime(_sign(member), (0, 0))
        ends = time.monotonic() + 10
        while _sign(member).stat().st_mtime == 0 and time.monotonic() < ends:
            time.sleep(0.01)
        assert time.time() - _sign(member).stat().st_mtime < 60


def test_the_last_one_out_clears_up(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with join(folder) as one:
        with join(folder) as two:
            two.take("a")
        assert one.take("b") == 1
        assert sorted(path.name for path in one.claims.iterdir()) == ["a.1", "b.1"]
    assert not folder.exists()
    with join(folder):
        (folder / "part.answers.jsonl").touch()
        stranger(folder, "dead", **(FAR | {"machine": crew.machine(), "pid": os.getpid()}))
    assert [path.name for path in folder.iterdir()] == ["part.answers.jsonl"]
