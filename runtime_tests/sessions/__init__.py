"""One module per runtime, found by the name in the target YAML."""
