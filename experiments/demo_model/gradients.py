"""The loss of a training step and its gradients in JAX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from experiments.demo_model.adapter import Adapter, answer_logits
from experiments.demo_model.packing import Batch
from himap_jax.model.network import Model

# The loss, the share of right tokens and the gradients of an adapter.
Gradients = Callable[[Adapter, Batch], tuple[Float[Array, ""], Float[Array, ""], Adapter]]


def jax_gradients(model: Model) -> Gradients:
  """The gradients of an adapter, with the projector of features as they are."""

  def loss_fn(adapter: Adapter, model: Model, batch: Batch) -> tuple[Array, Array]:
    logits = answer_logits(model.replace(params=adapter.params(model.params)), adapter.lora, batch)
    weight = batch.answer_valid.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.answers)
    right = (logits.argmax(-1) == batch.answers).astype(jnp.float32)
    return (loss * weight).sum() / weight.sum(), (right * weight).sum() / weight.sum()

  value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))

  def gradients(adapter: Adapter, batch: Batch) -> tuple[Array, Array, Adapter]:
    (loss, right), grads = value_and_grad(adapter, model, batch)
    return loss, right, grads

  return gradients
