"""What a conversion found: which parts are uniform, how exact they are, what is wrapped and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from hookedlm.errors import ConversionError


@dataclass(frozen=True)
class Agreement:
    """How far our numbers are from Hugging Face's on the check's batch.

    ``error`` is max |ours - theirs| / max |theirs| over real positions; 0.0 means every bit equal.
    ``typical`` is the same for the median position.
    """

    error: float
    exact: bool
    typical: float = 0.0

    def __str__(self) -> str:
        return "bit-identical" if self.exact else f"{self.error:.1e}"


@dataclass(frozen=True)
class PartReport:
    """One part of the model: how it was converted and how it compares."""

    where: str
    form: str
    quiet: Agreement | None = None
    """Nobody listening: fused code."""
    listening: Agreement | None = None
    """Everybody listening: longhand code."""
    reason: str = ""
    """Why it is opaque, or what is worth knowing."""

    @property
    def opaque(self) -> bool:
        """Whether Hugging Face's own module runs here."""
        return self.form.startswith("opaque")


@dataclass
class Fidelity:
    """The report of one conversion. Print it: what is exact, what is wrapped, and why."""

    model_type: str
    model_class: str
    dtype: str
    family: str
    parts: list[PartReport] = field(default_factory=list)
    unread: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def logits(self) -> Agreement:
        """The whole model's agreement, nobody listening."""
        part = self.part("logits")
        assert part.quiet is not None
        return part.quiet

    def part(self, where: str) -> PartReport:
        """The report of one part, by its name here (``blocks.3``, ``embed``, ``logits``)."""
        for part in self.parts:
            if part.where == where:
                return part
        raise KeyError(f"no part {where!r}; parts: {[part.where for part in self.parts]}")

    @property
    def opaque_parts(self) -> list[PartReport]:
        """Everything that runs as Hugging Face wrote it."""
        return [part for part in self.parts if part.opaque]

    @property
    def exact(self) -> bool:
        """Whether every part agrees with Hugging Face to the bit, nobody listening."""
        return all(part.quiet is None or part.quiet.exact for part in self.parts)

    def demand_uniform(self) -> None:
        """Raise ConversionError if anything is opaque (``strict=True``)."""
        if self.opaque_parts:
            raise ConversionError(
                f"strict=True, but {len(self.opaque_parts)} parts of this {self.model_type} model "
                f"are not uniform:\n{self}"
            )

    def __str__(self) -> str:
        head = (
            f"{self.model_class} ({self.model_type}, {self.dtype}) read as {self.family}\n"
            f"{'part':<14}{'form':<34}{'quiet':<16}{'listening':<16}"
        )
        lines = [head]
        for part in _merged(self.parts):
            quiet = "" if part.quiet is None else str(part.quiet)
            listening = "" if part.listening is None else str(part.listening)
            lines.append(
                f"{part.where:<14}{part.form:<34}{quiet:<16}{listening:<16}{part.reason}".rstrip()
            )
        if self.unread:
            lines.append(
                "config options away from their default that nothing here read (the check above "
                f"ran with them): {', '.join(self.unread)}"
            )
        return "\n".join(lines + self.notes)

    __repr__ = __str__


def _merged(parts: list[PartReport]) -> list[PartReport]:
    """Neighbouring blocks that read the same, as one line with the worst error."""
    merged: list[tuple[PartReport, int]] = []
    for part in parts:
        if merged and part.where.startswith("blocks."):
            last, count = merged[-1]
            if (last.form, last.reason) == (part.form, part.reason):
                both = PartReport(
                    last.where.split("-")[0] + "-" + part.where.split(".")[1],
                    part.form,
                    worse(last.quiet, part.quiet),
                    worse(last.listening, part.listening),
                    part.reason,
                )
                merged[-1] = (both, count + 1)
                continue
        merged.append((part, 1))
    return [part for part, _ in merged]


def worse(a: Agreement | None, b: Agreement | None) -> Agreement | None:
    """The larger errors of two agreements, exact only if both are; the other if one is None."""
    if a is None or b is None:
        return a or b
    return Agreement(max(a.error, b.error), a.exact and b.exact, max(a.typical, b.typical))
