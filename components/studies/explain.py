"""`urm explain`: one user in words: the history, the [LM] text, and the items nearest to each user vector."""

from collections.abc import Iterable, Mapping

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from components.config import RunConfig, Task
from components.exceptions import ConfigError
from components.studies.finished import FinishedRun
from components.urm.data.request import Ids, RecallRequest, UserContext
from components.urm.inference import UrmRecaller
from components.urm.retrieval.users import UserVectors

HISTORY_ROWS = 15
VECTOR_ITEMS = 5
VECTOR_WIDTH = 44  # characters of a user vector's table
Names = Mapping[int, tuple[str, str]]


def explain_user(
    run: FinishedRun, config: RunConfig, user_id: str, task: Task, *, query: str | None, guidance: str | None, k: int
) -> RenderableType:
    """Everything the model returns for a user, as tables, k items of the recall among them.

    The run needs the stages validate, features and sft. Guidance is free text after the task's prompt.

    Raises:
        DataError: The user is unknown, or the task needs a query.
        MissingInputError: A stage has not succeeded.
    """
    context = run.newest_context(user_id)
    request = RecallRequest(context, task, query, guidance or None)
    recaller = run.recaller()
    users = recaller.encode_users([request])
    recalled, nearest = _search(recaller, request, users, k)
    names = run.describe_items([int(item) for ids in (context.item_ids, recalled, *nearest) for item in ids])
    asked = task.description + "".join(
        f' {label} "{text}"' for label, text in (("Query:", query), ("Guidance:", guidance)) if text
    )
    return Group(
        Text(f"User {user_id} of {config.name}", style="bold"),
        Text(_profile(context)),
        _history_table(context, names),
        Text(f"\nTask {request.task.name}: {asked}", style="bold"),
        Text.assemble(("What the model says after [LM]: ", "dim"), recaller.generate_text(request) or "(nothing)"),
        _items_table(f"Recall, best {len(recalled)}", recalled, names, set(context.item_ids.tolist())),
        Text(f"\nNearest items of each of the {len(nearest)} user vectors (* had before)", style="bold"),
        Columns(_vector_tables(nearest, names, set(context.item_ids.tolist()))),
    )


def pick_task(config: RunConfig, name: str | None) -> Task:
    """The task of that name, or the first one that needs no query.

    Raises:
        ConfigError: The run has no such task, or all need a query and none is named.
    """
    if name is not None:
        return config.task(name)
    for task in config.tasks:
        if not task.needs_query:
            return task
    raise ConfigError(
        "option --task",
        expected="one of " + ", ".join(task.name for task in config.tasks),
        got="none",
        remedy="name a task and its --query",
    )


def _search(recaller: UrmRecaller, request: RecallRequest, users: UserVectors, k: int) -> tuple[Ids, list[Ids]]:
    """The combined recall, and the nearest items of each user vector alone."""
    excluded = request.excluded_items
    recalled, _ = recaller.top_k(users, k, [excluded])
    apart = [users.of_one_vector(number) for number in range(recaller.num_user_vectors)]
    return recalled[0], [recaller.top_k(one, VECTOR_ITEMS, [excluded])[0][0] for one in apart]


def _profile(context: UserContext) -> str:
    often = f"; most often {', '.join(context.top_categories)}" if context.top_categories else ""
    return f"{context.num_events} events of {context.num_items} items on {context.num_active_days} days{often}"


def _history_table(context: UserContext, names: Names) -> Table:
    shown = min(HISTORY_ROWS, len(context.item_ids))
    table = Table(title=f"History, newest {shown} of {len(context.item_ids)} items", title_justify="left")
    for heading, justify in (("days before", "right"), ("times", "right"), ("item", "left"), ("category", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]  # rich wants a literal
    for row in range(shown):
        title, category = names[int(context.item_ids[row])]
        table.add_row(f"{context.days_since[row]:.1f}", str(int(context.counts[row])), escape(title), escape(category))
    return table


def _items_table(heading: str, items: Ids, names: Names, had: set[int]) -> Table:
    table = Table(title=heading, title_justify="left")
    table.add_column("", justify="right")
    table.add_column("item")
    table.add_column("category")
    for rank, item in enumerate(items.tolist(), start=1):
        title, category = names[item]
        table.add_row(str(rank), escape(title) + (" *" if item in had else ""), escape(category))
    return table


def _vector_tables(nearest: Iterable[Ids], names: Names, had: set[int]) -> list[Table]:
    tables = []
    for number, items in enumerate(nearest):
        table = Table(width=VECTOR_WIDTH)
        table.add_column(f"UM {number}", no_wrap=True, overflow="ellipsis")
        for item in items.tolist():
            table.add_row(("* " if item in had else "  ") + escape(names[item][0]))
        tables.append(table)
    return tables
