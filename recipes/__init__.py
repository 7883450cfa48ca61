"""Contain the bundled recipes. A recipe is a YAML file that ``minibert train NAME`` runs."""
