"""Objectives: modules that turn log-probabilities into a loss, without knowing a model, a batch or a trainer."""
