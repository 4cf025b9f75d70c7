"""When a run is due: cron expressions in a time zone, as functions of the moments that are passed in.

Missed ticks are one: only the last tick up to now is ever due. Daylight saving time goes by Debian's cron, as cronsim has it:
an expression with a fixed minute and hour runs once at a repeated hour, the first time, and once for a skipped hour, at the
first minute after it; where minute or hour begin with a star ticks follow elapsed time, so a repeated hour has them twice and
a skipped hour has none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from pipeline.errors import ConfigError

YEARS_BACK = 50
"""As far as cronsim looks forward."""


@dataclass(frozen=True)
class Schedule:
    """A cron expression of five fields and an IANA time zone. Moments that go in and come out are aware; ticks are in UTC."""

    cron: str
    zone: str = "UTC"

    def __post_init__(self) -> None:
        """Raise ConfigError on what is no schedule, or never comes."""
        if len(self.cron.split()) != 5:
            raise ConfigError(f"--cron {self.cron}: expected five fields, minute hour day month weekday, as in '0 3 * * *'")
        try:
            next(self._ticks(datetime(2000, 1, 1, tzinfo=UTC)))
        except (CronSimError, StopIteration) as error:
            raise ConfigError(f"--cron {self.cron}: no such time, {str(error) or 'it never comes'}") from error
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ConfigError(
                f"--tz {self.zone}: no such time zone here; use an IANA name as in Europe/Berlin, or pip install tzdata"
            ) from error

    def due(self, settled: datetime | None, now: datetime) -> datetime | None:
        """The last tick up to ``now``, unless it is settled. None settled: the last one is due, whenever it was."""
        window = timedelta(hours=1)
        oldest = settled or now - timedelta(days=366 * YEARS_BACK)
        while True:
            start = max(oldest, now - window)
            last = None
            for tick in self._ticks(start):
                if tick > now:
                    break
                last = tick
            if last or start == oldest:
                return last
            window *= 2

    def following(self, now: datetime) -> datetime:
        """The first tick after ``now``."""
        return next(self._ticks(now))

    def _ticks(self, after: datetime) -> Iterator[datetime]:
        """Ticks later than ``after``. cronsim forgets which of two equal local times it is at, hence the comparison."""
        for tick in CronSim(self.cron, after.astimezone(ZoneInfo(self.zone))):
            if (moment := tick.astimezone(UTC)) > after:
                yield moment
