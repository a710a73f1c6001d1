"""The comparison's HTML report: its text, and what a real browser shows of it, pixel by pixel."""

import dataclasses
import html.parser
import re

import numpy as np
import pytest
from browser import Browser
from PIL import Image

from experiments.compare.report import Column, Example, Shown, render
from experiments.question_sets import Question

GRID = (4, 6)
COUNT = GRID[0] * GRID[1]
SIDE = 40  # of a patch in pixels
LAST_LAYER = 11
EVEN, CORNER, TOP = list(range(0, COUNT, 2)), [0, 1, 6, 23], list(range(6))
LINKS = ("src", "href", "srcset", "action", "data", "poster", "background", "ping")
EXACT = ("#answer", "#type", ".card h3", ".given")  # where the second example's hostile text stands alone
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><b>'&amp;\u2028"

COLUMNS = [
  Column("method", "Method", "text"),
  Column("budget", "Budget", "text"),
  Column("tokens", "Tokens", "number"),
  Column("accuracy", "Accuracy", "percent"),
]
ROWS = [
  {"method": "none", "tokens": 576, "accuracy": 0.75},
  {"method": "himap", "budget": "25%", "tokens": 144, "accuracy": np.float32(0.5)},
  {"method": "sparsevlm", "budget": "5%", "note": "budget not reachable: at least 66 tokens"},
  {"method": "fastv", "budget": "50%", "tokens": 1288, "accuracy": 1.0},
  {"method": "random", "budget": "9%", "tokens": np.int64(52), "accuracy": float("nan")},
]
CELLS = {
  "none": Shown("Red.", []),
  "himap 25%": Shown("red", [(8, CORNER), (2, EVEN)]),
  "divprune@0": Shown("blue", [(0, CORNER)]),
  "fastv 50%": Shown(" RED ", [(5, TOP)]),
}


def flat_picture(seed):
  """A picture whose patches have one colour each."""
  patches = np.random.default_rng(seed).integers(0, 256, (*GRID, 3), dtype=np.uint8)
  return Image.fromarray(patches.repeat(SIDE, 0).repeat(SIDE, 1))


EXAMPLES = [
  Example(flat_picture(0), GRID, Question("", None, "what colour is it?", "red", "colour", ""), CELLS),
  Example(
    flat_picture(1),
    GRID,
    Question("", None, f"how many {HOSTILE}", HOSTILE, HOSTILE, ""),
    {HOSTILE: Shown(HOSTILE, [(3, TOP)])},
  ),
]


def write_report(path, columns, rows, examples, *, title, num_layers=LAST_LAYER + 1):
  path.write_text(render(columns, rows, examples, title=title, num_layers=num_layers), encoding="utf-8")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  path = tmp_path_factory.mktemp("report") / "report.html"
  write_report(path, COLUMNS, ROWS, EXAMPLES, title=f"Comparison {HOSTILE}")
  return path


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
  browser = Browser(tmp_path_factory.mktemp("profile"), 1280, 900)
  yield browser
  browser.close()


@pytest.fixture
def page(tab, report):
  """The freshly opened report; at the end nothing may have gone wrong in it or have been asked of the network."""
  tab.resize(1280, 900)
  tab.colour_scheme("light")
  tab.errors.clear()
  tab.requests.clear()
  tab.open(report)
  wait_for_cards(tab, len(CELLS))
  yield tab
  assert not tab.errors
  assert tab.requests and all(url == report.as_uri() or url.startswith("data:image/") for url in tab.requests)


def wait_for_cards(page, count):
  page.wait(f"document.querySelectorAll('.card').length === {count}")


def texts(page, selector):
  visible = f"[...document.querySelectorAll('{selector}')].filter((node) => node.offsetParent)"
  return page.evaluate(f"{visible}.map((node) => node.innerText)")


def methods(page):
  return texts(page, "#figures th")


def shown_patches(page, example):
  """For each card, which patches of its picture look kept on the screen; the others must look faded to 15%."""
  background = page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
  background = np.array([int(part) for part in re.findall(r"\d+", background)])
  boxes = [page.box(f".card:nth-child({card + 1}) canvas") for card in range(len(example.cells))]
  assert len({top for _, top, _, _ in boxes}) == 1, "one screenshot must show them all"
  screen = page.screenshot().astype(float)
  return [patches_in(screen, box, example, background) for box in boxes]


