"""One pass over a dataset: statistics, action grids, and what is wrong with it."""
