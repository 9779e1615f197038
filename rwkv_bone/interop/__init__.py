"""Formats and command lines of other programs; nothing else knows them. May be imported by files/, merging/ and config.py."""
