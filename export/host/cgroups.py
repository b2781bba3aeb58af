"""Control groups of Linux, versions 1 and 2: the folders that state what this process may take."""

from collections.abc import Iterator
from pathlib import Path

PROC, MOUNT = Path("/proc/self"), Path("/sys/fs/cgroup")


def folders(controller: str, proc: Path = PROC, mount: Path = MOUNT) -> Iterator[tuple[int, Path]]:
    """Version and folder of every group with that controller which this process is in, parents included.

    A container may see its own group as the root, or the host's path with only its own group mounted. Elsewhere than on
    Linux there are none.
    """
    if not (proc / "cgroup").is_file():
        return
    for line in (proc / "cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers == "":
            version, tops = 2, [mount, mount / "unified"]
        elif controller in controllers.split(","):
            version, tops = 1, [mount / controller]  # of `cpu,cpuacct` each has a link
        else:
            continue
        for top in tops:
            group = top / inside.strip("/")
            for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
                if folder.is_dir():
                    yield version, folder
