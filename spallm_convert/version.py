"""The version of the package, for everything that reads it: metadata, reports, documentation."""

__version__ = "0.1.0"
