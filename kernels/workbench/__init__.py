"""Reports, sweeps and checks of the tile kernels, run from a clone: none of it is shipped."""
