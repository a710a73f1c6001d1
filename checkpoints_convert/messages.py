"""Errors and lists, shortened for messages."""

NUM_SHOWN = 4  # items of a list


def first_line(error: Exception) -> str:
  """The first line of an error's message, with the next where it ends in a colon; its type if the message is empty."""
  first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
  return f"{first} {others[0]}" if first.endswith(":") and others else first


def some(items: list[str] | tuple[str, ...]) -> str:
  """The first few of `items`, for a message."""
  return ", ".join(items[:NUM_SHOWN]) + (", …" if len(items) > NUM_SHOWN else "")
