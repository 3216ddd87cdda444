# How GPAW is built for gpurho: without MPI. gpurho runs several calculations side by side, not one on many ranks, and
# Debian's Quantum ESPRESSO brings an mpic++ that cannot link, which GPAW would take for a working one.
mpi = False
compiler = "g++"
libraries = ["xc", "blas"]
