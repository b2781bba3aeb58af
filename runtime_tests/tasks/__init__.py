"""lm-evaluation-harness tasks on the artifact as shipped, beside the fp32 model of the same checkpoint."""
