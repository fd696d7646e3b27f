"""``crnet profile``."""

from __future__ import annotations

from crnet.cli.arguments import DEFAULT_PRESET, Command, ConfigFiles, Json, Preset, print_json
from crnet.cli.layering import DEFAULTS, Settings
from crnet.config.check import check
from crnet.errors import ConfigError


def profile(
    preset: Preset = DEFAULT_PRESET,
    /,
    *,
    rounds: int = 3,
    config: ConfigFiles = (),
    as_json: Json = False,
    settings: Settings = DEFAULTS,
) -> None:
    """Measure what cost predicts, on random tokens, and print both side by side.

    Parameters
    ----------
    rounds
        Steps that are timed.
    """
    run_config = settings.of(preset)
    check(run_config)
    if rounds < 1:
        raise ConfigError(f"--rounds is {rounds}; it must be 1 or more")

    import torch

    from crnet.cost import table
    from crnet.cost.hardware import device_of
    from crnet.cost.workload import workload
    from crnet.inference.load import pick_device
    from crnet.measure.profile import measured

    device = pick_device(settings.train.device)
    if settings.train.threads:
        torch.set_num_threads(settings.train.threads)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    work, on = workload(run_config), device_of(device.type, name)
    rows = table.cost_rows(work, on)
    seen = measured(work, device, seed=settings.train.seed, rounds=rounds)
    if as_json:
        sides = {"predicted": rows, "measured": seen}
        print_json({k: [vars(row) for row in v] for k, v in sides.items()})
    else:
        print(f"{'':36}{'predicted':>20}{'measured':>20}{'difference':>14}")
        print(table.render(rows, table.titles(work, on), seen))


COMMAND = Command(profile, layers="run")
