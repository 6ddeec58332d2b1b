"""What is measured on samples: change per layer, divergence of answers, accuracy, and the cache of statistics.

May use calibrate.data and calibrate.reference.
"""
