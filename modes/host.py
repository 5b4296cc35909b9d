"""Host mode: the workload shares the node's namespace and addresses; nothing is made."""

from __future__ import annotations

from collections.abc import Iterable

from towpath.kernel.contract import NetnsSeen
from towpath.model import Attachment, Network
from towpath.plan import Plan


class Host:
    """See towpath.mode.Mode."""

    name = "host"
    needs_netns = False

    def home(self, network: Network) -> str:
        return ""

    def plan_network(self, network: Network) -> Plan:
        return ()

    def check_network(self, network: Network, seen: NetnsSeen) -> str:
        return ""

    def network_is_up(self, network: Network, seen: NetnsSeen) -> bool:
        return True

    def replace_addresses(self, network: Network, seen: NetnsSeen) -> Plan:
        return ()

    def plan_drop_network(self, network: Network) -> Plan:
        return ()

    def plan_attach(self, record: Attachment, network: Network) -> Plan:
        return ()

    def plan_plug(self, record: Attachment, network: Network) -> Plan:
        return ()

    def plan_detach(self, record: Attachment) -> Plan:
        return ()

    def check(self, record: Attachment, network: Network, node: NetnsSeen, inside: NetnsSeen) -> Iterable[str]:
        return ()
