"""From artifact to evidence: run the shipped file, compare it, measure it, record the results.

Start at `validate`; its checks start jobs, and a job opens the artifact in a session.
"""
