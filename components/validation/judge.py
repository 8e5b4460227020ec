"""Running the rules with Great Expectations: which rows are refused, which table rules fail, and the Data Docs."""

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
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
from components.engines.exhaustion import is_exhausted
from components.exceptions import UrmError
from components.validation.frames import Files, event_frames, item_frames
from components.validation.rules import REASON, Rule, event_rules, item_rules

BATCH_ROWS = 250_000
_ROW_RESULTS = {"result_format": "COMPLETE", "return_unexpected_index_query": False}
_PAGES_LOG = logging.getLogger("great_expectations.render.renderer.site_builder")


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
    batch_rows: int = BATCH_ROWS,
) -> dict[str, Judgement]:
    """Judge items, then events, whose items must be among the accepted ones.

    `previous` is the number of accepted rows of this source's last run by table, empty if there was none. At most
    `batch_rows` rows are in memory at once; the verdict does not depend on it.
    """
    context = open_context(data_docs)

    def say(table: Files, frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for frame in frames:
            report(f"judging {table.table}", done=int(frame.index[0]), rows=table.num_rows)
            yield frame

    item_ids: list[pd.Series[int]] = []

    def keep_ids(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for frame in frames:
            item_ids.append(frame["item_id"])
            yield frame

    gc.freeze()  # the collection after each batch looks at what the batch left behind
    _PAGES_LOG.addFilter(_refuse_full_disk)
    try:
        frames = keep_ids(say(items, item_frames(items, engine, batch_rows)))
        about_items = judge(context, items, frames, item_rules(limits, previous.get("items")))
        accepted: pd.Series[int] = pd.concat(item_ids).drop(list(about_items.refused))
        frames = say(events, event_frames(events, accepted, engine, batch_rows))
        about_events = judge(context, events, frames, event_rules(limits, now, previous.get("events")))
    finally:
        _PAGES_LOG.removeFilter(_refuse_full_disk)
    return {"items": about_items, "events": about_events}


def _refuse_full_disk(record: logging.LogRecord) -> bool:
    """Great Expectations logs that it cannot write a page, and goes on: without this, Data Docs would lack it."""
    error = OSError(record.getMessage())
    if is_exhausted(error):
        raise error
    return True


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


def judge(context: EphemeralDataContext, files: Files, frames: Iterable[pd.DataFrame], rules: list[Rule]) -> Judgement:
    """Check a table's frames, their index the row number, by rules in order of precedence.

    The outcome of each frame, and of the rules about the number of rows, is added to the Data Docs.

    Raises:
        UrmError: Great Expectations could not evaluate a rule.
    """
    by_reason = {rule.reason: rule for rule in rules}
    judgement = Judgement()
    check_rows = _make_checkpoint(context, files.table, [rule for rule in rules if not rule.counts_rows])
    checks: Iterable[tuple[gx.Checkpoint, str, pd.DataFrame]]
    checks = ((check_rows, f"{files.table} from row {frame.index[0]}", frame) for frame in frames)
    if counting := [rule for rule in rules if rule.counts_rows]:
        rows_alone = pd.DataFrame(index=pd.RangeIndex(files.num_rows))
        check_count = _make_checkpoint(context, f"{files.table}, number of rows", counting)
        checks = chain([(check_count, f"{files.table}, number of rows", rows_alone)], checks)
    for checkpoint, name, frame in checks:
        for result in _run(checkpoint, name, frame):
            rule = by_reason[_reason(result)]
            if result.exception_info.get("raised_exception"):
                raise UrmError(f"rule {rule.reason} of {files.table}: {result.exception_info['exception_message']}")
            if result.success:
                continue
            rows = result.result.get("unexpected_index_list")
            if rows is None:  # a rule about the whole table
                if rule not in [known for known, _ in judgement.failed]:  # of an earlier batch
                    judgement.failed.append((rule, str(result.result["observed_value"])))
                continue
            for row in rows:
                judgement.refused.setdefault(int(row), []).append(rule)
        gc.collect()  # a judged frame stands in circles of references
    precedence = {rule.reason: position for position, rule in enumerate(rules)}
    judgement.failed.sort(key=lambda failure: precedence[failure[0].reason])
    for broken in judgement.refused.values():
        broken.sort(key=lambda rule: precedence[rule.reason])
    return judgement


def _reason(result: ExpectationValidationResult) -> str:
    meta = result.expectation_config.meta if result.expectation_config else None
    return str((meta or {})[REASON])


def _make_checkpoint(context: EphemeralDataContext, name: str, rules: list[Rule]) -> gx.Checkpoint:
    suite = gx.ExpectationSuite(name=name)
    for rule in rules:
        suite.add_expectation(rule.expectation)
    context.suites.add(suite)
    asset = context.data_sources.add_pandas(name).add_dataframe_asset(name)
    definition = context.validation_definitions.add(
        gx.ValidationDefinition(name=name, data=asset.add_batch_definition_whole_dataframe("all"), suite=suite)
    )
    return context.checkpoints.add(
        gx.Checkpoint(
            name=name,
            validation_definitions=[definition],
            actions=[UpdateDataDocsAction(name="data_docs")],
            result_format=_ROW_RESULTS,
        )
    )


def _run(checkpoint: gx.Checkpoint, name: str, frame: pd.DataFrame) -> list[ExpectationValidationResult]:
    outcome: Any = checkpoint.run(batch_parameters={"dataframe": frame}, run_id=gx.RunIdentifier(run_name=name))
    (suite_result,) = outcome.run_results.values()
    return list(suite_result.results)
