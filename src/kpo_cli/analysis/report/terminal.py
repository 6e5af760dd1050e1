"""What `kpo analyze` shows while it works: a bar on a terminal, nothing elsewhere."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kpo_cli.terminal import printable


class ReadingBar:
    """A context manager; call it with each file that was read and each stage after them."""

    def __init__(self, name: str, files: int, console: Console) -> None:
        columns = (TextColumn(printable(name), markup=False), MofNCompleteColumn(), BarColumn(bar_width=30))
        self._progress = Progress(
            *columns, TextColumn("{task.description}", markup=False), TimeElapsedColumn(), console=console,
            transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("files", total=files)

    def __enter__(self) -> "ReadingBar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def file(self) -> None:
        self._progress.advance(self._task)

    def stage(self, name: str) -> None:
        self._progress.update(self._task, description=name)
