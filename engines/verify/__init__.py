"""Graphs against a reference run: how each is fed, how results are compared, which gates must hold.

The reference itself is passed in through the protocols in protocol.py. May use engines.runners, engines.chain and
graphs.
"""
