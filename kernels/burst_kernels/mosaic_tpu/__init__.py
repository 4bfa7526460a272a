"""Attention tiles for TPU: Pallas kernels for the Mosaic compiler."""
