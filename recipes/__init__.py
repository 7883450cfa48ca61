"""Provide the bundled recipes, YAML files that ``minibert train NAME`` runs."""
