"""Connectors: from tower features to the decoder's width."""
