"""The command line: one short function per command, grouped by file. Heavy imports happen inside the commands."""
