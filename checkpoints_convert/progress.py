"""Progress of reads longer than two seconds: a bar on a terminal, elsewhere a line every half minute."""

import sys

import tqdm


def byte_bar(num_bytes: int, label: str, *, shown: bool = True) -> tqdm.tqdm:
  """A progress bar, as a context manager; `update` takes the bytes read since the last call."""
  interval = 0.1 if sys.stderr.isatty() else 30
  options = dict(unit="B", unit_scale=True, delay=2, mininterval=interval, maxinterval=interval, file=sys.stderr)
  return tqdm.tqdm(total=num_bytes, desc=label, disable=not shown, **options)
