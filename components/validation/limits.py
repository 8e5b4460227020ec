"""What fails the stage: a rule about a whole table, too large a share of refused rows, no accepted row."""

from collections import Counter
from pathlib import Path

from components.config import ValidationConfig
from components.exceptions import DataError, QualityError
from components.validation.judge import Judgement


def require_table_rules(table: str, judgement: Judgement, data_docs: Path) -> None:
    """Raise a QualityError if the table breaks a rule about the whole of it."""
    for rule, observed in judgement.failed:
        raise QualityError(
            f"table {table}, rule {rule.reason}",
            expected=rule.message,
            got=observed,
            remedy=f"check the source or the limits in the section validation; see {data_docs / 'index.html'}",
        )


def require_share(table: str, share: float, reasons: Counter[str], limits: ValidationConfig, quarantine: Path) -> None:
    """Raise a QualityError if the share of refused rows is above the limit; `reasons` counts them by reason."""
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
    """Raise a DataError if a table has no accepted row."""
    for table, accepted in counts.items():
        if not accepted:
            raise DataError(
                f"table {table}",
                expected="at least one accepted row",
                got="none",
                remedy="lower validation.max_quarantined_share to stop earlier, and fix the source",
            )
