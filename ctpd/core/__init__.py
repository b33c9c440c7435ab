"""The parts that know nothing of models: errors, configuration, recipes, the store and the records."""
