"""What a machine is to the planner: a handful of rates, each measured, or with its source named.

Computing. A pass over some layers takes the sum of four times, each work over a rate:

    products / product_flops  +  attention / attention_flops  +  activations / activation_bandwidth  +  modules * launch

Products alone would flatter: norms, rotations and SiLU do no work worth counting and move every activation, and each
operation costs its start however few tokens it has. Parameters cost time too: `accumulate` seconds for each element
and micro-batch (its gradient is added to a sum), `update` seconds for each element once a step (norm, clip, AdamW).

A GPU computes what its host has launched before, and waits where the host is slower: where kernels are short. `host`
is what the host needs for a layer, `host_message` for a message, however many tokens they have; a CPU is its own host.

Sending. A message takes a latency and then its bytes over a bandwidth, `alpha + n / beta`. Of a payload of n bytes a
ring of N ranks carries over each rank's wire

    all_reduce 2 (N-1)/N n    reduce_scatter, all_to_all (N-1)/N n    all_gather (N-1) n (n the own shard)    send n

and the latency is paid log2 N times. Links inside a host and between hosts differ by a factor of ten, so each has its
own numbers. `overlap` is the share of a message that can really pass while the rank computes: on a GPU nearly all, on
a CPU whose cores also carry the messages nearly none.

The alpha-beta model is Hockney's (Parallel Computing 20, 1994); ring and tree costs as in Thakur et al. (2005).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..config import ConfigError

GIB = 2**30
RATES = ("product_flops", "attention_flops", "activation_bandwidth", "bandwidth", "memory", "ranks_per_host")


@dataclass(frozen=True)
class Link:
    """One way to send: seconds before the first byte, and bytes a second on a rank's wire after it."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Machine:
    """What the planner knows of the ranks and their links. Units: seconds, bytes, operations."""

    name: str
    source: str  # where the numbers come from, in words
    memory: float  # bytes that a rank may use
    product_flops: float  # in matrix products, a second
    attention_flops: float  # in fused attention, a second, the masked half not counted
    activation_bandwidth: float  # bytes of kept activations a second, written in forward
    launch: float  # seconds of the device for each dense layer, whatever its size; a backward costs two
    accumulate: float  # seconds for each element of a gradient and micro-batch
    update: float  # seconds for each float32 element that AdamW updates; others by `work.moved_by_update`
    overlap: float  # share of a message that passes beside computing, 0 to 1
    ranks_per_host: int
    backward: float = 1.0  # a backward's time over that of its work
    inside: Mapping[str, Link] = field(default_factory=dict)  # operation -> link between ranks of a host; "" any other
    across: Mapping[str, Link] = field(default_factory=dict)  # ... between hosts; empty: there is one host
    host: float = 0.0  # seconds in which a host launches a dense layer's forward for its GPU; a backward costs three
    host_message: float = 0.0  # ... and a message
    cores: int = 0  # ranks that can compute at once; 0: all. More take turns.
    missed: float = 0.0  # of the passes that the rates were made from the worst explained one, relative error

    def seconds(self, operation: str, payload: float, ranks: int, across: bool, messages: float = 1) -> float:
        """The time of `messages` collectives that hand over `payload` bytes in all, on `ranks` ranks.

        Args:
            operation: as the ledger names it.
            across: whether the ranks are on several hosts.
        """
        if ranks == 1 or payload <= 0:
            return 0.0
        links = self.across if across and self.across else self.inside
        link = links.get(operation) or links[""]
        return messages * math.ceil(math.log2(ranks)) * link.latency + wire_bytes(operation, payload, ranks) / (
            link.bandwidth
        )

    @property
    def turns(self) -> float:
        """By what computing takes longer where more ranks than cores share a host."""
        return max(1.0, self.ranks_per_host / self.cores) if self.cores else 1.0


