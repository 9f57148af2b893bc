"""How each model family is made from a recipe and a dataset."""
