"""Negative transfer on real digits: when source data hurt, for whom, and what a discriminator gate does about it."""
