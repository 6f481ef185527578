"""The node definitions that a simulated CML knows, with what the API needs of each.

Not the images' real catalogue: names, ports and sizes are enough for topologies to be imported, wired and started.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Definition:
    """One kind of node; `licensed` ones count against the node limit, `instant` ones need no boot."""

    id: str
    port: str
    """Name of the interface in a slot, with `{}` for the slot number."""
    ports: int
    ram: int
    cpus: int
    images: tuple[str, ...] = ()
    licensed: bool = True
    instant: bool = False
    loopback: bool = False

    def label(self, slot: int) -> str:
        return self.port.format(slot)


_ALL = (
    Definition("iosv", "GigabitEthernet0/{}", 4, 768, 1, ("iosv-159-3-m8",), loopback=True),
    Definition("iosvl2", "GigabitEthernet0/{}", 16, 768, 1, ("iosvl2-2020",), loopback=True),
    Definition("iol-xe", "Ethernet0/{}", 4, 1024, 1, ("iol-xe-17-12-01",), loopback=True),
    Definition("ioll2-xe", "Ethernet0/{}", 4, 1024, 1, ("ioll2-xe-17-12-01",), loopback=True),
    Definition("csr1000v", "GigabitEthernet{}", 8, 3072, 1, ("csr1000v-17-03-08a",), loopback=True),
    Definition("cat8000v", "GigabitEthernet{}", 8, 4096, 1, ("cat8000v-17-12-01a",), loopback=True),
    Definition("cat9000v-uadp", "GigabitEthernet1/0/{}", 8, 18432, 4, ("cat9kv-uadp-17-12-1",), loopback=True),
    Definition("iosxrv9000", "GigabitEthernet0/0/0/{}", 8, 20480, 4, ("iosxrv9000-7-11-1",), loopback=True),
    Definition("nxosv9000", "Ethernet1/{}", 16, 12288, 4, ("nxosv9300-10-4-2-f",), loopback=True),
    Definition("asav", "GigabitEthernet0/{}", 8, 2048, 1, ("asav-9-20-2",)),
    Definition("alpine", "eth{}", 4, 512, 1, ("alpine-base-3-19-1",)),
    Definition("desktop", "eth{}", 4, 512, 1, ("alpine-desktop-3-19-1",)),
    Definition("server", "eth{}", 4, 128, 1, ("tcl-14-1",)),
    Definition("ubuntu", "ens{}", 8, 2048, 1, ("ubuntu-22-04-20240126",)),
    Definition("trex", "eth{}", 6, 4096, 4, ("alpine-trex-3-19-1",)),
    Definition("wan_emulator", "eth{}", 4, 512, 1, ("alpine-wanem-3-19-1",)),
    Definition("external_connector", "port", 1, 0, 0, licensed=False, instant=True),
    Definition("unmanaged_switch", "port{}", 32, 0, 0, licensed=False, instant=True),
)

CATALOG: dict[str, Definition] = {d.id: d for d in _ALL}


def definition(name: str) -> Definition:
    """The definition of that name, or a plain machine under it: imported labs may name images that are missing."""
    return CATALOG.get(name) or Definition(name, "eth{}", 8, 512, 1)
