"""What the page shows of a comparison: a table, and pictures of the patches that every layer sees."""

from collections.abc import Callable

from PIL import Image

from himap_jax.demo.comparing import Comparison, Side, Span
from himap_jax.run import drawing

WIDTH = 480  # pixels that a picture has at least
MEASURES: tuple[tuple[str, Callable[[Side], float], str, float], ...] = (
  ("prefill, ms", lambda side: side.prefill_seconds, ",.4g", 1e3),
  ("decode, ms a token", lambda side: side.decode_seconds / max(side.num_new_tokens - 1, 1), ",.4g", 1e3),
  ("FLOPs of prefill, G", lambda side: side.costs.prefill, ",.4g", 1e-9),
  ("FLOPs on image tokens, G", lambda side: side.costs.image_tokens, ",.4g", 1e-9),
  ("KV cache, MB", lambda side: side.costs.cache_bytes, ",.4g", 1e-6),
  ("image tokens left", lambda side: side.image_tokens[-1], ",", 1),
)


def table(comparison: Comparison) -> str:
  """Times and costs of both answers, in Markdown."""
  plain, pruned = comparison.plain, comparison.pruned
  lines = ["| | without pruning | with pruning | share |", "|---|--:|--:|--:|"]
  for name, of, form, unit in MEASURES:
    one, other = of(plain), of(pruned)
    share = f"{other / one:.0%}" if one else ""
    lines.append(f"| {name} | {one * unit:{form}} | {other * unit:{form}} | **{share}** |")
  seconds = plain.compile_seconds + pruned.compile_seconds
  note = f"Compiled first, in {seconds:.1f} s; times are of a second run." if seconds else "Compiled before."
  return "\n".join([*lines, "", note])


def panels(comparison: Comparison) -> list[tuple[Image.Image, str]]:
  """A picture for each span of layers, with what it shows; none if the image tokens form no grid."""
  if not comparison.views:
    return []
  total = comparison.spans[0].num_image_tokens
  return [
    (_panel(comparison, number), f"{_name(span)}: {span.num_image_tokens} of {total} image tokens")
    for number, span in enumerate(comparison.spans)
  ]


def _panel(comparison: Comparison, num_stages: int) -> Image.Image:
  """The views beside each other, as layers after so many stages see them."""
  painted = []
  for view in comparison.views:
    factor = max(1, -(-WIDTH // view.picture.width))
    large = view.picture.resize((factor * view.picture.width, factor * view.picture.height))
    painted.append(drawing.paint(large, drawing.overlay(view, comparison.kept, comparison.ranks, num_stages)))
  width = sum(picture.width + drawing.MARGIN for picture in painted) - drawing.MARGIN
  sheet = Image.new("RGB", (width, max(picture.height for picture in painted)), "white")
  left = 0
  for picture in painted:
    sheet.paste(picture, (left, 0))
    left += picture.width + drawing.MARGIN
  return sheet


def _name(span: Span) -> str:
  if span.first == span.last:
    return "before the decoder"
  return f"layer {span.first}" if span.last - span.first == 1 else f"layers {span.first}–{span.last - 1}"


def legend(comparison: Comparison) -> str:
  """What the colours of the pictures mean, in HTML."""
  if not comparison.views:
    return "This model's image tokens are no patches on a grid, so none are drawn."
  return " ".join(
    f'<span style="white-space: nowrap"><span style="color: #{bytes(colour).hex()}">■</span> {name}</span>'
    for colour, name in drawing.legend(comparison.ranks)
  )
