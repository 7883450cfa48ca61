"""Side-by-side measurements of MiniBERT and its peers; not part of the wheel. ``python -m benchmarks --help``."""
