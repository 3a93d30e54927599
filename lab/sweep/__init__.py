"""Sweeps: a grid of mixes that share their work, on one machine or many. `python -m lab.sweep --help` says how."""
