"""The demo model's data and training.

`packages` and `cutouts` provide pictures of single things, `scenes` composes them, `questions` asks about a scene;
`data` mixes scenes and easy-VQA into training samples, and `packing` batches them. `align` initialises the projector,
`train` trains it with low-rank updates of the language model, `adapter` holds both and averages them, `evaluate`
measures accuracy.
"""
