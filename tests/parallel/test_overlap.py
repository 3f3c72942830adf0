"""The exchange of rows overlaps with the shared expert: measured on two hosts with a slow link between them."""

import json

import pytest

from tests.support import two_hosts as hosts

TRANSFERS = ["dispatch", "combine", "backward combine", "backward dispatch"]


@pytest.mark.slow
def test_transfers_hide_behind_the_shared_expert():
    """8,192 tokens a rank, dim 256, expert_dim 512, 300 Mbit/s: each transfer is hidden to 80% of the possible time.

    The possible time is that of the transfer or of the computation beside it, whichever is shorter. Other processes on
    the machine disturb the times, so one of three tries must pass; without overlap no try would.
    """
    tries = []
    try:
        with hosts.two_hosts("300mbit") as names:
            while len(tries) < 3 and (not tries or min(tries[-1].values()) < 0.8):
                lines = [out.splitlines()[-1] for out in hosts.run(names, "tests.support.slow_link")]
                ranks = [json.loads(line)["transfers"] for line in lines]
                tries.append({name: hidden([transfers[name] for transfers in ranks]) for name in TRANSFERS})
    except hosts.NamespacesUnavailable as error:
        pytest.skip(f"two hosts need network namespaces: {error}")
    assert min(tries[-1].values()) >= 0.8, tries


def hidden(ranks):
    """The share of one transfer that is hidden.

    The rank that starts last waits for the link alone, not for the other rank: its times, the shorter ones, count.
    """
    transfer, exposed = (min(rank[key] for rank in ranks) for key in ("transfer", "exposed"))
    return (transfer - exposed) / min(transfer, *(rank["computation"] for rank in ranks))
