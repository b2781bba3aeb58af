"""Checkpoint to artifact: plan, quantize once, lower. Never imports runtime_tests or devices.

`build` is the door for Python (docs/python.md); `python -m export` is thin over it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from . import build as _room  # noqa: F401 – loaded later, the room would take the place of the function of its name

if TYPE_CHECKING:
    from .manifest import Manifest
    from .plan import Cache, Device, Policy


def build(  # noqa: PLR0913 – the options of the command
    model: str,
    recipe: str,
    target: str,
    *,
    source: str | Path | None = None,
    adapter: str | Path | None = None,
    name: str | None = None,
    context: int | None = None,
    cache: "Cache | None" = None,
    policy: "Policy | None" = None,
    device: "Device" = "cpu",
    out: str | Path | None = None,
) -> "Manifest":
    """Build one artifact folder and return its manifest; a folder that holds what would be written stays as it is.

    `model`, `recipe` and `target` are names in configs/models, configs/quant and configs/targets. `source` is a folder,
    a .gguf file or a hub id, `adapter` the folder of a LoRA adapter that is merged into it, or into the base that the
    adapter names. `name` is the artifact's, by default the adapter's or source's own, or the model's. `context`
    replaces the model's context_length (tokens), `cache` the target's kind of KV cache (`float32`, `float16`,
    `bfloat16` or `int8`), `out` the folder build/NAME_RECIPE_TARGET[_CONTEXT][_CACHE][_POLICY] below the working
    folder. `policy` says which tokens stay in the cache: `window-N` the last N, `sink-N` the first N and the newest.
    `device` is where calibration computes: `cpu` or `cuda`, whose integers differ a little.
    Raises ExportError: a mistake in any of these, or a machine that cannot build it.
    """
    from . import manifest
    from .build import request, skip
    from .host import disk
    from .host.console import console

    (plan,), origin = request.asked(
        model,
        recipe,
        [target],
        source=source,
        adapter=adapter,
        name=name,
        context=context,
        cache=cache,
        policy=policy,
        device=device,
    )
    folder = request.place(plan, None if out is None else disk.expanded(out), several=False)
    if not skip.is_stale(plan, origin, folder):
        return manifest.read(folder)
    from . import pipeline

    console.print(plan.id, style="bold", soft_wrap=True)
    built = pipeline.export(plan, origin, folder)
    disk.trim(disk.cache_folder(pipeline.CACHE))
    return built
