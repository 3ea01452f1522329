"""Answers made elsewhere in one form, whoever wrote them.

What a row holds as the model's answer is decided by its form:

- lmms-eval's sample log (`doc_id`, `target`, `filtered_resps` or `resps`, and `doc` or `input`):
  the response, from whatever lists it lies in; `target` is the label. `answer` in `doc` is the
  label too, never the answer.
- VLMEvalKit's predictions (`index`, `question`, `answer`, `prediction`, `category`): `prediction`;
  `answer` is the label.
- any other row: the first field of ANSWER that it has.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks.rows import Row, read_rows
from eval.errors import EvalError

ANSWER = (
    *("response", "model_prediction", "model_answer", "model_output", "pred", "output"),
    *("answer", "text", "ans"),
)
LABELS = {"yes": "yes", "no": "no", "1": "yes", "0": "no", "true": "yes", "false": "no"}


def read_answers(path: Path) -> list[Row]:
    """The rows of a file; in those of a log the answer is `response`, the label is `label`."""
    return [plain(row) for row in read_rows(path)]


def plain(row: Row) -> Row:
    """A row of a log in the common form; any other row as it is."""
    if row.has("filtered_resps", "resps"):
        return _of_lmms_eval(row)
    if row.has("prediction"):
        return _of_vlmevalkit(row)
    return row


def answer_text(row: Row) -> str:
    """The model's answer in a row of `read_answers`."""
    return row.text(*ANSWER)


def label(row: Row, *names: str) -> str:
    """ "yes" or "no" of the first of these fields: Yes, 1 and true are yes, No, 0 and false no."""
    value = row.first(*names)
    whole = isinstance(value, float) and value.is_integer()
    reading = LABELS.get(str(int(value) if whole else value).strip().lower())
    if reading is None:
        raise EvalError(f"{row.where}: label {value!r}; expected 'yes' or 'no'.")
    return reading


def _of_lmms_eval(row: Row) -> Row:
    doc = row.fields.get("doc")
    known: dict[str, Any] = dict(doc) if isinstance(doc, Mapping) else {}
    for metric in (value for value in row.fields.values() if isinstance(value, Mapping)):
        # a log without `doc` keeps these beside its scores
        known |= {
            k: metric[k] for k in ("question_id", "category") if k in metric and k not in known
        }
    labels = {"label": known.pop("answer")} if "answer" in known else {}
    if isinstance(row.fields.get("input"), str):
        known.setdefault("question", row.fields["input"])
    labels |= {"label": row.fields["target"]} if "target" in row.fields else {}
    kept = {name: row.fields[name] for name in ("doc_id",) if name in row.fields}
    name = "filtered_resps" if row.has("filtered_resps") else "resps"
    return Row(row.where, {**known, **labels, **kept, "response": _only(row, name)})


def _of_vlmevalkit(row: Row) -> Row:
    fields = {key.lower(): value for key, value in row.fields.items()}
    response = fields.pop("prediction")
    labels = {"label": fields.pop("answer")} if "answer" in fields else {}
    return Row(row.where, {**fields, **labels, "response": response})


def _only(row: Row, name: str) -> str:
    """The one response in a list, or in a list of lists."""
    value = row.first(name)
    while isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise EvalError(
            f"{row.where}: the field {name!r} is {value!r}; expected one response, a string."
        )
    return value
