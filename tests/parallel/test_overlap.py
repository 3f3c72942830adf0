"""The exchange hidden behind the shared expert, by the clock, on two hosts with a slow link between them."""

import json

import pytest

from tests.support import two_hosts as hosts

LEGS = ["dispatch", "combine", "backward combine", "backward dispatch"]


@pytest.mark.slow
def test_transfers_hide_behind_the_shared_expert():
    """8,192 tokens a rank, dim 256, expert_dim 512, 300 Mbit/s: of each leg at least 80% of what can be is hidden.

    What can be: the transfer or the compute beside it, whichever is shorter. Neighbours of this machine disturb such
    times, so that one of three tries must do; without overlap none would.
    """
    tries = []
    try:
        with hosts.two_hosts("300mbit") as names:
            while len(tries) < 3 and (not tries or min(tries[-1].values()) < 0.8):
                lines = [out.splitlines()[-1] for out in hosts.run(names, "tests.support.slow_link")]
                ranks = [json.loads(line)["legs"] for line in lines]
                tries.append({leg: hidden([legs[leg] for legs in ranks]) for leg in LEGS})
    except hosts.NoHosts as why:
        pytest.skip(f"two hosts take network namespaces: {why}")
    assert min(tries[-1].values()) >= 0.8, tries


def hidden(ranks):
    """The share of one leg that is hidden. The rank that comes last waits for the link alone: its waits count."""
    transfer, exposed = (min(rank[key] for rank in ranks) for key in ("transfer", "exposed"))
    return (transfer - exposed) / min(transfer, *(rank["beside"] for rank in ranks))
