"""docs/long-context.md, what caches of several kinds cost along a long context: `make long-context`.

Each artifact is fed the same streams, in pieces and, where logits are read, token by token: a text, and in it facts,
each told once, somewhere, and asked for once, shortly before one of a few places. Read are the last tokens of the text
before a place, and the answers: one is found where each of its tokens was the likeliest.
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray

import devices
from export import formats, manifest
from export.architecture import Strict
from export.build.command import run as run_app
from export.checkpoints import tokenizer
from export.errors import ExportError
from export.host.console import say, stage
from export.manifest import ROOT, KVLayout, Manifest
from export.plan import Cache, ModelSpec, Policy, Target, load_named, load_plan, names
from export.toolbox import charts, significance
from export.toolbox.tables import NONE, Row, plain
from runtime_tests import evaluation, reference
from runtime_tests.bench import contenders, exports, publish
from runtime_tests.bench.results import StudyRun
from runtime_tests.bench.runners import device_runner
from runtime_tests.checks import accuracy, conformance
from runtime_tests.device_runner import Command, Feed, Logits, Reset
from runtime_tests.places import environment
from runtime_tests.reports import templates
from runtime_tests.sessions import open_session

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_PAGE = "long-context"
_RUNNERS = {"executorch-xnnpack": "device_runner"}
"""Targets that our C++ runner reads, for stock ExecuTorch's int8 takes an hour on x86; our session reads the others."""
_TEXTS = ("wikitext2.txt",)
"""A stream of each; each takes some ten minutes an artifact on a busy machine."""
_ON_MACS = ("coreml",)
"""Elsewhere our evaluator reads them."""
_POLICIES: dict[Policy, int] = {"window-1024": 8192, "sink-4": 2048}
"""With the context that they are built for: tokens leave only where it is full."""
_PLACES = (512, 1024, 2048, 4096, 6144, 8192)
_READ = 192
"""Tokens of text before each place whose predictions are read."""
_DEPTHS = (0.1, 0.35, 0.6, 0.85)
"""Where the facts that are asked for at a place are told, as shares of the way to it."""
_NAMES = (
    *("Lisbon", "Oslo", "Cairo", "Lima", "Rome", "Paris", "Tokyo", "Delhi", "Berlin", "Madrid", "Dublin", "Athens"),
    *("Vienna", "Prague", "Havana", "Moscow", "Sydney", "Boston", "Denver", "Dallas", "Austin", "London", "Milan"),
    "Geneva",
)


class Stream(NamedTuple):
    """Tokens, and by place those that are read: indices of tokens that a logits row before each is to predict."""

    tokens: list[int]
    text: dict[int, list[int]]
    answers: dict[int, list[list[int]]]

    @property
    def read(self) -> list[int]:
        """Every token that is read, in order."""
        return sorted(i for place, text in self.text.items() for i in chain(text, *self.answers[place]))

    def script(self) -> list[Command]:
        """Feeds the stream and asks for the logits before each token that is read."""
        commands: list[Command] = [Reset()]
        fed = 0
        for i in self.read:
            commands += [Feed(tuple(self.tokens[fed:i])), Logits()]
            fed = i
        return commands


class At(Strict):
    """What a reader made of the tokens before one place."""

    perplexity: float
    found: int
    kl: float | None
    """Mean, from the eager quantized model with a float32 cache; None: a reference."""
    error: float
    """95 % half interval of the difference of that mean to the first artifact's of the same target."""


class Reader(Strict):
    """An artifact or a reference."""

    label: str
    cache: str
    cache_bytes: int
    at: dict[int, At]


class LongContext(StudyRun):
    """Readers of the same streams."""

    texts: tuple[str, ...]
    read: int
    """Tokens of text before each place, of all streams."""
    asked: int
    """Facts at each place, of all streams."""
    readers: tuple[Reader, ...]
    note: str = ""
    """How this record came to be, where that was not one run of the command."""


