"""Record what a `Progress` is told."""

from spallm_convert.progress import Silent


class Remarks(Silent):
    """Keep the remarks, and ignore everything else."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def remark(self, line: str, /) -> None:
        self.lines.append(line)
