"""Ranks on this machine or on a hostfile's; the watch over a launcher."""
