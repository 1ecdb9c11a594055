"""Runs and what they record: journals, MLflow, hardware use, provenance, training, trials, comparison."""
