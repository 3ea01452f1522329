"""A language model that judges answers: any endpoint of the OpenAI chat form. Off unless named.

Every reply is appended to a file as it comes, so judging resumes where it was interrupted, and can
be scored again, without the endpoint, by anybody who has the file. One line of it:
`{"id": "3", "prompt_sha256": "9f2c...", "model": "gpt-4", "reply": "... Rating: 4"}`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.benchmarks.rows import read_rows, read_text
from eval.errors import EvalError

KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Endpoint:
    """A chat model behind an endpoint of the OpenAI form.

    url: what comes before `/chat/completions`
    model: its name there
    temperature: of the sampling
    max_tokens: where a response is cut
    retries: how often a request is repeated while the endpoint is busy or not reached; the pauses
        grow to 8 s, or are those that the endpoint names
    """

    url: str
    model: str
    temperature: float = 0.0
    max_tokens: int = 1024
    retries: int = 12

    def ask(self, prompt: str) -> str:
        """The response to one user message."""
        openai, has_key = _openai(), bool(os.environ.get(KEY))
        try:
            completion = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=self.temperature,
                max_tokens=self.max_tokens,
                extra_headers={} if has_key else {"Authorization": openai.Omit()},
            )
        except openai.APIStatusError as error:
            raise EvalError(
                f"{self.url}: HTTP {error.status_code} ({error.response.text[:300]}). Check the "
                f"address, the model {self.model!r} and the key in {KEY}; replies so far are kept."
            ) from error
        except openai.APIConnectionError as error:
            raise EvalError(
                f"{self.url}: not reached ({error.__cause__ or error}). Replies so far are kept: "
                "the same command resumes."
            ) from error
        try:
            return str(completion.choices[0].message.content or "")
        except (LookupError, TypeError, AttributeError):
            shown = str(completion)[:200]
            raise EvalError(f"{self.url}: no chat completion in its response: {shown}") from None

    @cached_property
    def _client(self) -> Any:
        key = os.environ.get(KEY) or "none"  # the client wants one, also where none is sent
        return _openai().OpenAI(
            base_url=self.url, api_key=key, max_retries=self.retries, timeout=120
        )


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise EvalError('--judge needs openai: pip install -e ".[judge]"') from None
    return openai


@dataclass(frozen=True)
class Judge:
    """A judge of answers.

    verdicts: file of its replies, appended to
    endpoint: what is requested where the file lacks a reply; None: the file alone
    """

    verdicts: Path
    endpoint: Endpoint | None = None

    def replies(self, prompts: Mapping[str, str]) -> dict[str, str]:
        """Reply to every prompt by its key. A changed prompt or model is a new request."""
        checksums = {key: _sha256(prompt) for key, prompt in prompts.items()}
        known = self._known(checksums)
        missing = [key for key in prompts if key not in known]
        if missing and self.endpoint is None:
            raise EvalError(
                f"{self.verdicts}: no verdict on {len(missing)} of {len(prompts)} answers (first: "
                f"{missing[0]}). Name a judge with --judge URL and --judge-model NAME."
            )
        for key in tqdm(missing, desc="judge", unit=" verdicts", disable=not missing):
            known[key] = self._ask(key, prompts[key])
        return {key: known[key] for key in prompts}

    def _known(self, checksums: Mapping[str, str]) -> dict[str, str]:
        if not self.verdicts.exists() or not _whole_lines(self.verdicts):
            return {}
        rows = [row for row in read_rows(self.verdicts) if self._is_ours(row.text("model"))]
        pairs = ((row.text("id"), row) for row in rows)
        return {
            key: row.text("reply")
            for key, row in pairs
            if checksums.get(key) == row.text("prompt_sha256")
        }

    def _is_ours(self, model: str) -> bool:
        return self.endpoint is None or model == self.endpoint.model

    def _ask(self, key: str, prompt: str) -> str:
        assert self.endpoint is not None
        reply = self.endpoint.ask(prompt)
        line = {"id": key, "prompt_sha256": _sha256(prompt), "model": self.endpoint.model}
        with self.verdicts.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "reply": reply}) + "\n")
        return reply


@dataclass(frozen=True)
class Template:
    """A prompt with fields in braces.

    name: file name and start of its SHA-256
    text: the prompt
    """

    name: str
    text: str

    @classmethod
    def load(cls, path: Path) -> Template:
        """A text file, or the variable `template` of a published Python script."""
        text = _template_of(path) if path.suffix == ".py" else read_text(path)
        return cls(f"{path.name} (sha256 {_sha256(text)[:12]})", text)

    def fill(self, **values: str) -> str:
        """The prompt; fields are named, or empty braces that are filled in the given order."""
        try:
            return self.text.format(*values.values(), **values)
        except (LookupError, ValueError) as error:
            raise EvalError(
                f"{self.name}: has a field {error} that cannot be filled; known are "
                f"{', '.join(values)}. Braces that are no field are written twice."
            ) from None


def shipped(name: str) -> Path:
    """A prompt of our own wording."""
    return Path(__file__).parent / "prompts" / f"{name}.txt"


@dataclass(frozen=True)
class JudgeOptions:
    """The options of a benchmark that a judge may score.

    judge (URL): endpoint of the OpenAI chat form (default: off)
    judge_model (NAME): model to ask there
    verdicts: file of its replies, appended to; alone: score these
    """

    judge: str | None = None
    judge_model: str | None = None
    verdicts: Path | None = None

    def open(self, **settings: Any) -> Judge | None:
        """The judge that is named, None where none is; `settings` are those of `Endpoint`."""
        if (self.judge is None) != (self.judge_model is None):
            raise EvalError("a judge needs both --judge URL and --judge-model NAME.")
        if self.judge is None or self.judge_model is None:
            return None if self.verdicts is None else Judge(self.verdicts)
        if not self.judge.startswith(("http://", "https://")):
            raise EvalError(
                f"--judge {self.judge}: expected an address such as http://localhost:8000/v1."
            )
        if self.verdicts is None:
            raise EvalError("--judge needs --verdicts FILE, to which its replies are appended.")
        return Judge(self.verdicts, Endpoint(self.judge, self.judge_model, **settings))

    def required(self, benchmark: str, **settings: Any) -> Judge:
        """The same of a benchmark without a score of its own."""
        if (named := self.open(**settings)) is None:
            raise EvalError(
                f"{benchmark} needs a judge, and none is named: --judge URL --judge-model NAME "
                "--verdicts FILE; or --export FILE for the published script."
            )
        return named

    @property
    def name(self) -> str:
        return self.judge_model or f"verdicts {self.verdicts}"


@dataclass(frozen=True)
class TemplateOptions(JudgeOptions):
    """The same of a benchmark whose prompt for the judge may be another.

    template: prompt for the judge (default: our own wording)
    """

    template: Path | None = None

    def prompt(self, name: str) -> Template:
        """The template that is named, or the shipped one."""
        return Template.load(self.template or shipped(name))

    def named(self, prompt: Template) -> dict[str, str]:
        """What the scores say of the judge."""
        return {"judge": self.name, "template": prompt.name}


NO_JUDGE = TemplateOptions()


def _template_of(script: Path) -> str:
    for statement in ast.parse(read_text(script)).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "template":
            return str(ast.literal_eval(statement.value))
    raise EvalError(f"{script}: no variable 'template' in it.")


def _whole_lines(path: Path) -> bool:
    """Cut off a last line that was not written to its end; whether any line is left."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    return end > 0


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
