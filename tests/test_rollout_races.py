"""Eight controllers want to end the same rollout in different ways, again and again: one decision each time."""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from core_support import FORK, NO_POSTGRESQL, postgresql_server, race
from rollout_support import decisions, release_pair, split

from mlops_workbench.core.errors import ConflictError
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.release import rollouts

RACES, CONTROLLERS = 500, 8


@pytest.fixture(params=["sqlite", "postgresql"])
def workspace(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workspace]:
    """Two releases, the first of which serves; its ledger on this database."""
    if request.param == "sqlite":
        yield release_pair(tmp_path / "w")[0]
    elif NO_POSTGRESQL:
        pytest.skip(NO_POSTGRESQL)
    else:
        with postgresql_server() as address:
            yield release_pair(tmp_path / "w", ledger=address.format(database="postgres"))[0]


def start_next(workspace: Workspace, ledger: Ledger) -> None:
    """A rollout of the release that does not serve."""
    slot = ledger.slot("champion")
    assert slot is not None
    other = next(row for row in ledger.releases() if row.digest != slot.digest)
    rollouts.start_rollout(workspace, other.name, actor="starter", shares=(0.5,))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_hundred_rollouts_end_in_five_hundred_decisions(workspace: Workspace) -> None:
    """Each controller sees the same open rollout, and promotes or aborts it at the same moment as the seven others."""
    together = FORK.Barrier(CONTROLLERS)

    def contend(number: int) -> list[str]:
        ledger, draw, won = Ledger(workspace.ledger_url), random.Random(number), []
        for _ in range(RACES):
            if number == 0:
                start_next(workspace, ledger)
            together.wait(60)
            seen = rollouts.the_rollout(ledger)
            end = draw.choice([rollouts.promote_rollout, rollouts.abort_rollout])
            together.wait(60)
            try:
                end(workspace, seen, actor=f"controller {number}", reason="a race")
                won.append(seen.name)
            except ConflictError:
                pass
            together.wait(60)
        return won

    answers = race(contend, CONTROLLERS, seconds=1100)
    assert all(isinstance(won, list) for won in answers), answers
    won = Counter(name for names in answers for name in names)
    assert won == {f"rollout-{number}": 1 for number in range(1, RACES + 1)}
    made = Counter(decisions(workspace))
    assert made["started"] == made["promoted"] + made["aborted"] == RACES == made.total() // 2
    print("\n", dict(made), "by controller:", [len(names) for names in answers])
    assert min(made["promoted"], made["aborted"]) > RACES // 20
    assert sum(bool(names) for names in answers) == CONTROLLERS  # a race, not a queue
    ledger = Ledger(workspace.ledger_url)
    report, slot = ledger.verify(), ledger.slot("champion")
    assert report.ok, report.problems[:3]
    assert slot is not None and slot.epoch == 1 + made["promoted"]
    assert [row.ended_at is None for row in ledger.rollouts()] == [False] * RACES
    assert split(workspace) == {"champion": 1.0}
    ledger.close()
