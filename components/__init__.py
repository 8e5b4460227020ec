"""The URM system: from behaviour logs to an asynchronous recall service."""

__version__ = "0.1.0"
