"""The judge: asked once an answer, its replies kept, its errors said."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks.judge import Endpoint, Judge, JudgeOptions, Template, shipped
from eval.errors import EvalError
from tests.support.local_server import Chat, reply, serving


def endpoint(chat: Chat, **more: Any) -> Endpoint:
    return Endpoint(chat.url, "judge-1", retries=2, **more)


def test_one_request(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert endpoint(chat, temperature=0.2, max_tokens=7).ask("Is it?") == "echo Is it?"
    assert chat.paths == ["/v1/chat/completions"]
    assert chat.keys == ["Bearer secret"]
    assert chat.asked == [
        {
            "model": "judge-1",
            "messages": [{"role": "user", "content": "Is it?"}],
            "temperature": 0.2,
            "max_tokens": 7,
        }
    ]
    monkeypatch.delenv("OPENAI_API_KEY")
    endpoint(chat).ask("again")
    assert chat.keys[1] is None


def test_a_busy_endpoint_is_asked_again(chat: Chat) -> None:
    chat.says = lambda prompt: (200, "fine") if len(chat.asked) == 3 else (503, "busy")
    assert endpoint(chat).ask("q") == "fine"
    assert len(chat.asked) == 3
    chat.says = lambda prompt: (429, "slow down")
    with pytest.raises(EvalError, match=r"HTTP 429 .*slow down.*replies so far are kept"):
        endpoint(chat).ask("q")
    assert len(chat.asked) == 3 + 3


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ((401, {"error": "bad key"}), r"HTTP 401 .*bad key.*the key in OPENAI_API_KEY"),
        ((200, {"choices": []}), r"no chat completion in its response: .*choices"),
        ((200, []), r"no chat completion in its response"),
    ],
)
def test_what_is_no_reply(chat: Chat, said: tuple[int, Any], message: str) -> None:
    chat.says = lambda prompt: said
    with pytest.raises(EvalError, match=message):
        endpoint(chat).ask("q")
    assert len(chat.asked) == 1


def test_a_web_page_is_no_reply() -> None:
    page = b"<html>not an API</html>"
    with (
        serving(lambda handler: reply(handler, 200, page, Content_Type="text/html")) as url,
        pytest.raises(EvalError, match=r"no chat completion in its response: <html>not an API"),
    ):
        Endpoint(url, "m").ask("q")


def test_nobody_there() -> None:
    with serving(lambda handler: None) as url:
        pass
    with pytest.raises(EvalError, match="not reached"):
        Endpoint(url, "m", retries=0).ask("q")


def test_without_openai_the_extra_is_named(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(EvalError, match=r'--judge needs openai: pip install -e "\.\[judge\]"'):
        endpoint(chat).ask("q")
    assert chat.asked == []


def test_judging_goes_on_where_it_stopped(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    judge = Judge(file, endpoint(chat))
    chat.says = lambda prompt: (500, "down") if prompt == "three" else (200, f"echo {prompt}")
    prompts = {"1": "one", "2": "two", "3": "three"}
    with pytest.raises(EvalError, match="HTTP 500"):
        judge.replies(prompts)
    first = {"id": "1", "prompt_sha256": hashlib.sha256(b"one").hexdigest(), "model": "judge-1"}
    lines = file.read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["1", "2"]
    assert json.loads(lines[0]) == {**first, "reply": "echo one"}
    file.write_text(file.read_text() + '{"id": "3", "prompt_sha')  # stopped while writing
    chat.says, chat.asked = lambda prompt: (200, f"late {prompt}"), []
    replies = judge.replies(prompts)
    assert replies == {"1": "echo one", "2": "echo two", "3": "late three"}
    assert list(replies) == ["1", "2", "3"]
    assert len(chat.asked) == 1
    assert Judge(file).replies(prompts) == replies


def test_a_changed_prompt_or_model_is_asked_anew(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    Judge(file, endpoint(chat)).replies({"1": "one"})
    assert Judge(file, endpoint(chat)).replies({"1": "changed"}) == {"1": "echo changed"}
    other = Judge(file, Endpoint(chat.url, "judge-2"))
    other.replies({"1": "changed"})
    assert len(chat.asked) == 3
    with pytest.raises(EvalError, match=r"no verdict on 1 of 2 answers \(first: 2\)"):
        Judge(file).replies({"1": "changed", "2": "new"})


def test_the_options(tmp_path: Path) -> None:
    file = tmp_path / "v.jsonl"
    assert JudgeOptions().open() is None
    assert JudgeOptions(None, None, file).open() == Judge(file)
    assert JudgeOptions("http://x", "m", file).open(temperature=0.2) == Judge(
        file, Endpoint("http://x", "m", temperature=0.2)
    )
    with pytest.raises(EvalError, match="both --judge URL and --judge-model"):
        JudgeOptions("http://x", None, file).open()
    with pytest.raises(EvalError, match="--judge needs --verdicts FILE"):
        JudgeOptions("http://x", "m", None).open()
    with pytest.raises(EvalError, match="--judge localhost:8000/v1: expected an address such as"):
        JudgeOptions("localhost:8000/v1", "m", file).open()


def test_templates(tmp_path: Path) -> None:
    plain, script = tmp_path / "own.txt", tmp_path / "official.py"
    plain.write_text("Q {question} A {answer} {{braces}}")
    script.write_text("import json\ntemplate = '''Q {} A {}'''\nprint(json)\n")
    template = Template.load(plain)
    assert template.fill(question="q", answer="{a}") == "Q q A {a} {braces}"
    assert template.name.startswith("own.txt (sha256 ")
    assert Template.load(script).fill(question="q", answer="a") == "Q q A a"
    plain.write_text("Q {wrong}")
    with pytest.raises(EvalError, match=r"'wrong' that cannot be filled; known are question"):
        Template.load(plain).fill(question="q")
    script.write_text("other = 1")
    with pytest.raises(EvalError, match=r"official\.py: no variable 'template'"):
        Template.load(script)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("hallusionbench", "question reference answer"),
        ("mmvp", "question options label answer"),
        ("mmhal", "contents question reference answer"),
        ("llava_bench", ""),
    ],
)
def test_our_own_prompts_hold_every_value(name: str, places: str) -> None:
    values = {place: f"<{place}>" for place in places.split()}
    filled = Template.load(shipped(name)).fill(**values)
    assert all(value in filled for value in values.values())
