"""Reads rows by path: local files and folders, data sets on the Hub, and installed docs."""
