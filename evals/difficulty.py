"""Difficulties of instructions, read from a file."""

from typing import Any

from conf.entry import UserError
from reward.readers import parse, read_file
from reward.records import number_of
from reward.sources import local_files
from reward.turns import BadRow

_VALUES = ("instruction_difficulty", "difficulty")


def read_difficulties(path: str) -> dict[str, float]:
    """Difficulties by index: from the JSON of an earlier run, or rows with `index` and `instruction_difficulty`.

    Raises:
        UserError: when the file cannot be read so.
    """
    files = local_files(path)
    if len(files) != 1:
        raise UserError(
            f"there is no file {path!r}; --difficulty takes one .json, .jsonl or .csv (.gz)"
        )
    found: dict[str, float] = {}
    for number, raw in read_file(files[0]):
        place = f"{path}:{number}"
        try:
            row = parse(raw)
            if isinstance(whole := row.get("difficulties"), dict):
                items = list(whole.items())
            else:
                name = next((key for key in _VALUES if key in row), None)
                index = row.get("index", row.get(""))  # pandas leaves the index without a name
                if name is None or index in (None, ""):
                    raise BadRow(f"it needs 'index' and {' or '.join(map(repr, _VALUES))}")
                items = [(index, row[name])]
            for index, value in items:
                _put(found, str(index), value)
        except BadRow as error:
            if error.kind != "blank_line":
                raise UserError(f"{place}: {error}; mend or remove the line") from None
    if not found:
        raise UserError(f"{path} holds no difficulties")
    return found


def _put(found: dict[str, float], index: str, value: Any) -> None:
    number = number_of(value, f"the difficulty of index {index}")
    if found.setdefault(index, number) != number:
        raise BadRow(f"index {index} has another difficulty before: {found[index]:g}")