def wire_bytes(operation: str, payload: float, ranks: int) -> float:
    """What a ring carries over each rank's wire for a payload, by the formulas above."""
    factor = {
        "all_reduce": 2 * (ranks - 1) / ranks, "reduce_scatter": (ranks - 1) / ranks, "all_gather": ranks - 1.0,
        "all_to_all": (ranks - 1) / ranks, "counts": (ranks - 1) / ranks, "replicas": 1.0,
    }  # fmt: skip
    return payload * factor.get(operation, 1.0)


def exposed(message: float, cover: float, overlap: float) -> float:
    """What is left of a message's time when `cover` seconds of computing run beside it."""
    return message - overlap * min(message, cover)


# Rates of one H100 80GB (SXM), bf16, compiled: fitted to the eight rows of one GPU in
# summary/01_model_and_its_costs_gpu.log, which the formulas then meet within 3 % (a test says so). NVLink: all-reduce
# bus bandwidths of two H100s of one host, 16 GB/s at 1 MiB, 175 at 25 MiB, 284 at 256 MiB, 325 at 1 GiB, measured on
# the machine of that log's day: alpha + n / beta with 70 us and 332 GB/s meets all four within 15 %.
_NVLINK = {"": Link(70e-6, 332e9)}
_H100 = Machine(
    name="h100",
    source="one H100 80GB: summary/01_model_and_its_costs_gpu.log; NVLink: all-reduce of two GPUs of one host; "
    "overlap: assumed; host: summary/07_3d_parallel.md",
    memory=78 * GIB, product_flops=650e12, attention_flops=430e12, activation_bandwidth=2.3e12, launch=20e-6,
    accumulate=4.6e-12, update=13e-12, overlap=0.9, ranks_per_host=8, inside=_NVLINK, host=0.6e-3, host_message=0.1e-3,
)  # fmt: skip
# Between hosts: one 400 Gb/s adapter a GPU (data sheet, 50 GB/s), of which 80 % is taken to be reached; the latency is
# taken to be that of NVLink and 30 us more. Not measured here.
MACHINES: dict[str, Machine] = {
    "h100": _H100,
    "h100-cluster": Machine(
        **{
            **vars(_H100),
            "name": "h100-cluster",
            "source": _H100.source + "; between hosts of 8: 400 Gb/s a GPU by data sheet, 80 % of it assumed",
            "across": {"": Link(100e-6, 40e9)},
        }
    ),
}


def find_machine(name: str) -> Machine:
    """A preset by name, or a machine that `calibrate` has written to a file.

    Raises:
        ConfigError: there is no such preset, and no file that holds a machine.
    """
    if name in MACHINES:
        return MACHINES[name]
    try:
        return from_json(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise ConfigError(
            f"machine={name!r} is neither a preset ({', '.join(MACHINES)}) nor a file that --measure has written"
        ) from error
    except ValueError as error:
        raise ConfigError(f"machine={name!r}: {error}; measure it again with --measure") from error


def to_json(machine: Machine) -> str:
    """A machine as text, as `--measure` keeps it."""
    return json.dumps(asdict(machine), indent=2) + "\n"


def from_json(text: str) -> Machine:
    """What `to_json` wrote.

    Raises:
        ValueError: a number is none, below zero, or 0 where something is divided by it; or no link is given.
        TypeError, KeyError, json.JSONDecodeError: the text is something else.
    """
    values = json.loads(text)
    links = [link for where in ("inside", "across") for link in values[where].values()]
    for name, value in [item for group in (values, *links) for item in group.items()]:
        if name in ("name", "source", "inside", "across"):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value!r} is not a number of 0 or above")
        if not value and name in RATES:
            raise ValueError(f"{name}={value!r} must be above 0")
    if "" not in values["inside"]:
        raise ValueError('inside has no link "", for operations that are not named')
    for where in ("inside", "across"):
        values[where] = {name: Link(**link) for name, link in values[where].items()}
    return Machine(**values)
