"""The decoders of the LLaMA line, which all families share: from transformers' text config to `TextConfig`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from himap_jax.errors import UserError, check_supported
from himap_jax.model.config import RopeConfig, TextConfig
from himap_jax.model.linear import ACTIVATIONS

ROPE_TYPES = ("default", "linear", "llama3")


def _llama(hf: Any) -> dict[str, Any]:
  return _same_bias(hf) | dict(mlp_bias=hf.mlp_bias)


def _mistral(hf: Any) -> dict[str, Any]:
  return _windows(hf, ["sliding_attention"] * hf.num_hidden_layers)


def _qwen2(hf: Any) -> dict[str, Any]:
  return dict(qkv_bias=True) | _windows(hf, hf.layer_types)


def _qwen3(hf: Any) -> dict[str, Any]:
  return _qwen3_vl(hf) | _windows(hf, hf.layer_types)


def _qwen3_vl(hf: Any) -> dict[str, Any]:
  return _same_bias(hf) | dict(qk_norm=True)


def _gemma(hf: Any) -> dict[str, Any]:
  return _same_bias(hf) | dict(norm_offset=True, embedding_scale=hf.hidden_size**0.5)


def _gemma3(hf: Any) -> dict[str, Any]:
  windows = _windows(hf, hf.layer_types)
  more = dict(
    qk_norm=True,
    query_scale=(hf.head_dim / hf.query_pre_attn_scalar) ** 0.5,
    output_norms=True,
    local_rope=_rope(hf.rope_parameters["sliding_attention"]),
    local_layers=windows["sliding_layers"],
  )
  return _gemma(hf) | windows | more


def _phi3(hf: Any) -> dict[str, Any]:
  return _mistral(hf) | dict(rotary_dim=int(_head_dim(hf) * hf.rope_parameters["partial_rotary_factor"]))


def _same_bias(hf: Any) -> dict[str, Any]:
  return dict(qkv_bias=hf.attention_bias, output_bias=hf.attention_bias)


def _windows(hf: Any, layer_types: list[str]) -> dict[str, Any]:
  sliding = [layer for layer, kind in enumerate(layer_types) if kind == "sliding_attention"]
  return dict(sliding_window=hf.sliding_window, sliding_layers=tuple(sliding))


def _rope(parameters: Mapping[str, Any]) -> RopeConfig:
  scaling = {field.name for field in dataclasses.fields(RopeConfig)} & parameters.keys()
  return RopeConfig(theta=parameters["rope_theta"], **{name: parameters[name] for name in scaling})


def _head_dim(hf: Any) -> int:
  return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


# By `model_type`: what transformers' module computes besides what all have in common.
TEXT_MODELS: dict[str, Callable[[Any], dict[str, Any]]] = {
  "llama": _llama,
  "mistral": _mistral,
  "qwen2": _qwen2,
  "qwen3": _qwen3,
  "gemma": _gemma,
  "gemma3_text": _gemma3,
  "phi3": _phi3,
  "qwen2_vl_text": _qwen2,
  "qwen2_5_vl_text": _qwen2,
  "qwen3_vl_text": _qwen3_vl,
}


def check_text_model(fields: Mapping[str, Any], where: str) -> None:
  """Raises `UserError` unless the `model_type` in the fields of a text config is in `TEXT_MODELS`."""
  check_supported(fields.get("model_type", "llama"), TEXT_MODELS, where=where, what="language model")


def text_config(
  hf: Any, where: str, *, tied: bool | None = None, options: Mapping[str, Any] | None = None
) -> TextConfig:
  """The sizes described by transformers' config of a model in `TEXT_MODELS`.

  Args:
    hf: the config.
    where: its file, for messages.
    tied: `tie_word_embeddings` of the whole model; either config can tie the head.
    options: extra `TextConfig` fields for models outside `TEXT_MODELS`.

  Raises:
    UserError: the activation, RoPE scaling or attention is not supported; the message names what is.
  """
  ropes = [dict(own) for own in hf.rope_parameters.values() if isinstance(own, Mapping)] or [dict(hf.rope_parameters)]
  for own in ropes:
    check_supported(own.get("rope_type", "default"), ROPE_TYPES, where=where, what="RoPE scaling")
  hidden_act = getattr(hf, "hidden_act", None) or getattr(hf, "hidden_activation", None)
  check_supported(hidden_act, ACTIVATIONS, where=where, what="activation")
  if getattr(hf, "use_bidirectional_attention", None):
    raise UserError(f"{where}: bidirectional attention (use_bidirectional_attention) is not supported; causal is")
  for name in ("attn_logit_softcapping", "final_logit_softcapping"):
    if getattr(hf, name, None):
      raise UserError(f"{where}: soft caps of logits ({name}) are not supported")
  common = dict(
    vocab_size=hf.vocab_size,
    hidden_size=hf.hidden_size,
    intermediate_size=hf.intermediate_size,
    num_hidden_layers=hf.num_hidden_layers,
    num_attention_heads=hf.num_attention_heads,
    num_key_value_heads=hf.num_key_value_heads or hf.num_attention_heads,
    head_dim=_head_dim(hf),
    rms_norm_eps=hf.rms_norm_eps,
    max_position_embeddings=hf.max_position_embeddings,
    tie_word_embeddings=bool(getattr(hf, "tie_word_embeddings", False) or tied),
    hidden_act=hidden_act,
    rope=_rope(hf.rope_parameters.get("full_attention", hf.rope_parameters)),
    rotary_dim=_head_dim(hf),
  )
  if options is None:
    check_supported(hf.model_type, TEXT_MODELS, where=where, what="language model")
    options = TEXT_MODELS[hf.model_type](hf)
  return TextConfig(**common | options).within(hf.max_position_embeddings)


def cross_text_config(hf: Any, where: str, *, tied: bool, num_extra_embeddings: int = 0) -> TextConfig:
  """The sizes described by transformers' `MllamaTextConfig`: a LLaMA decoder with cross-attention layers.

  Args:
    tied: whether the head is tied.
    num_extra_embeddings: embeddings of tokens after those of the head.

  Raises:
    UserError: as `text_config`; the decoder is another; or the cross-attention layers are not some of its layers.
  """
  check_supported(hf.model_type, ["mllama_text_model"], where=where, what="language model")
  layers, depth = hf.cross_attention_layers, hf.num_hidden_layers
  if not layers or sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= depth:
    raise UserError(
      f"{where}: cross_attention_layers must ascend and be some of the decoder's layers 0 to {depth - 1}, not {layers}"
    )
  more = dict(cross_attention_layers=tuple(layers), num_extra_embeddings=num_extra_embeddings)
  return dataclasses.replace(text_config(hf, where, options=more), tie_word_embeddings=tied)


def check_cross_layers(fields: Mapping[str, Any], where: str) -> None:
  """Raises `UserError` unless `cross_attention_layers` in the fields of a text config, if any, is a list of layers."""
  layers = fields.get("cross_attention_layers", [0])
  if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
    raise UserError(f"{where}: cross_attention_layers must be a list of layers, not {layers!r}")
