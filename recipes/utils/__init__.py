"""Shared by all rooms: errors, command-line parser, ranges of numbers, redaction of secrets, files, text and HTML."""
