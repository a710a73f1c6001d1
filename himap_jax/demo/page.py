"""The page, in Gradio: controls become the flags of himap_jax.run, and a question is answered with and without them.

The text of the flags is what is asked with. Controls write it, and what is pasted there sets them.
"""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import gradio as gr
from gradio.utils import get_upload_folder, is_in_or_equal

from himap_jax.demo import choices, results
from himap_jax.demo.comparing import compare
from himap_jax.errors import UserError
from himap_jax.pruning.config import PruningConfig
from himap_jax.run import pruning_flags
from himap_jax.run.asking import Asker
from himap_jax.run.pictures import PictureFiles
from himap_jax.run.user_errors import user_error

MAX_STAGES_WITH_SLIDERS = 8
UPLOAD_LIFETIME = 3600  # seconds
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # of the visitor's system
TITLE = "One question, with and without pruning"
ABOUT = (
  "A picture becomes image tokens, one for each patch. Pruning drops most of them on their way through the model's "
  "layers. Is the answer still right, and what does it save?"
)
QUIET: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}


class Limits(NamedTuple):
  """What visitors may ask for.

  Attributes:
    picture_bytes: of a picture's file.
    picture_pixels: of a picture.
    waiting: questions without an answer yet, of which one is being answered.
  """

  picture_bytes: int = 16_000_000
  picture_pixels: int = 32_000_000
  waiting: int = 8


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
  """Shows a `UserError` as one line in the page."""
  try:
    yield
  except UserError as error:
    raise gr.Error(" ".join(str(error).split()), print_exception=False) from error


