"""Finished artifacts (inspect, diff, verify, sign, charts, tables) and checkpoints for trials. Decides no artifact."""
