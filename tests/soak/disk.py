"""Commands on a disk that becomes full, at several moments: one line, and all is as it was.

python -m tests.soak.disk [--only NAME] [--bundle FOLDER]        (as root: it mounts a small disk)
"""

from __future__ import annotations

import pathlib
import sys

import click

from tap_deploy.console.exits import CleanExits
from tap_deploy.storage.files import sha256_of_file
from tap_deploy.storage.unfinished import temporary_folder
from tests.small_disk import room_left, small_disk
from tests.soak.kills import Attack, Place, attack_options, attacks, check_bundle, end_of, prepare

DISK_BYTES = 256 << 20
KEPT = ("run", "build")
# Of the room that the command takes; the last ones are short of little more than a manifest.
SHARES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99)


def digests(folder: pathlib.Path) -> dict[str, str | None]:
    """Return relative path -> SHA-256 of each file, and None for each folder."""
    return {
        path.relative_to(folder).as_posix(): sha256_of_file(path) if path.is_file() else None
        for path in folder.rglob("*")
    }


def most_used(place: Place, attack: Attack) -> int:
    """Run the command to the end; returns the bytes that it takes at most, in files."""
    process, most = place.start(attack.arguments), 0
    while process.poll() is None:
        sizes = []
        for name in place.files():
            try:
                sizes.append((place.folder / name).stat().st_size)
            except FileNotFoundError:
                continue
        most = max(most, sum(sizes))
    code, errors = end_of(process)
    assert code == 0, f"{attack.name} ended with {code}: {errors}"
    return most


def fill(disk: pathlib.Path, place: Place, attack: Attack, needed: int) -> tuple[int, int]:
    """Run the command with too little room; returns how often it was refused, and passed.

    Raises:
        AssertionError: it was never refused, said more than one line, changed something, or left
            something.
    """
    refused = passed = 0
    for share in SHARES:
        before = digests(place.folder)
        with room_left(disk, round(share * needed)):
            code, errors = end_of(place.start(attack.arguments))
        if code == 0:  # it needs less in a rerun, or files that it would like to keep are optional
            passed += 1
        else:
            refused += 1
            lines = [line for line in errors.splitlines() if line.startswith("error: ")]
            assert code == 2 and len(lines) == 1, f"{attack.name} ended with {code}: {errors}"
            assert "Traceback" not in errors and "internal error" not in errors, errors
            after = digests(place.folder)
            names = before.keys() | after.keys()
            changed = {name for name in names if before.get(name, "") != after.get(name, "")}
            # Each picture's result and each engine is kept as soon as it is complete.
            kept = tuple(
                pattern.partition("*")[0] for pattern in attack.results if attack.name in KEPT
            )
            changed = {name for name in changed if not f"{name}/".startswith(kept or ("/",))}
            assert not changed, f"{attack.name} changed {sorted(changed)}"
        check_bundle(place.folder / "bundle")
        place.check(attack)
    assert refused, f"{attack.name} was never refused: the disk was not full, or it writes nothing"
    return refused, passed


@click.command("disk", cls=CleanExits)
@attack_options
def main(only: tuple[str, ...], bundle: pathlib.Path | None) -> int:
    """Run commands on a disk that becomes full; exit with 1 if anything is wrong."""
    failed = False
    with temporary_folder() as folder:
        prepare(folder / "tap_micro", bundle)
        for index, attack in enumerate(attacks(only)):
            if attack.beside:
                continue
            with small_disk(folder / str(index), DISK_BYTES) as disk:
                place = Place(disk / "place", folder / "tap_micro")
                try:
                    start = sum((place.folder / name).stat().st_size for name in place.files())
                    needed = most_used(place, attack) - start
                    refused, passed = fill(disk, place, attack, needed)
                except AssertionError as exc:
                    click.echo(f"[✗] {attack.name}: {exc}")
                    failed = True
                else:
                    click.echo(
                        f"[✓] {attack.name} needs {needed / 1e6:.1f} MB: refused in one line with "
                        f"{refused} smaller rooms, passed with {passed}; the bundle is whole"
                    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
