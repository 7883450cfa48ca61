"""Makes models: recipes, their stages and the training loop."""
