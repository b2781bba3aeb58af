"""The shape of the product, counted: files, lines, entries of each folder, imports. `make shape` prints it."""

import ast
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).parents[2]
PRODUCT = ("export", "runtime_tests", "devices")
CODE = {".py", ".cpp", ".h"}


@dataclass(frozen=True)
class Import:
    """One import of a module of ours; `names` is empty where the module itself is bound."""

    importer: str
    module: str
    names: tuple[str, ...]
    line: int
    lazy: bool
    """Inside a function, or for type checkers only: it cannot close a cycle when modules are loaded."""


@cache
def tracked(*folders: str) -> tuple[Path, ...]:
    """Files of these folders that git knows or would add."""
    words = ["git", "ls-files", "-co", "--exclude-standard", "--", *folders]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return tuple(sorted(Path(line) for line in listed if line and (ROOT / line).is_file()))


def product_code() -> list[Path]:
    return [path for path in tracked(*PRODUCT) if path.suffix in CODE]


def lines(path: Path) -> int:
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def entries(*folders: str) -> dict[str, int]:
    """How many files and folders each folder holds, all levels below `folders`."""
    inside: dict[Path, set[Path]] = defaultdict(set)
    for path in tracked(*folders):
        for child in (path, *path.parents[:-1]):
            inside[child.parent].add(child)
    return {str(folder): len(children) for folder, children in sorted(inside.items()) if str(folder) != "."}


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    """Dotted name → file, of the product."""
    return {module_name(path): path for path in product_code() if path.suffix == ".py"}


def room(module: str) -> str:
    """The room a module is in, whatever sub-folder of it; a module at the top of its package is its own room."""
    parts = modules()[module].parent.parts
    return ".".join(parts[:2]) if len(parts) > 1 else module


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


@cache
def imports() -> tuple[Import, ...]:
    """Every import of one product module by another."""
    return tuple(found for name, path in modules().items() for found in _imports_of(name, path))


def _imports_of(importer: str, path: Path) -> list[Import]:
    top = {id(node) for node in tree(path).body}
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [Import(importer, n.name, (), node.lineno, id(node) not in top) for n in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for name in node.names:
                inner = f"{base}.{name.name}"
                module, names = (inner, ()) if inner in modules() else (base, (name.name,))
                found.append(Import(importer, module, names, node.lineno, id(node) not in top))
    return [one for one in found if one.module in modules() and one.module != importer]


def cycles() -> list[set[str]]:
    """Groups of modules that need each other to be loaded."""
    graph: dict[str, set[str]] = defaultdict(set)
    for one in imports():
        if not one.lazy:
            graph[one.importer].add(one.module)
    reach = {name: _reachable(name, graph) for name in list(graph)}
    groups = {frozenset(other for other in reach[name] if name in reach.get(other, ())) for name in reach}
    return [set(group) for group in groups if group]


def _reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph[name]
    return seen


def functions() -> list[str]:
    """Names of all functions at the top of a module."""
    return [n.name for path in modules().values() for n in tree(path).body if isinstance(n, ast.FunctionDef)]


def single_importer() -> list[str]:
    """Modules that one other module imports."""
    importers: dict[str, set[str]] = defaultdict(set)
    for one in imports():
        importers[one.module].add(one.importer)
    return sorted(name for name, by in importers.items() if len(by) == 1)


def main() -> None:
    code, counts = product_code(), entries(*PRODUCT)
    files, size = Counter(str(p.parent) for p in code), Counter[str]()
    for path in code:
        size[str(path.parent)] += lines(path)
    rows = [[folder, counts[folder], files[folder], size[folder]] for folder in counts]
    print(tabulate(rows, headers=["folder", "entries", "files", "lines"]))
    private = sum(name.startswith("_") for name in functions())
    print(f"\nproduct: {len(code)} files, {sum(size.values())} lines; tests: {sum(map(lines, _tests()))} lines")
    print(f"most entries: {max(counts.values())}; longest file: {max(map(lines, code))} lines")
    print(f"functions: {len(functions())}, of which {private} underscored ({private / len(functions()):.0%})")
    print(f"modules with one importer: {len(single_importer())} of {len(modules())}; import cycles: {len(cycles())}")


def _tests() -> list[Path]:
    return [path for path in tracked("tests") if path.suffix == ".py"]


if __name__ == "__main__":
    main()
