"""Train models with recipes, stages and a training loop."""
