"""What the rounding of 16-bit arithmetic does to log-ratios: measured beside the same ones in float32."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from kpo_cli.core.objective import Objective

SHARE = 0.1
"""Of the narrower clip width: an error of a filtered log-ratio above that decides clips."""


@dataclass(frozen=True)
class Rounding:
    """Of some responses behind an optimizer step; all but `tokens` and shares are root mean squares over their tokens.

    What is exact here is float32, whose own error is a ten thousandth of bfloat16's (docs/precision.md).
    """

    responses: int
    tokens: int
    z: float
    """The exact raw log-ratio."""
    z_error: float
    """The raw log-ratio less the exact one."""
    filtered_error: float
    """The same behind the objective's filter."""
    width: float | None
    """The narrower width of the surrogate's interval; None where it has none in log-ratios."""
    decided: float
    """Share of tokens that the surrogate limits by one of the two and not by the other."""

    @classmethod
    def of(
        cls,
        objective: Objective,
        log_probs: tuple[Tensor, Tensor],
        exact: tuple[Tensor, Tensor],
        advantages: Tensor,
        mask: Tensor,
    ) -> "Rounding":
        """From log-probabilities before and behind the step, rounded and exact, (N, T) each; `advantages` (N,)."""
        plain = replace(objective, correction=None, reference_kl=None, entropy_bonus=0.0)  # none of them reads z
        rounded, true = (
            plain(old_log_probs=old, log_probs=new, advantages=advantages, response_mask=mask)
            for old, new in (log_probs, exact)
        )
        return cls(
            responses=len(mask),
            tokens=int(mask.sum()),
            z=_rms(true.log_ratio[mask]),
            z_error=_rms((rounded.log_ratio.double() - true.log_ratio)[mask]),
            filtered_error=_rms((rounded.filtered_log_ratio.double() - true.filtered_log_ratio)[mask]),
            width=narrower_width(objective),
            decided=float((rounded.clipped != true.clipped)[mask].double().mean()),
        )

    @property
    def widths(self) -> float | None:
        """The filtered error in clip widths."""
        return None if self.width is None else self.filtered_error / self.width

    @property
    def decides(self) -> bool:
        """It takes part in what is clipped."""
        return self.widths is not None and self.widths > SHARE

    def facts(self) -> dict[str, Any]:
        """For a ratio record."""
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """The metrics of docs/metrics.md."""
        return {
            "log_ratio_rounding": self.z_error,
            "filtered_log_ratio_rounding": self.filtered_error,
            "clip_fraction_rounding": self.decided,
        }


def narrower_width(objective: Objective) -> float | None:
    """Of the interval that the surrogate keeps a ratio in, None where it has none."""
    widths = [getattr(objective.surrogate, name, None) for name in ("eps_low", "eps_high")]
    return min((width for width in widths if width is not None), default=None)


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
