"""The model: vision tower, connector, decoder, and the kernels that a platform needs. It knows no flag, file or mesh
policy.
"""
