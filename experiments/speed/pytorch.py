"""PyTorch's sides of the comparison, built on transformers' LLaVA.

- `transformers`: `generate` with scaled-dot-product attention, as its users run it.
- `authors`: HiMAP as its authors run it, on transformers' layers: attention maps of every layer, no cache, and the
  whole sequence pruned and run again for every new token; one sequence at a time. Image features are computed once.
- `authors_cache`: the same pruning once, scaled-dot-product attention except in the two scored layers, and decoding
  from the pruned cache.

Axes: B batch, S slots, N image tokens, D model dim.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicCache
from transformers.initialization import no_init_weights

from experiments.speed import side
from experiments.speed.side import NUM_SYSTEM_TOKENS, Job, Scenario, Side, Weights

PRUNE_LAYERS = (2, 8)
KEEP = (0.5, 0.125)
DTYPE = torch.bfloat16


class PyTorch(Side):
  """The shared part of the sides: the model, its inputs, and the tower.

  A side defines `_prefill`, the last token's logits of the embedded prompts, and `_times`, which runs a whole example
  and returns the time of each token.
  """

  def __init__(self, geometry: dict[str, Any], weights: pathlib.Path):
    self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = transformers.LlavaConfig(**{key: value for key, value in geometry.items() if key != "model_type"})
    with no_init_weights():
      model = transformers.LlavaForConditionalGeneration._from_config(config, dtype=DTYPE, attn_implementation="sdpa")
    file = Weights(weights)
    state = {name: self._values(name, tuple(value.shape), file) for name, value in model.state_dict().items()}
    if config.text_config.tie_word_embeddings:
      state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    self._model = model.to(self._device).eval()
    self.mapped_bytes = sum(value.nbytes for value in self._model.parameters() if value.ndim > 1)
    self.device = torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"
    self.parts = {
      "tower": lambda: (self._model.get_image_features(self._pixels), self._now()),
      "prefill": lambda: (self._prefill(), self._now()),
    }

  def _values(self, name: str, shape: tuple[int, ...], file: Weights) -> torch.Tensor:
    return torch.from_numpy(file.take(shape, name).view("uint16")).view(DTYPE)

  @torch.inference_mode()
  def prepare(self, scenario: Scenario) -> None:
    self.num_new_tokens = min(2, scenario.num_new_tokens)
    self._draw_inputs(scenario)
    self._embedded = self._embed()
    self.turn()
    self.num_new_tokens = scenario.num_new_tokens
    side.reset_peak_memory()

  def _draw_inputs(self, scenario: Scenario) -> None:
    config = self._model.config
    num_image_tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    shape = scenario.batch_size, scenario.num_text_tokens + num_image_tokens
    ids = torch.randint(2, config.text_config.vocab_size, shape, generator=generator)
    self._image = slice(NUM_SYSTEM_TOKENS, NUM_SYSTEM_TOKENS + num_image_tokens)
    ids[:, self._image] = config.image_token_id
    pixels = torch.randn(shape[0], 3, *[config.vision_config.image_size] * 2, generator=generator)
    self._ids, self._pixels = ids.to(self._device), pixels.to(self._device, DTYPE)

  turn = torch.inference_mode()(Side.turn)

  def example(self) -> float:
    times = self._times()
    return times[-1] - times[0]

  def accelerator_peak(self) -> int:
    return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else 0

  def _embed(self) -> torch.Tensor:
    embedded = self._model.get_input_embeddings()(self._ids)
    features = self._model.get_image_features(self._pixels).pooler_output
    embedded[:, self._image] = torch.stack(list(features))
    return embedded

  def _now(self) -> float:
    """The time when all pending work is done."""
    if self._device.type == "cuda":
      torch.cuda.synchronize()
    return time.perf_counter()


class Transformers(PyTorch):
  """No pruning, with transformers' own code."""

  def _prefill(self) -> torch.Tensor:
    return self._model(inputs_embeds=self._embedded, use_cache=True, logits_to_keep=1).logits

  def _times(self) -> list[float]:
    times = []

    def note(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # never stops
      times.append(self._now())
      return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    self._generate(self.num_new_tokens, stopping_criteria=[note])
    return times

  def _generate(self, num_new_tokens: int, **more: Any) -> None:
    self._model.generate(
      input_ids=self._ids,
      attention_mask=torch.ones_like(self._ids),
      pixel_values=self._pixels,
      max_new_tokens=num_new_tokens,
      min_new_tokens=num_new_tokens,
      do_sample=False,
      **more,
    )

  @torch.inference_mode()
  def job(self, job: Job) -> dict[str, float]:
    """In batches of `decode` rows, each of which is generated until its longest row ends."""
    self._draw_inputs(dataclasses.replace(job.scenario, batch_size=job.decode))
    start = self._now()
    for first in range(0, len(job.lengths), job.decode):
      lengths = job.lengths[first : first + job.decode]
      self._ids, self._pixels = self._ids[: len(lengths)], self._pixels[: len(lengths)]  # fewer in the last batch
      self._generate(max(lengths))
    return {"seconds": self._now() - start}


class Authors(PyTorch):
  """HiMAP's algorithm on transformers' layers."""

  def __init__(self, geometry: dict[str, Any], weights: pathlib.Path, *, with_cache: bool):
    super().__init__(geometry, weights)
    self._with_cache = with_cache
    self._decoder = self._model.model.language_model
    scored = {layer - 1 for layer in PRUNE_LAYERS} if with_cache else set(range(len(self._decoder.layers)))

    def note(module: torch.nn.Module, arguments: Any, output: tuple[torch.Tensor, torch.Tensor | None]) -> None:
      self._attention = output[1]

    for index, layer in enumerate(self._decoder.layers):
      layer.self_attn.config = type(layer.self_attn.config)(**layer.self_attn.config.to_dict())
      layer.self_attn.config._attn_implementation = "eager" if index in scored else "sdpa"
      layer.self_attn.register_forward_hook(note)

  def prepare(self, scenario: Scenario) -> None:
    if scenario.batch_size > 1 and not self._with_cache:
      raise NotImplementedError("one sequence at a time")
    super().prepare(scenario)

  def _prefill(self) -> torch.Tensor:
    return self._run(self._embedded, DynamicCache() if self._with_cache else None)

  def _times(self) -> list[float]:
    embedded, times = self._embed(), []
    cache = DynamicCache() if self._with_cache else None
    logits = self._run(embedded, cache)
    while True:
      token = logits.argmax(-1)
      times.append(self._now())
      if len(times) == self.num_new_tokens:
        return times
      new = self._model.get_input_embeddings()(token)[:, None]
      embedded = torch.cat([embedded, new], 1) if cache is None else embedded
      logits = self._run(embedded, None) if cache is None else self._extend(new, cache, len(times))

  def _extend(self, hidden: torch.Tensor, cache: DynamicCache, num_new: int) -> torch.Tensor:
    position = self._ids.shape[1] + num_new - 1
    positions = torch.full((len(hidden), 1), position, device=self._device)
    rotary = self._decoder.rotary_emb(hidden, position_ids=positions)
    for layer in self._decoder.layers:
      hidden = layer(hidden, past_key_values=cache, position_embeddings=rotary)
    return self._model.lm_head(self._decoder.norm(hidden))[:, -1]

  def _run(self, hidden: torch.Tensor, cache: DynamicCache | None) -> torch.Tensor:
    """Logits after the last token of embedded prompts, with pruning on the way."""
    causal_mask = functools.cache(self._causal_mask)  # once per length and pass, as in transformers
    image = self._image
    keep = [int(share * (image.stop - image.start)) for share in KEEP]
    positions = torch.arange(hidden.shape[1], device=self._device)[None].expand(len(hidden), -1)
    rotary = self._decoder.rotary_emb(hidden, position_ids=positions)
    for index, layer in enumerate(self._decoder.layers):
      if index in PRUNE_LAYERS:
        stage = PRUNE_LAYERS.index(index)
        rows = slice(image.stop, None) if stage == 0 else image
        score = self._attention.mean(1)[:, rows, image].sum(1)
        kept = image.start + score.topk(keep[stage], dim=-1).indices.sort(dim=-1).values
        slots = torch.arange(hidden.shape[1], device=self._device).expand(len(hidden), -1)
        slots = torch.cat([slots[:, : image.start], kept, slots[:, image.stop :]], 1)
        hidden = hidden.gather(1, slots[:, :, None].expand(-1, -1, hidden.shape[2]))
        positions, image = positions.gather(1, slots), slice(image.start, image.start + keep[stage])
        rotary = self._decoder.rotary_emb(hidden, position_ids=positions)
      is_eager = layer.self_attn.config._attn_implementation == "eager"
      mask = causal_mask(hidden.shape[1]) if is_eager else None
      hidden = layer(hidden, attention_mask=mask, past_key_values=cache, position_embeddings=rotary)
    return self._model.lm_head(self._decoder.norm(hidden[:, -1:]))[:, -1]

  def _causal_mask(self, num_slots: int) -> torch.Tensor:
    full = torch.full((num_slots, num_slots), torch.finfo(DTYPE).min, dtype=DTYPE, device=self._device)
    return full.triu(1)[None, None]
