"""Runners in Python: this folder goes to the device as it is and imports nothing from outside it but its runtime."""
