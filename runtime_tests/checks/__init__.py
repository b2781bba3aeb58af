"""The checks of an artifact. Each returns a `Finding`: measured values and the gates that judge them.

`validate._examine` calls them in turn; what runs in a child process or on a device is a job (`runtime_tests.jobs`).
"""
