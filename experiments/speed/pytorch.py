"""PyTorch's sides of a comparison, over transformers' own LLaVA.

- `transformers`: `generate` with scaled-dot-product attention, as its users run it.
- `authors`: HiMAP as its authors run it, over transformers' layers: attention maps of every layer, no cache, every new token
  by pruning and running the whole sequence again; one sequence at a time. Image features are computed once.
- `authors_cache`: the same pruning once, scaled-dot-product attention but in the two layers that are scored, and decoding
  from the pruned cache.

Axes: B batch, S slots, N image tokens, D model dim.
"""

import pathlib
import time
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicCache
from transformers.initialization import no_init_weights

from experiments.speed import side
from experiments.speed.side import NUM_SYSTEM_TOKENS, Scenario
from experiments.speed.weights import Weights

PRUNE_LAYERS = (2, 8)
KEEP = (0.5, 0.125)
DTYPE = torch.bfloat16


class PyTorch:
  """What the sides share: the model, its inputs, and the tower.

  A side has `_prefill`, the last token's logits of the embedded prompts, and `_example`, which runs a whole example and returns
  the time when each token was there.
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
    self._mapped_bytes = sum(value.nbytes for value in self._model.parameters() if value.ndim > 1)
    self.device = torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu"

  def _values(self, name: str, shape: tuple[int, ...], file: Weights) -> torch.Tensor:
    if len(shape) < 2:
      return torch.full(shape, float(not name.endswith("bias")), dtype=DTYPE)
    return torch.from_numpy(file.take(shape).view("uint16")).view(DTYPE)

  @torch.inference_mode()
  def prepare(self, scenario: Scenario) -> None:
    """Makes the inputs of a scenario and runs it once, for two tokens at most."""
    self._num_new_tokens = min(2, scenario.num_new_tokens)
    vision = self._model.config.vision_config
    num_image_tokens = (vision.image_size // vision.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    num_slots = scenario.num_text_tokens + num_image_tokens
    ids = torch.randint(
      2, self._model.config.text_config.vocab_size, (scenario.batch_size, num_slots), generator=generator
    )
    self._image = slice(NUM_SYSTEM_TOKENS, NUM_SYSTEM_TOKENS + num_image_tokens)
    ids[:, self._image] = self._model.config.image_token_id
    pixels = torch.randn(scenario.batch_size, 3, vision.image_size, vision.image_size, generator=generator)
    self._ids, self._pixels = ids.to(self._device), pixels.to(self._device, DTYPE)
    self._embedded = self._embed()
    self.turn()
    self._num_new_tokens = scenario.num_new_tokens
    side.reset_peak_memory()

  @torch.inference_mode()
  def turn(self) -> dict[str, float]:
    """Runs a whole example; where it is one token, the tower and the prefill after it alone too."""

    def example() -> float:
      times = self._example()
      return times[-1] - times[0]

    parts = {
      "tower": lambda: self._wait(self._model.get_image_features(self._pixels)),
      "prefill": lambda: self._wait(self._prefill()),
    }
    return side.figures(parts, example, self._num_new_tokens)

  def accounting(self) -> dict[str, float]:
    """Nothing: there are no programs to look into."""
    return {}

  def peak_bytes(self) -> int:
    """Of the accelerator, or of the process where there is none."""
    return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else side.peak_memory(self._mapped_bytes)

  def _embed(self) -> torch.Tensor:
    """Embeds the prompts, `[B, S, D]`."""
    embedded = self._model.get_input_embeddings()(self._ids)
    features = self._model.get_image_features(self._pixels).pooler_output
    embedded[:, self._image] = torch.stack(list(features))
    return embedded

  def _now(self) -> float:
    """The time when all that was begun is done."""
    self._wait(None)
    return time.perf_counter()

  def _wait(self, _: Any) -> None:
    if self._device.type == "cuda":
      torch.cuda.synchronize()


class Transformers(PyTorch):
  """No pruning, by transformers' own code."""

  def _prefill(self) -> torch.Tensor:
    return self._model(inputs_embeds=self._embedded, use_cache=True, logits_to_keep=1).logits

  def _example(self) -> list[float]:
    times = []

    def note(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # stops nothing
      times.append(self._now())
      return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    self._model.generate(
      input_ids=self._ids,
      attention_mask=torch.ones_like(self._ids),
      pixel_values=self._pixels,
      max_new_tokens=self._num_new_tokens,
      min_new_tokens=self._num_new_tokens,
      do_sample=False,
      stopping_criteria=[note],
    )
    return times


class Authors(PyTorch):
  """HiMAP's algorithm over transformers' layers."""

  def __init__(self, geometry: dict[str, Any], weights: pathlib.Path, *, with_cache: bool):
    super().__init__(geometry, weights)
    self._with_cache = with_cache
    self._masks: dict[int, torch.Tensor] = {}
    self._decoder = self._model.model.language_model
    scored = {layer - 1 for layer in PRUNE_LAYERS} if with_cache else set(range(len(self._decoder.layers)))
    for index, layer in enumerate(self._decoder.layers):
      layer.self_attn.config = type(layer.self_attn.config)(**layer.self_attn.config.to_dict())
      layer.self_attn.config._attn_implementation = "eager" if index in scored else "sdpa"

  def prepare(self, scenario: Scenario) -> None:
    if scenario.batch_size > 1 and not self._with_cache:
      raise NotImplementedError("one sequence at a time")
    super().prepare(scenario)

  def _prefill(self) -> torch.Tensor:
    return self._run(self._embedded, DynamicCache() if self._with_cache else None)

  def _example(self) -> list[float]:
    embedded, times = self._embed(), []
    cache = DynamicCache() if self._with_cache else None
    logits = self._run(embedded, cache)
    while True:
      token = logits.argmax(-1)
      times.append(self._now())
      if len(times) == self._num_new_tokens:
        return times
      new = self._model.get_input_embeddings()(token)[:, None]
      embedded = torch.cat([embedded, new], 1) if cache is None else embedded
      logits = self._run(embedded, None) if cache is None else self._extend(new, cache, len(times))

  def _extend(self, hidden: torch.Tensor, cache: DynamicCache, num_new: int) -> torch.Tensor:
    """Logits after one new token."""
    position = self._ids.shape[1] + num_new - 1
    positions = torch.full((len(hidden), 1), position, device=self._device)
    rotary = self._decoder.rotary_emb(hidden, position_ids=positions)
    for layer in self._decoder.layers:
      hidden = layer(hidden, past_key_values=cache, position_embeddings=rotary)
    return self._model.lm_head(self._decoder.norm(hidden))[:, -1]

  def _run(self, hidden: torch.Tensor, cache: DynamicCache | None) -> torch.Tensor:
    """Logits after the last token of embedded prompts, pruning on the way."""
    self._masks.clear()
    first, num_image = self._image.start, self._image.stop - self._image.start
    keep = [int(share * num_image) for share in KEEP]
    positions = torch.arange(hidden.shape[1], device=self._device)[None].expand(len(hidden), -1)
    rotary = self._decoder.rotary_emb(hidden, position_ids=positions)
    attention = None
    for index, layer in enumerate(self._decoder.layers):
      if index in PRUNE_LAYERS:
        stage = PRUNE_LAYERS.index(index)
        image = slice(first, first + num_image)
        rows = slice(image.stop, None) if stage == 0 else image
        score = attention.mean(1)[:, rows, image].sum(1)
        kept = first + score.topk(keep[stage], dim=-1).indices.sort(dim=-1).values
        before = torch.arange(first, device=self._device).expand(len(hidden), -1)
        after = torch.arange(image.stop, hidden.shape[1], device=self._device).expand(len(hidden), -1)
        slots = torch.cat([before, kept, after], 1)
        hidden = hidden.gather(1, slots[:, :, None].expand(-1, -1, hidden.shape[2]))
        positions, num_image = positions.gather(1, slots), keep[stage]
        rotary = self._decoder.rotary_emb(hidden, position_ids=positions)
      hidden, attention = self._layer(layer, hidden, rotary, cache)
    return self._model.lm_head(self._decoder.norm(hidden[:, -1:]))[:, -1]

  def _causal_mask(self, num_slots: int) -> torch.Tensor:
    """What is added to the logits of an eager layer; made once for a length and a pass, as transformers does."""
    if num_slots not in self._masks:
      full = torch.full((num_slots, num_slots), torch.finfo(DTYPE).min, dtype=DTYPE, device=self._device)
      self._masks[num_slots] = full.triu(1)[None, None]
    return self._masks[num_slots]

  def _layer(
    self, layer: torch.nn.Module, hidden: torch.Tensor, rotary: Any, cache: DynamicCache | None
  ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer's output and, where it is eager, its attention map."""
    maps: list[torch.Tensor | None] = []
    hook = layer.self_attn.register_forward_hook(lambda module, arguments, output: maps.append(output[1]))
    is_eager = layer.self_attn.config._attn_implementation == "eager"
    mask = self._causal_mask(hidden.shape[1]) if is_eager else None
    hidden = layer(hidden, attention_mask=mask, past_key_values=cache, position_embeddings=rotary)
    hook.remove()
    return hidden, maps[0]
