"""Answers and scores benchmarks with every setting."""
