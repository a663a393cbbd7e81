"""Train a diffusion transformer; the loop reads top to bottom in `train`.

    deepspeed [--hostfile launch/hosts] --module dit_ds.train --config RECIPE_OR_YAML \
        [--run runs/NAME] [--deepspeed_config ds_configs/zero2.json] [section.key=value ...]

Run the same command again to resume. SIGUSR1 to a rank: all save at the next step. SIGTERM: all
save and end with 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import pydantic
import torch
from tqdm import tqdm

from dit_ds import (
    beats,
    checkpoint,
    command_line,
    config,
    distributed,
    launched,
    muon,
    objectives,
    optim,
    posthoc,
    remote,
    restore,
    retention,
    rundir,
    warmstart,
    zero,
    zero_config,
)
from dit_ds.curvature import Curvature
from dit_ds.latents import LatentSpace
from dit_ds.loader import Loader, Split
from dit_ds.models import DiT
from dit_ds.monitor import Monitor
from dit_ds.preview import Preview
from dit_ds.samples import MicroBatch
from dit_ds.settings import Config
from dit_ds.validation import Validation


@dataclasses.dataclass
class State:
    """Where the training is. Order and draws follow from the step, so this is all there is."""

    step: int
    last_step: int
    global_batch: int
    stop: bool = False

    @property
    def done(self) -> bool:
        """Whether no further step is wanted."""
        return self.stop or self.step >= self.last_step

    @property
    def images_seen(self) -> int:
        """Samples trained on so far."""
        return self.step * self.global_batch


def train(
    cfg: Config,
    ds_config: dict[str, Any],
    run: Path,
    requests: launched.Requests,
    *,
    strict: bool = False,
) -> None:
    """Train from the newest checkpoint of `run`, or from the beginning, to `train.steps`.

    strict: refuse to go on from an earlier checkpoint where the newest is damaged.
    """
    root = run / "checkpoints"
    with distributed.agreed():
        if not cfg.data.path:
            raise ValueError(
                "data.path is not set; give the folder that tools/precompute_latents.py wrote"
            )
        store = remote.open_store(cfg.data.path, cfg.data.cache, cfg.data.cache_gb)
        manifest = store.manifest()
        store.check(manifest)
    distributed.agree_on("the settings", [cfg.model_dump(mode="json"), ds_config])
    distributed.agree_on(f"the data set at data.path={cfg.data.path}", manifest.fingerprint)
    # Held before a checkpoint is chosen: whoever still trains here may commit a newer one.
    with distributed.agreed():
        held = rundir.claim(run) if run.is_dir() else None
    found = restore.newest(root, strict=strict)
    with distributed.agreed():
        about = rundir.describe(cfg, ds_config, manifest)
        rundir.check_resume(found, cfg, about, run)
        with torch.device("meta"):  # sizes that do not fit are told before anything is built
            DiT(**about["weights"]["model"])
        objective = objectives.build(
            cfg.objective,
            num_classes=manifest.num_classes,
            learn_sigma=cfg.model.learn_sigma,
            latent_shape=manifest.latent_shape,
        )
        preview = Preview(cfg, manifest, objective)
        validation = None
        if cfg.validation.path:
            other = remote.open_store(cfg.validation.path, cfg.data.cache, cfg.data.cache_gb)
            validation = Validation(cfg, other, manifest, objective.losses)
    state = State(found.step if found else 0, cfg.train.steps, cfg.train.global_batch_size)
    if state.done:
        distributed.print_main(
            f"{run} is finished at step {state.step}; for more, set train.steps above that"
        )
        rundir.finish(run, step=state.step, last_step=state.last_step)
        return
    split = Split.of(
        global_batch=cfg.train.global_batch_size,
        world_size=distributed.world_size(),
        micro_batch=cfg.train.micro_batch_size,
    )
    start = None
    if cfg.init.from_ and found is None:
        start = warmstart.read(cfg.init.from_, about["weights"], seed=cfg.seed)
    with distributed.agreed():
        held = held or rundir.claim(run)  # what was refused above has made no folder
    with distributed.agreed():
        engine = build_engine(cfg, ds_config, split, about["weights"]["model"])
    if found is not None:
        restore.load(engine, found)
    if start is not None:
        warmstart.load(engine, start)
        start = None  # a whole copy of the weights
    announce(cfg, ds_config, run, split, state, engine)
    space = LatentSpace(manifest.scaling_factor, manifest.shift_factor)
    device = distributed.device()
    # The mean over the global batch: DeepSpeed averages over ranks and leaves micro-steps to us.
    share = split.world_size / split.global_batch
    keep = retention.Keep(
        cfg.train.keep_checkpoints, every=cfg.train.keep_every, best=cfg.train.keep_best or ""
    )
    saved_step = state.step

    def loss_of(model: Any, micro: MicroBatch) -> dict[str, torch.Tensor]:
        x_start = space.sample(micro.moments, micro.posterior)  # (N, C, H, W)
        return objective.loss(model, x_start, micro)  # each (N,)

    curvature = None
    if cfg.optimizer.hessian_every is not None:
        curvature = Curvature(
            engine,
            every=cfg.optimizer.hessian_every,
            seed=cfg.seed,
            probe=lambda model, micro, normals: objective.probe(
                model, space.sample(micro.moments, micro.posterior), micro, normals
            ),
            channels=about["weights"]["model"]["in_channels"] * (1 + cfg.model.learn_sigma),
        )

    def commit(*, wait: bool) -> None:
        nonlocal saved_step
        if snapshots is not None and not snapshots.commit(wait=wait):
            return  # who resumes from a checkpoint does not make the snapshots before it again
        done = checkpoints.commit(wait=wait)
        if done is not None:
            saved_step = retention.step_of(done.path)
            size = tqdm.format_sizeof(done.num_bytes, "B")
            monitor.say(
                f"saved {done.path}: {size} in {done.write_seconds:.1f} s, training waited "
                f"{done.pause_seconds:.2f} s"
            )

    def save(metrics: dict[str, float], *, wait: bool) -> None:
        about["weights"] |= {"step": state.step, "images_seen": state.images_seen}
        checkpoints.save(step=state.step, about=about, metrics=metrics)
        commit(wait=wait)

    @contextlib.contextmanager
    def losing_no_step() -> Iterator[None]:
        try:
            yield
        except distributed.RankError:  # on all ranks alike, as of a damaged shard
            for last in (lambda: commit(wait=True), lambda: save({}, wait=True)):
                try:
                    if state.step > saved_step:
                        beats.beat("save", state.step)
                        last()
                except distributed.RankError as e:
                    monitor.warn(str(e))
            raise

    with (
        Loader(
            store,
            manifest,
            split,
            lanes=cfg.lanes,
            window=cfg.data.window,
            seed=cfg.seed,
            flip=cfg.data.flip,
            first_step=state.step,
            last_step=state.last_step,
            workers=cfg.data.workers,
        ) as loader,
        Monitor(run, cfg, objective.losses, step=state.step) as monitor,
        losing_no_step(),
    ):
        # Not before the loader: what it refuses must not fix the settings of a run.
        rundir.write(run, cfg, ds_config, step=state.step)
        # Nor before its workers are forked: they would keep a copy of what is staged.
        checkpoints = checkpoint.Checkpoints(engine, root, keep)
        snapshots = None
        if every := cfg.post_hoc_ema.every:
            snapshots = posthoc.Snapshots(
                engine, run / "ema", every=every, step=state.step, last_step=state.last_step
            )
        phase = "compile"  # the first step takes longer: kernels, memory, the first shards
        while not state.done:
            beats.beat(phase, state.step, "waiting for data")
            lr = optim.learning_rate(cfg.optimizer, state.step, num_steps=state.last_step)
            optim.set_learning_rate(zero.client_optimizer(engine), lr)
            batch = loader.next()  # the micro-batches of one step
            if curvature is not None and curvature.due(state.step):
                beats.beat(phase, state.step, "estimating the curvature")
                curvature.estimate(batch[0])
            for i, micro in enumerate(batch):
                beats.beat(phase, state.step, f"micro-step {i + 1} of {len(batch)}")
                micro = micro.to(device)
                losses = loss_of(engine, micro)
                loss = (losses["loss"] * micro.weight).sum() * share
                engine.backward(loss, scale_wrt_gas=False)
                engine.step()  # acts at the last micro-batch
                monitor.add(losses, micro, objective.num_timesteps)
            beats.beat(phase, state.step, "agreeing on the step")
            state.step += 1
            monitor.log(engine, loader, step=state.step, images_seen=state.images_seen, lr=lr)
            if curvature is not None and state.step % cfg.train.log_every == 0:
                monitor.add_scalars(
                    curvature.scalars(), step=state.step, images_seen=state.images_seen
                )

            asked = requests.agreed(stop_after_hours=cfg.train.stop_after_hours)
            state.stop = asked == launched.STOP
            began = time.perf_counter()
            phase, metrics = "step", dict[str, float]()
            if validation is not None and validation.due(state.step) and not state.stop:
                try:
                    metrics = validation.losses(engine, loss_of)
                    monitor.add_scalars(metrics, step=state.step, images_seen=state.images_seen)
                    told = (
                        f"{metrics['validation/loss']:.4f}, "
                        f"EMA {metrics['validation_ema/loss']:.4f}"
                    )
                    monitor.say(f"validation at step {state.step}: loss {told}")
                except distributed.RankError as e:
                    monitor.warn(f"{e}; training goes on without this evaluation")
            due = asked or state.done or state.step % cfg.train.checkpoint_every == 0
            if due:
                beats.beat("save", state.step)
            try:
                commit(wait=bool(due))  # what an earlier step saved
            except checkpoint.DiskFull as e:
                monitor.warn(f"{e}; training goes on and tries again at the next save")
            if snapshots is not None and snapshots.due(state.step):
                beats.beat("save", state.step)
                try:
                    snapshots.save(step=state.step)
                except checkpoint.DiskFull as e:
                    monitor.warn(f"{e}; training goes on, and --ema-length does without it")
            if due:
                try:
                    save(metrics, wait=state.done)
                except checkpoint.DiskFull as e:
                    if state.done:
                        raise
                    monitor.warn(f"{e}; training goes on and tries again at the next save")
            if preview.due(state.step) and not state.stop:
                beats.beat("sample", state.step, "preview")
                try:
                    images = preview.images(engine)
                    monitor.show(images, columns=preview.columns, step=state.step)
                except distributed.RankError as e:
                    monitor.warn(f"{e}; training goes on without these samples")
            monitor.pause(time.perf_counter() - began)
    if held is not None:
        held.close()
    rundir.finish(run, step=state.step, last_step=state.last_step)
    why = "stopped as asked" if state.step < state.last_step else "done"
    distributed.print_main(f"{why} at step {state.step}, saved at step {saved_step} in {run}")


def build_engine(
    cfg: Config, ds_config: dict[str, Any], split: Split, sizes: dict[str, Any]
) -> Any:
    """The DeepSpeed engine around the model and its optimizer."""
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    resolved = ds_config | {
        "train_micro_batch_size_per_gpu": split.micro_batch,
        "gradient_accumulation_steps": split.num_micro,
        # At stage 0 DeepSpeed clips but tells no norm and applies NaN: the optimizer does both.
        "gradient_clipping": cfg.optimizer.gradient_clipping if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": ds_config.get("steps_per_print", 2**31),
    }
    try:
        with deepspeed.zero.Init(config_dict_or_path=resolved, enabled=stage == 3):
            model = DiT(**sizes, checkpoint_every=cfg.model.checkpoint_every)
        # Values follow from name and seed alone: all stages and worlds start from the same ones.
        model.initialize_weights(cfg.seed, gather=lambda p: zero.gathered(p, write=True))
        lengths = cfg.post_hoc_ema.lengths if cfg.post_hoc_ema.every else ()
        optimizer: Any
        if cfg.optimizer.name == "muon":
            optimizer = muon.build(model, cfg.optimizer, zero_stage=stage, ema_lengths=lengths)
        else:
            parameters = model.parameters()
            optimizer = optim.build(
                parameters, cfg.optimizer, zero_stage=stage, ema_lengths=lengths
            )
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=resolved, dist_init_required=False
        )
    except pydantic.ValidationError as e:  # DeepSpeed's own check of the sections of its JSON
        raise config.section_error("--deepspeed_config", e) from None
    zero.check_engine(engine)
    if isinstance(optimizer, muon.Muon):
        optimizer.attach(engine)
    return engine


def announce(
    cfg: Config,
    ds_config: dict[str, Any],
    run: Path,
    split: Split,
    state: State,
    engine: Any,
) -> None:
    """Say what is about to happen."""
    num_parameters = sum(map(_numel, zero.parameter_shapes(engine).values()))
    say = distributed.print_main
    say(
        f"{cfg.model.name or 'DiT'} with {num_parameters:,} parameters, "
        f"{zero_config.precision(ds_config)}, ZeRO stage {engine.zero_optimization_stage()}"
    )
    say(
        f"{split.world_size} ranks x {split.num_micro} micro-steps x {split.micro_batch} samples "
        f"for a global batch of {split.global_batch}"
        + (f"; {split.padding:.1%} of the work is padding" if split.padding else "")
    )
    say(f"{'resuming at' if state.step else 'from'} step {state.step} to {state.last_step}: {run}")


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, join the other ranks and train; exit 2 on a user's mistake."""
    args = command_line.parser().parse_intermixed_args(arguments)
    requests = launched.Requests()
    beats.begin()
    try:
        distributed.init()
        ranks_of_hosts = distributed.ranks_of_hosts()
        with distributed.agreed():
            cfg = config.load(args.config, args.overrides)
            ds_config = zero_config.load(args.deepspeed_config)
            zero_config.check_world(
                ds_config,
                f"--deepspeed_config {args.deepspeed_config}",
                device=distributed.device().type,
                ranks_of_hosts=ranks_of_hosts,
            )
            launched.check(expect_ranks=cfg.train.expect_ranks)
        run = command_line.run_directory(args, cfg)
        train(cfg, ds_config, run, requests, strict=args.strict)
    except ValueError as e:
        distributed.exit_with(e)
    distributed.shutdown()


if __name__ == "__main__":
    main()
