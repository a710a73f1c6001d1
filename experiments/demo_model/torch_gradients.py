"""The loss of a training step and its gradients in PyTorch, for CPUs with AMX, which XLA does not use.

The model is transformers' own LLaVA, read from the assembled checkpoint; the optimizer and the trained parameters stay
in JAX. Both give the same gradients but for rounding.

Axes: B images, S slots, H heads, N heads of keys and values, D dim of a head, A answer tokens, V vocabulary.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Array, Float
from torch.nn import functional
from transformers import AttentionInterface, LlavaForConditionalGeneration

from experiments.demo_model.adapter import LORA_SCALE, PROJECTOR, Adapter, Weights, checkpoint_name
from experiments.demo_model.packing import Batch

BLOCK = 256  # queries whose products with the keys up to the last of them are computed at once

_ATTENTION = "blocks_of_queries"
_TRANSFORMERS_PARTS = {"language_model": "model.language_model", PROJECTOR: f"model.{PROJECTOR}"}


class TorchGradients:
  """Calling it gives the loss, the share of right tokens, and the gradients of an adapter without cross-attention.

  Args:
    base: folder of the checkpoint without an adapter.
    adapter: one of the shapes to be trained.
    dtype: name of the model's dtype, in which low-rank updates are applied too.
    compiled: whether layers are compiled, which takes a minute and makes steps faster.
  """

  def __init__(self, base: pathlib.Path, adapter: Adapter, *, dtype: str, compiled: bool = True):
    AttentionInterface.register(_ATTENTION, _attend)
    model = LlavaForConditionalGeneration.from_pretrained(
      base,
      dtype=getattr(torch, dtype),
      attn_implementation={"text_config": _ATTENTION, "vision_config": "sdpa"},
      local_files_only=True,
    )
    self._model = model.eval().requires_grad_(False)
    self._projector = {
      path: {name: getattr(self._module(f"{PROJECTOR}/{path}"), name).requires_grad_() for name in leaves}
      for path, leaves in adapter.projector.items()
    }
    self._lora: dict[str, dict[str, torch.Tensor]] = {}
    for path, leaves in adapter.lora.items():
      own = {name: torch.zeros(leaf.shape, dtype=model.dtype, requires_grad=True) for name, leaf in leaves.items()}
      self._lora[path] = own
      self._module(path).register_forward_hook(_lora_hook(own))
    if compiled:
      for layer in [*model.model.language_model.layers, *model.model.vision_tower.encoder.layer]:
        layer.compile(dynamic=False)

  def __call__(self, adapter: Adapter, batch: Batch) -> tuple[Array, Array, Adapter]:
    for own, weights in ((self._projector, adapter.projector), (self._lora, adapter.lora)):
      for path, leaves in weights.items():
        for name, leaf in leaves.items():
          own[path][name].grad = None
          own[path][name].data.copy_(_tensor(leaf))
    logits = self._answer_logits(batch)
    answers, weight = _tensor(batch.answers).long(), _tensor(batch.answer_valid).float()
    losses = functional.cross_entropy(logits.float().flatten(0, 1), answers.flatten(), reduction="none")
    loss = (losses * weight.flatten()).sum() / weight.sum()
    right = ((logits.argmax(-1) == answers) * weight).sum() / weight.sum()
    loss.backward()
    return jnp.float32(loss.item()), jnp.float32(right.item()), Adapter(_grads(self._projector), _grads(self._lora))

  def _answer_logits(self, batch: Batch) -> Float[torch.Tensor, "B A V"]:
    model, inputs = self._model.model, batch.inputs
    pixels = _tensor(inputs.images.pixels).flatten(0, 1).to(self._model.dtype)
    states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = [states[layer][:, 1:] for layer in np.atleast_1d(self._model.config.vision_feature_layer)]
    is_image = _tensor(inputs.layout.image_id) >= 0
    x = model.get_input_embeddings()(_tensor(inputs.tokens).long().masked_fill(is_image, 0))
    x = x.masked_scatter(is_image[..., None], model.multi_modal_projector(torch.cat(features, -1)))
    allowed = _tensor(batch.mask()) & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape, dtype=x.dtype).masked_fill(~allowed, -torch.inf)
    positions = _tensor(inputs.positions).long()
    x = model.language_model(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False)[0]
    slots = _tensor(batch.answer_slots).long()[..., None].expand(-1, -1, x.shape[-1])
    return self._model.lm_head(x.gather(1, slots))

  def _module(self, path: str) -> torch.nn.Module:
    part, _, rest = checkpoint_name(path).partition(".")
    return self._model.get_submodule(f"{_TRANSFORMERS_PARTS[part]}.{rest}")


def _attend(
  module: torch.nn.Module,
  q: Float[torch.Tensor, "B H S D"],
  k: Float[torch.Tensor, "B N S D"],
  v: Float[torch.Tensor, "B N S D"],
  attention_mask: Float[torch.Tensor, "B 1 S S"],
  scaling: float,
  **kwargs: Any,
) -> tuple[Float[torch.Tensor, "B S H D"], None]:
  """Causal attention in blocks of queries; the mask is added."""
  del module, kwargs
  length, groups = q.shape[2], (q.shape[1] // k.shape[1], -1)
  q, outputs = q.unflatten(1, (k.shape[1], -1)), []
  for start in range(0, length, BLOCK):
    stop = min(start + BLOCK, length)
    scores = q[..., start:stop, :].flatten(2, 3) @ k[:, :, :stop].transpose(-1, -2)
    scores = scores.unflatten(2, groups) * scaling + attention_mask[:, :, None, start:stop, :stop]
    weights = torch.softmax(scores.float(), -1).to(q.dtype)
    outputs.append((weights.flatten(2, 3) @ v[:, :, :stop]).unflatten(2, groups))
  return torch.cat(outputs, 3).flatten(1, 2).transpose(1, 2).contiguous(), None


def _lora_hook(own: dict[str, torch.Tensor]) -> Callable[..., torch.Tensor]:
  def add(module: torch.nn.Module, args: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    del module
    return y + LORA_SCALE * functional.linear(functional.linear(args[0], own["a"]), own["b"])

  return add


def _tensor(x: Array) -> torch.Tensor:
  return torch.from_numpy(np.array(x))


def _grads(weights: dict[str, dict[str, torch.Tensor]]) -> Weights:
  return {
    path: {name: jnp.asarray(leaf.grad.float().numpy()) for name, leaf in leaves.items()}
    for path, leaves in weights.items()
  }
