"""Merging: base + adapters -> one standard model file. The command line is in command.py."""
