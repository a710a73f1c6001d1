"""The demo model's data and training.

`packages` and `cutouts` give pictures of single things, `scenes` composes them, `questions` asks about a scene; `data` mixes
scenes and easy-VQA into training samples, `packing` makes batches of them. `align` gives the projector its start, `train`
trains it with low-rank updates of the language model, `average` averages trained adapters, `evaluate` measures accuracy.
"""
