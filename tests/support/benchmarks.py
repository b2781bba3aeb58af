"""A benchmark run that was never measured, for tests of pages and records; logits of llama.cpp."""

import numpy as np

from runtime_tests.bench.results import Benchmark, Entry, ExportCost, Fidelity, HostOverhead, Sample, Settings, Timing
from runtime_tests.evidence.record import Outcome, Slice
from runtime_tests.jobs import BenchLogitsJob, Opening, isolation
from tests.support.records import here

SETTINGS = Settings(
    threads=2, context=256, prompts=(4, 8), generate=16, passes=2, repetitions=3, far_prompt=128, far_generate=64
)


def timing(decode_tps, *, prefill_tps=1000.0):
    passes = ((16, round(16e9 / decode_tps)), (16, round(16e9 / decode_tps)))
    prompts = {n: ((n, round(n * 1e9 / prefill_tps)),) * 2 for n in (4, 8)}
    return Timing(
        load_ns=10**8,
        first_ns=10**7,
        prompts=prompts,
        decode=passes,
        far=((64, round(64e9 / (decode_tps * 0.5))),),
        peak_rss_bytes=3 * 10**8,
        far_peak_rss_bytes=4 * 10**8,
    )


def entry(name, *, ours, against=()):
    return Entry(
        name=name,
        label=f"{name} file",
        ours=ours,
        runtime="a runtime",
        size_bytes=90_000_000 if ours else 100_000_000,
        weight_bytes_per_token=80_000_000,
        kv_bytes_per_position=100_000,
        against=against,
        made_by="" if ours else "python -m stock --option 1",
        tools={} if ours else {"exporter": "1.2.3"},
    )


def sample(name, repetition, decode_tps):
    outcome = Outcome.PASS if decode_tps else Outcome.CRASH
    return Sample(
        contender=name,
        repetition=repetition,
        position=0,
        load_average_1min=0.5,
        outcome=outcome,
        detail="" if decode_tps else "died by SIGSEGV",
        timing=timing(decode_tps) if decode_tps else None,
    )


def stored_run(model="tiny"):
    """Ours twice as fast as stock, a third contender that always dies."""
    rates = {"ours": (120, 100, 80), "stock": (60, 50, 40), "dead": (0, 0, 0)}
    fields = {"positions": 65, "p99_kl": 0.9, "top1": 0.75, "perplexity": 20.0, "reference_perplexity": 18.0}
    by_domain = {kind: Slice(mean_kl=kl, **fields) for kind, kl in (("prose", 0.1), ("code", 0.15))}
    ours = Fidelity(contender="ours", outcome=Outcome.PASS, detail="", mean_kl=0.125, by_domain=by_domain, **fields)
    return Benchmark(
        schema_version=3,
        run_id="20260102-030405",
        command=f"python -m runtime_tests.bench {model} --write",
        model=model,
        quant="int4-g32",
        started_at="2026-01-02T03:04:05+00:00",
        seconds=90,
        commit="0123456789abcdef" * 4,
        dirty=False,
        environment=here(),
        load_average_after=1.5,
        evaluation="default",
        checkpoint="random weights, seed 20",
        settings=SETTINGS,
        entries=(
            entry("ours", ours=True, against=("stock", "dead")),
            entry("stock", ours=False),
            entry("dead", ours=False),
        ),
        missing={"llama.cpp": "not installed: pip install it"},
        samples=tuple(sample(name, i, rate) for name, values in rates.items() for i, rate in enumerate(values)),
        read_bandwidth_bytes_per_s=(40e9, 20e9, 10e9),
        overheads=(HostOverhead(label="onnx-cpu", step_ns=(1000, 3000, 1000), runtime_ns=(900, 2900, 950)),),
        fidelity=(ours,),
        exports=(
            ExportCost(
                label="stock exporter", command="c", seconds=721, peak_rss_bytes=2_890_000_000, load_average_1min=1.0
            ),
        ),
    )


def llama_cpp_logits(path, folder, tokens, prefill):
    """In a process of its own, for a llama.cpp that was compiled wrongly dies (docs/decisions.md, "AMX")."""
    np.save(folder / "tokens.npy", np.array([[*tokens, 0]]))
    job = BenchLogitsJob(
        opening=Opening(runner="llamacpp", path=str(path), tokenizer="", context=256, threads=1),
        vocab_size=512,
        tokens=str(folder / "tokens.npy"),
        prefill=prefill,
        out=str(folder / "logits.npy"),
    )
    ended = isolation.run(job, limit_s=60)
    assert ended.outcome is Outcome.PASS, ended.detail
    return np.load(folder / "logits.npy")[0]
