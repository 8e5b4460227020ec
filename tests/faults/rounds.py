"""Kill -9 of workers, round after round: at points by name, and at random instants."""

import random
import time
from dataclasses import dataclass, field

import psutil

from tests.faults.checker import Report
from tests.faults.injection import POINTS, Fault
from tests.faults.world import Worker, World
from tests.worlds.recall import wait_until

_USERS_AT_A_TIME, _ROUNDS_A_USER, _EVENTS_A_ROUND = 8, 10, 24
_LONGEST_LIFE_SECONDS = 0.4  # about what a round's events take
_AIMED_SHARE = 0.6


@dataclass
class Tally:
    """What the rounds came to.

    Attributes:
        rounds: Rounds.
        events: Events sent, copies not counted.
        deaths: Workers killed, by where it struck them.
        redeliveries: Entries that dead workers left unfinished.
        report: The checker's.
    """

    rounds: int = 0
    events: int = 0
    deaths: dict[str, int] = field(default_factory=dict)
    redeliveries: int = 0
    report: Report = field(default_factory=Report)


def run_rounds(world: World, rounds: int, seed: int) -> Tally:
    """Two workers at work; each round one of them dies, and is replaced by a new one with a fate of its own."""
    chance, tally = random.Random(seed), Tally(rounds=rounds)
    users = [f"user{number}" for number in range(_USERS_AT_A_TIME * (1 + rounds // _ROUNDS_A_USER))]
    other = world.start_worker()
    with world.reading(users, seed):
        for number in range(rounds):
            fault = _choose(chance)
            doomed = world.start_worker(fault)
            first = _USERS_AT_A_TIME * (number // _ROUNDS_A_USER)
            events = world.make_events(users[first : first + _USERS_AT_A_TIME], _EVENTS_A_ROUND, chance)
            world.send(events + chance.sample(events, 3))  # some are sent twice
            tally.events += len(events)
            if fault.point:
                where = fault.point if _dies(doomed, world) else "anywhere"
            else:
                time.sleep(chance.uniform(0, _LONGEST_LIFE_SECONDS))
                where = "anywhere"
            tally.redeliveries += world.kill(doomed)
            if number % 20 == 19:
                print("round", number + 1, tally, flush=True)
            tally.deaths[where] = tally.deaths.get(where, 0) + 1
            if chance.random() < 0.2:  # the one who would have taken over dies as well
                tally.redeliveries += world.kill(other)
                tally.deaths["anywhere"] = tally.deaths.get("anywhere", 0) + 1
                other = world.start_worker()
        tally.report = world.settle()
    world.kill(other)
    return tally


def _choose(chance: random.Random) -> Fault:
    """Mostly death at a point by name, at one of its first calls; else none, and the killer comes at some instant."""
    if chance.random() >= _AIMED_SHARE:
        return Fault()
    return Fault(point=chance.choice(sorted(POINTS)), calls=chance.randint(1, 4))


def _dies(worker: Worker, world: World) -> bool:
    """Whether the worker's fault strikes before there is nothing left to do."""
    wait_until(lambda: worker.status == psutil.STATUS_ZOMBIE or world.checker.settled(), seconds=90)
    return worker.status == psutil.STATUS_ZOMBIE
