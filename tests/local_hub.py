"""A directory in place of the hub's data sets: what its client lists and downloads."""

import pathlib

import huggingface_hub


def serve(monkeypatch, directory: pathlib.Path) -> list[tuple[str, ...]]:
  """Puts the directory in place of any repository; returns a list to which what is asked for is added."""
  asked = []

  def list_repo_files(repository, repo_type):
    asked.append((repository, repo_type))
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())

  def hf_hub_download(repository, name, repo_type):
    asked.append((repository, name, repo_type))
    return str(directory / name)

  monkeypatch.setattr(huggingface_hub, "dataset_info", lambda repository, timeout: None)
  monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
  monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
  return asked
