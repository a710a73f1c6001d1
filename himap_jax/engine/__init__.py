"""The engine: prefill with pruning, decoding from the pruned cache, compiled programs, meshes and processes."""
