"""Kill merges and race them against each other until an error occurs: ``python -m tests.stress_merge``.

``--kills N``: a merge is killed between two of its steps on disk, for all such steps; a user may change the output; the
next merge must then write the output, or reject it and leave everything unchanged. ``--seconds S``: four
processes merge four adapters to the same name, while one of them is killed and restarted at intervals, and readers
watch: the output must be one of the four at any time. Prints a table of the outcomes, and exits with 1 if there was any
error. Needs Linux.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import tnadapt as tna
from tnadapt.checkpoints import atomic_files

from .checkpoints.merge.merge_scene import ACTIONS, Content, Scene, content, scene
from .support.file_layer import Call, intercepted, recorded

__all__ = ["kills", "main", "race"]

Count = collections.Counter[str]


def child(act: Callable[[], object]) -> int:
    """Run it in a forked process: 0, 1 for an error of ours, 3 for any other, or minus the signal that ended it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            act()
            code = 0
        except tna.TnadaptError:
            code = 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# -- Kills -----------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What is killed: a merge into one file or a folder, onto an old one or not, with renameat2 or without."""

    single: bool
    old: bool
    exchange: bool

    def __str__(self) -> str:
        return words_of(self.single, "replaced" if self.old else "new", self.exchange)

    def prepare(self, where: Scene) -> Content:
        """Make the output as it is before the merge, and return it."""
        where.clear()
        where.put(where.results[1] if self.old else None)
        return content(where.out)

    def left(self, where: Scene, old: Content) -> Content:
        """What a kill has left: the old output or the new one, or between two renames none."""
        found = content(where.out)
        between_renames = not self.exchange and not self.single and self.old and found is None
        assert found in (old, where.results[0]) or between_renames, "the kill left neither the old nor the new output"
        return found


def words_of(single: bool, word: str, exchange: bool) -> str:
    return f"{'file' if single else 'folder'}, {word}, {'renameat2' if exchange else 'no renameat2'}"


SETTINGS = [Setting(*flags) for flags in itertools.product((True, False), repeat=3)]


def killed_merge(where: Scene, setting: Setting, at: int, overwrite: bool) -> Callable[[], object]:
    """A merge that kills itself before its step number ``at``, counted from 1."""

    def act() -> None:
        left = at

        def before(call: Call) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        with intercepted(before, exchange=setting.exchange):
            where.merge(0, overwrite)

    return act


def one_kill(
    where: Scene, setting: Setting, at: int, action: Callable[[Scene], None], overwrite: bool, twice: int = 0
) -> str:
    """Kill a merge, let the user act, merge again: what came of it, or AssertionError."""
    old = setting.prepare(where)
    before = content(where.base)
    code = child(killed_merge(where, setting, at, setting.old))
    assert code in (-signal.SIGKILL, 0), f"the first merge ended with {code}"
    setting.left(where, old)
    action(where)
    assert not twice or child(killed_merge(where, setting, twice, overwrite)) != 3, "an error that is none of ours"
    start, aside = content(where.out), content(where.elsewhere)

    code = child(killed_merge(where, setting, 0, overwrite))
    now = content(where.out)
    assert code in (0, 1), f"the next merge ended with {code}"
    assert content(where.base) == before, "the base was changed"
    assert content(where.elsewhere) == aside, "what the user moved away was changed"
    if code == 0:
        assert now == where.results[0], "success was reported for something else than the result"
        assert not os.path.lexists(where.beside), "something was left beside the output"
        return "verified or made"
    # Refused: as it was, or what the kill had moved away is back.
    assert now == start or (start is None and now == old and not setting.exchange), "refused, and yet changed"
    # Refused for what stands there alone: it is done when that is gone.
    assert now is not None, "refused although nothing was there"
    where.out.rename(where.refused)
    code = child(killed_merge(where, setting, 0, overwrite=False))
    assert code == 0, f"the merge after the refusal ended with {code}"
    assert content(where.out) in (where.results[0], old), "after the refusal"
    assert content(where.refused) == now, "what was refused was changed"
    return "refused, nothing changed"


def kills(folder: Path, count: int, seed: int) -> tuple[Count, list[str]]:
    """So many kills: what came of them, and what was wrong."""
    rng = random.Random(seed)
    scenes = {single: scene(folder / ("file" if single else "folder"), single) for single in (True, False)}
    counts = {}
    for setting in SETTINGS:
        setting.prepare(where := scenes[setting.single])
        counts[setting] = len(recorded(lambda where=where, old=setting.old: where.merge(0, old), setting.exchange))
    found, wrong = Count(), []
    # Every step of every setting once, in random order, again and again.
    every = [(setting, at) for setting, count in counts.items() for at in range(1, count + 2)]
    drawn = itertools.chain.from_iterable(rng.sample(every, len(every)) for _ in itertools.count())
    for number, (setting, at) in enumerate(itertools.islice(drawn, count)):
        if number and number % 100 == 0:
            print(f"{number} of {count} kills: {len(wrong)} wrong", flush=True)
        action, overwrite = rng.choice(ACTIONS), rng.random() < 0.5
        twice = rng.randrange(1, counts[setting]) if rng.random() < 0.3 else 0
        try:
            found[f"{setting}: {one_kill(scenes[setting.single], setting, at, action, overwrite, twice)}"] += 1
        except AssertionError as error:
            found[f"{setting}: WRONG"] += 1
            wrong.append(f"{setting}, step {at}, then {action.__name__}, {overwrite=}, {twice=}: {error}")
    return found, wrong


# -- Races -----------------------------------------------------------------------------------------

