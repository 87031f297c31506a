"""The one exception that a user, not a developer, is meant to read."""

import difflib
from collections.abc import Mapping

LONGEST = 4000  # characters of a message; names in files can be megabytes


class UserError(ValueError):
  """A mistake its reader can mend: wrong key, value, path, file or shape.

  The message is one line that names the field and the fix. Every command in
  launch/ prints it without a traceback and exits with code 2.
  """

  def __init__(self, message: object):
    super().__init__(one_line(message))


def one_line(message: object) -> str:
  """One printable line: names out of files may hold line breaks and escapes."""
  words = " ".join(str(message)[: 2 * LONGEST].split())
  if len(words) > LONGEST:
    words = words[:LONGEST] + "..."
  return "".join(c if c.isprintable() else "?" for c in words)


def choose(field: str, name: str, choices: Mapping):
  """`choices[name]`, or a UserError that lists the valid names."""
  if name in choices:
    return choices[name]
  close = difflib.get_close_matches(str(name), [str(k) for k in choices], 1)
  hint = f"; did you mean {close[0]!r}?" if close else ""
  raise UserError(
    f"{field}={name!r} is not one of {', '.join(map(str, choices))}{hint}"
  )
