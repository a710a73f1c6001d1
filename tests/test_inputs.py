"""The layout of rows with several images, several runs of image tokens and different counts, against slow Python."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from himap_jax.inputs import IMAGE, PADDING, TEXT, UNUSED_ORDER, Layout, put_image_tokens, take_slots

# t text, 0 and 1 the image that a token is of, . padding
ROWS = ("tt000t11tt..", "000tttttt...", "t0t0t0t1t1t.", "t0ttttt.....")
MOST = 5


@pytest.fixture
def layout():
  kind = np.array([[{"t": TEXT, ".": PADDING}.get(slot, IMAGE) for slot in row] for row in ROWS])
  image_id = np.array([[int(slot) if slot.isdecimal() else -1 for slot in row] for row in ROWS])
  return jax.tree.map(jnp.asarray, Layout.of_rows(kind, image_id, MOST))


@pytest.mark.parametrize(
  "slots",
  [np.zeros((2, 3), np.float32), np.zeros(2, np.int32), np.zeros((4, 3), np.int32)],
  ids=["dtype", "rank", "axis"],
)
def test_annotations_are_checked(slots):
  """In all tests, by the import hook of `conftest`."""
  with pytest.raises(jaxtyping.TypeCheckError):
    take_slots(jnp.zeros((2, 12)), jnp.asarray(slots))


def places(row, kinds):
  return [slot for slot, kind in enumerate(row) if kind in kinds]


def test_slots(layout):
  image, present = layout.image_slots(), layout.image_present()
  instruction, valid = layout.instruction_slots()
  for number, row in enumerate(ROWS):
    own = places(row, "01")
    assert image[number].tolist()[: len(own)] == own
    assert present[number].tolist() == [index < len(own) for index in range(MOST)]
    assert layout.original()[number].tolist()[: len(own)] == list(range(len(own)))
    after = [slot for slot in places(row, "t") if slot > max(own)]
    assert instruction[number][valid[number]].tolist() == after
    assert layout.last_slot()[number] == max(places(row, "t01"))
    text = layout.text_slots()[number].tolist()
    assert len(text) == len(row) - MOST and text == [*places(row, "t.")][: len(text)]
  assert layout.image_id[0].tolist() == [-1, -1, 0, 0, 0, -1, 1, 1, -1, -1, -1, -1]


@pytest.mark.parametrize("is_ragged", [False, True])
def test_the_instruction_is_the_same_after_the_last_image_was_removed(layout, is_ragged):
  kept = jnp.array([[0, 1]] * 4, jnp.int32)
  _, pruned = layout.keep(kept, (kept < layout.num_present()[:, None]) if is_ragged else None)
  for own in (layout, pruned):
    instruction, valid = own.instruction_slots()
    orders = take_slots(own.order, instruction)
    for number, row in enumerate(ROWS):
      after = [slot for slot in places(row, "t") if slot > max(places(row, "01"))]
      assert orders[number][valid[number]].tolist() == after


def test_a_query_sees_what_is_not_later_and_no_padding(layout):
  slots = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (4, 12))
  visible = layout.visible(slots)
  for number, row in enumerate(ROWS):
    for query in places(row, "t01"):
      assert visible[number, query].tolist() == [key <= query and row[key] != "." for key in range(12)]


@pytest.mark.parametrize("window", [None, 3])
def test_image_tokens_may_see_later_ones_of_their_image(layout, window):
  """Before and after pruning, and no farther back than the window."""
  remaining, pruned = layout.keep(jnp.array([[0, 2, 4], [0, 1, 2], [1, 3, 4], [0, 1, 2]], jnp.int32))
  slots = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (4, 12))
  for own, source in ((layout, slots), (pruned, remaining)):
    visible = own.replace(is_bidirectional=True, window=window).visible()
    for number, row in enumerate(ROWS):
      for query, left in enumerate(source[number].tolist()):
        if row[left] != ".":
          expected = [
            row[right] != "."
            and (right <= left or (row[right] == row[left] != "t"))
            and (window is None or right > left - window)
            for right in source[number].tolist()
          ]
          assert visible[number, query].tolist() == expected


def pruned_row(row, kept):
  """The slots that stay: all but image tokens that are not kept, by their number in the row."""
  images = places(row, "01")
  return [slot for slot in places(row, "t01") if slot not in images or images.index(slot) in kept]


@pytest.mark.parametrize("counts", [None, (3, 1, 2, 1)], ids=["all", "own counts"])
def test_keeping(layout, counts):
  kept = jnp.array([[0, 2, 4], [0, 1, 2], [1, 3, 4], [0, 1, 2]], jnp.int32)
  present = None if counts is None else jnp.arange(3)[None] < jnp.array(counts)[:, None]
  source, pruned = layout.keep(kept, present)
  assert source.shape == (4, 12 - MOST + 3) and pruned.num_image_tokens == 3
  for number, row in enumerate(ROWS):
    own = kept[number].tolist()[: None if counts is None else counts[number]]
    stay = pruned_row(row, own)
    assert source[number].tolist()[: len(stay)] == stay
    assert pruned.order[number].tolist() == stay + [UNUSED_ORDER] * (10 - len(stay))
    assert (pruned.kind[number, len(stay) :] == PADDING).all()
    assert [pruned.image_id[number, slot] for slot in range(len(stay))] == [layout.image_id[number, s] for s in stay]
    numbers = [places(row, "01").index(slot) for slot in stay if row[slot] in "01"]
    assert pruned.original()[number].tolist()[: len(numbers)] == numbers


def test_pruning_twice_is_pruning_once(layout):
  first = layout.keep(jnp.array([[0, 1, 3, 4]] * 4, jnp.int32))[1].keep(jnp.array([[1, 3]] * 4, jnp.int32))[1]
  once = layout.keep(jnp.array([[1, 4]] * 4, jnp.int32))[1]
  for number, row in enumerate(ROWS):
    if len(places(row, "01")) == MOST:
      assert first.order[number].tolist() == once.order[number].tolist()


def test_image_tokens_are_put_into_their_slots(layout):
  tokens = jnp.arange(4 * MOST, dtype=jnp.float32).reshape(4, MOST, 1)
  x = put_image_tokens(jnp.full((4, 12, 1), -1.0), tokens, layout)
  for number, row in enumerate(ROWS):
    images = places(row, "01")
    expected = [tokens[number, images.index(slot), 0] if slot in images else -1 for slot in range(12)]
    assert x[number, :, 0].tolist() == expected
