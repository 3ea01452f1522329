"""Tables as rows: CSV and TSV from the standard library, XLSX through openpyxl.

VLMEvalKit writes its predictions in these forms; a cell that is empty is an empty string.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eval.errors import EvalError

SEPARATORS: Mapping[str, str] = {".csv": ",", ".tsv": "\t"}
REFUSED: Mapping[str, str] = {
    ".parquet": "convert it, for example: datasets.load_dataset(...).to_json('questions.jsonl')",
    ".pkl": "a pickle can run code when it is opened; write TSV (PRED_FORMAT=tsv) or JSON",
}
_LONGEST = 2**31 - 1


def is_table(path: Path) -> bool:
    """Whether the name of a file says that it is a table."""
    return kind(path) in (*SEPARATORS, ".xlsx")


def kind(path: Path) -> str:
    """The suffix of a file, without that of its compression."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def separated(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and row, cells by column) of every row of a CSV or TSV text."""
    # a VLMEvalKit question file holds whole images in its cells
    csv.field_size_limit(_LONGEST)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=SEPARATORS[kind(path)])
    try:
        columns = [name.strip() for name in next(reader)]
        for number, cells in enumerate((row for row in reader if any(row)), 1):
            yield _row(f"{path}, row {number}", columns, cells)
    except csv.Error as error:
        raise EvalError(f"{path}, line {reader.line_num}: broken table ({error}).") from error


def sheet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same of the first sheet of an XLSX file."""
    try:
        import openpyxl
    except ImportError:
        raise EvalError(
            f'{path}: an XLSX file needs openpyxl: pip install -e ".[xlsx]" (or have VLMEvalKit '
            "write TSV: PRED_FORMAT=tsv)."
        ) from None
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except FileNotFoundError:
        raise EvalError(f"{path}: no such file.") from None
    except Exception as error:
        # openpyxl lets errors of zip files and of XML through as they are
        raise EvalError(f"{path}: cannot be read as an XLSX file: {error}.") from error
    rows = book.worksheets[0].iter_rows(values_only=True)
    columns = [str(name or "").strip() for name in next(rows, ())]
    filled = (row for row in rows if any(cell is not None for cell in row))
    for number, row in enumerate(filled, 1):
        yield _row(f"{path}, row {number}", columns, ["" if c is None else c for c in row])


def _row(where: str, columns: list[str], cells: list[Any]) -> tuple[str, dict[str, Any]]:
    if len(cells) != len(columns):
        raise EvalError(f"{where}: {len(cells)} cells under {len(columns)} columns.")
    return where, dict(zip(columns, cells, strict=True))
