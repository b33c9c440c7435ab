"""The built-in testbed: a small synthetic world (a data set) and models pretrained on it."""