def stream(loaded: Any, text: str, places: Sequence[int], seed: int) -> Stream:
    """A stream up to the last place. Raises ExportError: the text is too short for it."""
    chance = random.Random(seed)  # noqa: S311 – the same facts each time
    names = iter(_NAMES)
    facts = [(int(place * depth), place, _fact(loaded, next(names), chance)) for place in places for depth in _DEPTHS]
    waiting = sorted(facts, key=lambda fact: fact[0])
    filler = loaded.encode(text, add_special_tokens=False)
    if len(filler) < places[-1]:
        raise ExportError(f"the text has {len(filler)} tokens; {places[-1]} are read")
    made = Stream([loaded.bos_token_id] if tokenizer.adds_bos(loaded) else [], {}, {})
    for place in places:
        asked = [fact for _, at, fact in facts if at == place]
        of_text: list[int] = []
        while len(made.tokens) < place - sum(map(len, chain(*asked))):
            if waiting and waiting[0][0] <= len(made.tokens):
                made.tokens.extend(chain(*waiting.pop(0)[-1]))
            else:
                of_text.append(len(made.tokens))
                made.tokens.append(filler.pop(0))
        made.text[place], made.answers[place] = of_text[-_READ:], []
        for head, answer, tail in asked:
            start = len(made.tokens) + len(head)
            made.answers[place].append(list(range(start, start + len(answer))))
            made.tokens.extend([*head, *answer, *tail])
    return made


def _fact(loaded: Any, name: str, chance: random.Random) -> list[list[int]]:
    """What leads to the answer, the answer, and what ends it."""
    parts = (f"\nThe code of {name} is", f" {chance.randrange(1000, 10000)}", ".\n")
    return [loaded.encode(part, add_special_tokens=False) for part in parts]


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="a name in configs/models")],
    recipe: Annotated[str, typer.Argument(help="a name in configs/quant")],
    source: Annotated[str | None, typer.Option(help="where the weights come from")] = None,
    also: Annotated[
        list[Path] | None, typer.Option(help="further artifacts of these weights, by their folders")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help=f"write docs/{_PAGE}.md, its record and its figure")] = False,
) -> None:
    """Read the streams with the checkpoint, and with each format's artifact for each kind of cache that it offers."""
    trained = load_named(ModelSpec, "models", model).architecture
    context = min(trained.max_position_embeddings if trained else _PLACES[-1], _PLACES[-1])
    plans = [
        load_plan(model, recipe, target, length, cache=kind, policy=policy)
        for target in names("targets")
        for length, kind, policy in _asked_for(load_named(Target, "targets", target), context)
    ]
    folders = [*(ROOT / exports.built(plan, source) for plan in plans), *(also or ())]
    artifacts = [(folder, manifest.read(folder)) for folder in folders]
    places, loaded = [place for place in _PLACES if place <= context], tokenizer.load(folders[0])
    streams = [stream(loaded, evaluation.read_text(name), places, seed) for seed, name in enumerate(_TEXTS)]
    study = LongContext(
        texts=_TEXTS,
        read=_READ * len(_TEXTS),
        asked=len(_DEPTHS) * len(_TEXTS),
        readers=tuple(_readers(artifacts, source, streams)),
        **publish.conditions(model, ", ".join(_TEXTS)),
    )
    for title, rows in tables(study).items():
        say("", title, *plain(rows))
    if write:
        publish.publish_study(_PAGE, study, page(study), figure(study))


def _asked_for(target: Target, context: int) -> Iterator[tuple[int, Cache | None, Policy | None]]:
    """Context, kind and policy of the caches that are compared; none where reading takes an hour each."""
    if target.name in _ON_MACS and sys.platform != "darwin":
        return
    backend = formats.load(target.backend)
    yield from ((context, kind, None) for kind in backend.CACHES)
    for policy, length in _POLICIES.items():
        if policy.partition("-")[0] not in backend.NO_POLICIES:
            yield min(length, context), None, policy


def _readers(artifacts: list[tuple[Path, Manifest]], source: str | None, streams: list[Stream]) -> Iterator[Reader]:
    """The checkpoint, then the artifacts; the first of a target is what the others of it lose to."""
    threads = environment.threads(devices.load("host"))

    @cache
    def refer(kind: reference.Kind, activations: str) -> list[NDArray[np.float32]]:
        described = next(one for _, one in artifacts if activations in ("", one.plan.target.activations))
        with stage("reference", f"{kind} {activations}"):
            at = ROOT / "build" / "cache"
            return [reference.read(kind, described, source, at, s.tokens, [i - 1 for i in s.read]) for s in streams]

    yield Reader(label="checkpoint, eager", cache="float32", cache_bytes=0, at=_judged(streams, refer("fp32", "")))
    firsts: dict[str, list[NDArray[np.float32]]] = {}
    for folder, described in artifacts:
        target, kv = described.plan.target, described.contract.kv
        exact = refer("quantized", target.activations)
        with stage("artifact", described.id):
            logits = [_rows(folder, described, one.script(), threads) for one in streams]
            at = _judged(streams, logits, exact, firsts.setdefault(target.name, logits))
        yield Reader(label=target.name, cache=_words(kv), cache_bytes=formats.cache_bytes(kv), at=at)


