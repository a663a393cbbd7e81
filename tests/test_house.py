"""The house: who may import whom. Imports go up this table only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import REPO

# Each module, with what it may import of ours; in the order in which things depend on each other.
HOUSE: dict[str, set[str]] = {
    "files": set(),
    "settings": set(),
    "config": {"settings"},
    "command_line": {"config", "settings"},
    "cluster_env": set(),
    "zero_config": {"config"},
    "hosts": set(),
    "distributed": {"files", "hosts"},
    "beats": set(),
    "network": {"beats", "distributed", "files"},
    "draws": set(),
    "layers": set(),
    "models": {"layers"},
    "flops": {"layers", "models"},
    "batch": set(),
    "schedule": set(),
    "ddpm": {"batch", "schedule"},
    "flow": {"batch"},
    "objectives": {"ddpm", "flow", "settings"},
    "profiles": set(),
    "optim": {"profiles", "settings"},
    "latents": set(),
    "manifest": {"files"},
    "shards": {"files", "manifest"},
    "parallel": set(),
    "arrays": set(),
    "labels": set(),
    "indexed": {"arrays", "labels", "manifest", "shards"},
    "foreign": {"arrays", "labels"},
    "adopt": {"arrays", "files", "foreign", "indexed", "labels", "manifest", "parallel"},
    "verify": {"indexed", "manifest", "parallel"},
    "transfer": {"files", "manifest", "parallel"},
    "remote": {"files", "manifest", "transfer"},
    "split": {"files", "indexed", "manifest", "remote", "shards"},
    "order": {"draws"},
    "samples": {"draws", "indexed", "manifest", "shards"},
    "loader": {"distributed", "manifest", "order", "parallel", "remote", "samples"},
    "sources": {"labels", "remote", "transfer"},
    "units": {"files", "labels", "remote", "sources", "transfer"},
    "plan": {"distributed", "files", "latents", "manifest", "remote", "sources", "units"},
    "records": {"files", "manifest"},
    "pipeline": {"latents", "manifest", "parallel", "plan", "records", "shards", "units"},
    "progress": {"distributed"},
    "heartbeat": {"distributed"},
    "extract": {"distributed", "files", "labels", "latents", "manifest", "sources", "units"}
    | {"plan", "records", "pipeline", "progress", "heartbeat"},
    "ddpm_samplers": {"batch", "ddpm", "schedule"},
    "flow_samplers": {"batch", "flow"},
    "dpm_solver": {"batch", "ddpm", "ddpm_samplers", "flow", "flow_samplers"},
    "samplers": {
        *("batch", "ddpm", "ddpm_samplers", "dpm_solver", "draws", "flow_samplers", "objectives"),
        "settings",
    },
    "zero": set(),
    "muon": {"distributed", "optim", "settings", "zero"},
    "checkpoint_index": set(),
    "archive": {"checkpoint_index"},
    "retention": {"archive", "files"},
    "inventory": {"archive", "retention"},
    "staging": {"archive", "checkpoint_index", "distributed", "files", "parallel"},
    "checkpoint": {
        *("archive", "checkpoint_index", "distributed", "files", "parallel", "retention"),
        *("staging", "zero"),
    },
    "restore": {"archive", "checkpoint_index", "distributed", "retention", "zero", "files"},
    "posthoc": {
        *("archive", "checkpoint", "checkpoint_index", "distributed", "optim", "profiles"),
        *("retention", "settings", "zero"),
    },
    "export": {
        *("models", "archive", "checkpoint_index", "distributed", "files", "manifest", "posthoc"),
        *("restore", "settings"),
    },
    "layouts": {"export", "files", "models", "settings"},
    "published": {"export", "files", "layouts"},
    "diffusers_model": set(),
    "card": {"export", "models"},
    "diffusers_folder": {
        *("card", "diffusers_model", "export", "files", "latents", "layouts", "models"),
        *("checkpoint_index", "published", "settings"),
    },
    "exchange": {"diffusers_folder", "distributed", "export", "layouts", "published"},
    "warmstart": {
        *("distributed", "exchange", "export", "layouts", "models", "published", "settings"),
        "zero",
    },
    "sampling": {
        *("distributed", "draws", "export", "files", "heartbeat", "latents", "batch"),
        *("objectives", "progress", "samplers"),
    },
    "rundir": {
        *("archive", "config", "distributed", "files", "manifest", "models", "order"),
        *("settings", "zero_config"),
    },
    "launched": {"distributed"},
    "preview": {
        *("ddpm", "settings", "distributed", "latents", "samplers", "manifest", "objectives"),
        "zero",
    },
    "validation": {"beats", "settings", "distributed", "manifest", "samples", "zero"},
    "monitor": {"settings", "distributed", "files", "latents", "loader", "samples"},
    "digits": {"files"},
}
HOUSE["curvature"] = {"distributed", "draws", "optim", "samples", "zero"}
HOUSE["train"] = {
    *("beats", "command_line", "curvature", "settings"),
    *("checkpoint", "config", "distributed", "latents", "launched", "loader", "models", "monitor"),
    *(
        "muon",
        "objectives",
        "optim",
        "posthoc",
        "preview",
        "remote",
        "restore",
        "retention",
        "rundir",
        "samples",
        "validation",
        "zero",
    ),
    "zero_config",
    "warmstart",
}
HOUSE["train"] -= {"sources", "units", "plan", "records", "pipeline", "progress", "heartbeat"}
HOUSE["benchmark"] = {
    *("archive", "checkpoint", "config", "distributed", "extract", "latents", "loader", "manifest"),
    *("models", "order", "retention", "samples", "shards", "train"),
}
HOUSE |= {
    "line": set(),
    "processes": set(),
    "route": set(),
    "console": set(),
    "diagnosis": set(),
    "comparison": set(),
    "facts": set(),
    "agent": {"beats", "facts", "line", "processes", "route"},
    "link": {"hosts", "line", "processes"},
    "fleet": {"console", "diagnosis", "hosts", "link"},
    "preflight": {"comparison", "files", "fleet", "hosts"},
    "run_folder": {"files"},
    "supervisor": {
        *("beats", "cluster_env", "command_line", "console", "files", "fleet", "hosts"),
        *("preflight", "run_folder"),
    },
}
HOUSE["benchmark_digits"] = {
    *("archive", "config", "curvature", "digits", "distributed", "export", "extract", "files"),
    *("latents", "loader", "manifest", "objectives", "rundir", "samplers", "sampling", "train"),
    "zero",
}
HOUSE["benchmark_samplers"] = {"benchmark_digits", "latents", "samplers"}
HOUSE["benchmark_network"] = {"benchmark", "distributed", "network", "zero"}
KNOWS_DEEPSPEED = {"train", "zero", "distributed"}
KNOWS_TORCH_NOT = {
    "settings",
    "config",
    "zero_config",
    "files",
    "draws",
    "order",
    "manifest",
    "shards",
}
KNOWS_TORCH_NOT |= {"settings", "transfer", "remote", "profiles"}
KNOWS_TORCH_NOT |= {"line", "processes", "hosts", "route", "diagnosis", "comparison", "facts"}
KNOWS_TORCH_NOT |= {"agent", "link", "fleet", "preflight", "supervisor", "beats", "command_line"}
KNOWS_TORCH_NOT |= {"run_folder"}
MODULES = sorted((REPO / "dit_ds").glob("[!_]*.py"))


def test_the_table_itself_goes_up() -> None:
    above: set[str] = set()
    for module, allowed in HOUSE.items():
        assert allowed <= above, f"{module} comes before {allowed - above}"
        above.add(module)
    assert above == {path.stem for path in MODULES}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Our own modules, and top-level names of others, that a file imports anywhere."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "dit_ds":
                if len(parts) > 1 and not parts[1].startswith("_"):
                    ours.add(parts[1])
            else:
                others.add(parts[0])
    return ours, others


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_go_up_the_table(path: Path) -> None:
    ours, others = imports(path)
    assert ours <= HOUSE[path.stem], f"{path.stem} may not import {ours - HOUSE[path.stem]}"
    assert "deepspeed" not in others or path.stem in KNOWS_DEEPSPEED
    assert "torch" not in others or path.stem not in KNOWS_TORCH_NOT
    assert "torchvision" not in others
    assert "pickle" not in others


@pytest.mark.parametrize("path", MODULES + sorted((REPO / "tools").glob("*.py")), ids=str)
def test_files_are_one_idea_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_nothing_unpickles() -> None:
    for path in [*MODULES, *(REPO / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node.func)
                assert call not in ("pickle.load", "pickle.loads"), path
                flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if call == "torch.load":
                    assert flags.get("weights_only") == "True", f"{path}: {ast.unparse(node)}"
                if call == "np.load":
                    assert flags.get("allow_pickle") == "False", f"{path}: {ast.unparse(node)}"