#: What a loser may be told, by a part of the message.
TOLD = ("another process is writing", "taken over by another process", "other processes are writing")

#: What one of two that replace a folder at once may be told as well, without locks and without exchanges.
BETWEEN = "has been created while its previous content"


class Race(NamedTuple):
    single: bool
    locks: bool
    exchange: bool

    def __str__(self) -> str:
        return words_of(self.single, "locks" if self.locks else "no locks", self.exchange)


RACES = [Race(*flags) for flags in itertools.product((True, False), (True, False), (True, False))]


def contender(where: Scene, number: int, setting: Race, ends: float, log: Path) -> None:
    """Merge one adapter again and again, and write what each attempt came to, a line each."""
    with pytest.MonkeyPatch.context() as patch, open(log, "ab", buffering=0) as file:
        if not setting.locks:
            patch.setattr(atomic_files.fcntl, "flock", lambda handle, operation: None)
        if not setting.exchange:
            patch.setattr(atomic_files, "_renameat2", lambda *arguments: False)
        while time.monotonic() < ends:
            try:
                where.merge(number, overwrite=True)
                line = "made"
            except tna.TnadaptError as error:
                told = (*TOLD, BETWEEN) if not setting.locks and not setting.exchange else TOLD
                line = next((f"told: {part}" for part in told if part in str(error)), f"WRONG {error}")
            except BaseException as error:
                line = f"WRONG {type(error).__name__}: {error}"
            file.write(line.replace("\n", " ").encode()[:1000] + b"\n")


def race(folder: Path, setting: Race, seconds: float, seed: int) -> tuple[Count, list[str]]:
    """Four processes merge to one name: what they came to and what readers saw, and what was wrong."""
    rng = random.Random(seed)
    where = scene(folder, setting.single, 4)
    where.put(where.results[0])
    ends = time.monotonic() + seconds
    log = folder.with_suffix(".log")
    log.touch()

    def started(number: int) -> int:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            try:
                contender(where, number, setting, ends, log)
            finally:
                os._exit(0)
        return pid

    found, wrong = Count(), list[str]()
    running = {number: started(number) for number in range(4)}
    next_kill = time.monotonic() + rng.uniform(0.0, 0.5)
    while time.monotonic() < ends:
        seen = seen_by_a_reader(where)
        if seen is None and not setting.single and not setting.exchange:
            found["read: not there, between two renames"] += 1
        else:
            kind = "read: one of the four" if seen in where.results else "read: WRONG"
            found[kind] += 1
            if kind.endswith("WRONG"):
                wrong.append(f"{setting}: a reader saw {seen if seen is None else sorted(seen)[:99]}")
        if time.monotonic() > next_kill:
            number = rng.randrange(4)
            os.kill(running[number], signal.SIGKILL)
            os.waitpid(running[number], 0)
            running[number] = started(number)
            found["killed"] += 1
            next_kill = time.monotonic() + rng.uniform(0.0, 0.5)
        time.sleep(0.001)
    for pid in running.values():
        os.waitpid(pid, 0)
    for line in log.read_text(encoding="utf-8").splitlines():
        found[line if not line.startswith("WRONG") else "WRONG"] += 1
        if line.startswith("WRONG"):
            wrong.append(f"{setting}: {line}")
    try:
        where.merge(0, overwrite=True)
    except tna.TnadaptError as error:
        wrong.append(f"{setting}: the merge after the race: {error}")
    if content(where.out) != where.results[0] or os.path.lexists(where.beside):
        wrong.append(f"{setting}: the merge after the race left {os.listdir(where.folder)}")
    where.clear()
    return found, wrong


def seen_by_a_reader(where: Scene) -> Content:
    """The output as one opens it: a folder is opened once, and its files from there."""
    try:
        if where.out.suffix:
            return where.out.read_bytes()
        handle = os.open(where.out, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        # What is reached through the open folder stays one publication, until its files are deleted.
        files = {}
        for name in where.results[0] or ():
            with open(os.open(name, os.O_RDONLY, dir_fd=handle), "rb") as file:
                files[name] = file.read()
    except FileNotFoundError:
        return seen_by_a_reader(where)  # replaced while it was read: look again
    finally:
        os.close(handle)
    return files


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=0.0, help="of races, of each kind in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="on the file system to be tried")
    settings = parser.parse_args(arguments)
    wrong = []
    with tempfile.TemporaryDirectory(dir=settings.folder) as place:
        begun = time.monotonic()
        if settings.kills:
            found, bad = kills(Path(place) / "kills", settings.kills, settings.seed)
            report(f"{settings.kills} kills in {time.monotonic() - begun:.0f} s", found)
            wrong += bad
        # Often in turn, so that a run that is stopped has tried them all.
        rounds = max(1, round(settings.seconds / 240.0))
        totals = {setting: Count() for setting in RACES}
        for turn in range(rounds if settings.seconds else 0):
            for number, setting in enumerate(RACES):
                span = settings.seconds / rounds / len(RACES)
                found, bad = race(Path(place) / f"race{turn}{number}", setting, span, settings.seed + turn)
                totals[setting] += found
                wrong += bad
            print(f"round {turn + 1} of {rounds}: {len(wrong)} wrong", flush=True)
        for setting, total in totals.items():
            if total:
                report(f"race: {setting}", total)
    for line in wrong[:50]:
        print(line)
    print(f"{len(wrong)} wrong")
    return 1 if wrong else 0


def report(title: str, found: Count) -> None:
    print(title)
    for name, count in sorted(found.items()):
        print(f"  {count:9,}  {name}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