def patches_in(screen, box, example, background):
  left, top, width, height = box
  kept = []
  for index in range(COUNT):
    row, column = divmod(index, GRID[1])
    centre = int(top + (row + 0.5) * height / GRID[0]), int(left + (column + 0.5) * width / GRID[1])
    colour = np.asarray(example.picture)[row * SIDE, column * SIDE].astype(float)
    faded = 0.15 * colour + 0.85 * background
    is_kept = np.abs(screen[centre] - colour).max() <= 2
    assert is_kept or np.abs(screen[centre] - faded).max() <= 3, (index, screen[centre], colour, faded)
    assert np.abs(colour - faded).max() > 10
    if is_kept:
      kept.append(index)
  return kept


def cards(page):
  return [" ".join(text.split()) for text in texts(page, ".card h3")]


def drag_slider(page, layer):
  """Drags the slider's thumb, 16 pixels wide, from where it is to a layer."""
  left, top, width, height = page.box("#layer")
  now = page.evaluate("Number(document.querySelector('#layer').value)")
  page.drag(*((left + 8 + (width - 16) * value / LAST_LAYER, top + height / 2) for value in (now, layer)))


def test_loads_nothing(report):
  text = report.read_text(encoding="utf-8")
  links = []
  parser = html.parser.HTMLParser()
  parser.handle_starttag = lambda tag, attributes: links.extend((tag, *pair) for pair in attributes if pair[0] in LINKS)
  parser.feed(text)
  assert not links
  assert not re.search(r"https?:", text)
  assert not re.search(r"@import|url\(|import\s*\(|fetch\(|XMLHttpRequest|WebSocket", text)
  assert "default-src 'none'" in text


def test_hostile_text_stays_text(page, report):
  assert report.read_text(encoding="utf-8").count("</script>") == 2
  page.click("#thumbnails button:nth-child(2)")
  wait_for_cards(page, 1)
  assert page.evaluate("document.title") == f"Comparison {HOSTILE}"
  for selector, before in {"h1": "Comparison ", "#question": "how many ", **dict.fromkeys(EXACT, "")}.items():
    actual = page.evaluate(f"document.querySelector('{selector}').textContent")
    assert actual.strip() == (before + HOSTILE).strip(), selector
  assert page.evaluate("document.querySelectorAll('img').length") == 3
  assert texts(page, ".given.right") == texts(page, ".given")


def test_table_shows_the_figures(page):
  assert texts(page, "thead th") == [column.label for column in COLUMNS]
  assert texts(page, "#figures tr:nth-child(2) > *") == ["himap", "25%", "144", "50.0%"]
  assert texts(page, "#figures tr:nth-child(3) > *") == ["sparsevlm", "5%", ROWS[2]["note"]]
  assert texts(page, "#figures tr:nth-child(4) > *") == ["fastv", "50%", "1,288", "100.0%"]
  assert texts(page, "#figures tr:nth-child(5) > *") == ["random", "9%", "52", "–"]
  assert texts(page, "#figures tr.none th") == ["none"]


def test_sorting_by_click(page):
  assert methods(page) == ["none", "himap", "sparsevlm", "fastv", "random"]
  tokens = "thead th:nth-child(3)"
  page.click(f"{tokens} button")
  assert methods(page) == ["random", "himap", "none", "fastv", "sparsevlm"]
  assert page.evaluate(f"document.querySelector('{tokens}').ariaSort") == "ascending"
  page.click(f"{tokens} button")
  assert methods(page) == ["fastv", "none", "himap", "random", "sparsevlm"]
  assert page.evaluate(f"document.querySelector('{tokens}').ariaSort") == "descending"
  page.click("thead th:nth-child(2) button")
  assert methods(page) == ["sparsevlm", "random", "himap", "fastv", "none"]
  assert page.evaluate("document.querySelectorAll('[aria-sort]').length") == 1


def test_sorting_by_keyboard(page):
  page.click("#row-filter")
  for _ in range(3):  # past the table's scrolling region and the first heading
    page.key("Tab", 9)
  page.key("Enter", 13, "\r")
  assert methods(page) == ["sparsevlm", "random", "himap", "fastv", "none"]