class Handlers:
  """What the page does when something is chosen or asked; values are those of its controls and results."""

  def __init__(self, asker: Asker, limits: Limits):
    self._asker, self._limits, self._uploads = asker, limits, get_upload_folder()
    self._most, self._numbers = asker.processor.num_image_tokens, itertools.count()
    self._waiting, self._turn = threading.BoundedSemaphore(limits.waiting), threading.Lock()

  def shown(self, pruning: PruningConfig) -> list[Any]:
    """The settings, the start of the sliders, the methods before and inside the decoder, and the switches."""
    pruning = choices.spelled_out(self._asker, pruning)
    settings, names = pruning_flags.text(pruning), choices.split(pruning.method)
    return [settings, (next(self._numbers), settings), *names, *self.switches(pruning)]

  def switches(self, pruning: PruningConfig) -> list[gr.Checkbox]:
    """The switches, which can be changed where the method and its layers allow it."""
    return [
      gr.Checkbox(getattr(pruning, name), interactive=self._allows(pruning, name)) for name in pruning_flags.SWITCHES
    ]

  def _allows(self, pruning: PruningConfig, switch: str) -> bool:
    """Whether a switch may be on; settings that are wrong without any tell nothing about it."""

    def works(**on: bool) -> bool:
      try:
        self._asker.schedule(dataclasses.replace(pruning, **dict.fromkeys(pruning_flags.SWITCHES, False) | on))
      except UserError:
        return False
      return True

    return works(**{switch: True}) or not works()

  def _possible(self, pruning: PruningConfig) -> PruningConfig:
    """The same with the switches off that may not be on."""
    for name in pruning_flags.SWITCHES:
      if getattr(pruning, name) and not self._allows(pruning, name):
        pruning = dataclasses.replace(pruning, **{name: False})
    return pruning

  def choose(self, before: str, inside: str, restored: bool, kept: bool) -> list[Any]:
    with _one_line():
      pruning = PruningConfig(choices.joined(before, inside), restore=restored, keep_positions=kept)
      settings, start, *names, restored, kept = self.shown(self._possible(pruning))
    chosen = zip(names, (before, inside), strict=True)
    unchanged = gr.skip()  # which leaves alone what a visitor has opened meanwhile
    return [settings, start, *(unchanged if name == own else name for name, own in chosen), restored, kept]

  def paste(self, settings: str) -> list[Any]:
    with _one_line():
      return self.shown(pruning_flags.parse(settings))

  def switch(self, name: str, settings: str, is_on: bool) -> str:
    """The settings with one of the switches, such as `restore`, on or off."""
    with _one_line():
      return pruning_flags.text(dataclasses.replace(pruning_flags.parse(settings), **{name: is_on}))

  def move(self, settings: str, *values: int | float) -> list[Any]:
    """The settings with other layers, keep counts and parameters, in this order, and the switches."""
    with _one_line():
      pruning = pruning_flags.parse(settings)
      count = len(pruning.keep or ())
      if len(values) != 2 * count + len(pruning.parameters):
        raise UserError("the settings are not those of the sliders; choose a method")
      layers, keep, parameters = values[:count], values[count : 2 * count], values[2 * count :]
      names = [name for name, _ in pruning.parameters]
      moved = dataclasses.replace(
        pruning,
        prune_layers=tuple(map(int, layers)),
        keep=tuple(value / 100 if self._most is None else int(value) for value in keep),
        parameters=tuple(zip(names, parameters, strict=True)),
      )
      moved = self._possible(moved)
      return [pruning_flags.text(moved), *self.switches(moved)]

  def move_with(self, controls: Sequence[gr.Slider | gr.Number], settings: str, *values: int | float | None) -> Any:
    """As `move`, with what the controls send; while a number box is empty, which is None, nothing changes."""
    if None in values:
      return gr.skip()
    return self.move(settings, *(own.preprocess(value) for own, value in zip(controls, values, strict=True)))

  def controls(self, settings: str) -> list[gr.Slider | gr.Number]:
    """Makes sliders of layers and of keep counts, and fields of parameters."""
    pruning, last = pruning_flags.parse(settings), self._asker.opened.config.text.num_hidden_layers - 1
    layers, keep = [], []
    for stage, (layer, count) in enumerate(zip(pruning.prune_layers or (), pruning.keep or (), strict=False)):
      least = choices.first_layer(pruning.method, stage)
      options = {"minimum": least or 0, "maximum": last, "value": layer, "interactive": least is not None}
      with gr.Row():
        layers.append(gr.Slider(**options, step=1, buttons=[], label="before layer", elem_id=f"layer-{stage}"))
        options = {"minimum": 1, "maximum": self._most, "value": count, "step": 1, "label": "keep"}
        if self._most is None:
          options = {"minimum": 0.5, "maximum": 100, "value": 100 * count, "step": 0.5, "label": "keep, %"}
        keep.append(gr.Slider(**options, buttons=[], interactive=True, elem_id=f"keep-{stage}"))
    return [*layers, *keep, *(gr.Number(value, label=name) for name, value in pruning.parameters)]

  def answer(self, file: dict[str, Any] | None, question: str, settings: str) -> list[Any]:
    """The answers without and with pruning, the table, the pictures and their legend.

    `file` is what Gradio knows of the picture's file, which only `PictureFiles` decodes.
    """
    with _one_line():
      if file is None:
        raise UserError("there is no picture yet")
      with self._in_line():  # so that few pictures are held at once
        picture, _ = PictureFiles().load(self._uploaded(file), max_pixels=self._limits.picture_pixels)
        pruning = pruning_flags.parse(settings)
        found = compare(self._asker, picture, question, pruning)
    table = f"{results.table(found)} Asked with `{pruning_flags.text(pruning)}`."
    gallery = gr.Gallery(results.panels(found), selected_index=len(found.spans) - 1 if found.views else None)
    return [found.plain.text, found.pruned.text, table, gallery, results.legend(found)]

  def _uploaded(self, file: dict[str, Any]) -> bytes:
    """The content of an uploaded file. Its path is what a visitor sent, which Gradio does not always check.

    Raises:
      UserError: it is no regular file in the folder of uploads, or too large.
    """
    most, size = self._limits.picture_bytes, None
    with contextlib.suppress(LookupError, TypeError, ValueError, OSError, RuntimeError):  # of what is no path
      path = pathlib.Path(file["path"]).resolve()
      if is_in_or_equal(path, self._uploads) and path.is_file():
        size = path.stat().st_size
    if size is None:
      raise UserError("the picture is gone or was never uploaded; choose it again")
    if size > most:
      raise UserError(f"the picture's file is above the limit of {most:,} bytes")
    with user_error("the picture is gone, choose it again"):
      return path.read_bytes()

  @contextlib.contextmanager
  def _in_line(self) -> Iterator[None]:
    """Lets questions in one by one; raises `UserError` if too many wait."""
    if not self._waiting.acquire(blocking=False):
      raise UserError(f"{self._limits.waiting} questions wait for their answers already; ask again in a while")
    try:
      with self._turn:
        yield
    finally:
      self._waiting.release()


