"""The demo checkpoint: a LLaVA assembled from pretrained parts that come inside packages."""
