"""A random checkpoint of LLaVA's tower and connector with Llama-3.2-Vision's decoder, and its parts in torch."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import tiny_checkpoints
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.mllama import modeling_mllama

TEXT = dict(
  model_type="mllama_text_model",
  vocab_size=tiny_checkpoints.VOCAB_SIZE,
  hidden_size=48,
  intermediate_size=96,
  num_hidden_layers=5,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=512,
  cross_attention_layers=[1, 3],
  rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
  tie_word_embeddings=True,
  bos_token_id=0,
  eos_token_id=1,
  pad_token_id=2,
)


@dataclasses.dataclass(frozen=True)
class TinyCross:
  """The checkpoint, and its parts in torch: a LLaVA, whose decoder is not used, and the decoder."""

  directory: pathlib.Path
  llava: tiny_checkpoints.Tiny
  decoder: transformers.MllamaForCausalLM

  @torch.no_grad()
  def logits(self, ids: list[int], pixels: np.ndarray, kept: list[int] | None = None) -> torch.Tensor:
    """Logits [S, V] of a row with one picture, of whose image tokens only the kept ones are read."""
    states = self.llava.model.get_image_features(torch.tensor(pixels)).pooler_output[0][None]
    states = states if kept is None else states[:, kept]
    ids = torch.tensor(ids)[None]
    reads = (ids == self.llava.model.config.image_token_id).cumsum(dim=1)[:, :, None, None]
    mask, full_row = modeling_mllama._prepare_cross_attention_mask(reads, states.shape[1], torch.float32)
    arguments = dict(cross_attention_mask=mask, full_text_row_masked_out_mask=full_row)
    return self.decoder(ids, cross_attention_states=states, **arguments).logits[0]


def make(llava: tiny_checkpoints.Tiny, directory: pathlib.Path) -> TinyCross:
  """Puts the tower, connector and processor of a LLaVA together with a new decoder."""
  config = transformers.MllamaTextConfig(**{name: value for name, value in TEXT.items() if name != "model_type"})
  config._attn_implementation = "eager"
  decoder = transformers.MllamaForCausalLM(config).eval()
  tiny_checkpoints.randomize(decoder, seed=5)
  with torch.no_grad():
    decoder.lm_head.weight.copy_(decoder.model.embed_tokens.weight[: config.vocab_size])
    for name, parameter in decoder.named_parameters():
      if "gate" in name and parameter.shape == (1,):
        parameter.copy_(parameter + parameter.sign())
  saved = load_file(llava.directory / "model.safetensors")
  tensors = {name: value for name, value in saved.items() if "vision_tower" in name or "projector" in name}
  tensors |= {f"model.language_model.{name}": value for name, value in decoder.model.state_dict().items()}
  embeddings = "model.language_model.embed_tokens.weight"
  tensors[embeddings] = tensors[embeddings][: config.vocab_size]
  save_file({name: value.clone() for name, value in tensors.items()}, directory / "model.safetensors")
  fields = json.loads((llava.directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(fields | {"model_type": "llava_cross", "text_config": TEXT}))
  for path in llava.directory.iterdir():
    if not (directory / path.name).exists() and not path.name.startswith("model"):
      shutil.copy(path, directory)
  return TinyCross(directory, llava, decoder)
