"""Build the tiny model of a class, on which the experiments run."""
