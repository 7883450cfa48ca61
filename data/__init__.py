"""Read data, labels and questions from files, the Hub or the docstrings of packages."""
