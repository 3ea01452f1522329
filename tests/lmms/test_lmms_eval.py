"""lmms-eval itself on POPE questions about pocket scenes, in an environment of its own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import lmms_eval
import pytest
from lmms_eval.models import get_model

from eval import pocket
from eval.benchmarks.pope.benchmark import PopeSettings
from eval.runs import generate
from eval.runs import samples as dataset
from eval.runs.config import Config
from eval.runs.samples import Sample
from tests.support import instructblip
from vlm_patch import GIFT, VHR, wrap
from vlm_patch.integrations.lmms_eval.model import VlmPatch

STRONG = "gift.alpha=30,gift.beta=0,gift.saliency_layer=1,gift.layers=2-3"
POPE = Path(lmms_eval.__file__).parent / "tasks" / "pope" / "pope.yaml"
TASK = """
include: {pope}
task: pope_pocket
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
lmms_eval_specific_kwargs: {{default: {{pre_prompt: "", post_prompt: ""}}}}
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
"""


@pytest.fixture(scope="session")
def config() -> Config:
    return Config(
        tasks=("pope",),
        splits=("test",),
        sections={
            "pope": PopeSettings(images=8, per_image=2, max_new_tokens=4, strategies=("popular",))
        },
        dtype="float32",
        device="cpu",
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lmms")


@pytest.fixture(scope="session")
def samples(config: Config, folder: Path) -> list[Sample]:
    return dataset.samples(config, folder / "scenes")


@pytest.fixture(scope="session")
def tasks(samples: Sequence[Sample], folder: Path) -> Path:
    """A folder of tasks: lmms-eval's own POPE with the pocket questions in place of its data."""
    rows = [
        {
            "question_id": str(sample.facts["question_id"]),
            "question": sample.prompt,
            "answer": sample.facts["label"],
            "image": generate.open_image(sample),
        }
        for sample in samples
    ]
    data = folder / "data"
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(data)
    made = folder / "tasks"
    made.mkdir()
    (made / "pope_pocket.yaml").write_text(TASK.format(pope=POPE, data=data))
    return made


@pytest.fixture(scope="session")
def answers(config: Config, samples: Sequence[Sample]) -> dict[str, list[str]]:
    """What `python -m eval` is told by the stock model and with GIFT, one question at a time."""
    model, processor = generate.load_model(config)

    def ask() -> list[str]:
        return [generate.ask(model, processor, [sample], 4)[0].text for sample in samples]

    found = {"baseline": ask()}
    with wrap(
        model, GIFT(alpha=30.0, beta=0.0, saliency_layer=1, layers=[2, 3]), processor=processor
    ):
        found["gift"] = ask()
    return found


def run(
    tasks: Path, out: Path, arguments: str, processes: int = 1, model: Path = pocket.MODEL
) -> subprocess.CompletedProcess[str]:
    """`lmms_eval` on a model, in batches of five; torchrun starts several processes."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "lmms_eval"]
    command += ["--model", "vlm_patch"]
    command += ["--model_args", f"pretrained={model},dtype=float32,{arguments}"]
    command += ["--device", "cpu", "--tasks", "pope_pocket", "--include_path", str(tasks)]
    command += ["--batch_size", "5", "--output_path", str(out), "--log_samples"]
    on_cpu = os.environ | {"ACCELERATE_USE_CPU": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=on_cpu)


def results(out: Path) -> tuple[dict[str, Any], list[str]]:
    """The scores of the run in `out`, and its answers in the order of the questions."""
    (scores,) = out.rglob("*_results.json")
    (log,) = out.rglob("*_samples_pope_pocket.jsonl")
    rows = sorted(map(json.loads, log.read_text().splitlines()), key=lambda row: row["doc_id"])
    found: dict[str, Any] = json.loads(scores.read_text())["results"]["pope_pocket"]
    return found, [row["filtered_resps"] for row in rows]


@pytest.mark.parametrize(
    ("methods", "arguments", "processes"),
    [
        ("baseline", "methods=baseline", 1),
        ("gift", f"methods=gift,{STRONG}", 1),
        ("gift", f"methods=gift,{STRONG}", 2),
    ],
)
def test_a_task_of_lmms_eval_gets_the_answers_of_python_m_eval(
    tasks: Path,
    samples: Sequence[Sample],
    answers: dict[str, list[str]],
    tmp_path: Path,
    methods: str,
    arguments: str,
    processes: int,
) -> None:
    done = run(tasks, tmp_path, arguments, processes)
    assert done.returncode == 0, done.stderr[-3000:]
    scores, said = results(tmp_path)
    assert said == answers[methods]
    right = [
        text == sample.facts["label"].title() for text, sample in zip(said, samples, strict=True)
    ]
    assert scores["pope_accuracy,none"] == pytest.approx(sum(right) / len(right))


def test_a_model_without_a_chat_template_is_given_one(
    tasks: Path, config: Config, samples: Sequence[Sample], tmp_path: Path
) -> None:
    """InstructBLIP gets the same bare question as from `python -m eval`."""
    folder = instructblip.save(tmp_path / "model")
    bare = f"methods=vhr,vhr.layers=1-2,chat_template={generate.BARE}"
    done = run(tasks, tmp_path / "out", bare, model=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    _, said = results(tmp_path / "out")
    model, processor = generate.load_model(
        replace(config, model=str(folder), chat_template=generate.BARE)
    )
    with wrap(model, VHR(layers=[1, 2]), processor=processor):
        expected = [generate.ask(model, processor, [sample], 4)[0].text for sample in samples]
    assert said == expected


def test_the_method_changes_what_is_asked_of_it(answers: dict[str, list[str]]) -> None:
    assert answers["gift"] != answers["baseline"]


def test_the_warnings_of_the_patch_reach_the_user(tasks: Path, tmp_path: Path) -> None:
    done = run(tasks, tmp_path, "methods=var+vhr")
    assert done.returncode == 0, done.stderr[-3000:]
    log = done.stdout + done.stderr
    assert "no published settings for a llama of 6 layers" in log
    assert len(re.findall("VAR does nothing on this model: no attention sink", log)) == 1


def test_a_wrong_argument_is_explained(tasks: Path, tmp_path: Path) -> None:
    done = run(tasks, tmp_path, "methods=gift,gift.alhpa=4")
    assert "unknown model argument 'gift.alhpa'" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*_results.json"))


def test_lmms_eval_finds_the_model_through_the_entry_point() -> None:
    assert get_model("vlm_patch") is VlmPatch


def test_what_is_not_supported_is_refused_with_the_reason() -> None:
    model = VlmPatch.__new__(VlmPatch)
    with pytest.raises(ValueError, match="output_type: generate_until"):
        model.loglikelihood([])
    with pytest.raises(ValueError, match="tasks of several rounds are not supported"):
        model.generate_until_multi_round([])
