"""The shell scripts a device runs: POSIX sh with toybox, coreutils or BSD tools. Knows no connection."""

import shlex
from collections.abc import Iterable, Mapping, Sequence

FAILED = 3
"""Exit status of a script that did not do it: a number that no client program uses for itself."""

GUARDED = """\
cd {folder} || exit {failed}
if command -v setsid >/dev/null; then own=setsid; else own=; set -m; fi
exec 3<&0
$own {command} </dev/null 3<&- &
job=$!
watch() {{
  trap 'kill -KILL $! 2>/dev/null; exit' TERM
  "$@" <&3 &
  wait $!
  kill -KILL -$job $job
}}
watch cat >/dev/null 2>&1 &
watches=$!
watch sleep {limit_s} >/dev/null 2>&1 &
watches="$watches $!"
exec 3<&-
wait $job
code=$?
kill -TERM $watches 2>/dev/null
wait
kill -KILL -$job 2>/dev/null
case $code in {unsure}) echo $code >{status} ;; esac
exit $code
"""

HASH = "if command -v sha256sum >/dev/null; then h=sha256sum; else h='shasum -a 256'; fi"


def quoted(words: Iterable[str]) -> str:
    """Words a shell reads back as they are."""
    return " ".join(shlex.quote(word) for word in words)


def answered(script: str) -> str:
    """A script that ends with 0 or FAILED and nothing else, so that a lost connection cannot look like an answer."""
    return f"(\n{script}\n) || exit {FAILED}"


def guarded(argv: Sequence[str], *, folder: str, limit_s: int, status: str, unsure: Iterable[int]) -> str:
    """Run a program so that nothing of it stays, however the run ends.

    It leads a process group of its own. Two watches beside it kill that group: one when our stdin ends, which stays
    open as long as the client lives, one after `limit_s` seconds. An exit status that the client could also give by
    itself is written to the file `status`.
    """
    return GUARDED.format(
        folder=shlex.quote(folder),
        failed=FAILED,
        limit_s=limit_s,
        command=quoted(argv),
        unsure="|".join(map(str, sorted(unsure))) or "none",
        status=shlex.quote(status),
    )


def survey(names: Iterable[str]) -> str:
    """What `df -Pk` says of the working folder, then the sha256 of every file at or below the names."""
    look = "\n".join(
        f'if [ -d {name} ]; then find {name} -type f -exec $h "{{}}" +; elif [ -e {name} ]; then $h {name}; fi'
        for name in map(shlex.quote, names)
    )
    return f"{HASH}\ndf -Pk .\n{look}\ntrue"


def check_hashes(wanted: Mapping[str, str]) -> str:
    """Fail unless every file of path → sha256 is there with that hash.

    Not with `sha256sum -c`: toybox, reading the list from stdin, ends with 0 whatever it finds.
    """
    expected = "\n".join(f"{digest}  {path}" for path, digest in wanted.items())
    return f'{HASH}\n[ "$($h {quoted(wanted)})" = {shlex.quote(expected)} ] || exit 1'
