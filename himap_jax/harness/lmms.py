"""The model that lmms-eval runs, without a fork:

    python -m lmms_eval --model himap_jax --tasks textvqa_val --batch_size 8 \\
      --model_args checkpoint=…,method=himap,prune_layers=2:8,keep=288:72

It needs lmms-eval, and hence torch, which computes nothing here.
"""

from collections.abc import Callable, Sequence
from typing import Any

from absl import logging
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from himap_jax.engine.engine import GenerationConfig
from himap_jax.engine.sampling import Sampling
from himap_jax.errors import UserError
from himap_jax.harness.responder import Continuation, Question, Responder
from himap_jax.harness.settings import Settings


class HarnessModel(lmms):
  """A responder as an lmms-eval model of the `simple` kind."""

  is_simple = True

  def __init__(self, responder: Responder):
    super().__init__()
    self._responder, self._settings = responder, responder.settings

  def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
    """Answers in the order of the requests; one that cannot be prepared is empty."""
    results = [GenerationResult("", TokenCounts(output_tokens=0)) for _ in requests]
    for question, answer in self._responder.answers(list(map(self._question, range(len(requests)), requests))):
      results[question.place] = GenerationResult(answer.text, TokenCounts(output_tokens=answer.num_tokens))
    return results

  def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
    """The mean negative log-likelihood of a token of every continuation, and whether the model would say it.

    lmms-eval takes the lowest of several choices, since most of its models return a loss. One that cannot be prepared is
    infinite.

    Returns:
      The pairs as results of generation, since lmms-eval makes text of all others.
    """
    results = [GenerationResult((float("inf"), False))] * len(requests)
    for continuation, loss in self._responder.losses(list(map(self._continuation, range(len(requests)), requests))):
      results[continuation.place] = GenerationResult(tuple(loss))
    return results

  def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
    raise UserError("tasks of several rounds are not supported")

  def _question(self, place: int, request: Any) -> Question:
    context, settings, doc_to_visual, doc_id, task, split = request.args
    sampling = Sampling()
    if settings.get("do_sample") and settings.get("temperature"):
      sampling = Sampling(float(settings["temperature"]), float(settings.get("top_p") or 1.0))
    if (settings.get("num_beams") or 1) > 1:
      logging.log_first_n(logging.WARNING, "beam search is not supported; answers are greedy", 1)
    max_new_tokens = int(settings.get("max_new_tokens") or self._settings.max_new_tokens)
    until = settings.get("until") or []
    stops = (until,) if isinstance(until, str) else tuple(until)
    generation = GenerationConfig(max_new_tokens, sampling, self._settings.seed)
    return Question(place, context, self._pictures(doc_to_visual, task, split, doc_id), generation, stops)

  def _continuation(self, place: int, request: Any) -> Continuation:
    context, target, *more = request.args
    if not more:  # a continuation without a prompt
      return Continuation(place, context, list, str(target), context)
    doc_to_visual, doc_id, task, split = more
    if callable(target):
      target = target(self.task_dict[task][split][doc_id])
    pictures = self._pictures(doc_to_visual, task, split, doc_id)
    return Continuation(place, context, pictures, str(target), (context, doc_id, task, split))

  def _pictures(self, doc_to_visual: Callable, task: str, split: str, doc_id: int) -> Callable[[], list]:
    return lambda: list(doc_to_visual(self.task_dict[task][split][doc_id]) or [])


class HimapJax(HarnessModel):
  """A checkpoint with a pruning method."""

  def __init__(self, batch_size: int | str = 1, device: str | None = None, max_batch_size: Any = None, **given: Any):
    """Loads the checkpoint; `given` are `Settings`, and JAX chooses the devices. Raises `UserError`."""
    del device, max_batch_size
    super().__init__(Responder.load(Settings.of(given | {"batch_size": batch_size})))
