"""A tiny model that answers with 11 tokens, and its page, whose Gradio takes seconds to import."""

import asyncio
import gc
import warnings

import pytest
from served import NAME, SETTING

import himap_jax
from himap_jax.generation import InputConfig
from himap_jax.run.asking import Asker
from himap_jax.run.config import AnswerConfig


@pytest.fixture(scope="session")
def asker(checkpoints):
  return Asker.open(
    AnswerConfig(
      checkpoint=str(checkpoints(NAME).directory),
      pruning=himap_jax.PruningConfig(*SETTING),
      generation=himap_jax.GenerationConfig(11, ignore_eos=True),
      inputs=InputConfig(prompt_template="<image>{question}", prompt_buckets=(32,), batch_size=1),
      dtype="float32",
    )
  )


@pytest.fixture(scope="session")
def answers(asker, loaded):
  """Returns `answer(picture, question, *setting)`, of the library."""
  model, config = loaded(NAME), asker.config

  def answer(picture, question, *setting):
    schedule = model.schedule(*setting)
    own = {"schedule": schedule, "generation": config.generation, "inputs": config.inputs}
    return himap_jax.generate(model, [picture], [question], **own)[0]

  return answer


@pytest.fixture(scope="session")
def files(tmp_path_factory, images):
  """The pictures as files."""
  folder = tmp_path_factory.mktemp("pictures")
  for index, image in enumerate(images):
    image.save(folder / f"{index}.png")
  return [folder / f"{index}.png" for index in range(len(images))]


@pytest.fixture(scope="session")
def limits():
  """What visitors may ask for."""
  from himap_jax.demo.page import Limits

  return Limits(picture_bytes=100_000, picture_pixels=10_000, waiting=4)


@pytest.fixture(scope="module")
def page(asker, files, limits):
  """The URL of the page, at a free port."""
  from himap_jax.demo.page import serve

  with serve(("127.0.0.1", 0), asker, [(str(files[0]), "what is it?"), (str(files[2]), "why?")], limits) as url:
    yield url


@pytest.fixture(scope="module", autouse=True)
def without_event_loops():
  """Collects at the end those that Gradio makes and leaves open, without their warnings."""
  yield
  asyncio.set_event_loop_policy(None)
  with warnings.catch_warnings(action="ignore"):
    gc.collect()
