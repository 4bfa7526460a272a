"""Attention tiles for NVIDIA Hopper in Pallas Mosaic GPU: wgmma, TMA, specialised warps."""
