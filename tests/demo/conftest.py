"""A tiny model that answers with 11 tokens, and its page."""

import threading

import pytest
from served import LIMITS, NAME, SETTING

import himap_jax
from himap_jax.demo.server import ExamplePicture, Page
from himap_jax.generation import InputConfig
from himap_jax.run.asking import Asker
from himap_jax.run.model_flags import AnswerConfig


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
def page(asker, files):
  """The server, at a free port."""
  example = ExamplePicture(files[0].read_bytes(), "image/png", ("what is it?", "why?"))
  with Page(("127.0.0.1", 0), asker, [example], LIMITS) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
