"""Implement the kinds of stages of a recipe, one module for each kind.

The function of a stage takes the arguments of the stage and a :class:`StageContext`. It writes
a complete model folder to ``context.output_dir`` and returns the content of ``metrics.json``.
Names of metrics on ``eval_data`` begin with ``eval_`` and belong to the best model. If data or
a model do not fit, the function raises ValueError and names the row.
"""
