"""Recipes: Hydra composition, the typed RunConfig, and the checks across its fields."""
