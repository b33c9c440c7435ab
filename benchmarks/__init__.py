"""Speed and memory, measured beside the strongest peer on the same machine, inputs and threads; `make bench` runs all."""
