"""The built-in testbed: a small synthetic world with models of its own."""
