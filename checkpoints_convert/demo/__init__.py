"""The demo checkpoint: a LLaVA assembled from pretrained parts that are contained in packages."""
