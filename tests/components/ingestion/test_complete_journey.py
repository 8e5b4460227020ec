import shutil
from pathlib import Path

import ibis
import pandas as pd
import pyarrow.parquet as pq
import pytest

from components.config import CompleteJourneySource
from components.exceptions import DataError
from components.ingestion.complete_journey import find_data, read_events, read_items


@pytest.fixture
def sales(slice_dir: Path) -> pd.DataFrame:
    sales = pd.read_parquet(slice_dir / "transactions.parquet")
    return sales[sales.quantity != 0]


@pytest.fixture
def events(slice_dir: Path, connection: ibis.BaseBackend) -> pd.DataFrame:
    table = read_events(CompleteJourneySource(data_dir=slice_dir), connection).readable().to_pyarrow()
    frame = table.drop(["attributes"]).to_pandas()
    attributes = [dict(entry) for entry in table["attributes"].to_pylist()]
    return pd.concat([frame, pd.DataFrame(attributes)], axis="columns")


def test_every_purchase_is_one_event(events: pd.DataFrame, sales: pd.DataFrame) -> None:
    expected = sales.assign(
        event_id=[f"{row.basket_id}-{row.product_id}-0" for row in sales.itertuples()],
        user_id=sales.household_id.astype(str),
        ts=sales.transaction_timestamp.dt.tz_localize("UTC"),
    )
    assert events.event_id.is_unique
    joined = events.merge(expected, on="event_id", suffixes=("", "_expected"))
    assert len(joined) == len(events) == len(sales)
    assert (joined.user_id == joined.user_id_expected).all()
    assert (joined.item_id == joined.product_id).all()
    assert (joined.ts == joined.ts_expected).all()
    assert set(events.behavior) == {"purchase"}
    assert set(events.scenario) == {"store"}


def test_rows_of_quantity_zero_are_no_purchases(slice_dir: Path, events: pd.DataFrame, sales: pd.DataFrame) -> None:
    everything = pq.read_metadata(slice_dir / "transactions.parquet").num_rows
    assert everything > len(sales) == len(events)
    assert "0" not in set(events.quantity)


def test_promotions_are_of_product_store_and_week(slice_dir: Path, events: pd.DataFrame, sales: pd.DataFrame) -> None:
    promotions = pd.read_parquet(slice_dir / "promotions.parquet")
    keys = ["product_id", "store_id", "week"]
    shown = set(promotions[promotions.display_location != "0"][keys].itertuples(index=False, name=None))
    mailed = set(promotions[promotions.mailer_location != "0"][keys].itertuples(index=False, name=None))
    rows = list(sales.itertuples())
    by_event = {f"{row.basket_id}-{row.product_id}-0": tuple(getattr(row, key) for key in keys) for row in rows}
    key = events.event_id.map(by_event)
    assert 0 < (events.in_display == "true").sum() < len(events)
    assert ((events.in_display == "true") == key.isin(shown)).all()
    assert ((events.in_mailer == "true") == key.isin(mailed)).all()


def test_discounts(events: pd.DataFrame, sales: pd.DataFrame) -> None:
    total = sales.retail_disc + sales.coupon_disc + sales.coupon_match_disc
    assert (events.discounted == "true").sum() == (total > 0).sum() > 0
    assert (events.coupon_used == "true").sum() == (sales.coupon_disc > 0).sum() > 0
    assert events.discount.astype(float).sum() == pytest.approx(total.sum(), abs=0.01 * len(sales))


def test_first_households(slice_dir: Path, connection: ibis.BaseBackend, sales: pd.DataFrame) -> None:
    source = CompleteJourneySource(data_dir=slice_dir, max_users=3)
    users = read_events(source, connection).readable().user_id.to_pyarrow().to_pylist()
    assert {int(user) for user in users} == set(sorted(sales.household_id.unique())[:3])


def test_items(slice_dir: Path, connection: ibis.BaseBackend, sales: pd.DataFrame) -> None:
    source = CompleteJourneySource(data_dir=slice_dir)
    items = read_items(source, connection).readable().to_pandas().set_index("item_id")
    products = pd.read_parquet(slice_dir / "products.parquet").set_index("product_id")
    assert sorted(items.index) == sorted(products.index)

    ice = items.loc[25671]
    assert ice.title == "Ice - crushed/cubed, frozen ice, national brand, 22 lb"
    assert list(ice.category) == ["grocery", "frozen ice", "ice - crushed/cubed"]
    assert ice.brand == "National"
    assert ice.available
    assert ice.external_id == "25671"

    bare = items.loc[26081]  # the till knows nothing of it but the department
    assert bare.title == "Miscellaneous, national brand"
    assert list(bare.category) == ["miscellaneous"]

    unit_price = ((sales.retail_disc + sales.sales_value + sales.coupon_match_disc) / sales.quantity).round(2)
    oldest_first = sales.assign(unit_price=unit_price).sort_values(["transaction_timestamp", "basket_id", "unit_price"])
    first = oldest_first.groupby("product_id").unit_price.first()
    priced = items.price.dropna()
    assert sorted(priced.index) == sorted(first.index.intersection(items.index))
    assert priced.to_numpy() == pytest.approx(first[priced.index].to_numpy(), abs=0.011)  # halves round either way


def test_a_missing_file_is_named(slice_dir: Path, tmp_path: Path, connection: ibis.BaseBackend) -> None:
    shutil.copytree(slice_dir, tmp_path / "data")
    (tmp_path / "data/promotions.parquet").unlink()
    with pytest.raises(DataError, match=r"promotions\.parquet: expected a Parquet file, got nothing"):
        read_events(CompleteJourneySource(data_dir=tmp_path / "data"), connection)


def test_a_missing_column_is_named(slice_dir: Path, tmp_path: Path, connection: ibis.BaseBackend) -> None:
    shutil.copytree(slice_dir, tmp_path / "data")
    path = tmp_path / "data/transactions.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["week", "coupon_disc"]), path)
    with pytest.raises(DataError, match="got no coupon_disc, week"):
        read_events(CompleteJourneySource(data_dir=tmp_path / "data"), connection)


def test_the_package_has_the_files() -> None:
    assert {path.stem for path in find_data().glob("*.parquet")} >= {"transactions", "promotions", "products"}
