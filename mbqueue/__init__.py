"""mbqueue: very long CHGNet trainings on short GPU sessions."""

__version__ = "0.1.0"
