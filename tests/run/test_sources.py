"""What may name a picture: paths, data: URLs, base64 and addresses on the web."""

import base64
import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import http.server
import io
import os
import pathlib
import signal
import socket
import tempfile
import threading
import time

import commands
import numpy as np
import pytest
from PIL import Image
from running import changed, read, write_rows

from himap_jax.run import job, sources
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


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_base64_of_every_format(format, mode, tmp_path):
  file = io.BytesIO()
  Image.new("RGB", (27, 25), "red").convert(mode).save(file, format)
  assert PictureFiles(tmp_path).size(base64.b64encode(file.getvalue()).decode()) == (27, 25)


def test_a_file_comes_before_base64(png, tmp_path):
  name = "A" * 64
  (tmp_path / name).write_bytes(png)
  assert same(PictureFiles(tmp_path).load(name)[0], png)


@pytest.mark.parametrize(
  ("image", "message"),
  [
    ("data:image/png,abc", "only data: URLs in base64"),
    ("data:image/png;base64,abc", "not base64"),
    ("data:image/png;base64,é", "not base64"),
    ("data:image/png;base64,QUFBQUFBQUE=", "not an image of a supported format"),
    ("A" * 64, "No such file"),
    (f"/9j/{'A' * 61}", "not base64"),
    (f"/9j/{'A' * 60}", "damaged image"),
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
  assert files.digest(image) is None or message.endswith(("format", "damaged image")) or image.startswith("http")


def test_where_a_missing_picture_was_looked_for(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for files, image, place in (
    (PictureFiles(), "a.png", f" in {tmp_path}"),
    (PictureFiles(pathlib.Path("pictures")), "a.png", f" in {tmp_path}/pictures"),
    (PictureFiles(), "/nowhere/a.png", ""),
  ):
    with pytest.raises(ImageError) as error:
      files.load(image)
    assert str(error.value) == f"{image}: No such file or directory{place}"


@pytest.fixture
def downloads(monkeypatch):
  """Returns `on_disk()`: the sizes of the files that hold downloads, of which there are none yet."""
  kept = sources._Downloads()
  monkeypatch.setattr(sources, "_downloads", kept)
  yield lambda: [os.fstat(own._file.fileno()).st_size for own in kept._segments]
  kept.close()


@pytest.fixture
def server(png, tmp_path, downloads):
  """A web server with a picture and a text; yields its address and the paths that were asked for."""
  directory = tmp_path / "web"
  directory.mkdir()
  (directory / "a.png").write_bytes(png)
  (directory / "text.png").write_text("text")
  for number in range(6):
    (directory / f"{number}.png").write_bytes(png)
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


def test_pictures_on_the_web_are_downloaded_once(server, png, downloads, monkeypatch):
  address, asked = server
  files = PictureFiles(allow_urls=True)
  assert files.size(f"{address}/a.png") == (7, 5) and same(files.load(f"{address}/a.png")[0], png)
  assert asked == ["/a.png"]
  for name, message in (("b.png", "cannot be downloaded .*404"), ("text.png", "not an image")):
    with pytest.raises(ImageError, match=message):
      files.load(f"{address}/{name}")
  kept = downloads()
  monkeypatch.setattr(sources, "MAX_URL_BYTES", 10)
  with pytest.raises(ImageError, match="larger than 10 bytes"):
    files.load(f"{address}/a.png?again")
  port = address.rpartition(":")[2]
  for name in ("http://localhost:1/a.png", "http://localhost:x/a.png", f"http://localhost:{port}/a b.png"):
    with pytest.raises(ImageError, match="cannot be downloaded") as error:
      files.load(name)
    assert "\n" not in str(error.value)
  assert downloads() == kept == [len(png) + len("text")]


def test_only_the_last_downloads_are_kept(server, png, downloads, monkeypatch):
  address, asked = server
  monkeypatch.setattr(sources, "MAX_KEPT_BYTES", 4 * len(png))
  files = PictureFiles(allow_urls=True)

  def load(*numbers):
    asked.clear()
    for number in numbers:
      assert same(files.load(f"{address}/{number}.png")[0], png)
      assert sum(downloads()) <= sources.MAX_KEPT_BYTES
    return [int(path[1]) for path in asked]

  assert load(0, 1, 2, 3) == [0, 1, 2, 3] and load(0, 1, 2, 3) == []
  assert load(4, 3, 0) == [4, 0]
  with sources.open_source(f"{address}/0.png", pathlib.Path(), allow_urls=True) as file:
    assert load(1, 2, 4, 5) == [1, 2, 5] and file.read() == png
  assert load(0) == [0]
  monkeypatch.setattr(sources, "MAX_KEPT_BYTES", 32 * len(png))  # files of several
  assert load(*range(6), *range(6)) and load(*range(6)) == [] and len(downloads()) < 10


def test_threads_share_downloads(server, png, downloads, monkeypatch):
  address, asked = server
  monkeypatch.setattr(sources, "MAX_KEPT_BYTES", 6 * len(png))
  names = [f"{address}/{number % 6}.png" for number in range(120)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for image, _ in pool.map(PictureFiles(allow_urls=True).load, names):
      assert same(image, png)
  assert len(asked) < 120 and sum(downloads()) <= 6 * len(png)


def test_a_download_needs_no_disk(server, png, downloads, monkeypatch):
  def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")

  address, asked = server
  files = PictureFiles(allow_urls=True)
  for target, name, instead in (
    (tempfile, "TemporaryFile", full), (os, "pwrite", full), (os, "pwrite", lambda file, data, place: len(data) - 1),
  ):  # fmt: skip
    with monkeypatch.context() as patched:
      patched.setattr(target, name, instead)
      assert same(files.load(f"{address}/a.png")[0], png)
  assert asked == ["/a.png"] * 3
  files.load(f"{address}/a.png")
  files.load(f"{address}/a.png")
  assert len(asked) == 4 and downloads() == [len(png)]


DOWNLOAD = """
import sys, tempfile, time
from himap_jax.run.pictures import PictureFiles
tempfile.tempdir = sys.argv[2]
PictureFiles(allow_urls=True).load(sys.argv[1])
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_of_a_process_that_is_killed(server, tmp_path, number):
  (tmp_path / "tmp").mkdir()
  command = commands.Command(DOWNLOAD, f"{server[0]}/a.png", tmp_path / "tmp")
  command.wait_until(lambda: "ready" in command.text()[0])
  os.kill(command.process.pid, number)
  command.communicate()
  assert command.process.exitcode == -number and list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_server_that_sends_slowly(monkeypatch, is_chunked):
  listener = socket.create_server(("localhost", 0))

  def serve():
    connection, _ = listener.accept()
    connection.recv(1000)
    head, part = (b"Transfer-Encoding: chunked", b"1\r\na\r\n") if is_chunked else (b"Content-Length: 300", b"a")
    with contextlib.suppress(OSError), connection:
      connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")
      for _ in range(300):
        time.sleep(0.01)
        connection.sendall(part)

  thread = threading.Thread(target=serve)
  thread.start()
  monkeypatch.setattr(sources, "MAX_URL_SECONDS", 0.1)
  with pytest.raises(ImageError, match="cannot be downloaded .it takes more than 0.1 seconds"):
    PictureFiles(allow_urls=True).load(f"http://localhost:{listener.getsockname()[1]}/a.png")
  thread.join()
  listener.close()


def test_a_server_that_breaks_off(monkeypatch):
  """What `http.client` raises is neither an `OSError` nor a `ValueError`."""
  listener = socket.create_server(("localhost", 0))
  replies = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", b"nonsense\r\n\r\n"]
  replies += [b"HTTP/1.1 200 OK\r\nContent-Length: 1005\r\n\r\nabcde"]  # for which it raises nothing

  def serve():
    for reply in replies:
      connection, _ = listener.accept()
      connection.recv(1000)
      connection.sendall(reply)
      connection.close()

  thread = threading.Thread(target=serve)
  thread.start()
  for number in range(len(replies)):
    with pytest.raises(ImageError, match="cannot be downloaded") as found:
      PictureFiles(allow_urls=True).load(f"http://localhost:{listener.getsockname()[1]}/{number}.png")
  assert "1,000 bytes are missing at its end" in str(found.value)
  thread.join()
  listener.close()


def test_a_picture_on_the_web_is_known_by_its_address(server, png, tmp_path):
  address, asked = server
  files = PictureFiles(tmp_path, allow_urls=True)
  _, digest = files.load(f"{address}/a.png")
  asked.clear()
  assert digest == files.digest(f"{address}/a.png") == hashlib.sha256(f"{address}/a.png".encode()).hexdigest()
  assert PictureFiles().digest(f"{address}/b.png") not in (digest, None) and asked == []


def test_a_run_with_a_picture_on_the_web(server, small):
  """Its row is answered as that of the same picture in a file."""
  address, _ = server
  rows = {"web": f"{address}/a.png", "missing": f"{address}/b.png", "file": "web/a.png"}
  write_rows(small.prompts, [{"id": own, "image": image, "question": "Why?"} for own, image in rows.items()])
  assert job.run(changed(small, allow_urls=True, emit=frozenset({"tokens", "kept"}))) == 0
  found = read(small.output)
  assert found["web"]["error"] is None and found["web"]["token_ids"] == found["file"]["token_ids"]
  assert found["web"]["kept"] == found["file"]["kept"]
  assert "404" in found["missing"]["error"]
