"""The results of validation over time: records, baselines, changes beyond noise, proofs that need no repetition."""
