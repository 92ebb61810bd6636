"""Define the version of the package, for its metadata, reports and documentation."""

__version__ = "0.1.0"
