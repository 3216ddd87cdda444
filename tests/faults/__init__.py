"""Faults on purpose: kills, full disks, torn and changed files, signals, clocks; and what must be left after each.

``pytest tests/faults`` runs a short form, ``make faults`` (``python -m faults`` with ``tests`` on the path) the full
one, whose figures go to ``benchmarks/results/reliability.json``, scenario by scenario.
"""
