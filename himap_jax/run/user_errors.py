"""Errors of the system that a user can mend, as `UserError`."""

import contextlib
from collections.abc import Callable, Iterator

import jax
from absl import flags

from himap_jax.engine.capacity import is_out_of_memory
from himap_jax.errors import UserError


@contextlib.contextmanager
def user_error(what: str) -> Iterator[None]:
  """Turns an OSError about a user's path into a UserError that says what was tried and why it failed."""
  try:
    yield
  except OSError as error:
    raise UserError(f"{what}: {error.strerror or error}") from error


@contextlib.contextmanager
def out_of_memory_is_user_error(what: Callable[[], str] = lambda: "the weights") -> Iterator[None]:
  """Turns JAX's out-of-memory error into a UserError that says what did not fit and names remedies."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if not is_out_of_memory(error):
      raise
    known = [f"--{name}" for name in ("batch_size", "prefill_batch_size", "max_image_tokens") if name in flags.FLAGS]
    raise UserError(
      f"the devices have too little memory for {what()} ({str(error).splitlines()[0]}); use a smaller {', '.join(known)}, "
      "--int8_weights, or a --mesh that shards the weights over more devices, such as "
      "--mesh=data:1,tensor:4"
    ) from error
