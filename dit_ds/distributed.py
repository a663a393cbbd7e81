"""Who we are among the ranks, and how they agree: the one place that asks.

Every function also works in a single process without a process group, so tools and tests need no
launcher. Collectives carry tensors and JSON, never pickles. Device differences (CPU with gloo,
GPU with NCCL) end here.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import socket
import sys
import traceback
import warnings
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from dit_ds import files, hosts

_TIMEOUT = datetime.timedelta(minutes=30)
# Small control messages travel over gloo even on GPUs: they neither wait for the GPU's queue nor
# make it wait.
_control: dist.ProcessGroup | None = None
# Memory that the GPU's driver knows must not be given back to the system.
_registered: list[torch.Tensor] = []
_unheard = False


class RankError(ValueError):
    """A mistake of the user, the same sentence on every rank; `dit_ds` exits with 2."""


def init() -> None:
    """Join the process group that the launcher described in the environment, if it did.

    Without a launcher this is a world of one. Safe to call twice.
    """
    global _control
    import deepspeed  # here, because it takes seconds that one-process tools need not wait

    deepspeed.utils.logger.setLevel("WARNING")
    # Said of every optimizer that is not DeepSpeed's own; the tests are where ours is tried.
    deepspeed.utils.logger.addFilter(lambda r: "untested optimizer" not in r.getMessage())
    warnings.filterwarnings("ignore", message=".*is deprecated", module="torch.distributed")
    # A shared-memory collective that only inference uses; building it takes 30 s and a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device().type == "cpu":
        # DeepSpeed refuses fp16 on CPUs without instructions for it; torch computes it all the
        # same, slowly, and so an fp16 configuration can be tried and tested anywhere.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    if not dist.is_initialized():
        if "WORLD_SIZE" not in os.environ and launched():
            os.environ.update(_slurm())
        for name, value in {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }.items():
            os.environ.setdefault(name, value)
        if device().type == "cuda":
            if local_rank() >= torch.cuda.device_count():
                raise ValueError(
                    f"local rank {local_rank()} has no GPU of its own: this host shows "
                    f"{torch.cuda.device_count()}; start that many ranks (--num_gpus, slots)"
                )
            torch.cuda.set_device(device())
        try:
            deepspeed.init_distributed(
                dist_backend="nccl" if device().type == "cuda" else "gloo",
                auto_mpi_discovery=False,
                verbose=False,
                timeout=_TIMEOUT,
            )
        except dist.DistNetworkError as e:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            reason = str(e).splitlines()[0]
            raise ValueError(
                f"the ranks cannot meet at {where}: {reason}; if another run on this machine has "
                "the port, give this one its own, as `deepspeed --master_port 29501 ...`"
            ) from e
    if _control is None:
        _control = dist.new_group(backend="gloo", timeout=_TIMEOUT)


def launched() -> bool:
    """Whether a launcher, or Slurm's `srun`, has started this process as one of several."""
    return "WORLD_SIZE" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _slurm() -> dict[str, str]:
    """What `srun` tells each of its tasks, in the words of the other launchers."""
    step = os.environ
    number = 31 * int(step["SLURM_JOB_ID"]) + int(step["SLURM_STEP_ID"])
    return {
        "RANK": step["SLURM_PROCID"],
        "LOCAL_RANK": step["SLURM_LOCALID"],
        "WORLD_SIZE": step["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": hosts.slurm_names(step["SLURM_STEP_NODELIST"])[0],
        "MASTER_PORT": step.get("MASTER_PORT", str(20000 + number % 10000)),
    }


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def shutdown() -> None:
    """Leave the process group, quietly and only if one was joined."""
    global _control
    _control = None
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number in the world."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the world."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its host, which is also the number of its device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_of_hosts() -> list[int]:
    """How many ranks each host runs, in the order of their ranks; a collective."""
    found: list[int] = []
    for number in gather_json(local_rank()):
        if number == 0 or not found:
            found.append(0)
        found[-1] += 1
    return found


def is_main() -> bool:
    """Whether this is rank 0, the one that prints and writes what is written once."""
    return rank() == 0


def device() -> torch.device:
    """The accelerator of this rank: its GPU, or the CPU where there is none.

    `DS_ACCELERATOR=cpu`, DeepSpeed's own switch, keeps a machine with GPUs on its CPU.
    """
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda":
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def host_buffer(num_bytes: int) -> torch.Tensor:
    """Bytes of host memory, (num_bytes,) uint8, that a GPU copies to without a detour.

    They are kept to the end of the process.
    """
    buffer = torch.empty(num_bytes, dtype=torch.uint8)
    buffer.fill_(0)  # touched now, so that the first copy is as fast as the others
    if device().type == "cuda":
        # torch's own pinned memory comes in powers of two, up to twice of what is asked.
        torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), num_bytes, 0)
        _registered.append(buffer)
    return buffer


