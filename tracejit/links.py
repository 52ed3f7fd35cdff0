"""Links between GPUs by name, as far as a prediction needs them.

A link has a bandwidth one way, in bytes per second, and the latency of one step of a ring, in
seconds. `within` is how many ranks it connects at most. Their public sources:

NVLink 3        NVIDIA A100 datasheet: 600 GB/s of one GPU, both ways together; boards of 8.
NVLink 4        NVIDIA H100 and H200 datasheets: 900 GB/s, likewise.
NVLink 5        NVIDIA HGX B200 datasheet: 1.8 TB/s, likewise.
InfiniBand HDR  NVIDIA ConnectX-6 datasheet: 200 Gb/s a port; one for each GPU, as in a DGX A100.
InfiniBand NDR  NVIDIA ConnectX-7 datasheet: 400 Gb/s a port; one for each GPU, as in a DGX H100.
Ethernet        IEEE 802.3ba: 100 Gb/s a port; one for each GPU.

The bandwidths are peaks, so a prediction is the best that a link allows. The latencies are those
that NCCL reckons with for a step of a ring with its protocol "Simple" (`src/graph/tuning.cc`,
`hwLat`): 3.4 µs over NVLink and 14 µs over a network.

A cluster is the links between its ranks, the fastest first. A ring is as fast as its slowest link:
the first one that connects as many ranks.
"""

from __future__ import annotations

from tracejit.records import dataclass


@dataclass(frozen=True)
class Link:
    """What connects ranks: bytes a second one way, seconds a step, ranks at most."""

    name: str
    bandwidth: float
    latency: float
    within: int = 1 << 30

    def seconds(self, nbytes: float, steps: int) -> float:
        """What a rank takes to send bytes, in so many steps one after another."""
        return steps * self.latency + nbytes / self.bandwidth


_BOARD = 8
_RING, _NETWORK = 3.4e-6, 14e-6

ETHERNET = (Link("100 Gb Ethernet", 12.5e9, _NETWORK),)
CLUSTERS = {  # by the name of the GPU
    "A100": (Link("NVLink 3", 300e9, _RING, _BOARD), Link("InfiniBand HDR", 25e9, _NETWORK)),
    "H100": (Link("NVLink 4", 450e9, _RING, _BOARD), Link("InfiniBand NDR", 50e9, _NETWORK)),
    "H200": (Link("NVLink 4", 450e9, _RING, _BOARD), Link("InfiniBand NDR", 50e9, _NETWORK)),
    "B200": (Link("NVLink 5", 900e9, _RING, _BOARD), Link("InfiniBand NDR", 50e9, _NETWORK)),
}
RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # for which an efficiency is predicted


def name_of(cluster: tuple[Link, ...]) -> str:
    """What a cluster is called: its links."""
    return ", ".join(link.name for link in cluster)


def link_of(cluster: tuple[Link, ...], ranks: int) -> Link:
    """The link by which so many ranks communicate."""
    return next(link for link in cluster if ranks <= link.within)
