"""Rows of a benchmark as a Markdown table."""

from collections.abc import Mapping, Sequence
from typing import Any


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line a row; columns are all keys, in the order they first appear."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  lines = [names, ["---"] * len(names)]
  lines += [[_text(row.get(name)) for name in names] for row in rows]
  return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _text(value: Any) -> str:
  if value is None:
    return ""
  return f"{value:.4g}" if isinstance(value, float) else str(value)
