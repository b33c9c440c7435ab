"""Pure tensor functions: log-probabilities, sums over units and importance weights. No I/O, no global state."""
