"""The table at the end of a run."""

from rich.console import Console
from rich.table import Table

from himap_jax import flops
from himap_jax.adaptive import Ladder
from himap_jax.adaptive_generation import AdaptiveGenerator
from himap_jax.config import LlavaConfig
from himap_jax.generation import Generator
from himap_jax.inference import Summary
from himap_jax.processing import Processor
from himap_jax.schedule import Schedule


def print_summary(
  summary: Summary,
  generator: Generator | AdaptiveGenerator,
  schedule: Schedule | Ladder,
  config: LlavaConfig,
  processor: Processor,
  *,
  method: str,
  num_devices: int,
) -> None:
  """Prints rows, errors, times, rates, device-hours, image tokens per stage and FLOPs against no pruning."""
  table = Table(show_header=False)
  rows = f"{summary.num_answered} answered, {summary.num_errors} errors, {summary.num_skipped} answered before"
  table.add_row("rows", rows)
  if summary.num_answered:
    table.add_row(
      "prefill", f"{summary.prefill_seconds:.2f} s ({summary.num_answered / summary.prefill_seconds:.2f} rows/s)"
    )
    table.add_row(
      "decode",
      f"{summary.decode_seconds:.2f} s ({summary.num_new_tokens / summary.decode_seconds:.1f} tokens/s, "
      f"{summary.num_new_tokens} tokens)",
    )
    running = summary.seconds - generator.compile_seconds
    hours = running * num_devices / summary.num_answered * 1e6 / 3600
    table.add_row(
      "in all",
      f"{running:.2f} s without compilation ({summary.num_answered / running:.2f} rows/s; {hours:,.1f} device-hours for a "
      "million rows)",
    )
  table.add_row("compilation", f"{generator.compile_seconds:.2f} s, {generator.num_programs} programs")
  table.add_row("method", method)
  if isinstance(schedule, Ladder):
    for number, rung in enumerate(schedule.rungs):
      table.add_row(f"image tokens of {summary.num_by_rung[number]} rows", _image_tokens(rung, processor))
    run = [(rung, summary.num_by_rung[number]) for number, rung in enumerate(schedule.rungs)]
  else:
    table.add_row("image tokens", _image_tokens(schedule, processor))
    run = [(schedule, summary.num_answered)]
  num_image_tokens = processor.num_image_tokens
  plain = flops.image_token_flops(config.text, Schedule(), num_image_tokens)
  for one, count in run:
    if count or len(run) == 1:
      share = flops.image_token_flops(config.text, one, num_image_tokens) / plain
      of_rows = f" of {count} rows" if len(run) > 1 else ""
      table.add_row(f"FLOPs on image tokens (HiMAP Eq. 10){of_rows}", f"{share:.1%} of no pruning")
  if summary.num_answered:
    text = round(summary.num_text_tokens / summary.num_answered)
    plain = flops.costs(config, Schedule(), num_image_tokens, text)
    pruned = [(flops.costs(config, one, num_image_tokens, text), count / summary.num_answered) for one, count in run]
    decoder, scoring, prefill, cache = (
      sum(getattr(costs, name) * weight for costs, weight in pruned)
      for name in ("decoder", "scoring", "prefill", "cache_bytes")
    )
    table.add_row(f"FLOPs on all tokens ({text} text tokens)", f"{decoder / plain.decoder:.1%} of no pruning")
    table.add_row("FLOPs of choosing tokens", f"{scoring / prefill:.2%} of this prefill")
    table.add_row("cache", f"{cache / plain.cache_bytes:.1%} of no pruning")
  Console().print(table)


def _image_tokens(schedule: Schedule, processor: Processor) -> str:
  counts = [f"{processor.num_image_tokens}"]
  counts += [f"{stage.keep} from layer {stage.layer} on" for stage in schedule.stages]
  counts += [f"not updated in {len(schedule.frozen_layers)} layers"] if schedule.frozen_layers else []
  return ", ".join(counts)
