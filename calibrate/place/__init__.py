"""From measurements to a plan: stage layers, counts, balance, candidates, search, presets, ablations.

May use every other room of calibrate; calibrate.py and pareto.py, beside the rooms, use this one.
"""
