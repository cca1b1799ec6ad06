"""Micro-benchmarks of what surgery costs, against plain training, naive code and TorchJD.

Every figure is a ratio of two things measured in one run, in turns, so that it carries over to other machines better than
seconds do, and noise hits both alike. ``python -m benchmarks --help`` says how to run them.
"""
