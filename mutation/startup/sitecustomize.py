"""Imported by every Python process of a measurement at start-up, to record the lines that a test's processes run.

Only processes that a test starts are traced; :class:`mutation.tracing.Tracing` handles pytest's own. A process writes
its record when it exits normally; one that is killed writes nothing.
"""

import os


def _trace(folder: str, root: str, test: str) -> None:
    import atexit
    import json
    import uuid
    from typing import NoReturn

    import coverage

    tracing = coverage.Coverage(data_file=None, source=[os.path.join(root, "tnadapt")], config_file=False)
    tracing.start()
    leave, process = os._exit, os.getpid()

    def write() -> None:
        if os.getpid() != process:  # forked
            return
        tracing.stop()
        data = tracing.get_data()
        lines = {os.path.relpath(file, root): sorted(data.lines(file) or ()) for file in data.measured_files()}
        with open(os.path.join(folder, f"{uuid.uuid4().hex}.json"), "w", encoding="utf-8") as file:
            json.dump({"test": test, "lines": lines}, file)

    def write_and_leave(status: int) -> NoReturn:
        write()
        leave(status)

    atexit.register(write)
    os._exit = write_and_leave


if "MUTATION_TRACE" in os.environ and "PYTEST_CURRENT_TEST" in os.environ:
    _trace(
        os.environ["MUTATION_TRACE"],
        os.environ["MUTATION_ROOT"],
        os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0],
    )
