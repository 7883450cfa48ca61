"""Reads rows by path: files and folders here, data sets on the Hub, and the documentation of the installed packages."""