def synchronize() -> None:
    """Wait until the accelerator has done what it was told."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def print_main(*message: object) -> None:
    """Print on rank 0 at once; silent elsewhere.

    Who read it may be gone (a launcher, `| head`): that ends no training; see `unheard`.
    """
    global _unheard
    if is_main():
        try:
            print(*message, flush=True)
        except BrokenPipeError:
            _unheard = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())  # also what is still buffered
            os.close(nowhere)


def unheard() -> bool:
    """Whether this rank has printed to a reader that is gone."""
    return _unheard


def warn_main(message: str) -> None:
    """Print what must not be missed among other lines, on rank 0."""
    if is_main():
        bar = "!" * 100
        print(f"\n{bar}\nWARNING: {files.printable(message)}\n{bar}\n", file=sys.stderr, flush=True)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier(group=_control)


def reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values` over all ranks, as a float64 tensor on the CPU.

    The terms are added in rank order everywhere, so every rank holds the same bits.
    """
    local = values.detach().to("cpu", torch.float64)
    if not dist.is_initialized() or world_size() == 1:
        return local.clone()
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local, group=_control)
    return torch.stack(parts).sum(0)


def reduce_max(value: float) -> float:
    """Largest `value` over all ranks."""
    if not dist.is_initialized() or world_size() == 1:
        return value
    t = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(t, op=dist.ReduceOp.MAX, group=_control)
    return t.item()


def gather_json(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank. It travels as JSON."""
    if not dist.is_initialized() or world_size() == 1:
        return [json.loads(json.dumps(value))]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([data.numel()]), group=_control)
    longest = int(max(s.item() for s in sizes))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: data.numel()] = data
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=_control)
    return [
        json.loads(p[: int(n.item())].numpy().tobytes()) for p, n in zip(parts, sizes, strict=True)
    ]


def gather_tensor(local: torch.Tensor) -> list[torch.Tensor]:
    """Same-shaped `local` of every rank, in rank order, on every rank, on the CPU."""
    local = local.detach().cpu().contiguous()
    if not dist.is_initialized() or world_size() == 1:
        return [local]
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local, group=_control)
    return parts


def bring_to_main(tensor: torch.Tensor, source: int) -> None:
    """Fill rank 0's `tensor` with that of rank `source`; same shape and dtype, both on the CPU."""
    if source != 0 and is_main():
        dist.recv(tensor, source, group=_control)
    elif source != 0 and rank() == source:
        dist.send(tensor, 0, group=_control)


def broadcast_json(value: Any = None) -> Any:
    """Rank 0's `value` on every rank."""
    return gather_json(value if is_main() else None)[0]


def agree(error: BaseException | None) -> None:
    """Raise the same `RankError` on every rank if any of them has an `error`; a collective.

    Call it after each part that may fail on single ranks (a file that one host lacks), so that no
    rank waits for ever in a collective that another has left. The message names the ranks and
    their hosts; equal messages are told once.
    """
    if reduce_max(0.0 if error is None else 1.0) == 0.0:
        return  # the usual case, every step: one small reduction
    mine = None if error is None else (str(error) or repr(error))
    told: dict[str, list[str]] = {}
    for r, (message, host) in enumerate(gather_json([mine, socket.gethostname()])):
        if message is not None:
            told.setdefault(message, []).append(f"rank {r} on {host}")
    if told:
        everyone = world_size()
        lines = [
            message if len(who) == everyone else f"{message} ({', '.join(who)})"
            for message, who in told.items()
        ]
        raise RankError("\n".join(lines)) from error


def agree_on(what: str, value: Any) -> None:
    """Raise a `RankError` unless `value`, JSON, is the same on every rank; a collective."""
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
    seen: dict[str, str] = {}
    for r, (theirs, host) in enumerate(gather_json([digest, socket.gethostname()])):
        seen.setdefault(theirs, f"{theirs} (rank {r} on {host})")
    if len(seen) > 1:
        raise RankError(
            f"the ranks differ in {what}: {', '.join(seen.values())}; give the same on all hosts"
        )


class agreed:  # noqa: N801 - read as a statement: `with agreed():`
    """Run a block on every rank, then `agree` on the error in it.

    A block holds no collective that only some ranks may reach. What is not a user's mistake
    (ValueError, OSError) is our own, and is shown with its traceback as well.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, Exception):
            if error is not None and not isinstance(error, ValueError | OSError):
                traceback.print_exception(error)
            agree(error)


def shared_store() -> dist.Store:
    """A new table of counters and words that all ranks see at once; a collective, its use is none.

    `add(name, amount)` gives a counter's new value, `check([name])` tells whether a word is set.
    Rank 0 holds it: when it is gone, the others' calls raise `dist.DistError`.
    """
    if world_size() == 1:
        return dist.HashStore()
    host, store = os.environ["MASTER_ADDR"], None
    with agreed():
        if is_main():
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    port = broadcast_json(store.port if store else None)
    with agreed():
        store = store or dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
    return store


def exit_with(error: ValueError) -> NoReturn:
    """Print a user's error once, from rank 0, without a traceback, and exit with 2."""
    if is_main() or not isinstance(error, RankError):
        print(f"error: {files.printable(str(error))}", file=sys.stderr, flush=True)
    shutdown()
    raise SystemExit(2)
