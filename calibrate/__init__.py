"""Calibration: data, streamed reference model, statistics, stage choice, budget and evaluation."""
