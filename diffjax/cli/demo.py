"""What one trained network can do: `diffjax demo runs/digits`, part of `make demo`.

Samples class-conditional digits by DDPM in 1000 steps, by DDIM in 50, and by DDIM in 50 guided at scales 1 to 4, all
from the same seeds; writes a picture each and one of all, and prints times and verdicts.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from tqdm import tqdm

from diffjax import sampler, schedule
from diffjax.cli import common
from diffjax.data import image_io
from diffjax.devices import parallel
from diffjax.evaluation.digits import score_digits
from diffjax.evaluation.results import as_dict, markdown
from diffjax.inference.pipeline import (
    Guidance,
    Pipeline,
    check_guidance,
    check_seed,
    load_model,
    require_undistilled,
    sampling_row,
)

PROGRAM = "diffjax demo"
REPEATS = 3  # of the short runs, whose median time counts


@dataclass(frozen=True)
class Options:
    """Sample from one trained network by DDPM, DDIM and guided DDIM, and compare."""

    run: tyro.conf.Positional[str] = "runs/digits"
    """Run folder of the configuration `digits`."""
    num: int = 100
    """Images per sampler, in one batch."""
    seed: int = 0
    """The same for every sampler."""


def main(arguments: list[str]) -> None:
    """Sample, write, print."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = common.parse(Options, PROGRAM, arguments)
    folder = Path(options.run)
    with common.user_errors(PROGRAM):
        run = load_model(folder)
        if str(run.description.config.data) != "digits" or not run.description.classes:
            raise ValueError(f"{folder} is not a run of the configuration 'digits': use sample.py")
        require_undistilled(run)
        check_guidance(run, Guidance(2.0))
        check_seed(options.seed)
        levels = run.schedule
        ddpm = sampler.ddpm(levels, schedule.trailing(levels, schedule.length(levels)))
        ddim = sampler.ddim(levels, schedule.trailing(levels, 50))
        if options.num < 10:
            raise ValueError(f"--num is {options.num}: ask for ten images or more, one of each digit")
    jobs = [("ddpm(fixed_small, trailing)", ddpm, 1.0)]
    jobs += [("ddim(eta=0, trailing)", ddim, scale) for scale in (1.0, 2.0, 3.0, 4.0)]

    generate = Pipeline.of(run)
    labels = np.arange(options.num, dtype=np.int32) % 10
    batch = parallel.round_up(options.num, jax.device_count())
    rows, first_images, verdicts = [], [], []
    for name, plan, scale in jobs:
        repeats = 1 if plan is ddpm else REPEATS
        with tqdm(
            total=plan.steps * repeats, desc=f"{name} guidance {scale:g}", unit="step", dynamic_ncols=True
        ) as bar:
            timed = [
                generate(
                    run.params,
                    plan,
                    labels,
                    options.num,
                    guidance=Guidance(scale),
                    seed=options.seed,
                    batch=batch,
                    progress=bar.update,
                )
                for _ in range(repeats)
            ]
        median = sorted(timed, key=lambda made: made.run_seconds)[repeats // 2]
        made = median._replace(compile_seconds=sum(made.compile_seconds for made in timed))
        rows.append(sampling_row(run, made, plan, name, Guidance(scale), batch))
        verdicts.append(score_digits(made.images, labels))
        first_images.append(made.images[:10])
        captions = [str(label) for label in labels]
        sheet = image_io.grid(made.images, captions, columns=10)
        image_io.save_png(folder / f"{name.split('(')[0]}-{plan.steps}-guidance-{scale:g}.png", sheet)

    titles = [f"{row.sampler.split('(')[0].upper()} {row.steps}, scale {row.guidance:g}" for row in rows]
    overview = image_io.grid(np.concatenate(first_images), list("0123456789") * len(rows), columns=10, titles=titles)
    image_io.save_png(folder / "overview.png", overview)
    speedup = rows[0].run_seconds / rows[1].run_seconds
    lines = [f"- {title}: {verdict}" for title, verdict in zip(titles, verdicts, strict=True)]
    lines += [f"- DDIM 50 is {speedup:.1f} times as fast as DDPM {ddpm.steps} (network, batch, device, dtype as above)"]
    report = markdown(rows) + "\n\n" + "\n".join(lines)
    (folder / "demo.md").write_text(report + "\n")
    result = {"rows": [as_dict(row) for row in rows], "verdicts": [asdict(v) for v in verdicts], "speedup": speedup}
    (folder / "demo.json").write_text(json.dumps(result, indent=1))
    print(report)
    print(f"wrote {folder}/overview.png, a picture per row, demo.md and demo.json")
