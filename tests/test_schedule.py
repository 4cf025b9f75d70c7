"""When ticks are due, and a scheduler under a clock that the test turns."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from jobs.schedule import LONGEST_SLEEP_S, Clock, Runner, follow
from pipeline.errors import ConfigError
from pipeline.operations.schedule import Schedule
from pipeline.root.result import RunResult, next_attempt, scheduled_name, write_result
from pipeline.root.storage import Storage
from tests.conftest import make_config

BERLIN = ZoneInfo("Europe/Berlin")
DAY = timedelta(days=1)


def berlin(*parts, fold=0):
    return datetime(*parts, tzinfo=BERLIN, fold=fold).astimezone(UTC)


def ticks(schedule, start, end):
    """Every tick of a span, as a scheduler that looks every minute sees them."""
    found, settled, now = [], start, start
    while now < end:
        now += timedelta(minutes=1)
        if tick := schedule.due(settled, now):
            assert tick == now
            found.append(tick)
            settled = tick
    return found


def test_due_is_the_last_tick_up_to_now_unless_settled():
    nightly = Schedule("0 3 * * *", "Europe/Berlin")
    tick = berlin(2026, 11, 24, 3)
    assert nightly.due(tick - DAY, tick - timedelta(seconds=1)) is None
    assert nightly.due(tick - DAY, tick) == tick
    assert nightly.due(tick, tick + timedelta(hours=23)) is None
    assert nightly.due(tick - 30 * DAY, tick + timedelta(hours=5)) == tick
    assert nightly.due(None, tick - timedelta(hours=1)) == tick - DAY
    assert nightly.following(tick) == tick + DAY
    assert Schedule("0 0 29 2 *").due(None, datetime(2027, 6, 1, tzinfo=UTC)) == datetime(2024, 2, 29, tzinfo=UTC)
    assert Schedule("* * * * *").due(tick - 3000 * DAY, tick) == tick


def test_a_skipped_hour_has_one_run_right_after_it():
    start, end = berlin(2026, 3, 29), berlin(2026, 3, 30)
    for cron in ("0 2 * * *", "30 2 * * *"):
        assert ticks(Schedule(cron, "Europe/Berlin"), start, end) == [berlin(2026, 3, 29, 3)]
    assert Schedule("30 2 * * *", "Europe/Berlin").due(start - DAY, berlin(2026, 3, 29, 12)) == berlin(2026, 3, 29, 3)
    assert len(ticks(Schedule("15 * * * *", "Europe/Berlin"), start, end)) == 23


def test_a_repeated_hour_has_one_run_the_first_time():
    start, end = berlin(2026, 10, 25), berlin(2026, 10, 26)
    first = berlin(2026, 10, 25, 2, 30)
    nightly = Schedule("30 2 * * *", "Europe/Berlin")
    assert ticks(nightly, start, end) == [first]
    for later in (timedelta(minutes=45), timedelta(hours=1), timedelta(minutes=75)):  # in and after the second 2 o'clock
        assert nightly.due(first, first + later) is None
        assert nightly.due(start, first + later) == first
    assert len(ticks(Schedule("15 * * * *", "Europe/Berlin"), start, end)) == 25


@pytest.mark.parametrize(
    ("cron", "zone", "message"),
    [
        ("0 3 * *", "UTC", "expected five fields"),
        ("0 0 3 * * *", "UTC", "expected five fields"),
        ("0 25 * * *", "UTC", "Bad hour"),
        ("0 0 30 2 *", "UTC", "Bad day-of-month"),
        ("0 3 * * *", "Europe/Bonn", "no such time zone"),
        ("0 3 * * *", "../passwd", "no such time zone"),
    ],
)
def test_what_is_no_schedule_is_refused(cron, zone, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(cron, zone)


class StoppedError(Exception):
    """The test's SIGTERM."""


