"""Stages as notebooks: their contract, runner, records and warm kernels."""
