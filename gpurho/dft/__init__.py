"""Density functional theory: pseudopotentials, engines, and the files that they read and write."""
