"""From a recipe to trained students: the method table, the runs, the stages and the graph that runs them."""
