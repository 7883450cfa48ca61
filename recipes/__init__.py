"""The recipes that ship with MiniBERT: YAML files, run with ``minibert train NAME.yaml``."""
