"""A run: settings resolved, models assembled, steps taken."""
