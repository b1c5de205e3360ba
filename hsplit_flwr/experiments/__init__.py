"""Experiments: rivals and ablations on one engine, a virtual clock, text metrics, and a runner of whole matrices."""
