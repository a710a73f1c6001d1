"""What difference between methods a number of questions can show."""

from collections.abc import Sequence

from experiments.compare.comparison import controls
from experiments.compare.grid import Cell
from experiments.shared.statistics import POWER, smallest_difference
from himap_jax.errors import UserError


def power(num_questions: int, cells: Sequence[Cell], disagreement: float, least_difference: float | None) -> str:
  """Says what difference the questions can show, as if random tokens had one seed, which is cautious.

  Args:
    disagreement: the share of questions that is answered right by only one of two methods.
    least_difference: points.

  Raises:
    UserError: the difference with correction is more than `least_difference`.
  """
  comparisons = max(1, sum(label != control for label, control in controls(cells).items()))
  one, all_ = (smallest_difference(num_questions, disagreement, comparisons=n) for n in (1, comparisons))
  text = (
    f"{num_questions} questions, of which {disagreement:.0%} are answered right by only one of two methods, show "
    f"a difference of {100 * one:.1f} points with a power of {POWER:.0%} in a single test, and one of "
    f"{100 * all_:.1f} points corrected for {comparisons} comparisons"
  )
  if least_difference is not None and 100 * all_ > least_difference:
    raise UserError(f"{text}; the requested limit is {least_difference:g} points: take more questions")
  return text
