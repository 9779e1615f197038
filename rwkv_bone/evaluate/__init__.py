"""Measuring models: GSM8K, MATH, and the loss on any text. The command line is in command.py."""
