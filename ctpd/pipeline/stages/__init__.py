"""One module per stage: configuration, inputs, `build`, and methods that read the artifact."""
