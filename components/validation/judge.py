"""Running the rules with Great Expectations: which rows are refused, which table rules fail, and the Data Docs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import great_expectations as gx
import ibis
import pandas as pd
from great_expectations.checkpoint import UpdateDataDocsAction
from great_expectations.core import ExpectationValidationResult
from great_expectations.data_context import EphemeralDataContext
from great_expectations.data_context.types.base import (
    DataContextConfig,
    InMemoryStoreBackendDefaults,
    ProgressBarsConfig,
)

from components.config import ValidationConfig
from components.exceptions import UrmError
from components.validation.frames import Files, event_frame, item_frame
from components.validation.rules import REASON, Rule, event_rules, item_rules

_ROW_RESULTS = {"result_format": "COMPLETE", "return_unexpected_index_query": False}


@dataclass(frozen=True)
class Judgement:
    """What the rules say of one table."""

    refused: dict[int, list[Rule]] = field(default_factory=dict)  # row number → the rules it breaks, in their order
    failed: list[tuple[Rule, str]] = field(default_factory=list)  # table rules that fail, with what was found instead


def judge_tables(
    items: Files,
    events: Files,
    *,
    limits: ValidationConfig,
    previous: Mapping[str, int],
    now: datetime,
    engine: ibis.BaseBackend,
    data_docs: Path,
    report: Callable[..., None],
) -> dict[str, Judgement]:
    """Judge items, then events, whose items must be among the accepted ones.

    `previous` is the number of accepted rows of this source's last run by table, empty if there was none.
    """
    context = open_context(data_docs)
    report("judging items", rows=items.num_rows)
    frame = item_frame(items, engine)
    about_items = judge(context, "items", frame, item_rules(limits, previous.get("items")))
    accepted: pd.Series[int] = frame["item_id"].drop(list(about_items.refused))

    report("judging events", rows=events.num_rows)
    frame = event_frame(events, accepted, engine)
    about_events = judge(context, "events", frame, event_rules(limits, now, previous.get("events")))
    return {"items": about_items, "events": about_events}


def open_context(data_docs: Path) -> EphemeralDataContext:
    """A Great Expectations context that keeps everything in memory but its Data Docs, and sends nothing anywhere."""
    config = DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(),
        analytics_enabled=False,
        progress_bars=ProgressBarsConfig(globally=False),
        data_docs_sites={
            "data_docs": {
                "class_name": "SiteBuilder",
                "site_name": "Data Docs",
                "show_how_to_buttons": False,
                "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(data_docs)},
                "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            }
        },
    )
    return gx.get_context(project_config=config, mode="ephemeral")


def judge(context: EphemeralDataContext, table: str, frame: pd.DataFrame, rules: list[Rule]) -> Judgement:
    """Check a frame, its index the row number, by rules in order of precedence; add the outcome to the Data Docs.

    Raises:
        UrmError: Great Expectations could not evaluate a rule.
    """
    by_reason = {rule.reason: rule for rule in rules}
    judgement = Judgement()
    for result in _run_suite(context, table, frame, rules):
        rule = by_reason[_reason(result)]
        if result.exception_info.get("raised_exception"):
            raise UrmError(f"rule {rule.reason} of {table}: {result.exception_info['exception_message']}")
        if result.success:
            continue
        rows = result.result.get("unexpected_index_list")
        if rows is None:  # a rule about the whole table
            judgement.failed.append((rule, str(result.result["observed_value"])))
            continue
        for row in rows:
            judgement.refused.setdefault(int(row), []).append(rule)
    precedence = {rule.reason: position for position, rule in enumerate(rules)}
    for broken in judgement.refused.values():
        broken.sort(key=lambda rule: precedence[rule.reason])
    return judgement


def _reason(result: ExpectationValidationResult) -> str:
    meta = result.expectation_config.meta if result.expectation_config else None
    return str((meta or {})[REASON])


def _run_suite(
    context: EphemeralDataContext, table: str, frame: pd.DataFrame, rules: list[Rule]
) -> list[ExpectationValidationResult]:
    suite = gx.ExpectationSuite(name=table)
    for rule in rules:
        suite.add_expectation(rule.expectation)
    context.suites.add(suite)
    asset = context.data_sources.add_pandas(table).add_dataframe_asset(table)
    definition = context.validation_definitions.add(
        gx.ValidationDefinition(name=table, data=asset.add_batch_definition_whole_dataframe("all"), suite=suite)
    )
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name=table,
            validation_definitions=[definition],
            actions=[UpdateDataDocsAction(name="data_docs")],
            result_format=_ROW_RESULTS,
        )
    )
    outcome: Any = checkpoint.run(batch_parameters={"dataframe": frame})
    (suite_result,) = outcome.run_results.values()
    return list(suite_result.results)
