"""``crnet profile``."""

from __future__ import annotations

import sys

from crnet.cli.arguments import DEFAULT_PRESET, Command, ConfigFiles, Json, Preset, print_json
from crnet.cli.layering import DEFAULTS, Settings
from crnet.config.check import check
from crnet.config.serialize import override
from crnet.errors import ConfigError


def profile(
    preset: Preset = DEFAULT_PRESET,
    /,
    *,
    rounds: int = 3,
    device: str | None = None,
    config: ConfigFiles = (),
    as_json: Json = False,
    settings: Settings = DEFAULTS,
) -> None:
    """Measure what cost predicts, on random tokens, and print both side by side.

    Parameters
    ----------
    rounds
        Steps that are timed.
    device
        What it runs on, for the time foreseen: as crnet cost --device; none: by the device's name.
    """
    run_config = settings.of(preset)
    check(run_config)
    if rounds < 1:
        raise ConfigError(f"--rounds is {rounds}; it must be 1 or more")

    import torch

    from crnet.cost import hardware, table
    from crnet.cost.workload import workload
    from crnet.inference.load import pick_device
    from crnet.kernels import compiled
    from crnet.measure.profile import measured, precision_advice, product_seconds
    from crnet.model.device import prepare_device, with_precision

    where = pick_device(settings.train.device)
    compiled.choose(settings.train.kernels)
    run_config = with_precision(override(run_config, train={"device": str(where)}), where)
    prepare_device(run_config, where)
    if settings.train.threads:
        torch.set_num_threads(settings.train.threads)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else ""
    on = hardware.device(device) if device else hardware.device_of(where.type, name)
    if on is None:
        print(
            f"{name} is not among the known devices: no time is foreseen; "
            "say --device FLOPS,GBPS that it reaches",
            file=sys.stderr,
        )
    work = workload(run_config)
    rows = table.cost_rows(work, on)
    seen = measured(work, where, seed=settings.train.seed, rounds=rounds)
    products = product_seconds(work, where)
    if as_json:
        sides = {"predicted": rows, "measured": seen}
        found = {side: [vars(row) for row in each] for side, each in sides.items()}
        advice = {"product_s": products, "advice": precision_advice(products)}
        print_json(found | advice)
    else:
        print(f"{'':36}{'predicted':>20}{'measured':>20}{'difference':>14}")
        print(table.render(rows, table.titles(work, on), seen))
        print(precision_advice(products))


COMMAND = Command(profile, layers="run")