def test_filtering_rows(page):
  page.write("#row-filter", "FAST, himap")
  assert methods(page) == ["himap", "fastv"]
  assert texts(page, "#row-count") == ["2 of 5 rows"]
  page.write("#row-filter", "")
  assert len(methods(page)) == 5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_slider_fades_the_dropped_patches(page, scheme):
  page.colour_scheme(scheme)
  everything = list(range(COUNT))
  for layer, himap, divprune, fastv in [
    (0, everything, CORNER, everything),
    (2, EVEN, CORNER, everything),
    (LAST_LAYER, CORNER, CORNER, TOP),
    (7, EVEN, CORNER, TOP),
  ]:
    drag_slider(page, layer)
    assert texts(page, "#layer-number") == [str(layer)]
    truth = [everything, himap, divprune, fastv]
    assert texts(page, ".kept") == [f"{len(kept)} of {COUNT} image tokens" for kept in truth]
    assert shown_patches(page, EXAMPLES[0]) == truth


def test_another_example_keeps_the_layer(page):
  drag_slider(page, 3)
  page.click("#thumbnails button:nth-child(2)")
  wait_for_cards(page, 1)
  assert shown_patches(page, EXAMPLES[1]) == [TOP]


def test_answers_are_marked(page):
  assert [text.strip() for text in texts(page, ".given.right")] == ["Red.", "red", "RED"]
  assert texts(page, ".given.wrong") == ["blue"]
  assert texts(page, "#tally") == ["3 of 4 answers are right"]


def test_filtering_cards(page):
  assert cards(page) == list(CELLS)
  page.write("#card-filter", "himap, fast 50")
  assert cards(page) == ["himap 25%", "fastv 50%"]
  page.write("#card-filter", "nothing")
  assert cards(page) == [] and texts(page, "#no-cards")
  page.write("#card-filter", "")
  assert texts(page, "#budgets button") == ["All budgets", "25%", "50%"]
  page.click("#budgets button:nth-child(2)")
  assert cards(page) == ["none", "himap 25%", "divprune@0"]
  drag_slider(page, 9)
  page.click("#budgets button:nth-child(1)")
  assert shown_patches(page, EXAMPLES[0])[3] == TOP


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out(page, width):
  page.resize(width, 900)
  assert page.evaluate("document.documentElement.scrollWidth") == width


def test_wide_table_scrolls_inside_its_box(tab, tmp_path):
  names = [f"column {number}" for number in range(30)]
  rows = [dict.fromkeys(names, number) for number in range(60)]
  write_report(tmp_path / "wide.html", [Column(name, name, "number") for name in names], rows, [], title="Wide")
  tab.open(tmp_path / "wide.html")
  tab.resize(390, 844)
  corner = "document.querySelector('thead th').getBoundingClientRect()"
  before = tab.evaluate(f"[{corner}.left, {corner}.top]")
  tab.evaluate("document.querySelector('.scroll').scrollTo({left: 500, top: 500, behavior: 'instant'})")
  assert tab.evaluate("[document.querySelector('.scroll').scrollLeft, scrollX]") == [500, 0]
  assert tab.evaluate(f"[{corner}.left, {corner}.top]") == before
  assert tab.evaluate("document.documentElement.scrollWidth") == 390
  tab.resize(1280, 900)


def test_without_examples(tab, tmp_path):
  write_report(tmp_path / "table.html", COLUMNS, ROWS, [], title="Table")
  tab.errors.clear()
  tab.open(tmp_path / "table.html")
  assert len(methods(tab)) == len(ROWS) and texts(tab, "section h2") == ["Figures"]
  assert not tab.errors


def test_stays_small(tmp_path):
  shown = Shown("yes", [(layer, range(layer, 576)) for layer in range(30)])
  picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8))
  asked = Question("", None, "is it?", "yes", "yes or no", "")
  example = Example(picture, (24, 24), asked, {f"method {n}": shown for n in range(60)})
  write_report(tmp_path / "one.html", COLUMNS, ROWS, [example], title="One example", num_layers=30)
  assert (tmp_path / "one.html").stat().st_size < 400_000


@pytest.mark.parametrize("stage, message", [
  ((0, [COUNT]), "outside the 4 × 6 grid"), ((0, [-1]), "outside the 4 × 6 grid"),
  ((12, [0]), "outside the decoder's layers, 0 to 11"), ((-1, [0]), "outside the decoder's layers"),
])  # fmt: skip
def test_refuses_impossible_stages(tmp_path, stage, message):
  example = dataclasses.replace(EXAMPLES[0], cells={"himap": Shown("red", [stage])})
  with pytest.raises(ValueError, match=message):
    write_report(tmp_path / "none.html", COLUMNS, ROWS, [example], title="None")
