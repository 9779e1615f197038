"""Training: from a command line to a finished run."""
