"""What a pipeline cannot be made of."""

from __future__ import annotations

from collections.abc import Iterator

from crnet.config.model_spec import model_spec
from crnet.config.sections import ParallelConfig, RunConfig, model_of, num_shares, num_stages


def pipeline_problems(config: RunConfig) -> Iterator[str]:
    """What keeps a model from being cut into stages, one sentence each, with the mend."""
    parallel, model, train = config.parallel, config.model, config.train
    if parallel.pipeline == 1:
        if parallel.schedule != ParallelConfig.schedule:
            yield (
                f"--parallel.schedule {parallel.schedule} has no effect without "
                "--parallel.pipeline; leave it out"
            )
        return
    wanted = num_stages(parallel)
    if wanted > model.num_layers:
        yield (
            f"--parallel.pipeline {parallel.pipeline} ({parallel.schedule}) cuts the model into "
            f"{wanted} stages, and it has {model.num_layers} blocks; take fewer processes"
        )
    yield from _micro_batch_problems(config)
    spec = model_spec(model_of(config))
    architecture = spec.architecture
    if spec.shared:
        yield (
            f"--parallel.pipeline with {model.linear}: all blocks read one matrix a position, and "
            "no stage has it for the others; say --parallel.data or --parallel.shard"
        )
    if architecture.balance_factor(spec.architecture_options):
        yield (
            f"--parallel.pipeline with {architecture.name}: how uneven the experts of one stage "
            "are would have to be in the loss of the last; say --parallel.data or --parallel.shard"
        )
    tied = model.tie_embeddings
    if architecture.ties_embeddings if tied is None else tied:
        yield (
            "--parallel.pipeline: the head is the embedding, and the last stage has the one, the "
            "first the other; say --model.tie-embeddings false"
        )
    if parallel.checkpoint == "parts":
        yield (
            "--parallel.pipeline with --parallel.checkpoint parts: stages number their optimizer's "
            "state each for itself; say --parallel.checkpoint whole"
        )
    if train.recompute in ("invert", "auto"):
        yield (
            f"--parallel.pipeline with --train.recompute {train.recompute}: "
            + (
                "invert goes down through all blocks, and its guard reads the gains of all of them"
                if train.recompute == "invert"
                else "auto plans for all blocks on one device"
            )
            + "; say replay, block or none"
        )
    if train.compile:
        yield (
            "--parallel.pipeline with --train.compile is not supported: a stage would be compiled "
            "while the next one waits for it; leave one of them out"
        )


def _micro_batch_problems(config: RunConfig) -> Iterator[str]:
    """As many micro-batches as processes keep all of them at work, and torch's schedules ask for
    it: interleaved for a multiple."""
    parallel, train = config.parallel, config.train
    share, over = divmod(train.batch_size, num_shares(parallel))
    size = min(train.micro_batch_size or share, share)
    if over or share % size:
        return  # which is said already
    processes, number = parallel.pipeline, share // size
    few = number < processes
    if not few and (parallel.schedule == "1f1b" or number % processes == 0):
        return
    asks = f"{processes} or more" if parallel.schedule == "1f1b" else f"a multiple of {processes}"
    most = share // processes
    fitting = [n for n in range(1, most + 1) if share % n == 0 and share // n % processes == 0]
    if parallel.schedule == "1f1b":
        fitting = [n for n in range(1, most + 1) if share % n == 0]
    mend = (
        f"take --train.micro-batch-size {fitting[-1]}"
        if fitting
        else f"take a --train.batch-size that is a multiple of {processes * num_shares(parallel)}"
    )
    yield (
        f"--parallel.pipeline {processes} ({parallel.schedule}) wants {asks} micro-batches, and "
        f"the {share} sequences of a share are {number}; {mend}"
    )
