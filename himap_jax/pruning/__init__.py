"""Pruning of image tokens: methods, schedules of their stages, and what these cost; plain arrays and integers only."""
