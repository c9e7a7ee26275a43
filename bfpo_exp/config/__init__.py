"""The settings of a run: their types and ranges, and what is said of a bad one."""
