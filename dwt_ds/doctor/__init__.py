"""`dwt-ds doctor`: whether the hosts of a run can train together, and what to do about each that cannot."""
