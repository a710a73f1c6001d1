"""Pruning of image tokens: methods, schedules of stages, and costs; plain arrays and integers only."""
