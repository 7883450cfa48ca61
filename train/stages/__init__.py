"""Implement the kinds of stages of a recipe, one module for each kind.

The function of a stage takes the arguments of the stage and a :class:`StageContext`. It writes
a complete model folder to ``context.output_dir`` and returns the content of ``metrics.json``.
Metrics with the prefix ``eval_`` are measured on ``eval_data`` with the best model. If data or
a model is not valid, the function raises ValueError. Messages about rows have row numbers.
"""
