"""Records for tests: one with every field set, and the gates that failed in one."""

from functools import cache

import numpy as np

from runtime_tests import evaluation
from runtime_tests.checks import accuracy, speed
from runtime_tests.evidence.record import Accuracy, Gate, Latency, Outcome, Record
from runtime_tests.places import environment, facts


def sample_comparison(noise=0.01):
    rng = np.random.default_rng(1)
    reference = rng.standard_normal((2, 65, 40)).astype(np.float32)
    candidate = reference + noise * rng.standard_normal(reference.shape).astype(np.float32)
    labels = accuracy.Labels(["english", "hindi"], evaluation.position_ranges(64, 64))
    return accuracy.compare(reference, candidate, rng.integers(0, 40, (2, 65)), labels)


def sample_latency():
    tests = (
        speed.speed_test(42, 0, [10_000_000, 11_000_000, 12_000_000, 10_500_000, 11_500_000]),
        speed.speed_test(0, 64, [640_000_000, 650_000_000, 660_000_000, 655_000_000, 645_000_000]),
    )
    return Latency(
        measured=True, note="", n_threads=2, model_size=1_000_000, model_n_params=2_000_000, load_s=0.25,
        first_inference_s=0.05, ttft_p50_s=0.011, tests=tests, token_p50_s=0.01, token_p95_s=0.012,
        token_samples_ns=((10, 11), (12, 13)), cv=0.05,
        first_third_ts=101.0, last_third_ts=99.0, peak_rss_bytes=123_000_000, rss_before_load_bytes=80_000_000,
        bytes_per_token=900_000, read_bandwidth_bytes_per_s=2e10, bandwidth_share=0.0044,
    )  # fmt: skip


here = cache(environment.current)
"""The machine that runs the tests."""


def sample_record(**changes):
    lowering, total = sample_comparison(), sample_comparison(noise=0.5)
    gate = Gate(
        name="lowering: mean KL", value=lowering.mean_kl, limit=1e-3, rule="at most", verdict="pass",
        fails_as=Outcome.MISMATCH, detail="",
    )  # fmt: skip
    fields = {
        "schema_version": 4, "run_id": "20260101-000000", "proof": "", "artifact": "tiny_int4-g32_fake",
        "manifest_sha256": "ab" * 32,
        "plan_key": dict.fromkeys(("model", "recipe", "target", "context", "evaluation"), "0a1b2c3d"),
        "size_bytes": 1_000_000, "bits_per_weight": 4.9, "device": "host", "emulated": False,
        "environment": here(), "state_before": facts.state(""),
        "state_after": facts.state(""), "commit": "c" * 40, "dirty": False,
        "started_at": "2026-01-01T00:00:00+00:00", "seconds": 1.5, "gates": (gate,),
        "accuracy": Accuracy(evaluation="default", prefill=64, decode=64, domains=("english", "hindi"),
                             total=total, rewriting=lowering, quantization=lowering, noise=None, lowering=lowering,
                             probe_sqnr_db=()),
        "latency": sample_latency(), "outcome": Outcome.PASS, "detail": "",
    }  # fmt: skip
    return Record.model_validate(fields | changes)


def failed(record):
    return {gate.name for gate in record.gates if gate.verdict == "fail"}