class TurnedClock:
    """A clock that only sleeping, and runs, move; it stops the scheduler at a moment."""

    def __init__(self, now, until):
        self.time, self.until = now, until

    def now(self):
        return self.time

    def sleep(self, seconds):
        assert 0 < seconds <= LONGEST_SLEEP_S
        self.time += timedelta(seconds=seconds)
        if self.time >= self.until:
            raise StoppedError


class TimedRunner(Runner):
    """Runs that take their time by the turned clock and leave their result, as those of the command do."""

    def __init__(self, root, clock, *, takes=timedelta(0), codes=(), max_staleness=None):
        super().__init__(make_config(root, root.parent / "corpus"), ["reindex"], self.hear, max_staleness)
        self.clock, self.takes, self.codes = clock, takes, list(codes)
        self.ticks, self.heard = [], []

    def hear(self, event, text, **fields):
        self.heard.append((event, text))

    def _run(self, tick):
        if self.clock.time >= self.clock.until:
            raise StoppedError
        self.ticks.append(tick)
        code, started = self.codes.pop(0) if self.codes else 0, self.clock.time
        self.clock.time += self.takes
        if code == 137:
            return code
        name = next_attempt(self._storage, self._digest, tick)
        write_result(self._storage, RunResult(run=name, exit_code=code, started=started, ended=self.clock.time))
        if code == 143:
            raise StoppedError
        return code


def scheduled(root, schedule, start, end, **options):
    """The runner of a scheduler that was up from start to end."""
    clock = TurnedClock(start, end)
    runner = TimedRunner(root, clock, **options)
    with pytest.raises(StoppedError):
        follow(schedule, runner, Clock(clock.now, clock.sleep))
    return runner


def settle(root, tick):
    """A root whose tick is done."""
    storage = Storage(str(root))
    write_result(storage, RunResult(run=scheduled_name("00", tick, 1), exit_code=0, started=tick, ended=tick))


NIGHTLY = Schedule("30 2 * * *", "Europe/Berlin")
HOURLY = Schedule("0 * * * *")
NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def test_scheduler_runs_once_a_night_over_both_changes_of_the_clock(tmp_path):
    settle(tmp_path / "spring", berlin(2026, 3, 27, 12))
    spring = scheduled(tmp_path / "spring", NIGHTLY, berlin(2026, 3, 27, 12), berlin(2026, 3, 30, 12))
    assert spring.ticks == [berlin(2026, 3, 28, 2, 30), berlin(2026, 3, 29, 3), berlin(2026, 3, 30, 2, 30)]
    settle(tmp_path / "autumn", berlin(2026, 10, 23, 12))
    autumn = scheduled(tmp_path / "autumn", NIGHTLY, berlin(2026, 10, 23, 12), berlin(2026, 10, 26, 12))
    assert autumn.ticks == [berlin(2026, 10, day, 2, 30) for day in (24, 25, 26)]


def test_scheduler_makes_up_missed_ticks_in_one_run(tmp_path):
    settle(tmp_path / "root", NOON)
    down_until = NOON + 30 * HOUR + timedelta(minutes=20)
    runner = scheduled(tmp_path / "root", HOURLY, down_until, down_until + HOUR)
    assert runner.ticks == [NOON + 30 * HOUR, NOON + 31 * HOUR]


def test_scheduler_runs_an_empty_root_at_once(tmp_path):
    runner = scheduled(tmp_path / "root", HOURLY, NOON + timedelta(minutes=20), NOON + timedelta(minutes=50))
    assert runner.ticks == [NOON]
    assert runner.heard[-1] == ("waiting", "next tick: 2026-11-24 13:00 UTC")


def test_scheduler_coalesces_what_a_long_run_overlaps(tmp_path):
    settle(tmp_path / "root", NOON)
    runner = scheduled(tmp_path / "root", HOURLY, NOON, NOON + 8 * HOUR, takes=timedelta(minutes=150))
    assert runner.ticks == [NOON + HOUR, NOON + 3 * HOUR, NOON + 6 * HOUR]


