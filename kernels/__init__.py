"""Array kernels of gpurho: descriptors and cell lists on the CPU (Numba) and on CUDA devices.

They know arrays only: no ASE, no files, no models. The CUDA side is imported when it is used.
"""