def build(asker: Asker, examples: Sequence[tuple[str, str]] = (), limits: Limits = Limits()) -> gr.Blocks:
  """The page of a model; `examples` are files of pictures with questions about them.

  Raises:
    UserError: the model cannot run the configured pruning.
  """
  handlers = Handlers(asker, limits)
  text, first, *names, can_restore, can_keep = handlers.shown(asker.config.pruning)
  example = examples[0] if examples else (None, "")
  with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(UPLOAD_LIFETIME // 10, UPLOAD_LIFETIME)) as page:
    gr.Markdown(f"# {TITLE}\n{ABOUT}")
    start = gr.State(first)
    with gr.Row():
      with gr.Column(scale=2, min_width=340):
        picture = gr.Image(
          example[0], sources=["upload", "clipboard"], image_mode=None, height=260, buttons=[], label="picture",
          elem_id="picture",
        )  # fmt: skip
        question = gr.Textbox(example[1], label="question", elem_id="question")
        with gr.Row():
          before = gr.Dropdown(choices.before(asker), value=names[0], label="before the decoder", elem_id="before")
          inside = gr.Dropdown(choices.inside(asker), value=names[1], label="inside the decoder", elem_id="inside")
        restored = gr.Checkbox(
          can_restore.value, label="RESTORE: make up for what is removed", interactive=can_restore.interactive,
          elem_id="restored",
        )  # fmt: skip
        kept = gr.Checkbox(
          can_keep.value, label="let tokens left before the decoder keep their positions",
          interactive=can_keep.interactive, elem_id="kept",
        )  # fmt: skip
        controls = gr.Column()
        settings = gr.Textbox(
          text, label="these settings, to copy; others can be pasted", lines=2, buttons=["copy"], elem_id="settings"
        )
        ask = gr.Button("Ask", variant="primary", elem_id="ask")
      with gr.Column(scale=3, min_width=400):
        with gr.Row():
          plain = gr.Textbox(label="without pruning", interactive=False, elem_id="plain")
          pruned = gr.Textbox(label="with pruning", interactive=False, elem_id="pruned")
        table = gr.Markdown(elem_id="table")
        gallery = gr.Gallery(
          label="what the layers see", format="png", preview=True, object_fit="contain", height=560,
          interactive=False, buttons=[], elem_id="gallery",
        )  # fmt: skip
        legend = gr.HTML(elem_id="legend")
    if examples:
      gr.Examples([list(one) for one in examples], [picture, question], api_visibility="private")

    with controls:

      @gr.render(inputs=start, triggers=[page.load, start.change], show_progress="hidden")
      def show_controls(start: tuple[int, str]) -> None:
        if len(pruning_flags.parse(start[1]).keep or ()) > MAX_STAGES_WITH_SLIDERS:
          gr.Markdown("This method has too many stages for sliders; the settings name them.")
          return
        moving = handlers.controls(start[1])
        move, moved = functools.partial(handlers.move_with, moving), [settings, restored, kept]
        for control in moving:
          control.input(move, [settings, *moving], moved, preprocess=False, **QUIET)

    chosen, switches = [before, inside], [restored, kept]
    everything = [settings, start, *chosen, *switches]
    for control in chosen:
      control.input(handlers.choose, [*chosen, *switches], everything, **QUIET)
    for pasted in (settings.submit, settings.blur):
      pasted(handlers.paste, settings, everything, **QUIET)
    for name, control in zip(pruning_flags.SWITCHES, switches, strict=True):
      control.input(functools.partial(handlers.switch, name), [settings, control], settings, **QUIET)
    shown = [plain, pruned, table, gallery, legend]
    asked = [ask.click, question.submit]
    inputs = [picture, question, settings]
    gr.on(asked, handlers.answer, inputs, shown, preprocess=False, api_visibility="private", concurrency_limit=None)
  return page


@contextlib.contextmanager
def serve(
  address: tuple[str, int], asker: Asker, examples: Sequence[tuple[str, str]] = (), limits: Limits = Limits()
) -> Iterator[str]:
  """Serves the page at a host and port, 0 for a free one; yields its URL. What visitors send is removed at the end.

  Raises:
    UserError: as in `build`.
    OSError: the address is in use or none of this machine.
  """
  host, port = address
  with socket.socket() as free:
    free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    free.bind((host, port))
    port = free.getsockname()[1]
  with tempfile.TemporaryDirectory(prefix="himap_jax_page_") as folder:
    os.environ["GRADIO_TEMP_DIR"] = folder
    page = build(asker, examples, limits)
    page.queue(default_concurrency_limit=1, api_open=False)  # Gradio's limit would refuse controls, too
    page.launch(
      server_name=host,
      server_port=port,
      share=False,
      max_file_size=limits.picture_bytes,
      prevent_thread_lock=True,
      quiet=True,
      inbrowser=False,
      ssr_mode=False,
      run_history=False,
      footer_links=[],
      theme=gr.themes.Soft(**FONTS),
    )
    try:
      yield f"http://{host}:{port}/"
    finally:
      page.close(verbose=False)
