"""RESTORE as the paper states it (arXiv 2606.01711), for one sequence; nothing here comes from himap_jax."""

import math

import torch


def gain(closeness: torch.Tensor, is_image: torch.Tensor, is_prompt: torch.Tensor, count: float) -> torch.Tensor:
  """What attention logits [S, S] gain after tokens were removed: log s_n + log(2 − D) of image tokens' keys.

  `closeness` is D [S, S]; queries after the prompt gain log s_n alone, s_n being `count`.
  """
  by_distance = torch.where(is_image[None] & is_prompt[:, None], torch.log(2 - closeness.double()), 0)
  return (by_distance + torch.where(is_image[None], math.log(count), 0)).float()


def closeness(angles: torch.Tensor) -> torch.Tensor:
  """D = 2/H Σ_j cos(θ_j (m − n)) from the angles θ_j m of every token, [S, H/2]."""
  return torch.cos(angles[:, None].double() - angles[None].double()).mean(dim=-1)
