"""dualign: align language models from online scalar rewards."""

__version__ = "0.1.0"
