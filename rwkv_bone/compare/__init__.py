"""Methods against each other: rates tuned, seeds, table and picture. The command line is in command.py."""
