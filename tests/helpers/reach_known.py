"""What is known to fall short: each entry says why, and goes when it is mended."""

#: Least share of the linear weights that is sketched, and why no more is, by model class.
SHARES: dict[str, tuple[float, str]] = {}

#: What fails after the conversion, by model class.
FAULTS: dict[str, str] = {}
