"""What fails the stage: a rule about a whole table, too large a share of refused rows, no accepted row."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from components.config import ValidationConfig
from components.exceptions import DataError, QualityError
from components.validation.judge import Judgement


def require_table_rules(table: str, judgement: Judgement, data_docs: Path) -> None:
    """Refuse a table that breaks a rule about the whole of it.

    Raises:
        QualityError: It does.
    """
    for rule, observed in judgement.failed:
        raise QualityError(
            f"table {table}, rule {rule.reason}",
            expected=rule.message,
            got=observed,
            remedy=f"check the source or the limits in the section validation; see {data_docs / 'index.html'}",
        )


def require_share(table: str, share: float, reasons: Counter[str], limits: ValidationConfig, quarantine: Path) -> None:
    """Refuse a table of which too large a share is refused.

    Args:
        table: Its name.
        share: Share of its rows that are refused.
        reasons: How many rows by reason.
        limits: Their `max_quarantined_share`.
        quarantine: Where the rows can be seen.

    Raises:
        QualityError: The share is above the limit.
    """
    if share <= limits.max_quarantined_share:
        return
    worst = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(3))
    raise QualityError(
        f"table {table}, rule {reasons.most_common(1)[0][0]}",
        expected=f"at most {limits.max_quarantined_share:.2%} of the rows refused",
        got=f"{share:.2%} ({worst})",
        remedy=f"see the rows in {quarantine} and fix the source, or raise validation.max_quarantined_share",
    )


def require_rows(counts: dict[str, int]) -> None:
    """Refuse tables without an accepted row.

    Raises:
        DataError: One has none.
    """
    for table, accepted in counts.items():
        if not accepted:
            raise DataError(
                f"table {table}",
                expected="at least one accepted row",
                got="none",
                remedy="lower validation.max_quarantined_share to stop earlier, and fix the source",
            )