def _words(kv: KVLayout) -> str:
    """`int8`, `float32, window of 1,024`, `float32, 2,048 slots, the first 4 stay`."""
    policy = f", window of {kv.window:,}" if kv.window else f", {kv.room:,} slots, the first {kv.sink} stay"
    return kv.dtype + policy * bool(kv.window or kv.sink)


def _rows(folder: Path, described: Manifest, script: Sequence[Command], threads: int) -> NDArray[np.float32]:
    if runner := _RUNNERS.get(described.plan.target.name):
        model = Path(folder.resolve(), described.plan.target.artifact)
        return device_runner.open_runner(contenders.opening(runner, model, folder, threads)).run(script)[1]
    session = open_session(folder, described, threads=threads)
    rows = conformance.execute(session, script)
    session.close()
    return rows


def _judged(
    streams: list[Stream],
    logits: list[NDArray[np.float32]],
    exact: list[NDArray[np.float32]] | None = None,
    first: list[NDArray[np.float32]] | None = None,
) -> dict[int, At]:
    """Logits [R, V] of each stream, those of the model without loss, and those of the artifact to compare with."""
    at = {}
    for place in streams[0].text:
        nll: list[float] = []
        kl: list[float] = []
        kl_of_first: list[float] = []
        found = 0
        for number, one in enumerate(streams):
            row_of = {i: row for row, i in enumerate(one.read)}
            for i in one.text[place]:
                mine = accuracy.log_softmax(logits[number][row_of[i]])
                nll.append(-float(mine[one.tokens[i]]))
                if exact and first:
                    truth, other = (accuracy.log_softmax(of[number][row_of[i]]) for of in (exact, first))
                    kl.append(float(accuracy.kl_divergence(truth, mine)))
                    kl_of_first.append(float(accuracy.kl_divergence(truth, other)))
            found += sum(
                all(logits[number][row_of[i]].argmax() == one.tokens[i] for i in answer)
                for answer in one.answers[place]
            )
        at[place] = At(
            perplexity=accuracy.perplexity(np.array(nll)),
            found=found,
            kl=float(np.mean(kl)) if kl else None,
            error=significance.paired(kl_of_first, kl),
        )
    return at


def tables(study: LongContext) -> dict[str, list[Row]]:
    """Title → a row for each reader, a column for each place."""
    head = ("reader", "cache", "MB", *(f"{place:,}" for place in study.readers[0].at))

    def table(shown: Callable[[At], str]) -> list[Row]:
        return [head, *((*_names(reader), *map(shown, reader.at.values())) for reader in study.readers)]

    return {
        "perplexity": table(lambda at: f"{at.perplexity:.2f}"),
        "mean KL": table(lambda at: NONE if at.kl is None else f"{at.kl:.4f}" + f" ± {at.error:.4f}" * (at.error > 0)),
        f"facts found, of {study.asked}": table(lambda at: str(at.found)),
    }


def _names(reader: Reader) -> tuple[str, str, str]:
    return reader.label, reader.cache, f"{reader.cache_bytes / 1e6:.0f}" if reader.cache_bytes else NONE


def page(study: LongContext) -> str:
    """docs/long-context.md."""
    return templates.render(
        publish.TEMPLATES / "long-context.md.j2",
        run=study,
        tables=tables(study),
        figure=f"{_PAGE}.svg",
        command="make long-context",
    )


def figure(study: LongContext) -> str:
    """Perplexity of each reader over the places."""
    label, places = "perplexity before a place in the context", list(study.readers[0].at)
    x = charts.linear([0, *places], 60, 500)
    y = charts.linear([at.perplexity for reader in study.readers for at in reader.at.values()], 360, 40)
    rows = charts.apart([y(value) for value in sorted((_last(r) for r in study.readers), reverse=True)])
    parts = [charts.text(16, 22, label, charts.STRONG), *charts.axes(x, y, "tokens in the cache")]
    for number, (row, reader) in enumerate(zip(rows, sorted(study.readers, key=_last, reverse=True), strict=True)):
        name = f"{reader.label}, {reader.cache}"
        points = [(x(place), y(at.perplexity)) for place, at in reader.at.items()]
        parts += [
            charts.polyline(points, number, name),
            charts.line(points[-1][0], points[-1][1], 512, row),
            charts.rect(514, row - 5, 10, 10, fill=charts.colour(number)),
            charts.text(530, row + 4, name),
        ]
    return charts.document(900, 408, label, parts)


def _last(reader: Reader) -> float:
    return list(reader.at.values())[-1].perplexity


if __name__ == "__main__":
    sys.exit(run_app(app))