def test_scheduler_waits_for_the_next_tick_after_any_failure(tmp_path):
    settle(tmp_path / "root", NOON)
    runner = scheduled(tmp_path / "root", HOURLY, NOON, NOON + 5.5 * HOUR, codes=[3, 4, 137, 1, 0])
    assert runner.ticks == [NOON + number * HOUR for number in (1, 2, 3, 4, 5)]


def test_restarted_scheduler_runs_no_finished_tick_again_and_a_lost_one_once(tmp_path):
    for code, ticks_after in ((0, []), (5, []), (143, [NOON + HOUR]), (137, [NOON + HOUR])):
        root = tmp_path / str(code)
        settle(root, NOON)
        first = scheduled(root, HOURLY, NOON, NOON + 1.2 * HOUR, codes=[code])
        assert first.ticks == [NOON + HOUR]
        again = scheduled(root, HOURLY, NOON + 1.3 * HOUR, NOON + 1.6 * HOUR)
        assert again.ticks == ticks_after, code
        assert scheduled(root, HOURLY, NOON + 1.7 * HOUR, NOON + 1.8 * HOUR).ticks == []


def test_scheduler_leaves_a_tick_to_another_that_settled_it(tmp_path):
    settle(tmp_path / "root", NOON)
    clock = TurnedClock(NOON + HOUR, NOON + 1.5 * HOUR)
    runner = TimedRunner(tmp_path / "root", clock)
    settle(tmp_path / "root", NOON + HOUR)
    assert (runner.run(NOON + HOUR, clock.now()), runner.ticks) == (None, [])
    assert runner.heard == [("settled", "the tick of 2026-11-24 13:00 UTC is settled already")]


def test_scheduler_tells_once_that_a_root_is_stale(tmp_path):
    settle(tmp_path / "root", NOON)
    options = {"codes": [1, 1, 1, 0, 1, 1, 1], "max_staleness": 2.5 * HOUR}
    runner = scheduled(tmp_path / "root", HOURLY, NOON, NOON + 7.5 * HOUR, **options)
    stale = [text for event, text in runner.heard if event == "stale"]
    assert stale == [f"stale: no run has succeeded since 2026-11-24 {hour}:00 UTC" for hour in (12, 16)]


def test_once_runs_what_is_due_and_exits_with_its_code(tmp_path):
    settle(tmp_path / "root", NOON)
    clock = TurnedClock(NOON + 1.5 * HOUR, NOON + 9 * HOUR)
    runner = TimedRunner(tmp_path / "root", clock, codes=[3])
    assert [follow(HOURLY, runner, Clock(clock.now, clock.sleep), once=True) for _ in range(2)] == [3, 0]
    assert runner.ticks == [NOON + HOUR]
    assert runner.heard == [("waiting", "next tick: 2026-11-24 14:00 UTC")]


def test_a_clock_that_was_ahead_and_is_put_right_does_not_silence_the_scheduler(tmp_path):
    root, ahead = tmp_path / "root", NOON + timedelta(days=365)
    assert scheduled(root, HOURLY, ahead, ahead + 0.5 * HOUR).ticks
    assert scheduled(root, HOURLY, NOON + HOUR / 2, NOON + 2.5 * HOUR).ticks == [NOON, NOON + HOUR, NOON + 2 * HOUR]


def test_nor_does_one_that_is_put_right_while_the_scheduler_runs(tmp_path):
    clock = TurnedClock(NOON + timedelta(days=365), NOON + timedelta(days=366))
    runner = TimedRunner(tmp_path / "root", clock)
    sleep = clock.sleep

    def put_right(seconds):
        if len(runner.ticks) == 1:
            clock.time, clock.until = NOON + HOUR / 2, NOON + 2.5 * HOUR
        sleep(seconds)

    with pytest.raises(StoppedError):
        follow(HOURLY, runner, Clock(clock.now, put_right))
    assert runner.ticks[1:] == [NOON, NOON + HOUR, NOON + 2 * HOUR]
