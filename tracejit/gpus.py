"""GPUs by name, as far as a prediction needs them, and how many programs one of their SMs holds.

Figures are peaks of the SXM variants without sparsity. Their public sources:

A100   NVIDIA A100 80GB datasheet (2,039 GB/s; 19.5, 156, 312, 9.7 TFLOPS) and the A100 whitepaper
       (108 SMs, boost clock 1.41 GHz).
H100   NVIDIA H100 datasheet (SXM5: 3.35 TB/s; 67, 495, 989, 34 TFLOPS) and the H100 whitepaper
       (132 SMs; 989 TFLOPS are 132 SMs × 4096 a clock at 1.83 GHz).
H200   NVIDIA H200 datasheet (SXM: 4.8 TB/s; the H100's TFLOPS and SMs).
B200   NVIDIA Blackwell architecture brief, HGX B200 at 1,000 W (8 TB/s; 80, 1,100, 2,250, 40
       TFLOPS); 148 SMs and their clock: Chips and Cheese, "Nvidia's B200" (2025).

The figures agree with what G. Lockwood quotes of these documents (glennklockwood.com, "A100",
"H100", "B200"), and for the H200 with what is said of NVIDIA's announcement of 2023: the H100's GPU
with 4.8 TB/s.

For all of them:

L2_WIDTH   32 bytes a clock and SM from the L2 cache: Chips and Cheese, "Nvidia's H100" (2023),
           measured 5.5 to 6 TB/s with 114 SMs at about 1.6 GHz.
LAUNCH     between a kernel and the one before it in a CUDA graph: NVIDIA, "Getting Started with
           CUDA Graphs" (2019), 3.4 µs a kernel of 2.9 µs, on a V100. No newer figure was found.
LATENCY    of a load from memory while many are under way: an assumption, twice and a half what one
           load alone takes (Luo et al., arXiv:2402.13499: 466 cycles on A100, 479 on H100).
EAGER      of the host per operation of eager PyTorch, dispatch and launch: an assumption.
REPLAY     of the host per replayed call, guard included, and for each of its launches: 3 and 0.5 µs
           without the driver (`benchmarks/launch_cost.py`, `replay_cost.py`), which is assumed to
           take 2 µs more.
"""

from __future__ import annotations

from tracejit.records import dataclass

L2_WIDTH = 32  # bytes a clock and SM
LAUNCH = 0.5e-6  # seconds
LATENCY = 0.7e-6
# What a launch has to keep to, if a GPU is to be used by it:
LONG = 8  # steps from which on a program has to keep memory busy
IN_FLIGHT = 16 << 10  # bytes per SM
BALANCE = 0.8  # of the SMs' time
EAGER = 5e-6
REPLAY = 5e-6, 2.5e-6


@dataclass(frozen=True)
class Gpu:
    """A GPU: SMs, clock in Hz, bytes per second of its memory, operations per second by type.

    `tf32` and `half` (bf16, f16) are of tensor cores; a multiplication with an addition is two.
    """

    name: str
    target: int  # its sm_ number
    sms: int
    clock: float
    bandwidth: float
    fp32: float
    tf32: float
    half: float
    fp64: float

    @property
    def l2_bandwidth(self) -> float:
        """Bytes per second from the L2 cache."""
        return L2_WIDTH * self.sms * self.clock


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 108, 1.41e9, 2.039e12, 19.5e12, 156e12, 312e12, 9.7e12),
        Gpu("H100", 90, 132, 1.83e9, 3.35e12, 67e12, 494.7e12, 989.4e12, 34e12),
        Gpu("H200", 90, 132, 1.83e9, 4.8e12, 67e12, 494.7e12, 989.4e12, 34e12),
        Gpu("B200", 100, 148, 1.85e9, 8e12, 80e12, 1100e12, 2250e12, 40e12),
    )
}


@dataclass(frozen=True)
class Arch:
    """What bounds the CTAs of one SM, besides what all targets have in common; bytes."""

    shared_per_block: int
    shared_per_sm: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
ARCHES = {
    80: Arch(shared_per_block=163 << 10, shared_per_sm=164 << 10),
    90: Arch(shared_per_block=227 << 10, shared_per_sm=228 << 10),
    100: Arch(shared_per_block=227 << 10, shared_per_sm=228 << 10),
}


def occupancy(
    target: int, registers: int, warps: int, shared_bytes: int, tensor_memory: int = 0
) -> int:
    """CTAs that one SM holds at a time, the least that a resource allows; 0 if none fits.

    slots          an SM holds 32 CTAs and 64 warps
    registers      each of its 4 partitions has 16384; a warp takes 32 times the `registers` of a
                   thread, rounded up to a multiple of 256
    shared memory  a CTA takes its bytes and 1024 more of the driver's, rounded up to 128
    tensor memory  an SM has 512 columns (sm_100)

    Source: cudaOccMaxActiveBlocksPerMultiprocessor in cuda_occupancy.h of the CUDA toolkit, with
    the largest shared-memory carve-out; for tensor memory, tcgen05.alloc in the PTX ISA.
    """
    arch = ARCHES[target]
    per_warp = _round_up(32 * registers, 256)
    if registers > 255 or per_warp * _round_up(warps, 4) > 65536:
        return 0
    if shared_bytes > arch.shared_per_block:
        return 0
    by_resource = [
        32,
        64 // warps,
        16384 // per_warp * 4 // warps,
        arch.shared_per_sm // _round_up(shared_bytes + 1024, 128),
    ]
    if tensor_memory:
        by_resource.append(512 // tensor_memory)
    return min(by_resource)


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to
