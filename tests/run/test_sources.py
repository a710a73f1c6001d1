"""What may name a picture: paths, data: URLs, base64 and addresses on the web."""

import base64
import functools
import http.server
import io
import threading

import numpy as np
import pytest
from PIL import Image

from himap_jax.run import sources
from himap_jax.run.pictures import ImageError, PictureFiles


@pytest.fixture
def png():
  file = io.BytesIO()
  Image.new("RGB", (7, 5), "red").save(file, "PNG")
  return file.getvalue()


def same(image, png):
  return image.size == (7, 5) and (np.asarray(image) == np.asarray(Image.open(io.BytesIO(png)))).all()


def test_data_urls_and_base64_are_the_file(png, tmp_path):
  text = base64.b64encode(png).decode()
  (tmp_path / "a.png").write_bytes(png)
  files = PictureFiles(tmp_path)
  digests = set()
  for name in ("a.png", text, f"{text[:40]}\n{text[40:]}\n", f"data:image/png;base64,{text}", f"data:;base64,{text}"):
    image, digest = files.load(name)
    assert same(image, png) and files.size(name) == (7, 5) and files.digest(name) == digest
    digests.add(digest)
  assert len(digests) == 1


def test_a_file_comes_before_base64(png, tmp_path):
  name = "A" * 64
  (tmp_path / name).write_bytes(png)
  assert same(PictureFiles(tmp_path).load(name)[0], png)


@pytest.mark.parametrize(
  ("image", "message"),
  [
    ("data:image/png,abc", "only data: URLs in base64"),
    ("data:image/png;base64,abc", "not base64"),
    ("data:image/png;base64,QUFBQUFBQUE=", "not an image of a supported format"),
    ("A" * 64, "not an image of a supported format"),
    ("A" * 65, "not base64"),
    ("A" * 2000, "not an image of a supported format"),
    ("no picture " * 2000, "File name too long"),
    ("http://localhost/a.png", "with --allow_urls only"),
    ("ftp://localhost/a.png", "No such file"),
  ],
)
def test_what_names_no_picture(image, message, tmp_path):
  files = PictureFiles(tmp_path)
  with pytest.raises(ImageError, match=message) as error:
    files.load(image)
  assert "\n" not in str(error.value) and len(str(error.value)) < 500
  assert files.digest(image) is None or "format" in message


@pytest.fixture
def server(png, tmp_path):
  """A web server with a picture and a text; yields its address and the paths that were asked for."""
  directory = tmp_path / "web"
  directory.mkdir()
  (directory / "a.png").write_bytes(png)
  (directory / "text.png").write_text("text")
  asked = []

  class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
      asked.append(self.path)

  serve = http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Handler, directory=directory))
  thread = threading.Thread(target=serve.serve_forever)
  thread.start()
  yield f"http://localhost:{serve.server_port}", asked
  serve.shutdown()
  thread.join()
  serve.server_close()


def test_pictures_on_the_web_are_downloaded_once(server, png, monkeypatch):
  address, asked = server
  files = PictureFiles(allow_urls=True)
  assert files.size(f"{address}/a.png") == (7, 5) and same(files.load(f"{address}/a.png")[0], png)
  assert asked == ["/a.png"]
  for name, message in (("b.png", "cannot be downloaded .*404"), ("text.png", "not an image")):
    with pytest.raises(ImageError, match=message):
      files.load(f"{address}/{name}")
  monkeypatch.setattr(sources, "MAX_URL_BYTES", 10)
  with pytest.raises(ImageError, match="larger than 10 bytes"):
    files.load(f"{address}/a.png?again")
  with pytest.raises(ImageError, match="cannot be downloaded"):
    files.load("http://localhost:1/a.png")
