"""From measurements to a plan: stage layers, counts, balance, candidates, search, Pareto front, presets, ablations.

May use every other room of calibrate.
"""
