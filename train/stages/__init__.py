"""The stages of a recipe, one module each.

A stage takes its arguments and the :class:`StageContext` that the recipe gives it. It
leaves a complete model folder in ``context.output_dir`` and returns the metrics of
``metrics.json``; those measured on ``eval_data`` are of the best model and begin with
eval_. It raises ValueError for data or a model that does not fit, with the number of the
row, and the errors of :func:`fit`.
"""
