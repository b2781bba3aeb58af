"""Artifact to evidence: run what ships, compare, measure, record."""
