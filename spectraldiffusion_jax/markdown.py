"""Tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """A head and its lines of cells, all text."""
  rows = [head, ["---"] * len(head), *lines]
  return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def records(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line a record; columns are all keys, in the order they first appear."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  return table(
    names, [[_text(row.get(name)) for name in names] for row in rows]
  )


def _text(value: Any) -> str:
  if value is None:
    return ""
  return f"{value:.4g}" if isinstance(value, float) else str(value)
