"""Sampling and chat. The command line is in command.py."""
