"""How long a run takes until its first step is done, and what that time goes into."""

from __future__ import annotations

from gasp_fast.processes import process_age


class StartUp:
    """Seconds since this object was made, by part. A part may be added to several times."""

    def __init__(self, *, since_process: bool = False) -> None:
        """`since_process`: count from the start of the process, with the imports that came before."""
        self.began = 0.0 if since_process else process_age()
        self.seconds: dict[str, float] = {}

    def add(self, part: str, *, heads: float = 0.0) -> None:
        """Count the time since the last call, or since the beginning, to `part`; `heads` of it apart."""
        passed = process_age() - self.began - sum(self.seconds.values())
        self.seconds[part] = self.seconds.get(part, 0.0) + passed - heads
        if heads:
            self.seconds["heads"] = self.seconds.get("heads", 0.0) + heads

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"first step done after {sum(self.seconds.values()):.1f} s: {parts}"
