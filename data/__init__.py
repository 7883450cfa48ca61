"""Read data, labels and questions from files, the Hub or the installed documentation."""
