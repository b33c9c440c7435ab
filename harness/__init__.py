"""Evaluation and comparison: lm-eval's scores of trained models, and tables made from the records alone."""
