"""Grids of runs, and the report with its figures."""
