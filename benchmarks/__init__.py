"""Benchmarks of speed and memory against the strongest other implementation, on the same machine, inputs and number of
threads. `make bench` runs all."""
